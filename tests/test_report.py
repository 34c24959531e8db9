"""The statistics behind the verdicts, and the report from stored results."""
import json
from pathlib import Path

import numpy as np
import pytest

import report
import study
from checkpoint import UserError

ROOT = Path(report.__file__).parent
STORED = sorted((ROOT / "results").glob("*/results.jsonl"))


# ---- statistics ------------------------------------------------------------------------------------------

def record(recipe: str, right: list[int], seed: int = 0, at: str = "4M", hits: str = "10", **more) -> dict:
    """A made-up evaluation: 64 samples of each problem, easy and hard alike."""
    d = {"samples": 64, "right_per_problem": right, "styles": {"tens": 1.0}, "answer_entropy": 1.0,
         "distinct_completions": 2.0, "unparsed": 0.0}
    return {"base": "base", "at": at, "recipe": recipe, "seed": seed, "step": -1, "shots": 0,
            "cost": {"flops": 1, "seconds": 60}, "curve": [[1, .2, 0., 5]], "validation": [[1, .1]],
            "problems": {"easy": d, "hard": d}, "benchmarks": {"recall": {"hits": hits}}, "general_mean": .5,
            "bits_per_byte": .3} | more


@pytest.mark.parametrize("low, high, expected", [
    (10.1, 20, "reproduced"), (9.9, 20, "undecided"), (-5, 10.1, "undecided"), (-5, 9.9, "not reproduced")])
def test_verdict_on_each_side_of_the_margin(low, high, expected):
    assert report.verdict(low, high, 10) == expected


def test_the_interval_of_equal_values_is_a_point():
    assert report.bootstrap(np.full((3, 50), 7.0)) == (7.0, 7.0, 7.0)


def test_the_interval_has_the_width_of_the_normal_approximation():
    """One seed, many problems: mean ± 1.96 sd/√N."""
    x = np.random.default_rng(1).normal(5, 10, (1, 400))
    mean, low, high = report.bootstrap(x)
    assert (high - low) / 2 == pytest.approx(1.96 * 10 / 20, rel=.15) and low < mean < high


def test_seeds_that_disagree_widen_the_interval():
    """Three seeds with means 0, 10, 20 and no spread over problems: the interval reaches the extremes."""
    x = np.repeat([[0.0], [10.0], [20.0]], 100, axis=1)
    mean, low, high = report.bootstrap(x)
    assert mean == 10 and low == 0 and high == 20


def test_a_difference_pairs_seeds_and_repeats_the_base():
    records = [record("base", [0, 32]), record("RL", [32, 32]), record("RL", [64, 32], seed=1)]
    x = report.difference(records, "RL", "base", "easy pass@1", ["4M"])
    assert x == pytest.approx(np.array([[50, 0], [100, 0]]))
    assert report.difference(records, "RL", "SFT", "easy pass@1", ["4M"]) is None


def test_a_missing_run_leaves_the_seeds_that_both_have():
    """RL has seeds 0 and 2, SFT 0 and 1: only seed 0 is compared, and never one seed with another."""
    records = [record("RL", [64]), record("RL", [0], 2), record("SFT", [32]), record("SFT", [48], 1)]
    assert report.difference(records, "RL", "SFT", "easy pass@1", ["4M"]) == pytest.approx(np.array([[50]]))


def test_the_largest_of_several_pairs_is_judged_by_a_wider_interval():
    x = np.random.default_rng(1).normal(0, 10, (1, 200))
    _, low, high = report.bootstrap(x)
    _, lower, higher = report.bootstrap(x, 3)
    assert lower < low < high < higher


@pytest.mark.parametrize("gain, expected", [(0, "not reproduced"), (32, "reproduced")])
def test_claim_1_is_judged_by_the_gain_at_early_checkpoints(gain, expected):
    """4 M of 8 M tokens is early; a gain of 50 points is above the margin of 10, none is below it."""
    records = [record("base", [16] * 20), record("base", [40] * 20, at="8M")]
    records += [record("RL", [16 + gain] * 20, seed) for seed in range(3)]
    rows = [row for row in report.judge(records) if row[0] == "C1"]
    assert [row[2] for row in rows] == ["4M of 8M", "4M of 8M"] and rows[0][5] == expected


@pytest.mark.parametrize("lost, expected", [(0, "not reproduced"), (1, "reproduced")])
def test_claim_6_is_judged_by_what_sft_loses(lost, expected):
    """Half of the benchmark items lost is more than 2 points; none is not."""
    records = [record("base", [1] * 5, hits="1" * 40),
               *(record("SFT", [1] * 5, seed, hits="01"[1 - lost] * 40) for seed in range(3))]
    row = next(row for row in report.judge(records) if row[1].startswith("SFT costs"))
    assert row[5] == expected


@pytest.mark.parametrize("right, reward, expected", [
    (16, .2, "not reproduced"), (32, .2, "reproduced"), (32, .3, "undecided")])
def test_claim_9_needs_equal_rewards_and_different_scores(right, reward, expected):
    """Seeds at 25 % and 50 % count only if their training rewards agree."""
    records = [record("base", [0] * 30), record("RL", [16] * 30), record("RL", [16] * 30, at="8M"),
               record("RL", [right] * 30, 1, curve=[[1, reward, 0., 5]]), record("base", [0] * 30, at="8M")]
    verdicts = [row[5] for row in report.judge(records) if row[0] == "C9"]
    assert len(verdicts) == 1 and verdicts[0].startswith(expected)


def test_problems_newly_solved_and_lost_are_counted():
    """Base solves problems 0 and 1, the run solves 1 and 2: one new, one lost."""
    records = [record("base", [64, 1, 0]), record("RL", [0, 64, 64])]
    row = next(r for r in report.solved(records) if r[2] == "RL" and r[4] == "easy")
    assert row[5:11] == [2, 2, 1, 1, 1, 1]


# ---- the report ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stored", STORED, ids=lambda p: p.parent.name)
def test_the_published_report_is_what_its_results_say(stored, tmp_path):
    """Text equal to the published one; pass@1 of the first record is its share of right samples."""
    records = [json.loads(line) for line in stored.read_text().splitlines()]
    out = tmp_path / stored.parent.name
    out.mkdir()
    claims = report.markdown(report.CLAIMS_HEADER, report.judge(records))
    text = report.report(out, records, claims, tuple(study.RECIPES))
    assert text == stored.with_name("report.md").read_text() == (out / "report.md").read_text()
    assert all((out / f"{name}.png").stat().st_size > 5_000 for name in ("main", "parallel", "forgetting"))
    easy = records[0]["problems"]["easy"]
    share = 100 * sum(easy["right_per_problem"]) / (easy["problems"] * easy["samples"])
    assert report.values(records[0], "easy pass@1").mean() == pytest.approx(share)


def test_a_recipe_has_one_colour_in_all_studies():
    """Whatever else was run; and the first ten recipes of a study can be told apart."""
    order = tuple(study.RECIPES)
    everything = report.Shown([record(name, [1]) for name in ("base", *order)], order).colors
    some = report.Shown([record("base", [1]), record("SFT", [1]), record("RL", [1])], order).colors
    assert all(some[name] == everything[name] for name in ("base", "RL", "SFT"))
    assert len({everything[name] for name in order[:10]}) == 10


# ---- the claims of all studies in one table ---------------------------------------------------------------

BEFORE = b"# Results\r\n\xff prose with | bars |\n<!-- claims: made by python study.py --report results -->"
AFTER = b"<!-- end of claims -->\nthe rest, without a newline at its end"


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder with two studies, one of which has two checkpoints, and a README with an old table."""
    one = [record("base", [16] * 20), record("RL", [32] * 20), record("base", [40] * 20, at="8M")]
    two = [*one, record("RL", [48] * 20, at="8M")]
    for name, records in (("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
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
    assert ["one", "C5", "direct RL lifts pass@1", "4M of 8M", "+25.0 [+25.0, +25.0]", "+0",
            "reproduced (1 seed)", "4 → 39 along RL"] in rows
    lifts = [i for i, row in enumerate(rows) if row[2] == "direct RL lifts pass@1"]
    assert [rows[i][:2] for i in lifts] == [["one", "C5"], ["two", "C5"]] and lifts[1] == lifts[0] + 1
    assert rows[lifts[1]][3] == "4M, 8M of 8M"
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
    assert "\n" not in message and report.BEGIN in message and report.END in message
    assert readme is None or (results / "README.md").read_bytes() == readme


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="results.jsonl: not found"):
        study.study(study.Config(report=str(tmp_path)))
