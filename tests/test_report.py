"""The statistics behind the verdicts, and the report from made-up and from stored results."""
import html
import json
import re
import shutil
import subprocess
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
@pytest.mark.parametrize("n, t, t99", [(2, 12.706, 31.821), (3, 4.303, 6.965), (6, 2.571, 3.365),
                                       (31, 2.042, 2.457), (300, 1.968, 2.339)])
@pytest.mark.parametrize("axis", [0, 1])
def test_one_seed_or_one_problem_has_the_interval_of_one_sample(n, t, t99, axis):
    """mean ± t sd/√n with a printed table's t, of 99 % for Bonferroni's 2.5 comparisons; equal values are a
    point, one number has none. A figure's bars are the range of seeds that have one number each."""
    x = np.random.default_rng(n).normal(3, 1, n)
    mean, half = x.mean(), x.std(ddof=1) / n ** .5
    sample = np.expand_dims(x, axis)
    assert report.interval(sample) == pytest.approx((mean, mean - t * half, mean + t * half), rel=1e-3)
    assert report.interval(sample, 2.5)[2] == pytest.approx(mean + t99 * half, rel=1e-3)
    assert report.interval(np.full((3, n), 7.)) == (7, 7, 7)
    assert np.isnan(report.interval(x[:1, None])[1:]).all()
    assert report.spread(sample) == ((mean, min(x), max(x)) if axis else report.interval(sample))


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
           hard: list[int] | None = None, samples: int = 64, hits: str = "1", **more) -> dict:
    """A made-up evaluation of problems of one, two, one, ... operations; hard: three, four, three, ..."""
    problems = {}
    for name, n, rights, sounds in (("easy", 1, right, sound), ("hard", 3, hard or right, hard or sound)):
        problems[name] = {
            "samples": samples, "right_per_problem": rights, "sound_per_problem": sounds or rights,
            "operations": (f"{n}{n + 1}" * 9)[:len(rights)], "guess": {"1": .01, "32": .2}, "unparsed": 0,
            "answer_entropy": 1, "distinct_completions": 2, "styles": {"tens": 1.}}
    return {"base": "base", "at": at, "recipe": recipe, "seed": seed, "step": -1, "how": "", "nll": [],
            "cost": {"flops": 1, "seconds": 60}, "curve": [[10, .2, 0., 5, .3, .2]], "noise": [1., 50.],
            "styles": [[10, {"tens": 1.}]], "validation": [[0, .1], [10, .2], [20, .3]],
            "problems": problems, "benchmarks": {"recall": {"hits": 40 * hits}}, "bits_per_byte": .3} | more


def three(recipe: str, gain: int = 0, unsound: int = 0, **more) -> list[dict]:
    """Three seeds, whose bases have 8, 16 and 24 of 64 samples right; so many more are, or are not sound."""
    rights = [8 + 8 * seed + gain for seed in range(3)]
    return [record(recipe, [n, n], seed, sound=[n - unsound] * 2, **more) for seed, n in enumerate(rights)]


BASES = three("base", at="2M") + three("base") + three("base", at="8M")


@pytest.mark.parametrize("seeds, low, high, expected", [
    (3, 10.2, 20, "reproduced"), (3, 9.8, 20, "undecided"), (3, -5, 10.2, "undecided"),
    (3, -5, 9.8, "not reproduced"), (2, -5, 9.8, "not reproduced (two seeds)"), (1, 10.2, 20, "one seed")])
def test_the_verdict_on_each_side_of_the_margin(seeds, low, high, expected):
    """Of two problems, whatever the seed: the interval is their mean ± 12.706 times half their distance."""
    mean, half = (low + high) / 2, (high - low) / 2 / 12.7062
    x = np.array([[mean - half, mean + half]] * seeds)
    assert report.judged("C1", "RL", "easy pass@1", "4M", x, 10, "8") == [
        "C1", "RL", "easy pass@1", "4M", f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", "+10", expected, "8"]


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


def alike(reward: float, *ahead: list[int]) -> list[dict]:
    """RL gains 16 of 64 samples at a reward of .2, its other seeds so many more at another; from 2M less than
    5 points; from 8M there is one seed."""
    records = three("RL", 3, at="2M") + [record("RL", [24, 24])] + three("RL", 40, at="8M")[:1]
    curve = [[10, .9, 0, 5, 0, 0], [20, reward, 0, 5, 0, 0]]
    for seed, more in enumerate(ahead, 1):
        records.append(record("RL", [24 + 8 * seed + n for n in more], seed, curve=curve))
    return records


def mix(larger: int, usual: int) -> list[dict]:
    """RL on hard problems gains 16 of 64 samples from a base with more arithmetic; so many from one of twice
    the size, and from the usual one."""
    records = []
    for base, gain in (("0.5M, 60 %", 16), ("1M, 30 %", larger), ("0.5M, 30 %", usual)):
        records += three("base", at="6M", base=base) + three("RL on hard", gain, at="6M", base=base)
    return records


@pytest.mark.parametrize("records, says, metric, expected", [
    (three("RL", 3) + three("RL", 40, at="8M"), "RL lifts early", "easy pass@1", "not reproduced"),
    (three("RL", 4) + three("RL", at="8M"), "RL lifts early", "easy pass@1", "reproduced"),
    (three("RL", 4, unsound=1), "RL lifts early", "easy sound@1", "not reproduced"),
    (three("RL") + three("SFT→RL", 3), "direct RL is at most 5", "easy pass@1", "reproduced"),
    (three("RL") + three("SFT→RL", 4), "direct RL is at most 5", "easy pass@1", "not reproduced"),
    (mix(15, 17), "RL from", "hard sound@1",
     "reproduced, not reproduced, not reproduced"),
    (mix(17, 15), "RL from", "hard sound@1",
     "not reproduced, reproduced, reproduced"),
    (three("RL gentle", 1), "at a third of its learning rate RL lifts", "easy pass@1", "reproduced"),
    (three("SFT→RL", 1) + three("SFT"), "RL after SFT lifts", "easy pass@1", "reproduced"),
    (three("SFT"), "SFT costs more than 2", "general", "not reproduced"),
    (three("SFT", hits="0"), "SFT costs more than 2", "general", "reproduced"),
    (three("continued 3.2M", hits="0"), "control: raising and lowering", "general", "reproduced"),
    (three("RL", bits_per_byte=.309), "RL costs at most .01", "bits per byte", "reproduced"),
    (three("RL", bits_per_byte=.311), "RL costs at most .01", "bits per byte", "not reproduced"),
    (three("SFT", bits_per_byte=.311), "SFT costs more than .01", "bits per byte", "reproduced"),
    (three("RL steps", 1) + three("RL"), "RL learns more where luck", "easy sound@1", "reproduced"),
    (three("RL", 1) + three("RL random"), "RL learns from its rewards", "easy pass@1", "reproduced"),
    (alike(.2, [1, 1]), "seeds with equal", "easy pass@1", "not reproduced"),
    (alike(.22, [2, 2]), "seeds with equal", "easy pass@1", "reproduced"),
    (alike(.22, [-2, -2]), "seeds with equal", "easy pass@1", "reproduced"),
    (alike(.2, [15, 16]), "seeds with equal", "easy pass@1", "reproduced"),
    (alike(.2, [0, 0], [15, 16]), "seeds with equal", "easy pass@1", "undecided"),
    (alike(.24, [9, 9]), "no two seeds", "easy pass@1", "undecided")])
def test_a_claim_is_judged_by_its_own_rule(records, says, metric, expected):
    """C1: 5 points (3.2 of 64) from early checkpoints only; C4: against both models of twice the size; C6: 2
    points or .01 bits; C9: gains, where training rewards agree, the largest of three pairs less surely."""
    rows = [row for row in report.judge(BASES + records) if row[1].startswith(says) and row[2] == metric]
    assert ", ".join(row[6] for row in rows) == expected


@pytest.mark.parametrize("accuracy, a, b, metric, expected", [
    (1.4, "RL", "base", "pass@1", 3.8 - 1.4), (14.8, "RL", "SFT native→RL", "pass@1", 54.8 - 53.6),
    (7.3, "SFT-Gold", "RL", "pass@32", 83.9 - 72.8), (7.3, "RL", "SFT 30 passes", "pass@1", 47.4 - 31.6),
    (2.4, "RL", "SFT", "pass@1", (.2 + 1.1) / 2), (4.1, "RL", "base", "pass@1", (25.7 + 32.4) / 2),
    (2.4, "SFT→RL", "SFT", "pass@1", 27.6 - 15.4),
    ((4.1 * 7.3) ** .5, "SFT→RL", "SFT", "pass@1", (16.3 + 16.9) / 2),
    *((x, "RL", "SFT", "pass@1", np.nan) for x in (0, 1.3, 14.9)), (7.3, "RL", "task", "pass@1", np.nan)])
def test_the_paper_where_its_base_is_as_accurate(accuracy, a, b, metric, expected):
    """Its differences where both recipes are given, nothing beyond; the mean of two checkpoints at 2.4 %, and
    at 4.1 %, for 3.2 % follow; the mean halfway (in the logarithm) between two."""
    assert report.paper_at(accuracy, a, b, f"easy {metric}") == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("metric, difference, paper", [
    ("easy pass@1", "+10.0 [+10.0, +10.0]", "+15.8"), ("easy sound@1", "+10.0 [+10.0, +10.0]", ""),
    ("bits per byte", "+0.012", "1.263 against .804")])
def test_a_checkpoint_s_row_has_the_paper_s_difference(metric, difference, paper):
    """From 7.3 % the paper's RL reaches 47.4 %, its SFT 31.6 %; nothing is known about sound answers. Bits
    per byte are one number, which has no interval; the paper's do not depend on the base."""
    records = [record("base", [73] * 2, samples=1000), record("RL", [400] * 2, samples=1000),
               record("SFT native", [300] * 2, samples=1000, bits_per_byte=.312)]
    rows = list(report.judge(records))
    row = next(row for row in rows if row[1:3] == ["the same, with native demonstrations", metric])
    assert row[3:5] == ["4M (base 7.3 %)", difference] and row[7] == paper


# ---- tables ----------------------------------------------------------------------------------------------
START = record("base", [64, 1, 0, 9, 1], sound=[64, 1, 0, 0, 1], hard=[0, 64, 64, 0, 0], curve=[])
RUN = record("RL", [16, 64, 64, 32, 16], sound=[0, 32, 32, 32, 16], hard=[64, 0, 0, 0, 0], noise=[-1., 5.],
             validation=[[0, .1], [10, .15], [20, .14], [30, .15], [40, .15], [50, .3]],
             curve=[[10, .2, 0, 5, 0, 0], [50, .25, 0, 5, 0, 0]],
             styles=[[10, {"words": 1.}], [50, {"tens": .6, "words": .005}]])
SHORT = {k: v for k, v in START.items() if k not in ("benchmarks", "bits_per_byte")}
SHORT |= {"step": 50, "how": "--shots 2"}
SEEDS = [record("base", [16]), record("base", [48], 1), record("RL", [32]), record("RL", [64], 1)]


@pytest.mark.parametrize("table, records, column, expected", [
    (report.summary, SEEDS, 4, ["75.0 (+25.0 [+25.0, +25.0])"]),
    (report.solved, [START, RUN], 5, [2, 1, 1, 2, "1.00", "2"]),
    (report.solved, [START, RUN | {"problems": {"easy": RUN["problems"]["easy"]}}], 5, [3, 4, 2, 1]),
    (report.by_operations, [RUN, record("RL", [64] * 5, 1)], 3,
     ["75.0 / 62.5", "87.5 / 75.0", "66.7 / 66.7", "50.0 / 50.0"]),
    (report.by_operations, [record("RL", [16])], 3, 2 * ["25.0 / 25.0", "– / –"]),
    (report.along, [RUN, START], 3, [0, "0.250", "30", "> 50", "tens 60%", "beyond measure"]),
    (report.evaluations, [SHORT], 2, ["base, step 50, --shots 2", 0, "23.4", "60.0", "20.6", "40.0"]),
    (report.evaluations, [SHORT], 11, ["40.0", "", "", "1.0e+00", "1.0"])])
def test_the_last_row_of_a_table(table, records, column, expected):
    """Gains are on the base of the same seed. The base has sound answers to problems 0, 1 and 4, RL to 1 to 4
    (hard: to 1 and 2, then to 0). Of one operation (0, 2, 4) 96 of 192 samples are right, 48 sound; of two 96
    and 64 of 128; of a second seed all; where there are none, nothing. Validation counts twice in a row,
    though .1 + .05 > .15 in floats."""
    row = list(table(records))[-1]
    assert row[column:column + len(expected)] == expected


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
@pytest.fixture
def drawn(monkeypatch) -> dict[str, report.Figure]:
    """Name -> figure, of those that would be drawn, which is slow."""
    figures = {}
    monkeypatch.setattr(report, "save", lambda figure, path: (
        figures.update({path.stem: figure}), path.write_bytes(b"not drawn")))
    monkeypatch.setattr(report.Figure, "tight_layout", lambda _: None)
    return figures


ALWAYS = "main matched parallel forgetting"


@pytest.mark.parametrize("preset, names", [
    *((name, f"{ALWAYS} early styles dial") for name in ("main", "raw", "dial", "controls")),
    ("quick", f"{ALWAYS} early styles"), ("luck", f"{ALWAYS} early styles luck"),
    ("wide", f"{ALWAYS} early styles steps wide"), ("rollouts", f"{ALWAYS} early styles steps"),
    ("composition", "composition")])
def test_a_study_has_its_figures(preset, names, tmp_path, drawn):
    """Each names all that it draws, the first every recipe; guesses are beside pass@32."""
    records = []
    for x in study.grid(study.STUDIES[preset], study.Config()):
        if x.evaluation and x.seed == 0:
            nll = [len(x.recipe)] if study.RECIPES.get(x.recipe, "").startswith("sft.py") else []
            records.append(record(x.recipe, [32, 16], at=x.at, base=x.base, step=x.step, how=x.how, nll=nll,
                                  samples=512 if x.how == study.WIDE else 64))
    report.report(tmp_path, records, tuple(study.RECIPES))
    assert drawn.keys() == set(names.split())
    for name, figure in drawn.items():
        named = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
        labels = [{curve.get_label() for curve in axis.containers} for axis in figure.axes]
        assert named == set.union(*labels), name
        for axis, curves in zip(figure.axes, labels):
            of_many = axis.get_title().endswith(("pass@32 (%)", "pass@k (%)")) and name != "matched"
            assert ("guessing" in curves) == of_many, name
        assert name != "main" or named > {r["recipe"] for r in records if r["base"] == records[0]["base"]}


def test_equal_seeds_have_no_bars_though_their_mean_is_rounded():
    points = [("base", "4M", np.array([.1]))] * 3        # in floating point their mean is more than .1
    axis, = report.plot([report.Panel("bits per byte", "", points)], ()).axes
    _, _, (bars,) = axis.containers[0]
    assert bars.get_segments()[0][:, 1] == pytest.approx(.1)


@pytest.mark.parametrize("name, found", [
    ("RL", 50), ("RL@38", 25), ("RL, T=1", 75), ("RL, 512 samples", 100), ("RL@50", 0), ("SFT, T=1", 0)])
def test_a_recipe_is_found_by_its_step_and_its_evaluation(name, found):
    records = [record("RL", [32]), record("RL", [16], step=38), record("RL", [48], how="--temperature 1.0"),
               record("RL", [64], how=study.WIDE)]
    scores = [report.values(r, "easy pass@1")[0] for r in report.find(records, name, "4M")]
    assert scores == pytest.approx([found] if found else [])


BOTH = [record("base", [16]), record("RL", [32])]
TAUGHT = [*BOTH, record("SFT", [48], nll=[.5])]


@pytest.mark.parametrize("figure, ends, expected", [
    (report.parallel, [*BOTH, record("base", [16], at="8M"), record("RL", [48], at="8M"),
                       record("base", [16], at="9M")], "RL RL 75, base base 25"),
    (report.dial, [*TAUGHT, record("SFT prose", [64], nll=[7])],
     "RL 0.5 50, RL 7.0 50, SFT 0.5 75, SFT prose 7.0 100, base 0.5 25, base 7.0 25"),
    (report.dial, TAUGHT, ""),
    (report.styles, [RUN, record("RL", [32], 1)],
     "tens 10.0 0, tens 10.0 100, tens 50.0 60, words 10.0 0, words 10.0 100, words 50.0 0"),
    (report.early, [RUN, record("RL", [32], at="2M", validation=[[0, .1], [10, .2]]), record("G=4", [32])],
     "+5 points 50.0 30, not reached 25.0 10"),
    (report.forgetting, [*BOTH, record("SFT", [64], hits="0")], "RL 25.0 0, SFT 75.0 -100, base 0.0 0")])
def test_the_points_of_a_figure(figure, ends, expected):
    """Of its first panel: the last checkpoint that has the most recipes; RL, which sees no demonstrations,
    from the least foreign to the most; 0 where a seed does not use a style; RL's steps to 5 points or to its
    end; points gained, points lost."""
    first = next(figure([], ends), report.Panel("", "", []))
    points = [point for point in first.points if "the paper" not in point[0]]
    points = [(name, x if isinstance(x, str) else round(float(x), 9), y) for name, x, (y,) in points]
    assert ", ".join(sorted(f"{name} {x} {y:.0f}" for name, x, y in points)) == expected


def colours(names: list[str]) -> dict[str, object]:
    figure = report.plot([report.Panel("", "", [(name, 0, [1]) for name in names])], tuple(study.RECIPES))
    return {drawn.get_label(): drawn.lines[0].get_color() for drawn in figure.axes[0].containers}


def test_a_recipe_has_one_colour_in_all_studies():
    """Whatever else was run; and the first ten recipes can be told apart."""
    everything = colours(["base", *study.RECIPES])
    assert colours(["base", "SFT", "RL"]).items() <= everything.items()
    assert len({everything[name] for name in list(study.RECIPES)[:10]}) == 10


@pytest.mark.parametrize("n, rows, columns", [(1, 1, 1), (4, 1, 4), (5, 2, 4), (9, 3, 4)])
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


def test_the_page_has_the_report_s_cells_its_figures_and_the_answers(tmp_path, monkeypatch, drawn):
    """Also an answer that would end its script. Runs whose base's evaluation failed are left out: the report
    ended in a traceback and the failed cell was not named."""
    shown = [{"question": "1 < 2?", "answer": 3, "answers": [["wrong", "</script><b>{x}"]]}]
    run = record("RL", [32, 32])
    run["problems"]["easy"]["examples"] = shown
    cells = [SimpleNamespace(evaluation=True, makes=tmp_path, record=r)
             for r in (record("base", [16, 16]), run, record("RL", [32, 32], at="8M"))]
    monkeypatch.setattr(study, "grid", lambda *_: cells)
    monkeypatch.setattr(study, "run_cells", lambda *_: ["base 8M"])
    monkeypatch.setattr(study, "record", lambda x: x.record)
    with pytest.raises(UserError, match="failed.*base 8M"):
        study.study(study.Config(out=str(tmp_path)))
    text, page = (Path(tmp_path, "quick", name).read_text("utf-8") for name in ("report.md", "report.html"))
    assert "| base | 4M | RL | 1 |" in text and "8M" not in text
    cells = [cell.strip() for row in re.findall(r"^\| (.*) \|$", text, re.M) for cell in row.split("|")]
    assert list(map(html.unescape, re.findall("<t[dh]>(.*?)</t[dh]>", page))) == cells
    assert page.count('src="data:image/png;base64,bm90IGRyYXdu"') == len(drawn)
    assert json.loads(re.search("const runs = (.*);", page)[1]) == {"base 4M": {"RL": {"seed 0": shown}}}
    assert page.count("</script>") == 1


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
READER = """<script>
checkpoint.value = "base 4M";
checkpoint.onchange();
recipe.value = "SFT";
recipe.onchange();
const seeds = document.querySelectorAll("table")[1].querySelectorAll("th")[3];
for (let clicks = 0; clicks < 2; clicks++) seeds.click();
</script>"""


@pytest.mark.skipif(not BROWSER, reason="no chromium or chrome is installed")
def test_a_browser_shows_the_answers_of_the_chosen_recipe_and_sorts_a_table(tmp_path, drawn):
    """After two choices: the answers of SFT's two seeds, as text. After two clicks: the largest number is
    first."""
    records = BASES + three("RL") + three("SFT")[:2]
    for r in records:
        answers = [["sound", f"{r['recipe']} <i>answers</i>"]]
        r["problems"]["easy"]["examples"] = [{"question": "1 < 2?", "answer": 3, "answers": answers}]
    report.report(tmp_path, records)
    page = tmp_path / "report.html"
    page.write_text(page.read_text("utf-8") + READER, "utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    before, _, shown = dom.partition('<tbody id="answers">')
    assert shown.count('<pre class="sound">SFT &lt;i&gt;answers&lt;/i&gt;</pre>') == 2
    assert "seed 1" in shown and "RL &lt;" not in shown
    rows = re.split("</?tbody>", before)[3].split("<tr>")[1:]
    assert [row.split("<td>")[4][0] for row in rows] == ["3", "3", "3", "3", "2"]


# ---- the claims of all studies in one table --------------------------------------------------------------
BEFORE = b"# Results\r\n\xff prose with | bars |\n<!-- claims: made by python study.py --report results -->"
AFTER = b"<!-- end of claims -->\nthe rest, without a newline at its end"


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder with two studies that share their runs from 4M, and a README with an old table."""
    shared = BASES + three("RL", 16)
    for name, records in {"one": shared, "two": shared + three("RL", 32, at="8M")}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "README.md").write_bytes(BEFORE + b"\n| an old table |\n" + AFTER)
    return tmp_path


def test_the_claims_of_all_studies_are_written_between_the_markers(results):
    """Over all checkpoints and for each, shared runs once; other bytes stay, a second time too."""
    for _ in range(2):
        study.study(study.Config(report=str(results)))
        text = (results / "README.md").read_bytes()
        assert text.startswith(BEFORE + b"\n") and text.endswith(b"\n" + AFTER)
    table, count = text[len(BEFORE):-len(AFTER)].decode().strip().split("\n\n")
    rows = [[column.strip() for column in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["study", "claim", "what it says", "metric", "checkpoints",
                       "difference in points [95 %]", "margin", "verdict", "the paper"]
    same = ["+0.0 [+0.0, +0.0]", "-2", "reproduced"]
    says = ["C6", "RL costs at most 2 points of general capability", "general"]
    assert [row for row in rows if row[1] == "C6" and row[6] == "-2"] == [
        ["one", *says, "4M (base 25.0 %)", *same, "44.4 against 44.3"],
        ["two", *says, "4M, 8M", *same, "44.4 against 44.3"],
        ["two", "C6", "", "", "8M (base 25.0 %)", *same, ""]]
    assert count.startswith(f"{len(rows) - 2} rows") and all(row[1] for row in rows)
    assert not list(results.glob("*/report.md"))


@pytest.mark.parametrize("readme", [None, b"", BEFORE, AFTER, AFTER + b"\n" + BEFORE])
def test_without_the_markers_nothing_is_written(results, readme):
    """Also if they are in the wrong order; the message is one line that quotes both."""
    (results / "README.md").unlink()
    if readme is not None:
        (results / "README.md").write_bytes(readme)
    with pytest.raises(UserError, match=f"^.*{report.BEGIN.decode()}.*{report.END.decode()}$"):
        study.study(study.Config(report=str(results)))
    assert readme is None or (results / "README.md").read_bytes() == readme


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="results.jsonl: not found"):
        study.study(study.Config(report=str(tmp_path)))
