"""Rerun submissions to the leaderboard and score them on hidden problems.

    python course/leaderboard.py ../ada ../bob --hidden 8417        ten minutes each

A submission is a copy of the project whose course/submission.txt holds one command, in which {init}, {data},
{seed} and {out} are filled in here. It runs on one core; when its time is up, {out}/final.pt counts, or else
{out}/last.pt. The score is the share of sound answers to easy problems drawn with the seed --hidden, which
students must not know. As in grade.py, the time limit guards against accidents, not against malice.
"""
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

from checkpoint import UserError, check_fields, generator, load_model, main, require  # noqa: E402, I001
from course.grade import limited  # noqa: E402
from data.prepare import make_problems  # noqa: E402
from evaluate import attempt, bootstrap_means, interval  # noqa: E402
import numpy as np  # noqa: E402


@dataclass
class Config:
    copies: tuple[str, ...]         # folders of the submissions
    init: str = "runs/course/base/6M.pt"    # checkpoint that all start from
    data: str = "data/course"       # folder made by experiments.py base
    hidden: int = 0                 # > 0: the teacher's seed, of the hidden problems
    seed: int = 0                   # >= 0: {seed} of the command
    minutes: float = 10.0           # > 0: for each submission, on one core
    n_problems: int = 200           # > 0: hidden problems
    n_samples: int = 16             # > 0: answers to each, at T=0.6


def command_of(copy: Path, values: dict[str, str]) -> list[str]:
    """The submission's command with its values. UserError unless it begins with python."""
    try:
        words = shlex.split((copy / "course/submission.txt").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"course/submission.txt cannot be read ({error})") from None
    require(words[:1] == ["python"], "course/submission.txt: must be one line that begins with python")
    for name, value in values.items():
        words = [word.replace(f"{{{name}}}", value) for word in words]
    return [sys.executable, *words[1:]]


def rerun(copy: Path, out: Path, c: Config) -> Path:
    """Run a submission; returns the checkpoint that counts. UserError if there is none."""
    values = {"init": os.path.abspath(c.init), "data": os.path.abspath(c.data), "seed": str(c.seed)}
    command = command_of(copy, values | {"out": str(out)})
    log = out.with_suffix(".log")
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {}
    if cores:                                    # Linux: a process started now has one core
        os.sched_setaffinity(0, {max(cores)})
    try:
        status = limited(command, copy, log, 60 * c.minutes, grace=30)
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
    for name in ("final.pt", "last.pt"):
        if (out / name).exists():
            return out / name
    said = log.read_text(errors="replace").strip().rpartition("\n")[2]
    raise UserError(f"no checkpoint (status {status}: {said[-80:]})")


def sound_per_problem(path: Path, c: Config) -> np.ndarray:
    """Share of sound answers (problems,) to the hidden ones. UserError unless the checkpoint is of the model
    that was given and has grown from it."""
    first, _, parents = load_model(c.init)
    model, tokenizer, lineage = load_model(path)
    require(model.config == first.config, "another model than the one given")
    require(lineage[:len(parents)] == parents, "not grown from the checkpoint that was given")
    problems = make_problems(c.hidden, "test", c.n_problems, 0)
    attempts = attempt(model, tokenizer, problems, c.n_samples, .6, 80, generator(c.hidden, "evaluation"))
    return np.array(attempts.per_problem(attempts.sound)) / c.n_samples


def run(c: Config) -> None:
    """Rerun and score every submission, then print the board; one that fails has 0 and a reason."""
    check_fields(c)
    load_model(c.init)
    require(Path(c.data, "train.jsonl").is_file(), f"{c.data}: holds no train.jsonl")
    board = []
    for copy in map(Path, c.copies):
        require(copy.is_dir(), f"{copy}: no such folder")
        with TemporaryDirectory(prefix="earlybird-board-") as temporary:
            try:
                each, why = sound_per_problem(rerun(copy, Path(temporary, "run"), c), c), ""
            except UserError as error:
                each, why = np.zeros(1), str(error)
        board.append((each.mean(), f"{copy!s:30s}", interval(bootstrap_means(each, 0)), why))
    for place, (mean, name, (low, high), why) in enumerate(sorted(board, reverse=True), 1):
        print(f"{place:2d}  {name}{mean:7.1%} sound  [{low:.1%}, {high:.1%}]  {why}")


if __name__ == "__main__":
    main(run, Config)
