"""Print the sha256 of the weights that every trainer makes in 20 steps, and the numbers of one evaluation.

    python tests/fingerprint.py > before.txt        then change the code, and on the same machine:
    python tests/fingerprint.py | diff before.txt -

A change that only tidies the code prints the same lines. One thread, two data seeds, about two minutes.
Across machines the lines differ: rounding does.
"""
import hashlib
import io
import json
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import merge
import pretrain
import rl
import sft
from data import prepare

STEPS = 20
DATA = dict(tokens=400_000, val_tokens=20_000, train_problems=400, eval_problems=50, benchmark_items=40)
QUICK = dict(eval_every=10, eval_problems=4, eval_samples=4, save_every=1_000, max_new=16, threads=1)
RL = QUICK | dict(n_problems=8, rollouts=8, steps=STEPS)


def short_sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def weights(path: Path) -> str:
    """sha256 of the names and values of a checkpoint's weights."""
    tensors = sorted(torch.load(path, weights_only=True)["model"].items())
    return short_sha256(b"".join(name.encode() + w.contiguous().numpy().tobytes() for name, w in tensors))


def quietly(function, config):
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return function(config)


def sevens(path: Path) -> str:
    """A problem file in which every answer is 7, learned by a model in seconds, so that RL has a signal."""
    path.write_text("".join(json.dumps({
        "id": f"seven-{i}", "question": f"Nora has {i + 2} shells. How many are seven?", "answer": "7",
        "solutions": ["#### 7"], "difficulty": "easy", "split": "train"}) + "\n" for i in range(64)))
    return str(path)


def fingerprint(folder: Path, seed: int) -> None:
    data = folder / "data"
    quietly(prepare.prepare, prepare.Config(out=str(data), seed=seed, **DATA))
    for path in sorted(data.iterdir()):
        print(f"seed {seed} {path.name:20s} {short_sha256(path.read_bytes())}")

    def run(name: str, script, **options) -> Path:
        path = quietly(script.train, script.Config(data=str(data), out=str(folder / name), **options))
        print(f"seed {seed} {name:20s} {weights(path)}", flush=True)
        return path
    seven = dict(problem_file=sevens(folder / "sevens.jsonl"))
    base = run("pretrain", pretrain, tokens=STEPS * 4096, threads=1)
    run("sft", sft, init=str(base), epochs=STEPS, batch=32, n_train=32, **QUICK)
    parrot = run("sft sevens", sft, init=str(base), epochs=5, batch=8, lr=6e-3, warmup=2, **seven, **QUICK)
    start = dict(init=str(parrot), **seven, **RL)
    first = run("rl", rl, **start)
    run("rl updates 4, kl", rl, updates=4, kl=.05, **start)
    averaged = run("merge parallel", merge, batch=8, **start)
    run("merge inner 5", merge, batch=8, inner=5, **start)
    run("merge fused", merge, batch=8, mode="fused", **start)
    run("merge alternating", merge, batch=8, mode="alternating", **start)
    for method in ("linear", "task", "ties"):
        out = folder / f"{method}.pt"
        quietly(merge.merge_weights, merge.WeightsConfig((str(first), str(averaged)), base=str(parrot),
                                                         method=method, out=str(out), threads=1))
        print(f"seed {seed} merge {method:14s} {weights(out)}")
    for path in (base, first):
        config = evaluate.Config((str(path),), data=str(data), n_problems=10, n_samples=8, k=(1, 8),
                                 max_new=16, reference=str(parrot), threads=1)
        result = quietly(evaluate.run, config)[0]
        numbers = {k: result[k] for k in ("problems", "benchmarks", "general_mean", "bits_per_byte")}
        print(f"seed {seed} evaluate {path.parent.name:11s} "
              f"{short_sha256(json.dumps(numbers, sort_keys=True).encode())} bits per byte "
              f"{result['bits_per_byte']!r}, general {result['general_mean']!r}, "
              f"kl {numbers['problems']['easy']['kl']!r}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for data_seed in (0, 1):
        with tempfile.TemporaryDirectory() as temporary:
            fingerprint(Path(temporary), data_seed)
