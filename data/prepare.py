"""Make the data set, on the spot and without a download: 24 s on one core for 12 M tokens.

    python data/prepare.py --out data/tiny

or with real text instead of the generated world, and real problems (beyond/README.md has the addresses):

    python data/prepare.py --out data/stories --math-fraction 0 --vocab-size 2048 \\
        --text data/raw/TinyStoriesV2-GPT4-train.txt --problems data/raw/train.jsonl,data/raw/test.jsonl

writes into the folder
    train.bin, val_general.bin,          token shards, uint16 (uint32 for a vocabulary above 65,536),
    val_arithmetic.bin                   every document followed by EOS
    train.jsonl, val.jsonl, test.jsonl   problems: {"id", "question", "answer", "solutions", ...} a line
    benchmarks.jsonl                     {"task", "context", "choices", "answer", "chance"} a line; only with
                                         generated general text
    tokenizer.json, manifest.json        the manifest has the options, counts and sha256 of every file
The same options and files write the same bytes.
See arithmetic.py and world.py for the texts and what is held out, beyond/text.py for the files that are read.
"""
import json
import os
import random
import shutil
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from zlib import crc32

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

from checkpoint import UserError, atomic_write, check_fields, file_sha256, main, require  # noqa: E402
from data import arithmetic, world  # noqa: E402
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
    train_problems: int = 6_000     # > 0: for SFT and RL, easy and hard together
    eval_problems: int = 400        # > 0: easy, and as many hard, in each of val.jsonl and test.jsonl
    benchmark_items: int = 250      # > 0: of each of the seven general benchmarks
    text: tuple[str, ...] = ()      # real text for the generated one: files .txt, .jsonl (or .gz), .parquet
    text_share: float = 1.0         # > 0, <= 1: share of --text in the general text; the world is the rest
    tokenizer: str = ""             # instead of training one: tokenizer.json, checkpoint, gpt2, o200k_base
    problems: tuple[str, ...] = ()  # FILE[,TESTFILE] for the generated problems: GSM8K's JSON lines, or ours
    annotations: bool = False       # keep GSM8K's calculator annotations such as <<48/2=24>>
    device: str = "auto"            # every script takes it; not used here
    threads: int = 0                # >= 0, <= 4096: likewise: this is plain Python on one core


HERE = ("out", "device", "threads")              # options that do not change the data


def check(c: Config) -> None:
    check_fields(c)
    require(len(set(c.problems)) == len(c.problems) <= 2,
            f"--problems {','.join(c.problems)}: must be one file, or two different ones: FILE,TESTFILE")


def general_split(text: str) -> str:
    """One general document in 50 is for validation, by hash of its text: no document is in both shards."""
    return "val" if crc32(text.encode()) % 50 == 0 else "pretrain"


def real_texts(c: Config, split: str) -> Iterator[str]:
    """The documents of --text that belong to a split, in the order of the files."""
    if c.text:
        from beyond.text import read_texts
        for text in read_texts(c.text):
            if general_split(text) == split:
                yield text


def dtype_of(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.n_vocab <= 65_536 else "uint32"


def generates(c: Config) -> bool:
    """Whether some of the general text is from the generated world."""
    return not c.text or c.text_share < 1


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
    made, counts = {"arithmetic": 0, "real": 0, "general": 0}, {}
    flat, ends = array({"uint16": "H", "uint32": "I"}[dtype_of(tokenizer)]), array("q", [0])
    reals, share = real_texts(c, split), c.text_share if c.text else 0
    bar = tqdm(total=tokens, unit="tok", unit_scale=True, desc=path.name)
    while sum(made.values()) < tokens:
        # keeps the mixture exact by tokens
        behind = made["arithmetic"] < math_fraction * (sum(made.values()) + 1)
        short = made["real"] < share * (made["real"] + made["general"] + 1)
        group = "arithmetic" if behind and math_fraction > 0 else "real" if short else "general"
        if group == "real":
            kind, texts = group, list(islice(reals, 1))
            if not texts:                        # nothing is read twice
                most = int(made["real"] / (share * (1 - math_fraction)))
                option = "--tokens" if split == "pretrain" else "--val-tokens"
                raise UserError(f"--text: of its documents (1 in 50 is for validation) those for {path.name} "
                                f"have {made['real']} tokens: enough for {option} {most}, not for {tokens}")
        else:
            kind, texts = draw_texts(rng, people, group, split, c.hard_fraction)
        ids = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos]]
        flat.extend(ids)
        ends.append(len(flat))
        made[group] += len(ids)
        count = counts.setdefault(kind, {"documents": 0, "tokens": 0})
        count["documents"] += 1
        count["tokens"] += len(ids)
        bar.update(len(ids))
    bar.close()
    order, shuffled = array("q", range(len(ends) - 1)), array(flat.typecode)
    rng.shuffle(order)
    for i in order:
        shuffled.extend(flat[ends[i]:ends[i + 1]])
    atomic_write(path, memoryview(shuffled)[:tokens].cast("B"))
    return dict(sorted(counts.items()))


def make_problems(seed: int, split: str, counts: dict[str, int]) -> list[dict]:
    """Distinct problems of a split, `counts` by difficulty, in random order."""
    rng = random.Random(f"{seed} problems {split}")
    problems: dict[str, dict] = {}
    for difficulty, wanted in counts.items():
        tries, target = 0, len(problems) + wanted
        while len(problems) < target:
            problem = arithmetic.draw_problem(rng, difficulty, split)
            problems.setdefault(problem["canonical"], problem)
            tries += 1
            if tries > 200 * wanted + 1000:
                raise UserError(f"{split}.jsonl: there are not {wanted} different {difficulty} problems; "
                                "ask for fewer")
    lines = list(problems.values())
    rng.shuffle(lines)
    return [{"id": f"{split}-{i}", "question": p["question"], "answer": p["answer"],
             "solutions": list(p["solutions"].values()), "difficulty": p["difficulty"], "split": split}
            for i, p in enumerate(lines)]


def prepare(c: Config) -> None:
    """Write the data set of this configuration. Raises UserError if the folder holds another one."""
    check(c)
    out, manifest_path = Path(c.out), Path(c.out) / "manifest.json"
    if manifest_path.exists():
        try:
            manifest = json.loads(manifest_path.read_text())
            there, files = asdict(Config()) | manifest["config"], dict(manifest.get("inputs", {}))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{manifest_path}: damaged; delete the folder and make the data again") from None
        different = [k for k, v in asdict(c).items() if k not in HERE
                     and there[k] != (list(v) if isinstance(there[k], list) else v)]
        require(not different, f"{out} holds a data set made with other options ({', '.join(different)}); "
                               "choose another --out or delete the folder")
        for path, digest in files.items():
            require(not Path(path).is_file() or file_sha256(path) == digest,
                    f"{path}: changed since {out} was made of it; choose another --out or delete the folder")
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


def make_tokenizer(c: Config, people: dict, problems: list[dict]) -> Tokenizer:
    """The one asked for, or one trained on texts like those of the shards and on real problems."""
    if c.tokenizer:
        from beyond.tokenizers import open_tokenizer
        return open_tokenizer(c.tokenizer)
    rng = random.Random(f"{c.seed} tokenizer")
    sample = [text for kind in ["arithmetic"] * 3 + ["general"] * (7 * generates(c)) for _ in range(600)
              for text in draw_texts(rng, people, kind, "pretrain", c.hard_fraction)[1]]
    if c.problems:
        sample += ["\n".join([p["question"], *p["solutions"][:1]]) for p in problems[:2_000]]
    size = 0
    for text in real_texts(c, "pretrain"):
        sample.append(text)
        size += len(text)
        if size > 2_000_000:                     # characters: plenty for some thousand merges
            break
    return train_tokenizer(sample, c.vocab_size)


def write_lines(path: Path, records: list[dict]) -> None:
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def write_all(folder: Path, c: Config) -> dict:
    people, more = world.population(c.seed), {}
    files = [*c.text, *c.problems, *[c.tokenizer] * Path(c.tokenizer).is_file()]
    if files:
        more["inputs"] = {path: file_sha256(path) for path in files}
    try:
        items = world.draw_benchmark(random.Random(f"{c.seed} benchmarks"), people,
                                     c.benchmark_items) if generates(c) else []
    except ValueError as error:
        raise UserError(str(error)) from None
    if c.problems:
        from beyond.text import read_problems
        problems, more["left_out"] = read_problems(c.problems, c.annotations)
    else:
        hard = round(c.train_problems * c.hard_fraction)
        counts = {"train": {"easy": c.train_problems - hard, "hard": hard}}
        counts |= dict.fromkeys(("val", "test"), {"easy": c.eval_problems, "hard": c.eval_problems})
        problems = {split: make_problems(c.seed, split, n) for split, n in counts.items()}
    tokenizer = make_tokenizer(c, people, problems["train"])
    tokenizer.save(folder / "tokenizer.json")
    if c.problems:
        sizes = [[len(tokenizer.encode(text)) + 1 for text in (p["question"] + "\n", s)]   # EOS is one more
                 for lines in problems.values() for p in lines for s in p["solutions"] or [""]]
        question, solution = map(max, zip(*sizes))
        more["longest"] = {"example": question + solution, "solution": solution}
    shards = {
        "train.bin": write_shard(folder / "train.bin", c, people, tokenizer, "train", "pretrain", c.tokens,
                                 c.math_fraction),
        "val_general.bin": write_shard(folder / "val_general.bin", c, people, tokenizer, "val general", "val",
                                       c.val_tokens, 0.0),
        "val_arithmetic.bin": write_shard(folder / "val_arithmetic.bin", c, people, tokenizer,
                                          "val arithmetic", "val", c.val_tokens, 1.0)}
    for split in problems:
        write_lines(folder / f"{split}.jsonl", problems[split])
    if items:
        write_lines(folder / "benchmarks.jsonl", items)
    manifest = {"config": {k: v for k, v in asdict(c).items() if k not in HERE}, "n_vocab": tokenizer.n_vocab,
                "tokenizer_sha256": tokenizer.sha256, "dtype": dtype_of(tokenizer), "shards": shards,
                "problems": {f"{split}.jsonl": len(lines) for split, lines in problems.items()},
                "benchmarks": dict(Counter(i["task"] for i in items)), **more,
                "sha256": {p.name: file_sha256(p) for p in sorted(folder.iterdir())}}
    atomic_write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def report(out: Path, manifest: dict, c: Config) -> None:
    """Print what was made: counts, mixture, tokens per document, samples, and how to go on."""
    people, rng, context = world.population(c.seed), random.Random(f"{c.seed} report"), ""
    print(f"\n{out}: vocabulary {manifest['n_vocab']}, problems {manifest['problems']}, "
          f"benchmark items {manifest['benchmarks']}\n\n"
          "train.bin      documents     tokens   share  tokens/document")
    for kind, n in manifest["shards"]["train.bin"].items():
        print(f"  {kind:12s}{n['documents']:10,d}{n['tokens']:11,d}{n['tokens'] / c.tokens:8.1%}"
              f"{n['tokens'] / n['documents']:10.1f}")
    if c.problems:
        longest, left_out = manifest["longest"], [f"{n} {why}" for why, n in manifest["left_out"].items()]
        print(f"left out of the problems: {', '.join(left_out)}; question and solution have up to "
              f"{longest['example']} tokens (pretrain.py --context), the solution alone up to "
              f"{longest['solution']} (--max-new of sft.py, rl.py, evaluate.py)")
        context = f" --context {-(-longest['example'] // 64) * 64}" if longest["example"] > 256 else ""
    print("\nthree samples of each kind:")
    for text in islice(real_texts(c, "pretrain"), 3):
        print(f"  [real] {text[:300]!r}")
    for kind, (_, write) in world.KINDS.items() if generates(c) else ():
        for _ in range(3):
            print(f"  [{kind}] {write(rng, people) if kind == 'recall' else write(rng)}")
    for _ in range(3 if c.math_fraction else 0):
        print("  [arithmetic]",
              " <EOS> ".join(arithmetic.draw_document(rng, c.hard_fraction)).replace("\n", "\n      "))
    print(f"\nnext: python pretrain.py --data {out}{context} --out runs/base")


if __name__ == "__main__":
    main(prepare, Config)
