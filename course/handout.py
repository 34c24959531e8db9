"""Bring the tables of course/README.md up to date: the functions, and the ranges measured by experiments.py.

    python course/handout.py
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

from checkpoint import atomic_write  # noqa: E402
from course.experiments import EXPERIMENTS, RANGES  # noqa: E402
from course.functions import FUNCTIONS, ROOT  # noqa: E402

HANDOUT = ROOT / "course/README.md"
# of a further run, from the spread of n seeds: Student's t for 95 %, times the root of 1 + 1/n
SPREADS = {2: 15.6, 3: 5.0, 4: 3.6, 5: 3.0}


def functions(part: int) -> list[str]:
    """The table of an assignment's functions."""
    rows = [f"| `{f.name}` | {f.title} | {f.points} | {f.seconds} |" for f in FUNCTIONS if f.part == part]
    return ["| function | | points | seconds |", "|---|---|---|---|", *rows]


def ranges(name: str, measured: dict) -> list[str]:
    """The table of an experiment's numbers: mean ± the width in which 95 % of further seeds lie."""
    e = EXPERIMENTS[name]
    rows = ["| arm | " + " | ".join(e.numbers) + " |", "|---" * (1 + len(e.numbers)) + "|"]
    for arm in e.arms:
        cells = ["not measured yet"] * len(e.numbers)
        if measured:
            factor = SPREADS.get(len(measured["seeds"]), 2.5)
            found = measured["experiments"][name][arm]
            cells = [f"{mean:.3g} ± {factor * spread:.2g}" for mean, spread in map(found.get, e.numbers)]
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return rows


def handout(text: str, measured: dict) -> str:
    """The text with its tables as they should be: each between <!-- NAME: begin --> and <!-- end -->."""
    def table(match: re.Match) -> str:
        name = match[2]
        rows = functions(int(name)) if name.isdigit() else ranges(name, measured)
        return "\n".join([match[1], *rows, match[3]])
    return re.sub(r"(<!-- (\w+): begin -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    found = json.loads(RANGES.read_bytes()) if RANGES.exists() else {}
    atomic_write(HANDOUT, handout(HANDOUT.read_text(encoding="utf-8"), found).encode())
