"""If your curve looks like this: six runs of rl.py, one of them healthy, each as a small figure.

    python data/prepare.py && python course/curves.py       about 15 minutes, one thread

Trains from the published bases and draws course/curves/NAME.png; course/curves.md says what to do about each.
`--names healthy,luck` chooses runs. The same call resumes.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

import numpy as np  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

import rl  # noqa: E402
from checkpoint import check_fields, main, parse, require  # noqa: E402
from course.experiments import points  # noqa: E402
from course.functions import ROOT  # noqa: E402
from study import json_lines  # noqa: E402

WINDOW = 10                          # steps: a point is their mean
TELLING = ("signal", "entropy", "kl")   # columns of log.jsonl that tell the runs apart
RUNS = {                             # name -> base, options of rl.py
    "healthy": ("6M", "--steps 100"),
    "no-signal": ("3M", "--steps 50 --difficulty hard --reward steps"),
    "luck": ("3M", "--steps 100"),
    "collapse": ("6M", "--steps 150 --lr 3e-4 --n-train 16 --n-problems 16"),
    "learning-rate": ("6M", "--steps 50 --lr 3e-3"),
    "memorising": ("6M", "--steps 150 --lr 3e-4 --n-train 500"),
}


@dataclass
class Config:
    names: tuple[str, ...] = tuple(RUNS)     # of the runs
    data: str = "data/tiny"                   # folder made by data/prepare.py
    runs: str = "runs/curves"                 # where they go
    out: str = str(ROOT / "course/curves")    # folder for the figures


def smooth(lines: list[dict], column: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a column: means of WINDOW steps; validation's as they are."""
    found = np.array(points(lines, column))
    if not column.startswith("val_"):
        found = np.array([found[i:i + WINDOW].mean(0) for i in range(0, len(found), WINDOW)])
    return found[:, 0], found[:, 1]


def draw(lines: list[dict], path: Path) -> None:
    """Left what RL is for; then the columns that tell what is wrong, each on a scale of its own."""
    figure, axes = plt.subplots(1, 1 + len(TELLING), figsize=(9, 2), layout="constrained")
    for column in ("right", "sound", "val_pass@1"):
        axes[0].plot(*smooth(lines, column), label=column)
    axes[0].legend(fontsize=7)
    for axis, column in zip(axes[1:], TELLING):
        axis.plot(*smooth(lines, column), color="black")
        axis.set_title(column, fontsize=9)
    for axis in axes:
        axis.set_ylim(0, 1 if axis.get_title() == "signal" else None)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("step", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def run(c: Config) -> None:
    check_fields(c)
    unknown = set(c.names) - set(RUNS)
    require(not unknown, f"{', '.join(sorted(unknown))}: must be of {', '.join(RUNS)}")
    for name in c.names:
        base, options = RUNS[name]
        argv = ["--init", str(ROOT / f"results/bases/{base}.pt"), "--data", c.data,
                "--out", str(Path(c.runs, name)), "--threads", "1", *options.split()]
        log = rl.train(parse(rl.Config, argv)).with_name("log.jsonl")
        draw(json_lines(log), Path(c.out, f"{name}.png"))


if __name__ == "__main__":
    main(run, Config)
