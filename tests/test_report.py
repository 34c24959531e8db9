"""The statistics behind the verdicts, and the report from stored results."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import report
import study
from checkpoint import UserError

STORED = sorted(Path(report.__file__).parent.glob("results/*/results.jsonl"))


# ---- statistics ------------------------------------------------------------------------------------------
def record(recipe: str, right: list[int], seed: int = 0, at: str = "4M", hits: str = "1", **more) -> dict:
    """A made-up evaluation: 64 samples of each problem, easy and hard alike."""
    d = {"samples": 64, "right_per_problem": right, "styles": {"tens": 1.0}, "answer_entropy": 1.0,
         "distinct_completions": 2.0, "unparsed": 0.0}
    return {"base": "base", "at": at, "recipe": recipe, "seed": seed, "step": -1, "shots": 0,
            "cost": {"flops": 1, "seconds": 60}, "curve": [[1, .2, 0., 5]], "validation": [[1, .1]],
            "problems": {"easy": d, "hard": d}, "benchmarks": {"recall": {"hits": 40 * hits}},
            "bits_per_byte": .3} | more


@pytest.mark.parametrize("low, high, expected", [
    (10.1, 20, "reproduced"), (9.9, 20, "undecided"), (-5, 10.1, "undecided"), (-5, 9.9, "not reproduced")])
def test_the_verdict_on_each_side_of_the_margin(low, high, expected):
    """Two seeds without spread over problems: the interval reaches from one to the other."""
    x = np.repeat([[low], [high]], 10, axis=1)
    assert report.judged("C1", "", "", x, 10)[5] == f"{expected} (2 seeds)"


def test_the_interval():
    """A point for equal values; the extremes for three seeds without spread over problems; for one seed and
    many problems the normal approximation, mean ± 1.96 sd/√N; wider if x is the largest of several pairs."""
    assert report.bootstrap(np.full((3, 50), 7.0)) == (7, 7, 7)
    assert report.bootstrap(np.repeat([[0.0], [10.0], [20.0]], 100, axis=1)) == (10, 0, 20)
    x = np.random.default_rng(1).normal(5, 10, (1, 400))
    mean, low, high = report.bootstrap(x)
    assert (high - low) / 2 == pytest.approx(1.96 * 10 / 20, rel=.15) and low < mean < high
    _, lower, higher = report.bootstrap(x, 3)
    assert lower < low and high < higher


def test_a_difference_pairs_seeds():
    """The base is repeated; of runs with seeds 0 and 2 and 0 and 1 only seed 0 is compared."""
    records = [record("base", [0, 32]), record("RL", [32, 32]), record("RL", [64, 32], 2),
               record("SFT", [16, 32]), record("SFT", [48, 0], 1)]
    gain = report.difference(records, "RL", "base", "easy pass@1", ["4M"])
    assert gain == pytest.approx(np.array([[50, 0], [100, 0]]))
    over = report.difference(records, "RL", "SFT", "easy pass@1", ["4M"])
    assert over == pytest.approx(np.array([[25, 0]]))
    assert report.difference(records, "RL", "fused", "easy pass@1", ["4M"]) is None


def test_a_run_is_compared_with_the_base_of_its_seed():
    """If pretraining, too, has seeds: 16 → 32 of 64 with seed 0, 48 → 64 with seed 1 are 25 points each."""
    records = [record("base", [16]), record("base", [48], 1), record("RL", [32]), record("RL", [64], 1)]
    gain = report.difference(records, "RL", "base", "easy pass@1", ["4M"])
    assert gain == pytest.approx(np.array([[25], [25]]))
    rows = {tuple(row[2:4]): row[4] for row in report.evaluations(records)}
    assert rows["RL", 0].startswith("50.0 (+25.0 ") and rows["RL", 1].startswith("100.0 (+25.0 ")
    assert [row[4] for row in report.summary(records)] == ["50.0", "75.0 (+25.0 [+25.0, +25.0])"]


START = [record("base", [16]), record("base", [40], at="8M")]
HALF = [record("RL", [32]), record("RL", [32], at="8M")]


def runs(recipe: str, right: int = 16, hits: str = "1") -> list[dict]:
    return START + [record(recipe, [right], seed, hits=hits) for seed in range(3)]


def pair(right: int, reward: float) -> list[dict]:
    """Two seeds, one of which has half of its samples right, at reward .2."""
    return START + HALF + [record("RL", [right], 1, curve=[[1, reward, 0., 5]])]


@pytest.mark.parametrize("records, says, expected", [
    (runs("RL"), "RL lifts pass@1", "not reproduced"), (runs("RL", 48), "RL lifts pass@1", "reproduced"),
    (runs("SFT"), "SFT costs", "not reproduced"), (runs("SFT", hits="0"), "SFT costs", "reproduced"),
    (pair(32, .2), "seeds with equal", "not reproduced"), (pair(48, .2), "seeds with equal", "reproduced"),
    (pair(48, .3), "no two seeds", "undecided")])
def test_a_claim_is_judged_by_its_own_rule(records, says, expected):
    """C1 by the gain at early checkpoints such as 4 M of 8 M (50 points are above the margin of 10), C6 by
    the items that SFT loses (none or all), C9 only by seeds whose training rewards agree."""
    row, = (row for row in report.judge(records) if row[1].startswith(says))
    assert row[5] == expected and (row[0] != "C1" or row[2] == "4M of 8M")


def test_problems_newly_solved_and_lost_are_counted():
    """Base solves problems 0 and 1, the run solves 1 and 2: one new, one lost."""
    records = [record("base", [64, 1, 0]), record("RL", [0, 64, 64])]
    row, = (row for row in report.solved(records) if row[2] == "RL" and row[4] == "easy")
    assert row[5:11] == [2, 2, 1, 1, 1, 1]


# ---- the report ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stored", STORED, ids=lambda p: p.parent.name)
def test_the_published_report_is_what_its_results_say(stored, tmp_path):
    """Text equal to the published one; the figures have the same names and are not empty."""
    records = [json.loads(line) for line in stored.read_text().splitlines()]
    out = tmp_path / stored.parent.name
    out.mkdir()
    claims = report.report(out, records, tuple(study.RECIPES))
    text = (out / "report.md").read_text(encoding="utf-8")
    assert claims in text and text == stored.with_name("report.md").read_text(encoding="utf-8")
    assert {p.name for p in out.glob("*.png")} == {p.name for p in stored.parent.glob("*.png")}
    assert all((out / f"{name}.png").stat().st_size > 5_000 for name in ("main", "parallel", "forgetting"))


def colours(names: list[str]) -> dict[str, object]:
    figure = report.plot([("", "", "o", [(name, 0, [1]) for name in names])], tuple(study.RECIPES))
    return {drawn.get_label(): drawn.lines[0].get_color() for drawn in figure.axes[0].containers}


def test_a_recipe_has_one_colour_in_all_studies():
    """Whatever else was run; and the first ten recipes can be told apart."""
    everything = colours(["base", *study.RECIPES])
    assert colours(["base", "SFT", "RL"]).items() <= everything.items()
    assert len({everything[name] for name in list(study.RECIPES)[:10]}) == 10


@pytest.mark.parametrize("n, rows, columns", [(1, 1, 1), (3, 1, 3), (4, 2, 2), (5, 2, 3), (7, 2, 4)])
def test_any_number_of_panels_is_drawn(n, rows, columns):
    """Five had four places."""
    axes = report.plot([("", "", "o", [("base", 0, [1])])] * n, ()).axes
    assert len(axes) == n and axes[0].get_gridspec().get_geometry() == (rows, columns)


def test_runs_from_a_base_without_evaluation_are_left_out(tmp_path, monkeypatch):
    """If only that cell failed, the report ended in a traceback and the failed cell was not named."""
    records = [record("base", [16]), record("RL", [32]), record("RL", [32], at="8M")]
    cells = [SimpleNamespace(evaluation=True, makes=tmp_path, record=r) for r in records]
    monkeypatch.setattr(study, "grid", lambda *_: cells)
    monkeypatch.setattr(study, "run_cells", lambda *_: ["base 8M"])
    monkeypatch.setattr(study, "record", lambda x: x.record)
    with pytest.raises(UserError, match="failed.*base 8M"):
        study.study(study.Config(out=str(tmp_path)))
    report.report(tmp_path, records)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| base | 4M | RL | 1 |" in text and "8M" not in text


def test_the_dial_has_the_demonstrations_foreignness_on_its_axis(tmp_path):
    """Four panels for each checkpoint, a point per run at its nats per token; recipes without any are left
    out; a study of raw and annealed bases is drawn."""
    records = [record("raw", [8]), record("base", [16]), record("RL", [32]),
               record("SFT native", [40], nll=[.25]), record("SFT prose", [20], nll=[7.])]
    panels = list(report.dial([], records))
    assert len(panels) == 4 and {panel[0].split(" pass")[0] for panel in panels} >= {"from 4M: easy"}
    assert [point[:2] for point in panels[0][3]] == [("SFT native", .25), ("SFT prose", 7.)]
    report.report(tmp_path, records, tuple(study.RECIPES))
    assert "![dial](dial.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "dial.png").stat().st_size > 10_000


def test_a_report_of_base_models_alone_is_drawn(tmp_path):
    """After a study whose recipes failed."""
    report.report(tmp_path, [record("base", [16]), record("base", [20], at="8M")])
    assert "| base | 8M | base | 1 |" in (tmp_path / "report.md").read_text(encoding="utf-8")


# ---- the claims of all studies in one table ---------------------------------------------------------------
BEFORE = b"# Results\r\n\xff prose with | bars |\n<!-- claims: made by python study.py --report results -->"
AFTER = b"<!-- end of claims -->\nthe rest, without a newline at its end"


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder with two studies, one of which has two checkpoints, and a README with an old table."""
    one = [*START, record("RL", [32])]
    for name, records in {"one": one, "two": [*one, record("RL", [48], at="8M")]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "README.md").write_bytes(BEFORE + b"\n| an old table |\n" + AFTER)
    return tmp_path


def test_the_claims_of_all_studies_are_written_between_the_markers(results):
    """A row per claim and study, without the rows per checkpoint; the other bytes stay, a second time too."""
    for _ in range(2):
        study.study(study.Config(report=str(results)))
        text = (results / "README.md").read_bytes()
        assert text.startswith(BEFORE + b"\n") and text.endswith(b"\n" + AFTER)
    table = text[len(BEFORE):-len(AFTER)].decode().strip().splitlines()
    rows = [[column.strip() for column in line.strip("|").split("|")] for line in table]
    assert rows[0] == ["study", "claim", "what it says", "checkpoints", "difference in points [95 %]",
                       "margin", "verdict", "the paper (%)"]
    first, second = (i for i, row in enumerate(rows) if row[2] == "direct RL lifts pass@1")
    assert rows[first] == ["one", "C5", "direct RL lifts pass@1", "4M of 8M", "+25.0 [+25.0, +25.0]", "+0",
                           "reproduced (1 seed)", "4 → 39 along RL"]
    assert second == first + 1 and rows[second][::3][:2] == ["two", "4M, 8M of 8M"]
    assert all(row[1] for row in rows) and not list(results.glob("*/report.md"))


@pytest.mark.parametrize("readme", [None, b"", BEFORE, AFTER, AFTER + b"\n" + BEFORE])
def test_without_the_markers_nothing_is_written(results, readme):
    """Also if they are in the wrong order; the message is one line that quotes both."""
    (results / "README.md").unlink()
    if readme is not None:
        (results / "README.md").write_bytes(readme)
    with pytest.raises(UserError) as error:
        study.study(study.Config(report=str(results)))
    message = str(error.value)
    assert "\n" not in message and report.BEGIN.decode() in message and report.END.decode() in message
    assert readme is None or (results / "README.md").read_bytes() == readme


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="results.jsonl: not found"):
        study.study(study.Config(report=str(tmp_path)))
