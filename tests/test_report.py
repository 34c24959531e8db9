"""The statistics behind the verdicts, and the report from made-up and from stored results."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import report
import study
from checkpoint import UserError
from worlds import snapshot

STORED = [p for p in sorted(Path(report.__file__).parent.glob("results/*/results.jsonl"))
          if "how" in json.loads(p.open().readline())]


# ---- statistics ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("df, p975, p99", [(1, 12.706, 31.821), (2, 4.303, 6.965), (5, 2.571, 3.365),
                                           (30, 2.042, 2.457), (299, 1.968, 2.339)])
def test_quantiles_are_those_of_a_printed_table(df, p975, p99):
    """Of Student's t."""
    assert [report.t_quantile(p, df) for p in (.975, .99)] == pytest.approx([p975, p99], abs=6e-4)


@pytest.mark.parametrize("S, N", [(2, 3), (3, 50), (6, 4)])
@pytest.mark.parametrize("seed_sd, problem_sd", [(1, 3), (3, 0), (0, 0)])
def test_the_interval_is_that_of_an_analysis_of_variance(S, N, seed_sd, problem_sd):
    """By the textbook's squared totals. Without any effect the variance of the rest is the least."""
    gen = np.random.default_rng(S)
    x = gen.normal(0, 1, (S, N))
    x -= x.mean(0) + x.mean(1, keepdims=True) - x.mean()
    x += seed_sd * gen.normal(5, 1, (S, 1)) + problem_sd * gen.normal(0, 1, N)
    seeds, problems, cells = (sum(t * t for t in totals) / n - x.sum() ** 2 / x.size
                              for totals, n in ((x.sum(1), N), (x.sum(0), S), (x.flat, 1)))
    dfs = [S - 1, N - 1, (S - 1) * (N - 1)]
    squares = [total / df for total, df in zip((seeds, problems, cells - seeds - problems), dfs)]
    variance = max(squares[0] + squares[1] - squares[2], squares[2])
    df = max(1, variance ** 2 / sum(square ** 2 / df for square, df in zip(squares, dfs)))
    half = report.t_quantile(.975, df) * (variance / x.size) ** .5
    assert report.interval(x) == pytest.approx((x.mean(), x.mean() - half, x.mean() + half))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("comparisons, t", [(1, 2.5706), (2.5, 3.3649)])
def test_one_seed_or_one_problem_has_the_interval_of_one_sample(axis, comparisons, t):
    """mean ± t sd/√n with the printed t, of 99 % for Bonferroni's 2.5 comparisons; equal values are a point,
    one number has none."""
    x = np.array([3., -1., 4., 1., -5., 9.])
    half = t * x.std(ddof=1) / 6 ** .5
    _, low, high = report.interval(np.expand_dims(x, axis), comparisons)
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), rel=1e-4)
    assert report.interval(np.full((3, 6), 7.)) == (7, 7, 7)
    assert np.isnan(report.interval(x[:1, None])[1:]).all()


@pytest.mark.parametrize("seed_sd", [0, 3, 8])
def test_the_interval_covers_the_truth(seed_sd):
    """In 90 % of 1,000 draws or more: problems differ by 20 points, a problem between seeds by 20."""
    gen = np.random.default_rng(seed_sd)
    covered = 0
    for _ in range(1_000):
        x = gen.normal(0, 20, (3, 300)) + gen.normal(0, 20, 300) + gen.normal(0, seed_sd, (3, 1))
        _, low, high = report.interval(x)
        covered += low <= 0 <= high
    assert covered >= 900


# ---- claims ----------------------------------------------------------------------------------------------
def record(recipe: str, right: list[int], seed: int = 0, at: str = "4M", sound: list[int] | None = None,
           samples: int = 64, hits: str = "1", **more) -> dict:
    """A made-up evaluation of problems of one, two, one, ... operations; hard: three, four, three, ..."""
    easy, hard = ({"samples": samples, "right_per_problem": right, "sound_per_problem": sound or right,
                   "operations": ([n, n + 1] * 9)[:len(right)], "guess": {"1": .01, "32": .2}, "unparsed": 0,
                   "answer_entropy": 1, "distinct_completions": 2, "styles": {"tens": 1.}} for n in (1, 3))
    return {"base": "base", "at": at, "recipe": recipe, "seed": seed, "step": -1, "how": "", "nll": [],
            "cost": {"flops": 1, "seconds": 60}, "curve": [[10, .2, 0., 5, .3, .2]], "noise": [1., 50.],
            "styles": [[10, {"tens": 1.}]], "validation": [[0, .1], [10, .2], [20, .3]],
            "problems": {"easy": easy, "hard": hard}, "benchmarks": {"recall": {"hits": 40 * hits}},
            "bits_per_byte": .3} | more


@pytest.mark.parametrize("low, high, expected", [
    (10.1, 20, "reproduced"), (9.9, 20, "undecided"), (-5, 10.1, "undecided"), (-5, 9.9, "not reproduced")])
def test_the_verdict_on_each_side_of_the_margin(low, high, expected):
    """Two problems: the interval is their mean ± 12.706 times half their distance."""
    half = (high - low) / 2 / 12.7062
    x = (low + high) / 2 + np.array([[-half, half]])
    assert report.judged("C1", "", "", "", x, 10)[6] == f"{expected} (1 seed)"


@pytest.mark.parametrize("ats, expected", [
    (["4M"], [[50, 0], [25, 0]]), (["8M"], [[100, 0], [100, 0]]), (["4M", "8M"], [[62.5, 0]])])
def test_a_difference_pairs_seeds(ats, expected):
    """RL with seeds 0, 1 and 2 at 4M, SFT with 0 and 1; at 8M both with 1 and 2: only seed 1 has all."""
    records = [record("SFT", [0, 32]), record("SFT", [32, 32], 1), record("RL", [64, 64], 2),
               record("RL", [32, 32]), record("RL", [48, 32], 1)]
    for seed in (1, 2):
        records += [record("SFT", [0, 0], seed, "8M"), record("RL", [64, 0], seed, "8M")]
    assert report.difference(records, "RL", "SFT", "easy pass@1", ats) == pytest.approx(np.array(expected))
    assert report.difference(records, "RL", "fused", "easy pass@1", ats) is None


def test_a_run_is_compared_with_the_base_of_its_seed():
    """A seed is one of pretraining, too: 16 → 32 of 64 with one, 48 → 64 with another are 25 points each."""
    records = [record("base", [16]), record("base", [48], 1), record("RL", [32]), record("RL", [64], 1)]
    assert [row[4] for row in report.summary(records)] == ["50.0", "75.0 (+25.0 [+25.0, +25.0])"]


BASES = [record("base", [16, 16], seed, at) for seed in range(3) for at in ("4M", "8M")]


def runs(recipe: str, right: int = 16, **more) -> list[dict]:
    return BASES + [record(recipe, [right, right], seed, **more) for seed in range(3)]


def pair(right: int, reward: float) -> list[dict]:
    """Two seeds of RL, one of which has half of its samples right, at reward .2; another run from 8M."""
    second = record("RL", [right] * 2, 1, curve=[[10, .9, 0, 5, 0, 0], [20, reward, 0, 5, 0, 0]])
    return [*BASES, record("RL", [32, 32]), second, record("RL", [32, 32], at="8M")]


def mix(right: int) -> list[dict]:
    """RL on hard problems from 25 to 50 %, but from a base with more arithmetic to `right` of 64."""
    ends = {("0.5M, 60 %", "8M"): right, ("1M, 30 %", "8M"): 32, ("1M, 30 %", "3.8M"): 32}
    return [record(recipe, [n, n], at=at, base=base) for (base, at), end in ends.items()
            for recipe, n in (("base", 16), ("RL on hard", end))]


@pytest.mark.parametrize("records, says, metric, expected", [
    (runs("RL", 19), "RL lifts early", "easy pass@1", "not reproduced"),
    (runs("RL", 20), "RL lifts early", "easy pass@1", "reproduced"),
    (runs("RL", 20, sound=[17, 17]), "RL lifts early", "easy sound@1", "not reproduced"),
    (mix(33), "RL gains more on hard", "hard sound@1", "reproduced (1 seed)"),
    (mix(31), "RL gains more on hard", "hard sound@1", "not reproduced (1 seed)"),
    (runs("SFT"), "SFT costs more than 2", "general", "not reproduced"),
    (runs("SFT", hits="0"), "SFT costs more than 2", "general", "reproduced"),
    (runs("RL", bits_per_byte=.309), "RL costs at most .01", "bits per byte", "reproduced"),
    (runs("RL", bits_per_byte=.311), "RL costs at most .01", "bits per byte", "not reproduced"),
    (pair(32, .2), "seeds with equal", "easy pass@1", "not reproduced"),
    (pair(48, .22), "seeds with equal", "easy pass@1", "reproduced"),
    (pair(48, .24), "no two seeds", "easy pass@1", "undecided")])
def test_a_claim_is_judged_by_its_own_rule(records, says, metric, expected):
    """C1: 5 points (3.2 of 64) from early checkpoints such as 4M; C4: against both models of twice the size;
    C6: 2 points or .01 bits; C9: only seeds whose last training rewards agree."""
    rows = [row for row in report.judge(records) if row[1].startswith(says) and row[2] == metric]
    assert [row[6] for row in rows] == [expected] * (2 if rows[0][0] == "C4" else 1)
    assert rows[0][0] != "C1" or rows[0][3] == "4M"


@pytest.mark.parametrize("accuracy, recipe, expected", [
    (1.4, "RL", 3.8), (10.4, "SFT", 35.5), (14.8, "SFT→RL", 53.6), ((7.3 * 10.4) ** .5, "RL", 49.65),
    (1.3, "RL", np.nan), (14.9, "RL", np.nan), (0, "RL", np.nan), (7.3, "task", np.nan)])
def test_the_paper_where_its_base_is_as_accurate(accuracy, recipe, expected):
    """Its numbers at its checkpoints, the mean halfway (in the logarithm) between two, nothing beyond."""
    assert report.paper_at(accuracy, recipe, "easy pass@1") == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("metric, paper", [("easy pass@1", "+15.8"), ("easy sound@1", "")])
def test_a_checkpoint_s_row_has_the_paper_s_difference(metric, paper):
    """From 7.3 % the paper's RL reaches 47.4 %, its SFT 31.6 %; nothing is known about sound answers."""
    records = [record(recipe, [right] * 2, samples=1000)
               for recipe, right in (("base", 73), ("RL", 400), ("SFT native", 300))]
    rows = list(report.judge(records))
    i = [(row[0], row[2]) for row in rows].index(("C3", metric))
    assert rows[i + 1][:5] == ["", "base 7.3 %", "", "4M", rows[i][4]] and rows[i + 1][7] == paper


# ---- tables ----------------------------------------------------------------------------------------------
RUNS = [record("base", [64, 1, 0, 0]), record("RL", [0, 64, 64, 32], sound=[0, 32, 16, 0])]


def test_problems_newly_solved_and_lost_are_counted():
    """Sound answers: the base has some to problems 0 and 1, the run to 1 and 2."""
    assert [row[5:11] for row in report.solved(RUNS)][2:] == [[2, 2, 1, 1, "1.00", "2"]] * 2


def test_problems_are_told_apart_by_their_operations():
    """Problems 0 and 2 have one operation: (0 + 64) / 128 are right, (0 + 16) / 128 sound."""
    assert list(report.by_operations(RUNS))[1][3:] == ["50.0 / 12.5", "75.0 / 25.0"] * 2


def test_an_evaluation_without_benchmarks_leaves_two_columns_empty():
    r = {k: v for k, v in RUNS[0].items() if k not in ("benchmarks", "bits_per_byte")}
    row, = report.evaluations([r | {"how": "--no-benchmarks", "step": 50}])
    assert row[2] == "base, step 50, --no-benchmarks" and row[11:] == ["37.5", "", "", "1.0e+00", "1.0"]


@pytest.mark.parametrize("gain, expected", [(5, 50), (10, 75), (30, np.nan)])
def test_steps_to_a_gain(gain, expected):
    """From 10 % to 15 % is a gain of 5 points, though .1 + .05 > .15 in floating point."""
    r = {"validation": [[0, .1], [25, .14], [50, .15], [75, .3]]}
    assert report.steps_to(r, gain) == pytest.approx(expected, nan_ok=True)


def test_the_curves_are_means_of_ten_steps():
    """Twelve steps: ten, then two; the gradient's noise was measured in two of them."""
    lines = [{"step": i, "reward": i / 10, "kl": .5, "flops": i, "right": 1} for i in range(1, 11)]
    lines += [{"step": i, "reward": .8, "kl": .1, "flops": i, "sound": i / 10} for i in (11, 12)]
    lines[3] |= {"gradient_square": 1, "gradient_trace": 10, "style tens": 1.}
    lines[11] |= {"gradient_square": 3, "gradient_trace": 30, "style words": .5}
    assert study.rl_curves(lines) == {
        "curve": [[10, .55, .5, 10, 1, 0], [12, .8, .1, 12, 0, 1.15]], "noise": [2, 20],
        "styles": [[10, {"tens": .1}], [12, {"words": .25}]]}


# ---- figures ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset, more", [
    *((name, "early styles dial") for name in ("quick", "main", "raw", "dial", "controls")),
    ("luck", "early styles luck"), ("wide", "early styles dial steps wide"),
    ("rollouts", "early styles steps"), ("composition", "composition")])
def test_a_study_has_its_figures(preset, more, tmp_path, monkeypatch):
    """Each names all that it draws, the first every recipe; guesses are beside pass@32."""
    drawn = {}
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, path, **_: drawn.update({path.stem: figure}))
    monkeypatch.setattr(report.Figure, "tight_layout", lambda _: None)       # slow
    records = []
    for x in study.grid(study.STUDIES[preset], study.Config()):
        if x.evaluation and x.seed == 0:
            nll = [len(x.recipe)] if study.RECIPES.get(x.recipe, "").startswith("sft.py") else []
            records.append(record(x.recipe, [32, 16], at=x.at, base=x.base, step=x.step, how=x.how, nll=nll))
    report.report(tmp_path, records, tuple(study.RECIPES))
    assert drawn.keys() == {"main", "matched", "parallel", "forgetting", *more.split()}
    for name, figure in drawn.items():
        named = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
        labels = [{curve.get_label() for curve in axis.containers} for axis in figure.axes]
        assert named == set.union(*labels), name
        for axis, curves in zip(figure.axes, labels):
            of_many = axis.get_title().endswith(("pass@32 (%)", "pass@k (%)")) and name != "matched"
            assert ("guessing" in curves) == of_many, name
        assert name != "main" or named > {r["recipe"] for r in records if r["base"] == records[0]["base"]}


def test_recipes_stand_side_by_side_at_the_last_checkpoint_that_has_the_most():
    """4M and 8M have RL, 9M has not."""
    ends = [*runs("RL"), *runs("RL", at="8M"), record("base", [16], at="9M")]
    assert {panel.title.split(":")[0] for panel in report.parallel([], ends)} == {"from 8M"}


@pytest.mark.parametrize("prose, edges", [(7., [.5, 7.]), (.5, [.5])])
def test_the_dial_has_the_foreignness_of_demonstrations_on_its_axis(prose, edges):
    """Nats per token. RL, which sees none, is a line from the least to the most: drawn once if they agree."""
    records = [record("base", [16]), record("RL", [32]), record("SFT", [40], nll=[.5]),
               record("SFT prose", [20], nll=[prose])]
    points = [point[:2] for point in next(report.dial([], records)).points]
    assert points[:2] == [("SFT", .5), ("SFT prose", prose)]
    assert sorted(x for name, x in points if name == "RL") == edges


def test_a_style_that_a_run_does_not_use_has_the_share_0():
    """Else the mean of the seeds that still use it would be drawn, and nothing once it has died out."""
    ends = [record("RL", [32], styles=[[10, {"tens": .6, "words": .4}], [20, {"tens": 1.}]]),
            record("RL", [32], 1, styles=[[10, {"tens": 1.}], [20, {"tens": 1.}]])]
    panel, = report.styles([], ends)
    assert sorted(point[1:] for point in panel.points if point[0] == "words") == [
        (10, [0]), (10, [40]), (20, [0]), (20, [0])]


def colours(names: list[str]) -> dict[str, object]:
    figure = report.plot([report.Panel("", "", [(name, 0, [1]) for name in names])], tuple(study.RECIPES))
    return {drawn.get_label(): drawn.lines[0].get_color() for drawn in figure.axes[0].containers}


def test_a_recipe_has_one_colour_in_all_studies():
    """Whatever else was run; and the first ten recipes can be told apart."""
    everything = colours(["base", *study.RECIPES])
    assert colours(["base", "SFT", "RL"]).items() <= everything.items()
    assert len({everything[name] for name in list(study.RECIPES)[:10]}) == 10


@pytest.mark.parametrize("n, rows, columns", [(1, 1, 1), (3, 1, 3), (4, 1, 4), (5, 2, 4), (9, 3, 4)])
def test_any_number_of_panels_is_drawn(n, rows, columns):
    axes = report.plot([report.Panel("", "", [("base", 0, [1])])] * n, ()).axes
    assert len(axes) == n and axes[0].get_gridspec().get_geometry() == (rows, columns)


# ---- the report ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stored", STORED, ids=lambda p: p.parent.name)
def test_the_published_report_is_what_its_results_say(stored, tmp_path):
    """Letter for letter, beside the same figures."""
    out = tmp_path / stored.parent.name
    out.mkdir()
    report.report(out, study.stored(stored.parent), tuple(study.RECIPES))
    assert (out / "report.md").read_bytes() == stored.with_name("report.md").read_bytes()
    assert {p.name for p in out.glob("*.png")} == {p.name for p in stored.parent.glob("*.png")}


def test_base_models_alone_are_drawn_and_redrawn_with_equal_bytes(tmp_path):
    """After a study whose recipes failed."""
    report.report(tmp_path, BASES)
    first = snapshot(tmp_path)
    report.report(tmp_path, BASES)
    assert snapshot(tmp_path) == first and b"| base | 8M | base | 3 |" in first["report.md"]
    assert all(len(first[f"{name}.png"]) > 5_000 for name in ("main", "matched", "parallel", "forgetting"))


def test_runs_from_a_base_without_evaluation_are_left_out(tmp_path, monkeypatch):
    """If only that cell failed, the report ended in a traceback and the failed cell was not named."""
    cells = [SimpleNamespace(evaluation=True, makes=tmp_path, record=r)
             for r in (*RUNS, record("RL", [32], at="8M"))]
    monkeypatch.setattr(study, "grid", lambda *_: cells)
    monkeypatch.setattr(study, "run_cells", lambda *_: ["base 8M"])
    monkeypatch.setattr(study, "record", lambda x: x.record)
    with pytest.raises(UserError, match="failed.*base 8M"):
        study.study(study.Config(out=str(tmp_path)))
    text = (tmp_path / "quick" / "report.md").read_text(encoding="utf-8")
    assert "| base | 4M | RL | 1 |" in text and "8M" not in text


# ---- the claims of all studies in one table --------------------------------------------------------------
BEFORE = b"# Results\r\n\xff prose with | bars |\n<!-- claims: made by python study.py --report results -->"
AFTER = b"<!-- end of claims -->\nthe rest, without a newline at its end"


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder with two studies, one of which has two checkpoints, and a README with an old table."""
    for name, records in {"one": runs("RL", 32), "two": [*runs("RL", 32), *runs("RL", 48, at="8M")]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "README.md").write_bytes(BEFORE + b"\n| an old table |\n" + AFTER)
    return tmp_path


def test_the_claims_of_all_studies_are_written_between_the_markers(results):
    """A row per claim, metric and study, none per checkpoint; other bytes stay, a second time too."""
    for _ in range(2):
        study.study(study.Config(report=str(results)))
        text = (results / "README.md").read_bytes()
        assert text.startswith(BEFORE + b"\n") and text.endswith(b"\n" + AFTER)
    table, count = text[len(BEFORE):-len(AFTER)].decode().strip().split("\n\n")
    rows = [[column.strip() for column in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["study", "claim", "what it says", "metric", "checkpoints",
                       "difference in points [95 %]", "margin", "verdict", "the paper"]
    one, two = (row for row in rows if row[2] == "RL costs at most 2 points of general capability")
    assert one[3:] == ["general", "4M", "+0.0 [+0.0, +0.0]", "-2", "reproduced", "44.4 against 44.3"]
    assert (one[:2], two[:2], two[4]) == (["one", "C6"], ["two", "C6"], "4M, 8M")
    assert count.startswith(f"{len(rows) - 2} rows") and all(row[1] for row in rows)
    assert not list(results.glob("*/report.md"))


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
