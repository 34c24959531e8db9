"""Print the sha256 of the weights that every trainer makes in 20 steps, and the numbers of one evaluation.

    python tests/fingerprint.py > before.txt        then change the code, and on the same machine:
    python tests/fingerprint.py | diff before.txt -

A change that only tidies the code prints the same lines. One thread, two data seeds, about two minutes.
Across machines the lines differ: rounding does.
"""
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import merge
import pretrain
import rl
import sft
import worlds
from data import prepare

STEPS = 20
DATA = dict(tokens=400_000, val_tokens=20_000, train_problems=400, eval_problems=50, benchmark_items=40)
QUICK = dict(eval_every=10, eval_problems=4, eval_samples=4, save_every=1_000, max_new=16, threads=1)
SFT = QUICK | dict(teacher="native")
GRPO = QUICK | dict(n_problems=8, rollouts=8, steps=STEPS)
RL = GRPO | dict(lr=3e-4)
MERGE = GRPO | dict(lr_rl=3e-4, batch=8, teacher="native")


def weights(path: Path) -> bytes:
    """Names and values of a checkpoint's weights."""
    content = b""
    for name, w in sorted(torch.load(path, weights_only=True)["model"].items()):
        content += name.encode() + w.contiguous().numpy().tobytes()
    return content


def sevens(path: Path) -> str:
    """A problem file in which every answer is 7, learned by a model in seconds, so that RL has a signal."""
    path.write_text("".join(json.dumps({
        "id": f"seven-{i}", "question": f"Nora has {i + 2} shells. How many are seven?", "answer": "7",
        "solutions": ["#### 7"], "difficulty": "easy", "split": "train"}) + "\n" for i in range(64)))
    return str(path)


def fingerprint(folder: Path, seed: int) -> None:
    def show(name: str, content: bytes, more: str = "") -> None:
        print(f"seed {seed} {name:20s} {hashlib.sha256(content).hexdigest()[:16]}{more}", flush=True)

    def run(name: str, script, **options) -> str:
        path = worlds.quietly(script.train, script.Config(data=data, out=str(folder / name), **options))
        show(name, weights(path))
        return str(path)

    data = str(folder / "data")
    worlds.quietly(prepare.prepare, prepare.Config(out=data, seed=seed, **DATA))
    for path in sorted(Path(data).iterdir()):
        show(path.name, path.read_bytes())

    seven = dict(problem_file=sevens(folder / "sevens.jsonl"))
    base = run("pretrain", pretrain, tokens=STEPS * 4096, threads=1)
    run("sft", sft, init=base, epochs=STEPS, batch=32, n_train=32, **SFT)
    parrot = run("sft sevens", sft, init=base, epochs=5, batch=8, lr=6e-3, warmup=2, **seven, **SFT)
    start = dict(init=parrot, **seven)
    first = run("rl", rl, **start, **RL)
    run("rl updates 4, kl", rl, updates=4, kl=.05, **start, **RL)
    averaged = run("merge parallel", merge, **start, **MERGE)
    run("merge inner 5", merge, inner=5, **start, **MERGE)
    run("merge fused", merge, mode="fused", **start, **MERGE)
    run("merge alternating", merge, mode="alternating", **start, **MERGE)

    for method in ("linear", "task", "ties"):
        out = str(folder / f"{method}.pt")
        worlds.quietly(merge.merge_weights, merge.WeightsConfig(
            (first, averaged), base=parrot, method=method, density=.5, out=out, threads=1))
        show(f"merge {method}", weights(out))

    for name, path in (("pretrain", base), ("rl", first)):
        config = evaluate.Config((path,), data=data, n_problems=10, n_samples=8, k=(1, 8), max_new=16,
                                 reference=parrot, threads=1)
        result = worlds.quietly(evaluate.run, config)[0]
        numbers = {k: result[k] for k in ("problems", "benchmarks", "general_mean", "bits_per_byte")}
        show(f"evaluate {name}", json.dumps(numbers, sort_keys=True).encode(),
             f" bits per byte {result['bits_per_byte']!r}, general {result['general_mean']!r}, "
             f"kl {result['problems']['easy']['kl']!r}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for data_seed in (0, 1):
        with tempfile.TemporaryDirectory() as temporary:
            fingerprint(Path(temporary), data_seed)
