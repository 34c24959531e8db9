"""Experiments on what the course's functions do: each trains two arms that differ in one option.

    python course/experiments.py base               once: data, 4M.pt and 6M.pt, in about 10 minutes
    python course/experiments.py std                an experiment: at most 5 minutes
    python course/experiments.py all --seeds 0,1,2  the teacher's, once: the ranges, into course/ranges.json

One thread each. A line of JSON for every arm and seed, and a figure OUT/NAME.png. The same call resumes.
"""
import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

import merge  # noqa: E402
import pretrain  # noqa: E402
import rl  # noqa: E402
import sft  # noqa: E402
from checkpoint import atomic_write, check_fields, load_model, main, parse, require  # noqa: E402
from data import prepare  # noqa: E402
from evaluate import measure_benchmarks  # noqa: E402
from study import json_lines  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from torch import Tensor  # noqa: E402

SCRIPTS = {"pretrain": pretrain, "sft": sft, "rl": rl, "merge": merge}
RANGES = Path(__file__).resolve().parent / "ranges.json"


class Experiment(NamedTuple):
    part: int                       # assignment
    script: str
    options: str                    # of both arms
    arms: dict[str, str]            # name -> options of its own
    numbers: tuple[str, ...]        # names in log.jsonl, or "general"; the first two are plotted


EXPERIMENTS = {
    "decay": Experiment(2, "pretrain", "--tokens 1M --eval-every 20 --checkpoints-at 1M",
                        {"constant": "--decay 0", "decayed": "--decay 0.5"},
                        ("val_arithmetic", "val_general")),
    "teacher": Experiment(3, "sft", "--eval-every 20",
                          {"native": "--teacher native", "prose": "--teacher prose"},
                          ("val_pass@1", "loss", "demonstration_nll", "general")),
    "std": Experiment(4, "rl", "--steps 50", {"on": "--std", "off": "--no-std"},
                      ("val_pass@1", "reward", "signal", "grad_norm")),
    "baseline": Experiment(4, "rl", "--steps 50", {"with": "", "without": ""},
                           ("val_pass@1", "reward", "entropy", "kl")),
    "clip": Experiment(4, "rl", "--steps 40 --updates 4 --lr 3e-4",
                       {"on": "--clip-low 0.2 --clip-high 0.2", "off": "--clip-low 1 --clip-high 1e9"},
                       ("val_pass@1", "kl", "clip_fraction", "ratio")),
    "groups": Experiment(4, "rl", "--steps 50", {"4": "--rollouts 4 --n-problems 256",
                                                 "16": "--rollouts 16 --n-problems 64"},
                         ("val_pass@1", "reward", "signal", "grad_norm")),
    "reward": Experiment(4, "rl", "--steps 50", {"answer": "--reward answer", "steps": "--reward steps"},
                         ("sound", "right", "val_pass@1", "kl")),
    "merge": Experiment(5, "merge", "--steps 30", {"parallel": "--mode parallel", "fused": "--mode fused"},
                        ("val_pass@1", "reward", "sft_loss", "kl")),
}


@dataclass
class Config:
    names: tuple[str, ...]          # base, all, or experiments
    seeds: tuple[int, ...] = (0,)   # >= 0: seeds of every arm
    init: str = "runs/course/base/4M.pt"    # checkpoint from which all but `decay` start
    data: str = "data/course"       # folder made by `base`
    out: str = "runs/course"        # folder for runs and figures


def without_baseline(rewards: Tensor, std: bool = True) -> Tensor:
    """In the place of rl.advantages: the rewards (P, G) themselves."""
    return rewards


def make_base(c: Config) -> None:
    """The data (60 % arithmetic) and the checkpoints that everything starts from."""
    prepare.prepare(prepare.Config(out=c.data, math_fraction=.6, tokens=6_100_000))
    pretrain.train(pretrain.Config(data=c.data, out=f"{c.out}/base", tokens=6_000_000,
                                   checkpoints_at=(4_000_000,), threads=1))


def points(log: list[dict], column: str) -> list[tuple]:
    """(step, value) of the lines of a log that have the column."""
    return [(line["step"], line[column]) for line in log if line.get(column) is not None]


def run_arm(name: str, arm: str, seed: int, c: Config) -> dict[str, tuple[list, list]]:
    """Train an arm of an experiment; returns (steps, values) of each of its numbers."""
    e = EXPERIMENTS[name]
    script = SCRIPTS[e.script]
    out = Path(c.out, name, f"{arm}-{seed}")
    options = f"{e.options} {e.arms[arm]} --threads 1 --seed {seed}".split()
    options += ["--data", c.data, "--out", str(out)]
    if e.script != "pretrain":
        options += ["--init", c.init]
    changed = without_baseline if (name, arm) == ("baseline", "without") else rl.advantages
    with mock.patch.object(rl, "advantages", changed), redirect_stdout(sys.stderr):
        final = script.train(parse(script.Config, options))

    log = json_lines(out / "log.jsonl")
    curves = {}
    for number in e.numbers:
        found = [(0, general(final, c))] if number == "general" else points(log, number)
        curves[number] = tuple(zip(*found))
    return curves


def general(path: Path, c: Config) -> float:
    """Mean accuracy of a checkpoint on the seven benchmarks."""
    model, tokenizer, _ = load_model(path)
    items = [json.loads(line) for line in Path(c.data, "benchmarks.jsonl").read_text().splitlines()]
    tasks = measure_benchmarks(model, tokenizer, items).values()
    return float(np.mean([task["accuracy"] for task in tasks]))


def run_experiment(name: str, c: Config) -> dict[str, dict]:
    """Train every arm with every seed, print their numbers (the last validation, the mean of the last ten
    steps) as lines of JSON, plot; returns arm -> number -> (mean, standard deviation) over the seeds."""
    e = EXPERIMENTS[name]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    ranges = {}
    for i, arm in enumerate(e.arms):
        found = []
        for seed in c.seeds:
            curves = run_arm(name, arm, seed, c)
            found.append({number: float(np.mean(values[-1 if number.startswith("val_") else -10:]))
                          for number, (_, values) in curves.items()})
            print(json.dumps({"experiment": name, "arm": arm, "seed": seed, **found[-1]}), flush=True)
            for axis, number in zip(axes, e.numbers):
                axis.plot(*curves[number], color=f"C{i}", label=arm if seed == c.seeds[0] else None)
                axis.set(xlabel="step", ylabel=number)
        if len(c.seeds) > 1:
            columns = {number: [numbers[number] for numbers in found] for number in e.numbers}
            ranges[arm] = {number: (np.mean(x), np.std(x, ddof=1)) for number, x in columns.items()}
    axes[0].legend()
    figure.savefig(Path(c.out, f"{name}.png"), dpi=120)
    plt.close(figure)
    return ranges


def run(c: Config) -> None:
    check_fields(c)
    unknown = set(c.names) - {"base", "all", *EXPERIMENTS}
    require(not unknown, f"{', '.join(unknown)}: must be of base, all, {', '.join(EXPERIMENTS)}")
    every = "all" in c.names
    require(not every or len(c.seeds) > 1, "all: needs two --seeds or more, such as 0,1,2")
    if "base" in c.names:
        make_base(c)
    names = EXPERIMENTS if every else [name for name in c.names if name != "base"]
    require(not names or Path(c.init).is_file(),
            f"{c.init}: not found; python course/experiments.py base makes it")
    ranges = {name: run_experiment(name, c) for name in names}
    if every:
        atomic_write(RANGES, json.dumps({"seeds": c.seeds, "experiments": ranges}, indent=1).encode())
        print(f"{RANGES}: written; now run python course/handout.py", file=sys.stderr)


if __name__ == "__main__":
    main(run, Config)
