"""A small data set and a checkpoint that several test files share, made once per session in a temporary
folder; and the scripts as a person runs them, in this process (fast) or as one of their own (real)."""
import atexit
import functools
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import pretrain
import sft
from checkpoint import load_checkpoint
from data import prepare

ROOT = Path(__file__).resolve().parent.parent
LONG = bool(os.environ.get("EARLYBIRD_LONG"))
DATA_OPTIONS = dict(tokens=150_000, val_tokens=6_000, train_problems=400, eval_problems=100,
                    benchmark_items=200)
TINY_OPTIONS = dict(tokens=3_000, val_tokens=1_000, train_problems=20, eval_problems=5, benchmark_items=5,
                    vocab_size=280)


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="earlybird-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@contextmanager
def captured():
    """Catches stdout and stderr, and gives pytest its signal handlers back."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            yield out, err
    finally:
        for sign, handler in handlers.items():
            signal.signal(sign, handler)


def quietly(function, config):
    """function(config) without its output."""
    with captured():
        return function(config)


@functools.cache
def data() -> Path:
    """150 k tokens, 400 train problems, 100 easy and 100 hard ones in val and in test, 200 items a task."""
    out = folder() / "data"
    quietly(prepare.prepare, prepare.Config(out=str(out), **DATA_OPTIONS))
    return out


@functools.cache
def other_data() -> Path:
    """A tiny data set of another seed with another tokenizer."""
    out = folder() / "other_data"
    quietly(prepare.prepare, prepare.Config(out=str(out), seed=5, **TINY_OPTIONS))
    return out


PRETRAIN = dict(size="0.3M", context=128, batch=4, micro_batch=2, tokens=1_536, checkpoints_at=(512, 1_536),
                warmup=1, eval_every=1_000, save_every=1_000, threads=1)


@functools.cache
def base() -> Path:
    """A checkpoint after three updates: it knows nothing, but it is whole."""
    config = pretrain.Config(data=str(data()), out=str(folder() / "base"), **PRETRAIN)
    return Path(quietly(pretrain.train, config))


def texts(tokenizer, shard: Path) -> list[str]:
    """The decoded texts of a shard. The last one may be cut off and is left out."""
    ids = np.fromfile(shard, np.uint16)
    after_eos = np.flatnonzero(ids == tokenizer.eos) + 1
    return [tokenizer.decode(text[:-1].tolist()) for text in np.split(ids, after_eos)[:-1]]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def snapshot(path: Path) -> dict[str, bytes]:
    """Name -> content of every file below a folder (the lock, which is empty, aside)."""
    path = Path(path)
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*"))
            if p.is_file() and p.name != ".lock"}


def same(a, b) -> bool:
    """Nested dicts and lists of tensors and plain values are equal, bitwise; 'seconds' and 'out' aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        ignored = ("seconds", "out", "bytes")
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ignored)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(resumed: Path, reference: Path) -> None:
    """Every file of the two folders has the same content, seconds aside."""
    names = {p.name for p in reference.iterdir()}
    assert {p.name for p in resumed.iterdir()} == names                  # no litter either
    kept = [name for name in names if name.endswith(".pt")]
    assert len(kept) > 1
    assert same(lines(resumed / "log.jsonl"), lines(reference / "log.jsonl"))
    assert (resumed / "samples.txt").read_bytes() == (reference / "samples.txt").read_bytes()
    for name in kept:
        assert same(load_checkpoint(resumed / name), load_checkpoint(reference / name)), name


@dataclass
class Outcome:
    status: int         # exit status
    errors: list[str]   # lines of stderr, progress bars aside
    out: str            # stdout


def without_bars(stderr: str) -> list[str]:
    """Lines of stderr that are not progress bars ('rl:  50%|##   | 1/2 [00:01<00:01,  1.00s/step]')."""
    return [line for line in re.split(r"[\r\n]+", stderr)
            if line.strip() and not re.search(r" \[\d+:\d\d.*\]\s*$", line)]


def run_here(script: str, *argv: object, stdin: str = "") -> Outcome:
    """`python SCRIPT ARGV...` in this process. An exception other than SystemExit passes through: a bug."""
    words = [str(ROOT / script), *map(str, argv)]
    status = 0
    with captured() as (out, err), mock.patch.multiple(
            sys, argv=words, stdin=io.StringIO(stdin), path=sys.path[:]):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
    if isinstance(status, str):
        err.write("\n" + status)
        status = 1
    return Outcome(status, without_bars(err.getvalue()), out.getvalue())


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"} | more


def run_process(script: str, *argv: object, stdin: str = "", env: dict | None = None, **options) -> Outcome:
    """`python SCRIPT ARGV...` as a process of its own."""
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=600) | options
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, argv)], input=stdin, text=True,
                          env=env or environment(), **options)
    return Outcome(done.returncode, without_bars(done.stderr), done.stdout)


@functools.cache
def sevens() -> Path:
    """A problems file in which every answer is 7."""
    path = folder() / "sevens.jsonl"
    path.write_text("".join(json.dumps({
        "id": f"seven-{i}", "question": f"Nora has {i + 2} shells. How many are seven?", "answer": "7",
        "solutions": ["#### 7"], "difficulty": "easy", "split": "train"}) + "\n" for i in range(32)))
    return path


@functools.cache
def parrot() -> Path:
    """A checkpoint that has learned to answer 7, though not always: rewards differ within a group."""
    config = sft.Config(init=str(base()), data=str(data()), problem_file=str(sevens()),
                        out=str(folder() / "parrot"), epochs=14, batch=16, lr=8e-3, warmup=2, max_new=12,
                        eval_every=1_000, eval_problems=1, eval_samples=1, save_every=1_000, threads=1)
    return Path(quietly(sft.train, config))
