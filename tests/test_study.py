"""The grid behind the README's figure: what is run, what is not run again, what is reported."""
import json
from pathlib import Path

import study

STORED = Path(study.__file__).parent / "results" / "pipeline" / "results.jsonl"


def fake(tmp_path: Path, name: str, code: str, needs: str = "") -> dict:
    """A cell that runs Python code instead of a script of ours (a name 'data' gets no --threads option)."""
    return {"name": name, "command": ["-c", code], "makes": tmp_path / name.replace(" ", ""),
            "needs": Path(needs)}


def test_every_cell_finds_what_it_needs():
    """A grid whose cells wait for files that no cell makes would never end."""
    cells = study.grid(study.Config())
    made = {x["makes"] for x in cells} | {Path(f"runs/base/{t}.pt") for t in study.TOKENS} | {Path(".")}
    assert all(x["needs"] in made for x in cells)
    assert len({x["makes"] for x in cells}) == len(cells)


def test_what_exists_is_not_run_again_and_failures_do_not_stop_the_rest(tmp_path):
    """A cell with a result is skipped; a failed one is named, and what waits for it; the others are run."""
    write = "import sys; open({!r}, 'a').write('x')"
    there, fresh = fake(tmp_path, "there", ""), fake(tmp_path, "fresh", "")
    there["makes"].write_text("old")
    there["command"][1] = write.format(str(there["makes"]))
    fresh["command"][1] = write.format(str(fresh["makes"]))
    broken = fake(tmp_path, "broken", "raise SystemExit(3)")
    orphan = fake(tmp_path, "orphan", "", needs=str(broken["makes"]))
    failed = study.run_cells([there, broken, orphan, fresh], tmp_path, jobs=2)
    assert there["makes"].read_text() == "old" and fresh["makes"].read_text() == "x"
    assert sorted(failed) == ["broken", "orphan"]


def test_the_report_agrees_with_the_stored_counts(tmp_path):
    """The published table can be redrawn; its pass@1 is the share of right samples (a closed form)."""
    records = [json.loads(line) for line in STORED.read_text().splitlines()]
    table = study.report(tmp_path, records)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert table == STORED.with_name("table.md").read_text().rstrip("\n")
    one = next(r for r in records if r["recipe"] == "base" and r["at"] == "8M")["problems"]["easy"]
    share = 100 * sum(one["right_per_problem"]) / (one["problems"] * one["samples"])
    assert f"| 8M | base | 0 | {share:.1f} |" in table
