"""Make the data set, on the spot and without a download: 24 s on one core for 12 M tokens.

    python data/prepare.py --out data/tiny

or with real text instead of the generated world, and real problems (beyond/README.md has the addresses):

    python data/prepare.py --out data/stories --math-fraction 0 --vocab-size 2048 \\
        --text data/raw/TinyStoriesV2-GPT4-train.txt --problems data/raw/train.jsonl,data/raw/test.jsonl

writes shards of tokens (every document followed by EOS), problems, benchmarks if there is generated text, the
tokenizer, and a manifest with the options, counts and sha256 of every file: data/README.md explains them all.
The same options and files write the same bytes. The texts are those of arithmetic.py and world.py.
"""
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

from checkpoint import HERE, UserError, atomic_write, check_fields, file_sha256, main, require  # noqa: E402
from data import arithmetic, world  # noqa: E402
from data.teacher import WORDINGS  # noqa: E402
from data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402


@dataclass
class Config:
    out: str = "data/tiny"          # folder to write; a whole data set of these options is left as it is
    seed: int = 0                   # >= 0: of every text and of the population
    tokens: int = 12_000_000        # > 0: pretraining tokens in train.bin, none of them repeated
    math_fraction: float = 0.3      # >= 0, <= 1: share of arithmetic among them
    hard_fraction: float = 0.3      # >= 0, <= 1: share of hard problems (3-4 operations) among arithmetic
    vocab_size: int = 512           # >= 260, <= 65536: tokens: 256 bytes, 2 special ones, the rest merges
    val_tokens: int = 100_000       # > 0: in each of the two validation shards
    train_problems: int = 20_000    # > 0: for SFT and RL, easy and hard together
    eval_problems: int = 400        # > 0: easy, and as many hard, in each of val.jsonl and test.jsonl
    benchmark_items: int = 250      # > 0: of each of the seven general benchmarks
    text: tuple[str, ...] = ()      # real text for the generated one: files .txt or .jsonl
    text_share: float = 1.0         # > 0, <= 1: share of --text in the general text; the world is the rest
    tokenizer: str = ""             # instead of training one: a tokenizer.json or a checkpoint
    problems: tuple[str, ...] = ()  # FILE[,TESTFILE] for the generated problems: GSM8K's JSON lines, or ours
    annotations: bool = False       # keep GSM8K's calculator annotations such as <<48/2=24>>
    device: str = "auto"            # every script takes it; not used here
    threads: int = 0                # >= 0, <= 4096: likewise: this is plain Python on one core


def options(c: Config) -> dict:
    """Those that change the data, as JSON has them: lists, no tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(c).items() if k not in HERE}


def general_split(text: str) -> str:
    """One general document in 50 is for validation, by hash of its text: no document is in both shards."""
    return "val" if crc32(text.encode()) % 50 == 0 else "pretrain"


def documents(group: str, c: Config, split: str, rng: random.Random) -> Iterator[tuple]:
    """(kind, texts) of each document of a group: arithmetic or general, without end, or the real ones."""
    people = world.population(c.seed)
    while group == "arithmetic":
        yield group, arithmetic.draw_document(rng, c.hard_fraction, split)
    while group == "general":
        kind, text = world.draw_document(rng, people)
        if general_split(text) == split:
            yield kind, [text]
    if c.text:
        from beyond.text import read_texts
        for text in read_texts(c.text):
            if general_split(text) == split:
                yield group, [text]


def write_shard(path: Path, c: Config, tokenizer: Tokenizer, dtype: str, math: float) -> dict:
    """Write train.bin or a validation shard, documents shuffled, the share `math` of the tokens arithmetic;
    returns kind -> {"documents", "tokens"}."""
    rng = random.Random(f"{c.seed} {path.stem.replace('_', ' ')}")
    split, option = ("pretrain", "tokens") if path.stem == "train" else ("val", "val_tokens")
    tokens = getattr(c, option)
    share = c.text_share if c.text else 0
    sources = {group: documents(group, c, split, rng) for group in ("arithmetic", "real", "general")}
    shard = []
    counts = Counter()                           # documents of each kind
    sizes = Counter()                            # and their tokens
    bar = tqdm(total=tokens, unit="tok", unit_scale=True, desc=path.name)
    while sizes.total() < tokens:
        # keeps the mixture exact by tokens
        behind = sizes["arithmetic"] < math * (sizes.total() + 1)
        short = sizes["real"] < share * (sizes.total() - sizes["arithmetic"] + 1)
        kind, texts = next(sources["arithmetic" if behind else "real" if short else "general"], ("", []))
        if not texts:                            # nothing is read twice
            most = int(sizes["real"] / (share * (1 - math)))
            raise UserError(f"--text: its documents for {path.name} (1 in 50 is for validation) are enough "
                            f"for --{option.replace('_', '-')} {most}, not for {tokens}")
        ids = [i for text in texts for i in (*tokenizer.encode(text), tokenizer.eos)]
        shard.append(np.array(ids, dtype))
        counts[kind] += 1
        sizes[kind] += len(ids)
        bar.update(len(ids))
    bar.close()
    rng.shuffle(shard)
    atomic_write(path, np.concatenate(shard)[:tokens].data)
    return {kind: {"documents": counts[kind], "tokens": sizes[kind]} for kind in sorted(counts)}


def make_problems(seed: int, split: str, easy: int, hard: int) -> list[dict]:
    """So many distinct problems of a split, in random order."""
    rng = random.Random(f"{seed} problems {split}")
    lines = []
    for difficulty, wanted in (("easy", easy), ("hard", hard)):
        found = {}
        for _ in range(200 * wanted + 1000):
            if len(found) < wanted:
                problem = arithmetic.draw_problem(rng, difficulty, split)
                found.setdefault(problem.pop("canonical"), problem)
        require(len(found) == wanted, f"{split}.jsonl: there are not {wanted} different {difficulty} ones")
        lines += found.values()
    rng.shuffle(lines)
    return [{"id": f"{split}-{i}", **problem, "solutions": list(problem["solutions"].values())}
            for i, problem in enumerate(lines)]


def taught(problem: dict, setting: str) -> dict:
    """The same problem, solved by a teacher."""
    numbers = arithmetic.numbers_of(problem["question"])
    return problem | {"solutions": [arithmetic.teach(numbers, wording) for wording in WORDINGS[setting]]}


def prepare(c: Config) -> None:
    """Write the data set of this configuration. Raises UserError if the folder holds another one."""
    check_fields(c)
    require(len(set(c.problems)) == len(c.problems) <= 2,
            f"--problems {','.join(c.problems)}: must be one file, or two different ones: FILE,TESTFILE")
    out = Path(c.out)
    path = out / "manifest.json"
    if path.exists():
        try:
            manifest = json.loads(path.read_bytes())
            there = options(Config()) | manifest["config"]
            inputs = manifest.get("inputs", {}).items()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: damaged; delete the folder and make the data again") from None
        changed = [k for k, v in options(c).items() if there[k] != v]
        require(not changed, f"{out}: made with other options ({', '.join(changed)}); choose another --out")
        for name, digest in inputs:
            require(not Path(name).is_file() or file_sha256(name) == digest,
                    f"{name}: changed since {out} was made of it; choose another --out")
        print(f"{out} is complete already; nothing to do.")
        return
    require(not out.exists(), f"{out} exists and is not a data set of ours; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        whole = Path(temporary, "whole")         # the folder appears under its real name when it is whole
        whole.mkdir()
        manifest = write_all(whole, c)
        require(not out.exists(), f"{out}: another process has made it meanwhile; its data set stays")
        os.rename(whole, out)
    report(out, manifest, c)


def make_tokenizer(c: Config, generated: bool, problems: list[dict]) -> Tokenizer:
    """The one asked for, or one trained on texts like those of the shards and on real problems."""
    if c.tokenizer:
        from beyond.tokenizers import open_tokenizer
        return open_tokenizer(c.tokenizer)
    rng = random.Random(f"{c.seed} tokenizer")
    sample = []
    for group, n in {"arithmetic": 1_800, "general": 4_200 * generated}.items():
        for _, texts in islice(documents(group, c, "pretrain", rng), n):
            sample += texts
    if c.problems:
        sample += ["\n".join([p["question"], *p["solutions"][:1]]) for p in problems[:2_000]]
    size = 0
    for _, texts in documents("real", c, "pretrain", rng):
        sample += texts
        size += len(texts[0])
        if size > 2_000_000:                     # characters: plenty for some thousand merges
            break
    return train_tokenizer(sample, c.vocab_size)


def write_all(folder: Path, c: Config) -> dict:
    """Write every file of the data set into the folder; returns the manifest."""
    generated = not c.text or c.text_share < 1   # some of the general text
    rng = random.Random(f"{c.seed} benchmarks")
    people = world.population(c.seed)
    items = world.draw_benchmark(rng, people, c.benchmark_items) if generated else []
    more = {}
    files = [*c.text, *c.problems, *[c.tokenizer] * Path(c.tokenizer).is_file()]
    if files:
        more["inputs"] = {path: file_sha256(path) for path in files}
    if c.problems:
        from beyond.text import read_problems
        problems, more["left_out"] = read_problems(c.problems, c.annotations)
    else:
        hard = round(c.train_problems * c.hard_fraction)
        problems = {"train": make_problems(c.seed, "train", c.train_problems - hard, hard)}
        for split in ("val", "test"):
            problems[split] = make_problems(c.seed, split, c.eval_problems, c.eval_problems)
        for setting in WORDINGS:
            problems[f"train-{setting}"] = [taught(problem, setting) for problem in problems["train"]]
    tokenizer = make_tokenizer(c, generated, problems["train"])
    tokenizer.save(folder / "tokenizer.json")
    if c.problems:
        every = [p for lines in problems.values() for p in lines]
        question = max(len(tokenizer.encode(p["question"] + "\n")) for p in every) + 1          # for EOS
        solution = max(len(tokenizer.encode(s)) for p in every for s in p["solutions"] or [""]) + 1
        more["longest"] = {"example": question + solution, "solution": solution}
    dtype = "uint16" if tokenizer.n_vocab <= 65_536 else "uint32"
    shards = {}
    for name, share in (("train", c.math_fraction), ("val_general", 0.), ("val_arithmetic", 1.)):
        shards[f"{name}.bin"] = write_shard(folder / f"{name}.bin", c, tokenizer, dtype, share)
    for name, lines in {**problems, "benchmarks": items}.items():
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            atomic_write(folder / f"{name}.jsonl", text.encode())
    manifest = {"config": options(c), "n_vocab": tokenizer.n_vocab, "tokenizer_sha256": tokenizer.sha256,
                "dtype": dtype, "shards": shards,
                "problems": {f"{split}.jsonl": len(lines) for split, lines in problems.items()},
                "benchmarks": dict(Counter(i["task"] for i in items)), **more,
                "sha256": {p.name: file_sha256(p) for p in sorted(folder.iterdir())}}
    atomic_write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def report(out: Path, manifest: dict, c: Config) -> None:
    """Print counts, mixture, tokens per document, samples, and the next command."""
    print(f"\n{out}: vocabulary {manifest['n_vocab']}, problems {manifest['problems']}, "
          f"benchmark items {manifest['benchmarks']}")
    print("\ntrain.bin      documents     tokens   share  tokens/document")
    for kind, n in manifest["shards"]["train.bin"].items():
        print(f"  {kind:12s}{n['documents']:10,d}{n['tokens']:11,d}{n['tokens'] / c.tokens:8.1%}"
              f"{n['tokens'] / n['documents']:10.1f}")
    longest = manifest.get("longest", {"example": 0})
    if c.problems:
        left_out = [f"{n} {why}" for why, n in manifest["left_out"].items()]
        print(f"left out of the problems: {', '.join(left_out)}; question and solution have up to "
              f"{longest['example']} tokens (--context), the solution {longest['solution']} (--max-new)")
    print("\nthree samples of each kind:")
    rng = random.Random(f"{c.seed} report")
    people = world.population(c.seed)
    for _, texts in islice(documents("real", c, "pretrain", rng), 3):
        print(f"  [real] {texts[0][:300]!r}")
    for kind in manifest["benchmarks"]:
        write = world.KINDS[kind][1]
        for _ in range(3):
            print(f"  [{kind}] {write(rng, people) if kind == 'recall' else write(rng)}")
    for _, texts in islice(documents("arithmetic", c, "pretrain", rng), 3 if c.math_fraction else 0):
        print("  [arithmetic]", " <EOS> ".join(texts).replace("\n", "\n      "))
    context = f" --context {-(-longest['example'] // 64) * 64}" if longest["example"] > 256 else ""
    print(f"\nnext: python pretrain.py --data {out}{context} --out runs/base")


if __name__ == "__main__":
    main(prepare, Config)
