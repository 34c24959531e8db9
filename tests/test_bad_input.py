"""Bad input: one clear line that names the file or the option, a non-zero exit, and nothing lost or
half-written. The table holds (command, arguments, text that the line must contain)."""
import errno
import gzip
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import worlds

QUICK = {   # so that a row which is not refused ends soon; later arguments win
    "data/prepare.py": "--out {out} --tokens 2000 --val-tokens 500 --train-problems 5 --eval-problems 2 "
                       "--benchmark-items 3 --vocab-size 270",
    "pretrain.py": "--data {data} --out {out} --threads 1 --size 0.3M --context 32 --batch 2 --micro-batch 2 "
                   "--tokens 64 --checkpoints-at 64",
    "sft.py": "--data {data} --out {out} --threads 1 --problems {bad}/good.jsonl --epochs 1 "
              "--eval-problems 1 --eval-samples 1 --max-new 4 --init {base}",
    "rl.py": "--data {data} --out {out} --threads 1 --problems {bad}/good.jsonl --steps 1 --n-problems 2 "
             "--rollouts 2 --eval-problems 1 --eval-samples 1 --max-new 4 --init {base}",
    "merge.py": "--data {data} --out {out} --threads 1 --problems {bad}/good.jsonl --steps 1 --n-problems 2 "
                "--rollouts 2 --batch 2 --eval-problems 1 --eval-samples 1 --max-new 4 --init {base}",
    "merge.py weights": "--threads 1 --out {out}/merged.pt",
    "evaluate.py": "--data {data} --threads 1 --n-problems 1 --n-samples 2 --k 1 --max-new 4 --no-benchmarks",
    "model.py": "--threads 1",
}


# ---- bad files ---------------------------------------------------------------------------------------------

GOOD = json.dumps({"question": "What is 1 plus 2?", "answer": "3", "solutions": ["1+2=3\n#### 3"],
                   "difficulty": "easy"})


def line(**changes) -> str:
    return json.dumps({k: v for k, v in (json.loads(GOOD) | changes).items() if v is not ...})


PROBLEMS = {    # file name -> second line of a problems file
    "good": GOOD,
    "broken": GOOD[:40],
    "not_json": "hello",
    "array": "[1, 2]",
    "number": "12",
    "null": "null",
    "deep": "[" * 100_000,
    "empty_answer": line(answer=""),
    "word_answer": line(answer="twelve"),
    "float_answer": line(answer="3.0"),
    "padded_answer": line(answer="03"),
    "plus_answer": line(answer="+3"),
    "underscore_answer": line(answer="1_2"),
    "fullwidth_answer": line(answer="３"),
    "newline_answer": line(answer="3\n"),
    "int_answer": line(answer=3),
    "null_answer": line(answer=None),
    "no_answer": line(answer=...),
    "no_question": line(question=...),
    "blank_question": line(question="  \n"),
    "list_question": line(question=["What"]),
    "long_question": line(question="What is 1 plus 2? " * 99),
    "no_solutions": line(solutions=...),
    "empty_solutions": line(solutions=[]),
    "text_solutions": line(solutions="#### 3"),
    "number_solution": line(solutions=[3]),
    "wrong_solution": line(solutions=["1+2=4\n#### 4"]),
    "two_answers": line(solutions=["#### 3\n#### 3"]),
    "surrogate": line(question="What is \ud800?"),
    "surrogate_solution": line(solutions=["\udfff\n#### 3"]),
    "val_problem": line(split="val"),
    "test_problem": line(split="test"),
    "list_difficulty": line(difficulty=["easy"]),
    "number_difficulty": line(difficulty=1),
    "bad_utf8": b'{"question": "What is \xff?", "answer": "3"}',
}


def forge(path: Path, change) -> None:
    """The base checkpoint with one thing changed."""
    content = torch.load(worlds.base(), weights_only=True)
    change(content)
    torch.save(content, path)


class Evil:
    """Unpickling this creates a file: code in a checkpoint."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def flip(path: Path, at: float) -> None:
    """Flip one bit at this fraction of the file."""
    raw = bytearray(path.read_bytes())
    raw[int(at * len(raw))] ^= 4
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def bad() -> Path:
    """A folder of bad files, one fault each."""
    folder = worlds.folder() / "bad"
    folder.mkdir()
    for name, second in PROBLEMS.items():
        second = second if isinstance(second, bytes) else second.encode()
        (folder / f"{name}.jsonl").write_bytes(GOOD.encode() + b"\n" + second + b"\n" + GOOD.encode() + b"\n")
    (folder / "nothing.jsonl").write_bytes(b"")
    (folder / "blank.jsonl").write_bytes(b"\n \n\n")
    (folder / "file").write_text("not a folder")
    (folder / "folder").mkdir()
    (folder / "folder" / "keep.txt").write_text("mine")
    texts(folder)
    checkpoints(folder)
    data_folders(folder)
    run_folders(folder)
    return folder


def texts(folder: Path) -> None:
    """Files for prepare.py --text."""
    (folder / "little.txt").write_text("One sentence.")
    (folder / "blank.txt").write_text("\n \n<|endoftext|>\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n" * 9)
    (folder / "half.txt.gz").write_bytes(gzip.compress(bytes(range(128)) * 9)[:-20])
    (folder / "plain.txt.gz").write_text("not compressed")
    for name, second in (("array", "[1]"), ("key", '{"txt": "x"}'), ("number", '{"text": 3}'),
                         ("null", "null"), ("surrogate", '{"text": "\\ud800"}'), ("half", '{"text": "x')):
        (folder / f"text_{name}.jsonl").write_text(f'{{"text": "One sentence."}}\n{second}\n')


def checkpoints(folder: Path) -> None:
    whole = worlds.base().read_bytes()
    (folder / "empty.pt").write_bytes(b"")
    (folder / "half.pt").write_bytes(whole[:len(whole) // 2])
    (folder / "short.pt").write_bytes(whole[:-10])
    (folder / "text.pt").write_text("weights, honestly\n")
    (folder / "json.pt").write_text("{}")
    (folder / "flipped.pt").write_bytes(whole)
    flip(folder / "flipped.pt", .5)
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    torch.save({"format": "earlybird checkpoint 1", "model": Evil(folder / "evil-ran")}, folder / "evil.pt")
    torch.save(Evil(folder / "evil-ran"), folder / "old_evil.pt", _use_new_zipfile_serialization=False)

    def poison(value):
        def change(content):
            content["model"]["head.weight"][3, 3] = value
        return change
    forge(folder / "nan.pt", poison(float("nan")))
    forge(folder / "inf.pt", poison(float("inf")))
    forge(folder / "format.pt", lambda c: c.update(format="earlybird checkpoint 0"))
    for key in ("model", "config", "tokenizer", "lineage"):
        forge(folder / f"no_{key}.pt", lambda c, key=key: c.pop(key))
    forge(folder / "lineage.pt", lambda c: c.update(lineage=[{"script": "pretrain.py"}]))
    forge(folder / "lineage_text.pt", lambda c: c.update(lineage="pretrain"))
    forge(folder / "shape.pt", lambda c: c["model"].update(norm=torch.ones(7)))
    forge(folder / "text_weight.pt", lambda c: c["model"].update(norm="ones"))
    forge(folder / "less.pt", lambda c: c["model"].pop("norm"))
    forge(folder / "more.pt", lambda c: c["model"].update(bias=torch.ones(7)))
    forge(folder / "config_extra.pt", lambda c: c["config"].update(colour="red"))
    forge(folder / "config_text.pt", lambda c: c["config"].update(n_layers="five"))
    forge(folder / "config_heads.pt", lambda c: c["config"].update(n_heads=3))
    forge(folder / "config_context.pt", lambda c: c["config"].update(context=-1))
    forge(folder / "context.pt", lambda c: c["config"].update(context=64))
    forge(folder / "config_vocab.pt", lambda c: c["config"].update(n_vocab=400))
    forge(folder / "tokenizer_less.pt", lambda c: c["tokenizer"].update(merges=c["tokenizer"]["merges"][:20]))
    forge(folder / "tokenizer_text.pt", lambda c: c.update(tokenizer="gpt2"))
    forge(folder / "tokenizer_pattern.pt", lambda c: c["tokenizer"].update(pattern="("))
    forge(folder / "tokenizer_future.pt", lambda c: c["tokenizer"].update(merges=[[300, 301]]))
    forge(folder / "tokenizer_other.pt", lambda c: c["tokenizer"]["merges"].__setitem__(-1, [0, 1]))
    forge(folder / "tokenizer_twice.pt", lambda c: c["tokenizer"]["merges"].__setitem__(
        slice(-2, None), [[97, 98], [97, 98]]))


def data_folders(folder: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(worlds.data(), folder / name))

    def edit_manifest(name: str, change) -> None:
        path = copy(name) / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))
    flip(copy("d_flipped") / "train.bin", .3)
    os.truncate(copy("d_truncated") / "val_general.bin", 1_001)
    (copy("d_empty_shard") / "train.bin").write_bytes(b"")
    (copy("d_no_shard") / "val_arithmetic.bin").unlink()
    (copy("d_no_tokenizer") / "tokenizer.json").unlink()
    (copy("d_no_manifest") / "manifest.json").unlink()
    shutil.copy(worlds.other_data() / "tokenizer.json", copy("d_tokenizer"))
    (copy("d_tokenizer_list") / "tokenizer.json").write_text("[]")
    (copy("d_tokenizer_merges") / "tokenizer.json").write_text('{"pattern": "x", "merges": 5}')
    (copy("d_tokenizer_text") / "tokenizer.json").write_bytes(b"\xff\xfe")
    (copy("d_manifest_text") / "manifest.json").write_text("hello")
    (copy("d_manifest_list") / "manifest.json").write_text("[]")
    (copy("d_manifest_utf8") / "manifest.json").write_bytes(b'{"a": "\xff"}')
    edit_manifest("d_manifest_shards", lambda m: m.pop("shards"))
    edit_manifest("d_manifest_sha256", lambda m: m.pop("sha256"))
    edit_manifest("d_manifest_train", lambda m: m["shards"].pop("train.bin"))
    # a byte of a file that is still well-formed afterwards: only a checksum can tell
    for name, file in (("d_train_problem", "train.jsonl"), ("d_val_problem", "val.jsonl")):
        path = copy(name) / file
        path.write_text(path.read_text().replace("How many", "How meny", 1))
    path = copy("d_benchmark") / "benchmarks.jsonl"
    path.write_text(path.read_text().replace('"answer": 1', '"answer": 0', 1))
    (copy("d_benchmark_text") / "benchmarks.jsonl").write_text("hello\n")
    (copy("d_no_benchmark") / "benchmarks.jsonl").unlink()
    (copy("d_no_val") / "val.jsonl").unlink()


def run_folders(folder: Path) -> None:
    """Run folders of pretrain.py with QUICK's options, in which something is wrong."""
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder / "r_whole", folder / name))
    argv = QUICK["pretrain.py"].format(data=worlds.data(), out=folder / "r_whole").split()
    assert worlds.run_here("pretrain.py", *argv).status == 0
    (copy("r_config_text") / "config.json").write_text("hello")
    (copy("r_config_list") / "config.json").write_text("[]")
    os.truncate(copy("r_last_half") / "last.pt", 100_000)
    shutil.copy(worlds.base(), copy("r_last_foreign") / "last.pt")
    flip(copy("r_last_flipped") / "last.pt", .7)


# ---- the table ---------------------------------------------------------------------------------------------

NINES = "9" * 400
ROWS = [
    ("data/prepare.py", "--math-fraction 1.5", "--math-fraction 1.5"),
    ("data/prepare.py", "--math-fraction nan", "--math-fraction nan"),
    ("data/prepare.py", "--hard-fraction -0.1", "--hard-fraction -0.1"),
    ("data/prepare.py", "--vocab-size 100", "--vocab-size 100"),
    ("data/prepare.py", "--vocab-size 70000", "--vocab-size 70000"),
    ("data/prepare.py", "--tokens 0", "--tokens 0"),
    ("data/prepare.py", "--tokens -5", "--tokens -5"),
    ("data/prepare.py", "--tokens 1.5", "--tokens"),
    ("data/prepare.py", "--tokens many", "--tokens"),
    ("data/prepare.py", f"--tokens {NINES}", "--tokens"),
    ("data/prepare.py", "--tokens", "--tokens"),
    ("data/prepare.py", "--val-tokens 0", "--val-tokens 0"),
    ("data/prepare.py", "--train-problems 0", "--train-problems 0"),
    ("data/prepare.py", "--eval-problems -1", "--eval-problems -1"),
    ("data/prepare.py", "--benchmark-items 400", "--benchmark-items"),
    ("data/prepare.py", "--seed x", "--seed"),
    ("data/prepare.py", "--colour red", "--colour"),
    ("data/prepare.py", "stray", "stray"),
    ("data/prepare.py", "--out {bad}/folder", "folder"),
    ("data/prepare.py", "--out {bad}/file", "file"),
    ("data/prepare.py", "--out {bad}/file/data", "file"),
    ("data/prepare.py", "--out {data} --seed 3", "seed"),
    ("data/prepare.py", "--out {bad}/d_manifest_text", "d_manifest_text"),
    ("data/prepare.py", "--out {bad}/d_manifest_list", "d_manifest_list"),
    ("data/prepare.py", "--text {bad}/none.txt", "none.txt"),
    ("data/prepare.py", "--text {bad}/folder", "folder"),
    ("data/prepare.py", "--text {bad}/file", "must end in .txt"),
    *[("data/prepare.py", f"--text {{bad}}/{name}", name) for name in (
        "latin.txt", "half.txt.gz", "plain.txt.gz")],
    *[("data/prepare.py", f"--text {{bad}}/text_{name}.jsonl", f"text_{name}.jsonl, line 2")
      for name in ("array", "key", "number", "null", "surrogate", "half")],
    ("data/prepare.py", "--text {bad}/little.txt", "not for 2000"),
    ("data/prepare.py", "--text {bad}/blank.txt", "not for 2000"),
    ("data/prepare.py", "--text-share 0", "--text-share 0"),
    ("data/prepare.py", "--text-share 1.5", "--text-share 1.5"),
    ("data/prepare.py", "--text-share nan", "--text-share nan"),
    *[("data/prepare.py", f"--problems {{bad}}/{name}.jsonl", f"{name}.jsonl, line 2") for name in (
        "broken", "not_json", "array", "null", "deep", "int_answer", "no_answer", "no_question",
        "blank_question", "list_question", "text_solutions", "number_solution", "wrong_solution",
        "two_answers", "surrogate", "val_problem", "test_problem", "bad_utf8")],
    ("data/prepare.py", "--problems {bad}/good.jsonl", "no problem is left"),
    ("data/prepare.py", "--problems {bad}/nothing.jsonl", "nothing.jsonl"),
    ("data/prepare.py", "--problems {bad}/none.jsonl", "none.jsonl"),
    ("data/prepare.py", "--problems {bad}/good.jsonl,{bad}/good.jsonl", "two different ones"),
    ("data/prepare.py", "--problems a,b,c", "--problems a,b,c"),
    ("data/prepare.py", "--tokenizer klingon", "--tokenizer klingon"),
    ("data/prepare.py", "--tokenizer {bad}/half.pt", "half.pt"),
    ("data/prepare.py", "--tokenizer {bad}/none.pt", "none.pt"),
    ("data/prepare.py", "--tokenizer {bad}/tokenizer_text.pt", "tokenizer_text.pt"),
    ("data/prepare.py", "--tokenizer {bad}/d_tokenizer_list/tokenizer.json", "d_tokenizer_list"),
    ("data/prepare.py", "--tokenizer {bad}/d_tokenizer_text/tokenizer.json", "d_tokenizer_text"),

    ("pretrain.py", "--size 2M", "--size 2M"),
    ("pretrain.py", "--context 0", "--context 0"),
    ("pretrain.py", "--context 9999", "--context 9999"),
    ("pretrain.py", "--batch 0", "--batch 0"),
    ("pretrain.py", "--batch 4 --micro-batch 3", "--micro-batch 3"),
    ("pretrain.py", "--micro-batch 0", "--micro-batch 0"),
    ("pretrain.py", "--tokens 0", "--tokens 0"),
    ("pretrain.py", f"--tokens {NINES}", "--tokens"),
    ("pretrain.py", "--checkpoints-at 32,65", "--checkpoints-at 65"),
    ("pretrain.py", "--checkpoints-at 0", "--checkpoints-at 0"),
    ("pretrain.py", "--checkpoints-at 32,x", "--checkpoints-at"),
    ("pretrain.py", "--lr 0", "--lr 0"),
    ("pretrain.py", "--lr=-1e-3", "--lr -0.001"),
    ("pretrain.py", "--lr nan", "--lr nan"),
    ("pretrain.py", "--lr inf", "--lr inf"),
    ("pretrain.py", "--lr fast", "--lr"),
    ("pretrain.py", "--decay 1.5", "--decay 1.5"),
    ("pretrain.py", "--weight-decay -1", "--weight-decay -1"),
    ("pretrain.py", "--weight-decay nan", "--weight-decay nan"),
    ("pretrain.py", "--warmup -3", "--warmup -3"),
    ("pretrain.py", "--grad-clip 0", "--grad-clip 0"),
    ("pretrain.py", "--eval-every 0", "--eval-every 0"),
    ("pretrain.py", "--save-every 0", "--save-every 0"),
    ("pretrain.py", "--threads -1", "--threads -1"),
    ("pretrain.py", "--threads 1e12", "--threads"),
    ("pretrain.py", "--device toaster", "--device toaster"),
    ("pretrain.py", "--device meta", "--device meta"),
    ("pretrain.py", "--compile yes", "yes"),
    ("pretrain.py", "--data {bad}/nowhere", "nowhere"),
    ("pretrain.py", "--data {bad}/file", "file"),
    ("pretrain.py", "--data {bad}/d_flipped", "d_flipped/train.bin"),
    ("pretrain.py", "--data {bad}/d_truncated", "d_truncated/val_general.bin"),
    ("pretrain.py", "--data {bad}/d_empty_shard", "d_empty_shard/train.bin"),
    ("pretrain.py", "--data {bad}/d_no_shard", "d_no_shard/val_arithmetic.bin"),
    ("pretrain.py", "--data {bad}/d_no_tokenizer", "tokenizer.json"),
    ("pretrain.py", "--data {bad}/d_no_manifest", "manifest.json"),
    ("pretrain.py", "--data {bad}/d_tokenizer", "tokenizer.json"),
    ("pretrain.py", "--data {bad}/d_tokenizer_list", "tokenizer.json"),
    ("pretrain.py", "--data {bad}/d_tokenizer_merges", "tokenizer.json"),
    ("pretrain.py", "--data {bad}/d_tokenizer_text", "tokenizer.json"),
    ("pretrain.py", "--data {bad}/d_manifest_text", "manifest.json"),
    ("pretrain.py", "--data {bad}/d_manifest_list", "manifest.json"),
    ("pretrain.py", "--data {bad}/d_manifest_utf8", "manifest.json"),
    ("pretrain.py", "--data {bad}/d_manifest_shards", "manifest.json"),
    ("pretrain.py", "--data {bad}/d_manifest_sha256", "manifest.json"),
    ("pretrain.py", "--data {bad}/d_manifest_train", "train"),
    ("pretrain.py", "--out {bad}/file", "file"),
    ("pretrain.py", "--out {bad}/r_whole --seed 3", "seed=0"),
    ("pretrain.py", "--out {bad}/r_config_text", "config.json"),
    ("pretrain.py", "--out {bad}/r_config_list", "config.json"),
    ("pretrain.py", "--out {bad}/r_last_half", "r_last_half/last.pt"),
    ("pretrain.py", "--out {bad}/r_last_foreign", "r_last_foreign/last.pt"),
    ("pretrain.py", "--out {bad}/r_last_flipped", "r_last_flipped/last.pt"),

    ("sft.py", "--init=", "--init"),
    ("sft.py", "--init {bad}/nothing.pt", "nothing.pt"),
    ("sft.py", "--init {bad}/folder", "folder"),
    ("sft.py", "--init {bad}/half.pt", "half.pt"),
    ("sft.py", "--init {bad}/nan.pt", "nan.pt"),
    ("sft.py", "--init {bad}/no_lineage.pt", "no_lineage.pt"),
    ("sft.py", "--difficulty medium", "--difficulty medium"),
    ("sft.py", "--difficulty hard", "hard"),
    ("sft.py", "--epochs 0", "--epochs 0"),
    ("sft.py", "--batch 0", "--batch 0"),
    ("sft.py", "--lr 0", "--lr 0"),
    ("sft.py", "--lr inf", "--lr inf"),
    ("sft.py", "--warmup -1", "--warmup -1"),
    ("sft.py", "--weight-decay -1", "--weight-decay -1"),
    ("sft.py", "--micro-batch 0", "--micro-batch 0"),
    ("sft.py", "--checkpoints-at 999", "--checkpoints-at 999"),
    ("sft.py", "--max-new 126", "--max-new"),
    ("sft.py", "--seed -1", "--seed -1"),
    ("sft.py", "--gold maybe", "maybe"),
    ("sft.py", "--data {bad}/d_no_val", "val.jsonl"),
    ("sft.py", "--problems {bad}/no_solutions.jsonl", "no_solutions.jsonl, line 2"),
    ("sft.py", "--problems {bad}/empty_solutions.jsonl", "empty_solutions.jsonl, line 2"),
    ("sft.py", "--problems {bad}/text_solutions.jsonl", "text_solutions.jsonl, line 2"),
    ("sft.py", "--problems {bad}/number_solution.jsonl", "number_solution.jsonl, line 2"),
    ("sft.py", "--problems {bad}/wrong_solution.jsonl", "wrong_solution.jsonl, line 2"),
    ("sft.py", "--problems {bad}/two_answers.jsonl", "two_answers.jsonl, line 2"),
    ("sft.py", "--problems {bad}/surrogate_solution.jsonl", "surrogate_solution.jsonl, line 2"),
    ("sft.py", "--problems {bad}/long_question.jsonl", "context"),
    ("sft.py", "--out {bad}/file", "file"),
    ("sft.py", "--out {bad}/r_whole", "another configuration"),

    ("sft.py", "--questions -1", "--questions -1"),
    ("sft.py", "--problems {bad}/val_problem.jsonl", "val_problem.jsonl"),

    ("rl.py", "--init=", "--init"),
    ("rl.py", "--questions -1", "--questions -1"),
    ("rl.py", "--problems {bad}/test_problem.jsonl", "test_problem.jsonl"),
    ("rl.py", "--rollouts 1", "--rollouts 1"),
    ("rl.py", "--n-problems 0", "--n-problems 0"),
    ("rl.py", "--n-problems 3 --updates 2", "--updates 2"),
    ("rl.py", "--updates 0", "--updates 0"),
    ("rl.py", "--steps 0", "--steps 0"),
    ("rl.py", "--temperature 0", "--temperature 0"),
    ("rl.py", "--temperature nan", "--temperature nan"),
    ("rl.py", "--temperature inf", "--temperature inf"),
    ("rl.py", "--clip-low -0.1", "--clip-low -0.1"),
    ("rl.py", "--kl -1", "--kl -1"),
    ("rl.py", "--kl inf", "--kl inf"),
    ("rl.py", "--checkpoints-at 7", "--checkpoints-at 7"),
    ("rl.py", "--max-new 126", "--max-new 126"),
    ("rl.py", "--data {bad}/d_train_problem --problems=", "train.jsonl"),
    ("rl.py", "--data {bad}/d_val_problem", "val.jsonl"),
    ("rl.py", "--problems {bad}/absent.jsonl", "absent.jsonl"),
    ("rl.py", "--problems {bad}/folder", "folder"),
    ("rl.py", "--problems {bad}/nothing.jsonl", "nothing.jsonl"),
    ("rl.py", "--problems {bad}/blank.jsonl", "blank.jsonl"),
    ("rl.py", "--problems {base}", "line 1"),
    ("rl.py", "--problems {bad}/long_question.jsonl", "context"),
    *[("rl.py", f"--problems {{bad}}/{name}.jsonl", f"{name}.jsonl, line 2") for name in (
        "broken", "not_json", "array", "number", "null", "deep", "empty_answer", "word_answer",
        "float_answer", "padded_answer", "plus_answer", "underscore_answer", "fullwidth_answer",
        "newline_answer", "int_answer", "null_answer", "no_answer", "no_question", "blank_question",
        "list_question", "surrogate", "list_difficulty", "number_difficulty", "bad_utf8")],

    ("merge.py", "--init=", "--init"),
    ("merge.py", "--init {bad}/nothing.pt", "nothing.pt"),
    ("merge.py", "--init {bad}/half.pt", "half.pt"),
    ("merge.py", "--init {bad}/flipped.pt", "flipped.pt"),
    ("merge.py", "--init {bad}/nan.pt", "nan.pt"),
    ("merge.py", "--init {bad}/evil.pt", "evil.pt"),
    ("merge.py", "--mode serial", "--mode serial"),
    ("merge.py", "--mode=", "--mode"),
    ("merge.py", "--weight-rl 1.1", "--weight-rl 1.1"),
    ("merge.py", "--weight-rl -0.1", "--weight-rl -0.1"),
    ("merge.py", "--weight-rl nan", "--weight-rl nan"),
    ("merge.py", "--weight-rl half", "--weight-rl"),
    ("merge.py", "--inner 0", "--inner 0"),
    ("merge.py", "--inner 2", "--inner 2"),
    ("merge.py", "--inner 2 --steps 4 --checkpoints-at 3", "--inner 2"),
    ("merge.py", "--inner 2 --steps 4 --mode fused", "--inner 2"),
    ("merge.py", "--inner all", "--inner"),
    ("merge.py", "--lr-rl -1", "--lr-rl -1"),
    ("merge.py", "--lr-rl nan", "--lr-rl nan"),
    ("merge.py", "--lr-sft inf", "--lr-sft inf"),
    ("merge.py", "--batch 0", "--batch 0"),
    ("merge.py", "--rollouts 1", "--rollouts 1"),
    ("merge.py", "--n-problems 0", "--n-problems 0"),
    ("merge.py", "--questions -1", "--questions -1"),
    ("merge.py", "--steps 0", "--steps 0"),
    ("merge.py", "--temperature 0", "--temperature 0"),
    ("merge.py", "--temperature nan", "--temperature nan"),
    ("merge.py", "--weight-decay -1", "--weight-decay -1"),
    ("merge.py", "--grad-clip 0", "--grad-clip 0"),
    ("merge.py", "--micro-batch 0", "--micro-batch 0"),
    ("merge.py", "--eval-every 0", "--eval-every 0"),
    ("merge.py", "--save-every 0", "--save-every 0"),
    ("merge.py", "--checkpoints-at 7", "--checkpoints-at 7"),
    ("merge.py", "--max-new 0", "--max-new 0"),
    ("merge.py", "--max-new 126", "--max-new 126"),
    ("merge.py", "--difficulty medium", "--difficulty medium"),
    ("merge.py", "--difficulty hard", "hard"),
    ("merge.py", "--gold maybe", "maybe"),
    ("merge.py", "--threads -1", "--threads -1"),
    ("merge.py", "--device toaster", "--device toaster"),
    ("merge.py", "--colour red", "--colour"),
    ("merge.py", "--data {bad}/d_no_val", "val.jsonl"),
    ("merge.py", "--data {bad}/d_val_problem", "val.jsonl"),
    ("merge.py", "--data {bad}/d_train_problem --problems=", "train.jsonl"),
    ("merge.py", "--problems {bad}/absent.jsonl", "absent.jsonl"),
    ("merge.py", "--problems {bad}/val_problem.jsonl", "val_problem.jsonl"),
    ("merge.py", "--problems {bad}/long_question.jsonl", "context"),
    *[("merge.py", f"--problems {{bad}}/{name}.jsonl", f"{name}.jsonl, line 2") for name in (
        "broken", "no_answer", "no_solutions", "number_solution", "wrong_solution", "bad_utf8")],
    ("merge.py", "--out {bad}/file", "file"),
    ("merge.py", "--out {bad}/r_whole", "another configuration"),
    ("merge.py", "--out {bad}/r_last_half", "r_last_half/last.pt"),

    ("merge.py weights", "", "checkpoints"),
    ("merge.py weights", "{base}", "one checkpoint"),
    *[("merge.py weights", f"{{base}} {{bad}}/{name}.pt", f"{name}.pt") for name in (
        "absent", "empty", "half", "flipped", "foreign", "module", "evil", "old_evil", "nan", "inf", "format",
        "no_lineage", "shape", "less", "more", "context", "tokenizer_text", "tokenizer_other")],
    ("merge.py weights", "{base} {base} --method mean", "--method mean"),
    ("merge.py weights", "{base} {base} --method task", "--base"),
    ("merge.py weights", "{base} {base} --method ties", "--base"),
    ("merge.py weights", "{base} {base} --method ties --base {bad}/absent.pt", "absent.pt"),
    ("merge.py weights", "{base} {base} --base {bad}/nan.pt", "nan.pt"),
    ("merge.py weights", "{base} {base} --base {bad}/context.pt", "context.pt"),
    ("merge.py weights", "{base} {base} --weights 1", "--weights"),
    ("merge.py weights", "{base} {base} --weights 1,2,3", "--weights"),
    ("merge.py weights", "{base} {base} --weights 1,-1", "--weights"),
    ("merge.py weights", "{base} {base} --weights 0,0", "--weights"),
    ("merge.py weights", "{base} {base} --weights 1,nan", "--weights"),
    ("merge.py weights", "{base} {base} --weights inf,1", "--weights"),
    ("merge.py weights", "{base} {base} --weights a,b", "--weights"),
    ("merge.py weights", "{base} {base} --base {base} --method task --scale nan", "--scale"),
    ("merge.py weights", "{base} {base} --base {base} --method task --scale inf", "--scale"),
    ("merge.py weights", "{base} {base} --density 0", "--density 0"),
    ("merge.py weights", "{base} {base} --density 1.5", "--density 1.5"),
    ("merge.py weights", "{base} {base} --density nan", "--density nan"),
    ("merge.py weights", "{base} {base} {base} --sweep 0.5", "--sweep"),
    ("merge.py weights", "{base} {base} --sweep 0.5 --weights 1,1", "--sweep"),
    ("merge.py weights", "{base} {base} --sweep nan", "--sweep"),
    ("merge.py weights", "{base} {base} --sweep half", "--sweep"),
    ("merge.py weights", "{base} {base} --threads -1", "--threads -1"),
    ("merge.py weights", "{base} {base} --device toaster", "--device toaster"),
    ("merge.py weights", "{base} {base} --colour red", "--colour"),
    ("merge.py weights", "{base} {base} --out {bad}/folder", "folder"),
    ("merge.py weights", "{base} {base} --out {bad}/file/merged.pt", "file"),

    ("evaluate.py", "", "checkpoints"),
    ("evaluate.py", "{base} {base} {base}", "3 checkpoints"),
    ("evaluate.py", "{base} --k 3", "--n-samples 2"),
    ("evaluate.py", "{base} --k 0", "k"),
    ("evaluate.py", "{base} --k=", "k"),
    ("evaluate.py", "{base} --k one", "--k"),
    ("evaluate.py", "{base} --n-samples 0", "--n-samples 0"),
    ("evaluate.py", "{base} --n-problems 0", "--n-problems"),
    ("evaluate.py", "{base} --max-new 0", "--max-new"),
    ("evaluate.py", "{base} --max-new 126", "--max-new 126"),
    ("evaluate.py", "{base} --temperature 0", "--temperature 0"),
    ("evaluate.py", "{base} --temperature inf", "--temperature inf"),
    ("evaluate.py", "{base} --split train", "--split train"),
    ("evaluate.py", "{base} --shots -1", "--shots -1"),
    ("evaluate.py", "{base} --shots 9", "context"),
    ("evaluate.py", "{base} --shots 9999", "--shots"),
    ("evaluate.py", "{base} --seed -1", "--seed -1"),
    ("evaluate.py", "{base} --data {other}", "tokenizer"),
    ("evaluate.py", "{base} --reference {bad}/half.pt", "half.pt"),
    ("evaluate.py", "{base} --reference {bad}/nowhere.pt", "nowhere.pt"),
    ("evaluate.py", "{base} --reference {bad}/context.pt", "context.pt: its context is shorter"),
    ("evaluate.py", "{base} --samples --reference {base}", "--reference"),
    ("evaluate.py", "{base} --data {bad}/nowhere", "nowhere"),
    ("evaluate.py", "{base} --data {bad}/d_flipped", "d_flipped/train.bin"),
    ("evaluate.py", "{base} --data {bad}/d_val_problem", "val.jsonl"),
    ("evaluate.py", "{base} --data {bad}/d_benchmark --benchmarks", "benchmarks.jsonl"),
    ("evaluate.py", "{base} --data {bad}/d_benchmark_text --benchmarks", "benchmarks.jsonl"),
    ("evaluate.py", "{base} --data {bad}/d_no_benchmark --benchmarks", "benchmarks.jsonl"),
    ("evaluate.py", "{base} --problems {bad}/broken.jsonl", "broken.jsonl, line 2"),
    ("evaluate.py", "{base} --n-problems 3 --problems {bad}/long_question.jsonl", "context"),
    ("evaluate.py", "{bad}/context.pt --problems {bad}/good.jsonl --benchmarks", "context"),
    ("evaluate.py", "{base} --problems {bad}/list_difficulty.jsonl", "list_difficulty.jsonl, line 2"),
    ("evaluate.py", "{base} {bad}/half.pt", "half.pt"),
    ("evaluate.py", "{bad}/text_weight.pt", "text_weight.pt"),

    *[("model.py", f"{{bad}}/{name}.pt", f"{name}.pt") for name in (
        "absent", "empty", "half", "short", "text", "json", "flipped", "foreign", "list", "module", "evil",
        "old_evil", "nan", "inf", "format", "no_model", "no_config", "no_tokenizer", "no_lineage", "lineage",
        "lineage_text", "shape", "text_weight", "less", "more", "config_extra", "config_text", "config_heads",
        "config_context", "config_vocab", "tokenizer_less", "tokenizer_text", "tokenizer_pattern",
        "tokenizer_future", "tokenizer_twice")],
    ("model.py", "", "checkpoint"),
    ("model.py", "{base} {base}", "one checkpoint"),
    ("model.py", "{base} --temperature -1", "--temperature -1"),
    ("model.py", "{base} --temperature nan", "--temperature nan"),
    ("model.py", "{base} --max-new -1", "--max-new -1"),
    ("model.py", "{base} --max-new 128", "--max-new 128"),
    ("model.py", "{base} --seed 1.5", "--seed"),
    ("merge.py", "--seed -1", "--seed -1"),
    ("merge.py weights", "{base} {base} --sweep 0.5 --out=", "--out"),
    ("merge.py weights", "{base} {base} --sweep 0.5 --data {bad}/nowhere", "nowhere"),
    ("merge.py weights", "{base} {base} --sweep 0.5 --data {other}", "tokenizer"),
    ("merge.py weights", "{base} {base} --sweep 0.5 --data {data} --n-problems 0", "--n-problems"),
    ("merge.py weights", "{base} {base} --sweep 0.5 --data {data} --seed -1", "--seed -1"),
]


def where(folder: Path, tmp_path: Path) -> dict:
    return {"bad": folder, "base": worlds.base(), "data": worlds.data(), "other": worlds.other_data(),
            "out": tmp_path / "out"}


def run(command: str, arguments: str, bad: Path, tmp_path: Path) -> worlds.Outcome:
    """A command of QUICK with its options and these arguments, in which {base} and the like are paths."""
    places = where(bad, tmp_path)
    argv = f"{command} {QUICK[command]} {arguments}".format(**places).split()
    return worlds.run_here(*argv)


@pytest.mark.parametrize("command, arguments, expected", ROWS,
                         ids=[f"{command} {arguments[:60]}" for command, arguments, _ in ROWS])
def test_bad_input_is_refused_in_one_line(command, arguments, expected, bad, tmp_path):
    """The message is one line that names the culprit, the exit status is not zero, no code of the input ran,
    and no folder has a file more, less or changed."""
    watched = [bad, worlds.base().parent, worlds.data(), tmp_path]
    before = [listing(path) for path in watched]
    outcome = run(command, arguments, bad, tmp_path)
    assert outcome.status != 0
    assert len(outcome.errors) == 1, outcome.errors
    assert outcome.errors[0].startswith(f"{Path(command.split()[0]).name}: error: ")
    assert expected in outcome.errors[0]
    assert [listing(path) for path in watched] == before


def listing(folder: Path) -> dict:
    """Name -> size and time of the last change of everything below a folder, locks aside."""
    stats = {p: p.stat() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    return {str(p): (s.st_size, s.st_mtime_ns) for p, s in stats.items()}


def test_the_table_is_long_enough():
    """The table has at least 60 bad inputs, over every script."""
    assert len(set(ROWS)) == len(ROWS) >= 60
    assert {command for command, _, _ in ROWS} == set(QUICK)


@pytest.mark.parametrize("command", list(QUICK))
def test_the_table_starts_from_good_input(command, bad, tmp_path):
    """Each row changes one thing: without the change the same command succeeds, so the row tests its
    change."""
    copies = {"model.py": 1, "evaluate.py": 1, "merge.py weights": 2}.get(command, 0)
    outcome = run(command, f"{shutil.copy(worlds.base(), tmp_path)} " * copies, bad, tmp_path)
    assert outcome.status == 0, outcome.errors


# ---- places that cannot be written -------------------------------------------------------------------------

@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a place that even root cannot write")
@pytest.mark.parametrize("command", ["data/prepare.py", "pretrain.py", "sft.py", "rl.py", "merge.py",
                                     "merge.py weights"])
def test_an_out_folder_that_cannot_be_made(command, bad, tmp_path):
    """The error is one line naming the folder."""
    checkpoints = "{base} {base}" if command == "merge.py weights" else ""
    outcome = run(command, f"--out /sys/earlybird/out {checkpoints}", bad, tmp_path)
    assert outcome.status != 0 and len(outcome.errors) == 1, outcome.errors
    assert "/sys/earlybird" in outcome.errors[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("script", ["data/prepare.py", "pretrain.py", "sft.py", "rl.py", "merge.py",
                                    "evaluate.py"])
def test_a_read_only_folder(script, bad, tmp_path):
    """A read-only place is named in one line, and nothing in it changes."""
    place = tmp_path / "read_only"
    place.mkdir()
    path = shutil.copy(worlds.base(), place)
    place.chmod(0o555)
    argv = [a.format(**where(bad, place)) for a in QUICK[script].split()]
    outcome = worlds.run_here(script, *argv, *([path] if script == "evaluate.py" else []))
    place.chmod(0o755)
    assert outcome.status != 0 and len(outcome.errors) == 1, outcome.errors
    assert "read_only" in outcome.errors[0]
    assert [p.name for p in place.iterdir()] == [Path(path).name]


@contextmanager
def full_disk(monkeypatch, after: int):
    """The disk is full once `after` files were put in place: no later write can be brought to the disk."""
    done, real_fsync, real_replace = [], os.fsync, os.replace

    def replace(a, b):
        real_replace(a, b)
        if str(b).endswith(".pt"):
            done.append(b)

    def fsync(handle):
        if len(done) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(handle)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(os, "fsync", fsync)
        yield


STEPS = {"pretrain.py": "--tokens 256 --checkpoints-at 256 --save-every 1",
         "sft.py": "--batch 1 --save-every 1", "rl.py": "--steps 4 --save-every 1",
         "merge.py": "--steps 4 --save-every 1"}


@pytest.mark.parametrize("script", STEPS)
def test_a_full_disk_costs_no_checkpoint(script, bad, tmp_path, monkeypatch):
    """The disk fills up at the third checkpoint: one line names the file that could not be written, the
    second one is whole, there is no litter; and when there is room again the same command finishes the
    run."""
    options = STEPS[script] + f" --problems {worlds.sevens()}" * (script == "sft.py")
    with full_disk(monkeypatch, after=2):
        outcome = run(script, options, bad, tmp_path)
    out = tmp_path / "out"
    assert outcome.status != 0 and len(outcome.errors) == 1, outcome.errors
    assert str(out) in outcome.errors[0] and os.strerror(errno.ENOSPC) in outcome.errors[0]
    assert {p.name for p in out.iterdir()} == {".lock", "config.json", "last.pt", "log.jsonl", "samples.txt"}
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 2
    outcome = run(script, options, bad, tmp_path)
    assert outcome.status == 0, outcome.errors
    assert "step 2" in outcome.out


def test_a_full_disk_leaves_the_old_merge(bad, tmp_path, monkeypatch):
    """Merged weights that do not fit leave the file of that name as it was, and no litter."""
    path = Path(shutil.copy(worlds.base(), tmp_path / "merged.pt"))
    with full_disk(monkeypatch, after=0):
        outcome = run("merge.py weights", f"{{base}} {{base}} --out {path}", bad, tmp_path)
    assert outcome.status != 0 and len(outcome.errors) == 1, outcome.errors
    assert str(path) in outcome.errors[0] and os.strerror(errno.ENOSPC) in outcome.errors[0]
    assert worlds.snapshot(tmp_path) == {"merged.pt": worlds.base().read_bytes()}


def test_a_full_disk_leaves_no_half_data_set(tmp_path):
    """A write that fails half-way (here at a limit on the size of files) leaves neither the folder nor a
    partial one, and the line says which file did not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        argv = [a.format(out=tmp_path / "data") for a in QUICK["data/prepare.py"].split()]
        outcome = worlds.run_here("data/prepare.py", *argv, "--tokens", "30_000")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.status != 0 and len(outcome.errors) == 1, outcome.errors
    assert "train.bin" in outcome.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_cost_the_evaluation(bad, tmp_path, monkeypatch):
    """Nothing is lost: minutes of measuring are on the screen before the JSON is written, and the line names
    the file that could not be."""
    path = Path(shutil.copy(worlds.base(), tmp_path))
    argv = [a.format(**where(bad, tmp_path)) for a in QUICK["evaluate.py"].split()]
    with full_disk(monkeypatch, after=0):
        outcome = worlds.run_here("evaluate.py", path, *argv)
    assert outcome.status != 0 and len(outcome.errors) == 1, outcome.errors
    assert ".json" in outcome.errors[0] and os.strerror(errno.ENOSPC) in outcome.errors[0]
    assert "pass@1" in outcome.out
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


LINES = {"pretrain.py": "--tokens 2k --checkpoints-at 2000", "sft.py": "--batch 1 --problems {sevens}",
         "rl.py": "--steps 12", "merge.py": "--steps 12"}


@pytest.mark.parametrize("script", LINES)
def test_a_log_that_outgrows_the_disk(script, bad, tmp_path):
    """A limit on the size of files is reached by the log between two checkpoints: one line names the log,
    which is cut to whole lines and continues when there is room again."""
    options = f"{LINES[script]} --save-every 1000".replace("{sevens}", str(worlds.sevens()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500, hard))
    try:
        outcome = run(script, options, bad, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.status != 0 and len(outcome.errors) == 1, outcome.errors
    assert "log.jsonl" in outcome.errors[0] or "samples.txt" in outcome.errors[0]
    assert run(script, options, bad, tmp_path).status == 0
    steps = [line["step"] for line in worlds.lines(tmp_path / "out" / "log.jsonl") if "skipped" in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 12


def test_a_log_that_cannot_be_written(bad, tmp_path):
    """The log outgrows the disk between two checkpoints: one line naming it, in a process of its own as the
    interpreter would report the unwritten rest once more at its end."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500, 1_500))
    argv = [a.format(**where(bad, tmp_path)) for a in QUICK["sft.py"].split()]
    argv += ["--problems", worlds.sevens(), "--batch", 1, "--save-every", 1_000]
    outcome = worlds.run_process("sft.py", *argv, preexec_fn=limit)
    assert outcome.status != 0 and len(outcome.errors) == 1, outcome.errors
    assert "log.jsonl" in outcome.errors[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written():
    """A table sent to a full disk must not end in success: the caller's script would continue without it."""
    with open("/dev/full", "w") as full:
        outcome = worlds.run_process("model.py", worlds.base(), "--threads", 1, stdout=full)
    assert outcome.status != 0
    said = " ".join(outcome.errors)
    assert os.strerror(errno.ENOSPC) in said and "Traceback" not in said


# ---- and the rest ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, arguments, expected", [
    ("rl.py", "--problems none.jsonl --init none.pt", "none.jsonl"), ("sft.py", "--colour red", "--colour"),
    ("merge.py", "weights none.pt nothing.pt", "none.pt"),
    ("evaluate.py", "none.pt --k 32 --n-samples 8", "--n-samples 8")])
def test_real_processes_do_the_same(script, arguments, expected, tmp_path):
    """The table runs inside this process; a shell sees the same: status 2, one line on stderr, nothing on
    stdout."""
    outcome = worlds.run_process(script, *arguments.split(), cwd=tmp_path)
    assert outcome.status == 2 and outcome.out == ""
    assert len(outcome.errors) == 1 and expected in outcome.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_evaluation(bad, tmp_path, monkeypatch):
    """Ctrl-C gives status 130, no traceback and no half-written result."""
    import model

    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(model, "sample", interrupt)
    path = shutil.copy(worlds.base(), tmp_path)
    argv = [a.format(**where(bad, tmp_path)) for a in QUICK["evaluate.py"].split()]
    outcome = worlds.run_here("evaluate.py", path, *argv)
    assert outcome.status == 130 and outcome.errors == ["interrupted"]
    assert [p.name for p in tmp_path.iterdir()] == [Path(path).name]


def test_a_typed_line_that_is_not_utf8():
    """model.py: a pasted line with bytes that are not UTF-8 is answered or refused in a line, and the next
    one too."""
    argv = [sys.executable, worlds.ROOT / "model.py", worlds.base(), "--threads", "1", "--max-new", "4"]
    done = subprocess.run(argv, input=b"caf\xe9?\nNora\n", capture_output=True, timeout=300,
                          env=worlds.environment(PYTHONIOENCODING="utf-8:strict"))
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"> ") == 3 and done.stderr == b""


def test_models_text_stays_text(bad, tmp_path):
    """Text from a model never reaches an interpreter, a shell or a path: a vocabulary of nothing but shell
    and Python code is sampled, graded and shown as text."""
    ran = tmp_path / "ran"
    evil = f"__import__('pathlib').Path('{ran}').touch() $(touch {ran}) `touch {ran}`; touch {ran}"
    from data.arithmetic import style_of
    from evaluate import grade
    for text in (evil, f"{evil}\n#### 3", f"#### {evil}", "9**9**9\n#### 9**9**9", f"#### 3\n{evil}"):
        assert grade(text, "3") == ("right" if text == f"{evil}\n#### 3" else "unparsed")
        assert style_of(text) in ("other", "bare")
    assert list(tmp_path.iterdir()) == []


def test_the_evil_checkpoints_did_not_run(bad):
    """After the whole table no pickle was executed. The instrument works: unpickling it does run."""
    assert not (bad / "evil-ran").exists()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        torch.load(bad / "old_evil.pt", weights_only=False).close()
    assert (bad / "evil-ran").exists()
