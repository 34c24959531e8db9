"""Make the data set, on the spot and without a download: about a minute on one core for 12 M tokens.

    python data/prepare.py --out data/tiny

writes into the folder
    train.bin, val_general.bin,          token shards, uint16,
    val_arithmetic.bin                   every document followed by EOS
    train.jsonl, val.jsonl, test.jsonl   problems: {"id", "question", "answer", "solutions", ...} a line
    benchmarks.jsonl                     {"task", "context", "choices", "answer", "chance"} a line
    tokenizer.json, manifest.json        the manifest has the options, counts and sha256 of every file
The same options write the same bytes.
See arithmetic.py and world.py for what the texts are and what is held out.
"""
import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

from checkpoint import UserError, atomic_write, main, require  # noqa: E402
from data import arithmetic, world  # noqa: E402
from data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402


@dataclass
class Config:
    out: str = "data/tiny"          # folder to write; it must not exist yet
    seed: int = 0                   # of every text and of the population
    tokens: int = 12_000_000        # pretraining tokens in train.bin, none of them repeated
    math_fraction: float = 0.3      # share of arithmetic among them
    hard_fraction: float = 0.3      # share of hard problems (3-4 operations) among arithmetic
    vocab_size: int = 512           # tokens: 256 bytes, 2 special ones, the rest merges
    val_tokens: int = 100_000       # in each of the two validation shards
    train_problems: int = 6_000     # for SFT and RL, easy and hard together
    eval_problems: int = 400        # easy, and as many hard, in each of val.jsonl and test.jsonl
    benchmark_items: int = 250      # of each of the seven general benchmarks
    device: str = "auto"            # every script takes it; not used here
    threads: int = 0                # likewise: this is plain Python on one core


HERE = ("out", "device", "threads")              # options that do not change the data


def check(c: Config) -> None:
    require(0 <= c.math_fraction <= 1, f"--math-fraction {c.math_fraction}: must be between 0 and 1")
    require(0 <= c.hard_fraction <= 1, f"--hard-fraction {c.hard_fraction}: must be between 0 and 1")
    require(260 <= c.vocab_size <= 65_536,
            f"--vocab-size {c.vocab_size}: must be between 260 and 65536 (uint16)")
    for name in ("tokens", "val_tokens", "train_problems", "eval_problems", "benchmark_items"):
        require(getattr(c, name) > 0, f"--{name.replace('_', '-')} {getattr(c, name)}: must be positive")


def general_split(text: str) -> str:
    """One general document in 50 is for validation, by hash of its text: no document is in both shards."""
    return "val" if crc32(text.encode()) % 50 == 0 else "pretrain"


def draw_texts(rng: random.Random, people: dict, kind: str, split: str,
               hard_fraction: float) -> tuple[str, list[str]]:
    """(kind of document, its texts); EOS will follow each text."""
    if kind == "arithmetic":
        return kind, arithmetic.draw_document(rng, hard_fraction, split)
    while True:
        general_kind, text = world.draw_document(rng, people)
        if general_split(text) == split:
            return general_kind, [text]


def write_shard(path: Path, c: Config, people: dict, tokenizer: Tokenizer, stream: str, split: str,
                tokens: int, math_fraction: float) -> dict:
    """Write a shard of `tokens` tokens, documents shuffled; returns kind -> {"documents", "tokens"}."""
    rng = random.Random(f"{c.seed} {stream}")
    documents, made, counts = [], {"arithmetic": 0, "general": 0}, {}
    bar = tqdm(total=tokens, unit="tok", unit_scale=True, desc=path.name)
    while sum(made.values()) < tokens:
        # keeps the mixture exact by tokens
        behind = made["arithmetic"] < math_fraction * (sum(made.values()) + 1)
        group = "arithmetic" if behind and math_fraction > 0 else "general"
        kind, texts = draw_texts(rng, people, group, split, c.hard_fraction)
        ids = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos]]
        documents.append(np.array(ids, dtype=np.uint16))
        made[group] += len(ids)
        count = counts.setdefault(kind, {"documents": 0, "tokens": 0})
        count["documents"] += 1
        count["tokens"] += len(ids)
        bar.update(len(ids))
    bar.close()
    rng.shuffle(documents)
    atomic_write(path, np.concatenate(documents)[:tokens].tobytes())
    return dict(sorted(counts.items()))


def write_problems(path: Path, seed: int, split: str, counts: dict[str, int]) -> int:
    """Distinct problems of a split, `counts` by difficulty, in random order; returns how many."""
    rng = random.Random(f"{seed} problems {split}")
    problems: dict[str, dict] = {}
    for difficulty, wanted in counts.items():
        tries, target = 0, len(problems) + wanted
        while len(problems) < target:
            problem = arithmetic.draw_problem(rng, difficulty, split)
            problems.setdefault(problem["canonical"], problem)
            tries += 1
            if tries > 200 * wanted + 1000:
                raise UserError(f"{path.name}: there are not {wanted} different {difficulty} problems; "
                                "ask for fewer")
    lines = list(problems.values())
    rng.shuffle(lines)
    records = [{"id": f"{split}-{i}", "question": p["question"], "answer": p["answer"],
                "solutions": list(p["solutions"].values()), "difficulty": p["difficulty"], "split": split}
               for i, p in enumerate(lines)]
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in records).encode())
    return len(lines)


def prepare(c: Config) -> None:
    """Write the data set of this configuration. Raises UserError if the folder holds another one."""
    check(c)
    out, manifest_path = Path(c.out), Path(c.out) / "manifest.json"
    if manifest_path.exists():
        try:
            there = dict(json.loads(manifest_path.read_text())["config"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{manifest_path}: damaged; delete the folder and make the data again") from None
        different = [k for k, v in asdict(c).items() if k not in HERE and there.get(k) != v]
        require(not different, f"{out} holds a data set made with other options ({', '.join(different)}); "
                               "choose another --out or delete the folder")
        print(f"{out} is complete already; nothing to do.")
        return
    require(not out.exists(), f"{out} exists and is not a data set of ours; choose another --out")
    partial = out.with_name(out.name + ".partial")       # appears under its real name when it is whole
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = write_all(partial, c)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(out, manifest, c)


def write_all(folder: Path, c: Config) -> dict:
    people = world.population(c.seed)
    try:
        items = world.draw_benchmark(random.Random(f"{c.seed} benchmarks"), people, c.benchmark_items)
    except ValueError as error:
        raise UserError(str(error)) from None
    rng = random.Random(f"{c.seed} tokenizer")
    sample = [text for kind in ["arithmetic"] * 3 + ["general"] * 7 for _ in range(600)
              for text in draw_texts(rng, people, kind, "pretrain", c.hard_fraction)[1]]
    tokenizer = train_tokenizer(sample, c.vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    shards = {
        "train.bin": write_shard(folder / "train.bin", c, people, tokenizer, "train", "pretrain", c.tokens,
                                 c.math_fraction),
        "val_general.bin": write_shard(folder / "val_general.bin", c, people, tokenizer, "val general", "val",
                                       c.val_tokens, 0.0),
        "val_arithmetic.bin": write_shard(folder / "val_arithmetic.bin", c, people, tokenizer,
                                          "val arithmetic", "val", c.val_tokens, 1.0)}
    hard = round(c.train_problems * c.hard_fraction)
    problems = {"train.jsonl": write_problems(folder / "train.jsonl", c.seed, "train",
                                              {"easy": c.train_problems - hard, "hard": hard})}
    for split in ("val", "test"):
        counts = {"easy": c.eval_problems, "hard": c.eval_problems}
        problems[f"{split}.jsonl"] = write_problems(folder / f"{split}.jsonl", c.seed, split, counts)
    atomic_write(folder / "benchmarks.jsonl", "".join(json.dumps(i) + "\n" for i in items).encode())
    manifest = {"config": {k: v for k, v in asdict(c).items() if k not in HERE}, "n_vocab": tokenizer.n_vocab,
                "tokenizer_sha256": tokenizer.sha256, "shards": shards, "problems": problems,
                "benchmarks": dict(Counter(i["task"] for i in items)),
                "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest()
                           for p in sorted(folder.iterdir())}}
    atomic_write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def report(out: Path, manifest: dict, c: Config) -> None:
    """Print what was made: counts, mixture, tokens per document, samples, and how to go on."""
    people, rng = world.population(c.seed), random.Random(f"{c.seed} report")
    print(f"\n{out}: vocabulary {manifest['n_vocab']}, problems {manifest['problems']}, "
          f"benchmark items {manifest['benchmarks']}\n\n"
          "train.bin      documents     tokens   share  tokens/document")
    for kind, n in manifest["shards"]["train.bin"].items():
        print(f"  {kind:12s}{n['documents']:10,d}{n['tokens']:11,d}{n['tokens'] / c.tokens:8.1%}"
              f"{n['tokens'] / n['documents']:10.1f}")
    print("\nthree samples of each kind:")
    for kind, (_, write) in world.KINDS.items():
        for _ in range(3):
            print(f"  [{kind}] {write(rng, people) if kind == 'recall' else write(rng)}")
    for _ in range(3):
        print("  [arithmetic]",
              " <EOS> ".join(arithmetic.draw_document(rng, c.hard_fraction)).replace("\n", "\n      "))
    print(f"\nnext: python pretrain.py --data {out} --out runs/base")


if __name__ == "__main__":
    main(prepare, Config)
