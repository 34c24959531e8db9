"""The report of a study from its stored records: claims and their verdicts, tables, figures.

Only arithmetic: `python study.py --report results/main` redraws a report in seconds. Left out: a correction
for the number of claims; the reader sees all of them, whatever came out. The claims stand below as data, the
recipes and studies that they name in study.py.
"""
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from checkpoint import atomic_write, number, require
from evaluate import general, passes

# ---- how it is judged (written before the runs) ----------------------------------------------------------
METRICS = ("easy pass@1", "easy pass@8", "easy pass@32", "hard pass@1", "hard pass@32", "general")
PASS_1, _, PASS_32, _, _, GENERAL = METRICS


class Claim(NamedTuple):
    """The statistic is a − b, averaged over the checkpoints, the seeds and the test problems. Reproduced: its
    95 % interval over seeds and problems lies above the margin. Not reproduced: below it. Else undecided."""
    id: str                         # C1: of checkpoints with at most two thirds of the pretraining tokens
    says: str
    a: str                          # recipe; "G=4@13": after step 13
    b: str
    paper: str                      # the paper's figures, %
    metric: str = PASS_1
    margin: float = 0               # points


EARLY_1 = ("15.6 after 4B of 50B tokens, base about 2", PASS_1, 10)
EARLY_32 = ("35.5 after 4B tokens, base about 14", PASS_32)
CONTROLS = ("SFT at lr/2", "RL at lr/2", "fused", "alternating", "H=10", "H=all", "linear", "task", "ties")
CLAIMS = [Claim(*row) for row in (
    ("C1", "RL lifts pass@1 of early checkpoints", "RL", "base", *EARLY_1),
    # added with their preset after RL's result for C1 was known: two more chances
    ("C1", "200 steps of RL lift pass@1 of early checkpoints", "RL×4", "base", *EARLY_1),
    ("C1", "64 rollouts a problem lift pass@1 of early checkpoints", "RL wide", "base", *EARLY_1),
    ("C1", "RL lifts pass@32 of early checkpoints", "RL", "base", *EARLY_32),
    ("C1", "200 steps of RL lift pass@32 of early checkpoints", "RL×4", "base", *EARLY_32),
    ("C1", "64 rollouts a problem lift pass@32 of early checkpoints", "RL wide", "base", *EARLY_32),
    ("C2", "direct RL is at most 5 points below SFT→RL", "RL", "SFT→RL", "47.4 against 48.5", PASS_1, -5),
    ("C2", "the same after 200 steps of RL", "RL×4", "SFT→RL×4", "the same", PASS_1, -5),
    ("C3", "RL beats SFT on pass@1", "RL", "SFT", "47.4 against 31.5"),
    ("C3", "the same after 200 steps of RL", "RL×4", "SFT", "the same"),
    ("C3", "SFT-Gold beats RL on pass@32", "SFT-Gold", "RL", "84 against 72.8", PASS_32),
    ("C3", "SFT-Gold→RL beats RL on pass@1", "SFT-Gold→RL", "RL", "the highest"),
    ("C5", "direct RL lifts pass@1", "RL", "base", "4 → 39 along RL"),
    ("C5", "direct RL expands: pass@32 rises", "RL", "base", "45 → 69 along RL", PASS_32),
    ("C5", "the same after 200 steps", "RL×4", "base", "45 → 69 along RL", PASS_32),
    ("C5", "RL after SFT sharpens: pass@32 falls", "SFT", "SFT→RL", "80 → 75 along RL", PASS_32),
    ("C5", "the same after 200 steps", "SFT", "SFT→RL×4", "80 → 75 along RL", PASS_32),
    ("C5", "RL after SFT lifts pass@1", "SFT→RL", "SFT", "33 → 49 along RL"),
    ("C6", "RL costs at most 2 points of general capability", "RL", "base", "44.4 against 44.3", GENERAL, -2),
    ("C6", "the same after 200 steps", "RL×4", "base", "44.4 against 44.3", GENERAL, -2),
    ("C6", "SFT costs more than 2 points of it", "base", "SFT", "44.3 against 39.5", GENERAL, 2),
    ("C7", "parallel averaging beats RL on pass@32", "parallel", "RL", "81 against 72.8", PASS_32),
    ("C7", "parallel averaging beats SFT on pass@32", "parallel", "SFT", "81 against 70", PASS_32),
    ("C7", "parallel averaging beats SFT→RL on pass@32", "parallel", "SFT→RL", "81 against 65", PASS_32),
    *(("C7", f"control: it beats {x} on pass@32", "parallel", x, "–", PASS_32) for x in CONTROLS),
    ("C7", "it costs at most 2 points of general capability", "parallel", "base", "45.8–47.5 against 44.3",
     GENERAL, -2),
    ("C7", "its pass@1 is below RL's", "RL", "parallel", "47.4 against 33–41"),
    ("C8", "few rollouts per problem are more FLOP-efficient: G=4 ahead after equal rollouts", "G=4", "G=64",
     "early, n=5 against n=64"),
    ("C8", "many are more sample-efficient: G=64 ahead after equal problems (13 steps)", "G=64", "G=4@13",
     "n=64 against n=5"),
)]
# C8 also for test problems split by the base's success, right answers of 64 samples (the paper's split).
SPLITS = ((16, 64), (0, 8))
# C4: gain of RL on hard problems, a's minus b's: the data mix must beat the scale, at equal tokens and FLOPs.
COMPOSITION = ((("0.5M, 60 %", "8M"), ("1M, 30 %", "8M")), (("0.5M, 60 %", "8M"), ("1M, 30 %", "3.8M")))
# C9: at the earliest checkpoint where RL gains 5 points, two seeds whose training rewards (last 10 steps)
# differ by less than .03 differ by more than 3 points of test pass@1. The interval is over problems and, as
# the largest of several pairs is judged, wider by Bonferroni's rule.
BRITTLE = (5, .03, 3)

# ---- statistics ------------------------------------------------------------------------------------------
def with_base(records: list[dict]) -> list[dict]:
    """Those from checkpoints that were evaluated themselves: such a cell, too, may have failed."""
    bases = [(r["base"], r["at"]) for r in records if r["recipe"] == "base" and not r["shots"]]
    return [r for r in records if (r["base"], r["at"]) in bases]


def checkpoints(records: list[dict], trained: bool = False) -> list[str]:
    """Those of the base model, or `trained`: only those from which a recipe was run, if there are any."""
    runs = [r for r in records if r["recipe"] != "base" and trained]
    return sorted({r["at"] for r in runs or records}, key=number)


def values(r: dict, metric: str) -> np.ndarray:
    """(N,) in %: pass@k of each problem ('easy pass@32') or value of each benchmark item ('general')."""
    if metric == GENERAL:
        return 100 * general(r["benchmarks"])
    difficulty, k = metric.split(" pass@")
    return 100 * passes(r["problems"][difficulty], int(k))


def find(records: list[dict], recipe: str, at: str, base: str = "") -> list[dict]:
    """Evaluations of a recipe ("G=4@13": after step 13) from a checkpoint, by seed. `base`: or the first."""
    name, _, step = recipe.partition("@")
    base = base or records[0]["base"]
    wanted = {"base": base, "at": at, "recipe": name, "step": int(step or -1), "shots": 0}
    return sorted((r for r in records if wanted.items() <= r.items()), key=lambda r: r["seed"])


def base_of(records: list[dict], r: dict) -> dict:
    """The evaluation of the base that a run started from: of its seed, or the only one."""
    found = find(records, "base", r["at"], r["base"])
    return next((x for x in found if x["seed"] == r["seed"]), found[0])


def by_seed(records: list[dict], recipe: str, metric: str, at: str, base: str) -> dict[int, np.ndarray]:
    """Seed -> values (N,). The base's only model, if it is the only one, stands for every seed."""
    found = {r["seed"]: values(r, metric) for r in find(records, recipe, at, base)}
    if recipe == "base" and len(found) == 1:
        found = dict.fromkeys({r["seed"] for r in records}, *found.values())
    return found


def difference(records: list[dict], a: str, b: str, metric: str, ats: list[str],
               base: str = "") -> np.ndarray | None:
    """a − b (S, N), averaged over the checkpoints, of the seeds that both have at all of them; else None."""
    gaps = defaultdict(list)                             # seed -> (N,) at each checkpoint
    for at in ats:
        x = by_seed(records, a, metric, at, base)
        y = by_seed(records, b, metric, at, base)
        for seed in x.keys() & y.keys():
            gaps[seed].append(x[seed] - y[seed])
    means = [np.mean(gaps[seed], axis=0) for seed in sorted(gaps) if len(gaps[seed]) == len(ats)]
    return np.array(means) if means else None


@functools.cache
def resamples(S: int, N: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed (2000, S) and problem (2000, N) is drawn, with replacement; always the same."""
    rng = np.random.default_rng(0)
    drawn = [np.bincount(rng.integers(0, n, n), minlength=n) for n in 2_000 * (S, N)]
    return np.array(drawn[::2], float), np.array(drawn[1::2], float)


def bootstrap(x: np.ndarray, comparisons: int = 1) -> tuple[float, float, float]:
    """(mean, low, high): 95 % interval of the mean of x (S, N) over seeds and problems; wider by Bonferroni's
    correction if x is the most striking of several comparisons."""
    seeds, problems = resamples(*x.shape)
    means = ((seeds @ x) * problems).sum(1) / x.size
    low, high = np.percentile(means, (2.5 / comparisons, 100 - 2.5 / comparisons))
    return x.mean(), low, high


# ---- claims ----------------------------------------------------------------------------------------------
def judged(claim: str, says: str, where: str, x: np.ndarray, margin: float, paper: str = "",
           comparisons: int = 1) -> list[str]:
    """A row of the table: id, claim, checkpoints, statistic of x (S, N), margin, verdict, paper."""
    mean, low, high = bootstrap(x, comparisons)
    verdict = "reproduced" if low > margin else "not reproduced" if high < margin else "undecided"
    seeds = "" if len(x) > 2 or claim == "C9" else f" ({len(x)} seed{'s' * (len(x) > 1)})"
    interval = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return [claim, says, where, interval, f"{margin:+g}", verdict + seeds, paper]


def judge_claim(records: list[dict], c: Claim, candidates: list[str], last: str) -> Iterator[list[str]]:
    """The claim over all checkpoints that have both recipes, then each of these checkpoints alone."""
    alone = {at: difference(records, c.a, c.b, c.metric, [at]) for at in candidates}
    ats = [at for at in candidates if alone[at] is not None]
    x = difference(records, c.a, c.b, c.metric, ats)
    if x is None:                                        # no seed has both at every checkpoint
        return
    yield judged(c.id, c.says, f"{', '.join(ats)} of {last}", x, c.margin, c.paper)
    if len(ats) > 1:
        for at in ats:
            yield judged("", "", at, alone[at], c.margin)
    if c.id == "C8":
        start, = find(records, "base", ats[0])
        right = np.array(start["problems"]["easy"]["right_per_problem"])
        for low, high in SPLITS:
            chosen = (low <= right) & (right <= high)
            if chosen.any():
                yield judged("", f"problems of which the base solves {low} to {high} of 64",
                             f"{chosen.sum()} problems", x[:, chosen], c.margin)


def judge_composition(records: list[dict]) -> Iterator[list[str]]:
    """C4: is the gain of RL on hard problems larger from one base model than from another?"""
    for (base_a, at_a), (base_b, at_b) in COMPOSITION:
        a = difference(records, "RL on hard", "base", "hard pass@1", [at_a], base_a)
        b = difference(records, "RL on hard", "base", "hard pass@1", [at_b], base_b)
        if a is not None and b is not None:
            yield judged("C4", f"RL gains more on hard problems from {base_a} than from {base_b}",
                         f"{at_a}, {at_b}", a - b, 0, "+24.5…29.5 (math-heavy 1B) against +10 (4B)")


def judge_brittle(records: list[dict], trained: list[str]) -> Iterator[list[str]]:
    """C9: do two seeds of RL with equal training reward differ in test pass@1?"""
    gain, alike, margin = BRITTLE
    gains = {at: difference(records, "RL", "base", PASS_1, [at]) for at in trained}
    at = next((at for at, x in gains.items() if x is not None and x.mean() >= gain), None)
    if at is None or len(trained) < 2:
        return
    gaps = []
    for a, b in permutations(find(records, "RL", at), 2):
        rewards = [np.mean([point[1] for point in r["curve"][-10:]]) for r in (a, b)]
        if abs(rewards[0] - rewards[1]) < alike:
            gaps.append(values(a, PASS_1) - values(b, PASS_1))
    if gaps:
        yield judged("C9", "seeds with equal training reward differ in test pass@1 (largest pair)", at,
                     max(gaps, key=np.mean)[None], margin, "validation .26, .134, .149 at reward .21",
                     len(gaps) // 2)
    else:
        yield ["C9", "no two seeds have equal training reward", at, "", "", "undecided", ""]


def judge(records: list[dict]) -> Iterator[list[str]]:
    """The rows for every claim that these records can answer; rows without an id belong to the one above."""
    trained = checkpoints(records, trained=True)
    last = checkpoints(records)[-1]
    early = [at for at in trained if number(at) <= 2 / 3 * number(last)]
    for claim in CLAIMS:
        yield from judge_claim(records, claim, early if claim.id == "C1" else trained, last)
    yield from judge_composition(records)
    yield from judge_brittle(records, trained)


# ---- figures ---------------------------------------------------------------------------------------------
# (title, name of x, line style, points); points (recipe, x, scores (N,)) with equal recipe and x are averaged
Panel = tuple[str, str, str, list[tuple]]


def measured(metrics: tuple[str, ...], title: str, unit: str, runs: list[tuple]) -> Iterator[Panel]:
    """A panel per metric; `runs`: (recipe, x, record)."""
    for metric in metrics:
        points = [(recipe, x, values(r, metric)) for recipe, x, r in runs]
        yield f"{title}{metric} (%)", unit, "o-", points


def main(records: list[dict], ends: list[dict]) -> Iterator[Panel]:
    """Everything against pretraining tokens; recipes a little aside, else their intervals would overlap."""
    names = list(dict.fromkeys(r["recipe"] for r in ends))
    few = [r for r in records if r["base"] == ends[0]["base"] and r["shots"]]
    runs = [(f"base, {r['shots']}-shot", number(r["at"]) / 1e6, r) for r in few]
    runs += [(r["recipe"], number(r["at"]) / 1e6 + .04 * names.index(r["recipe"]), r) for r in ends]
    return measured(METRICS, "", "pretraining tokens (millions)", runs)


def steps(records: list[dict], _: list[dict]) -> Iterator[Panel]:
    """Along the steps of RL. The recipe A→B starts from A's result, others start from the base."""
    traced = [r for r in records if r["step"] >= 0]
    for at in checkpoints(traced):
        runs = []
        for recipe in dict.fromkeys(r["recipe"] for r in traced):
            runs += [(recipe, 0, r) for r in find(records, recipe.rpartition("→")[0] or "base", at)]
            runs += [(recipe, r["step"], r) for r in traced if (r["recipe"], r["at"]) == (recipe, at)]
            runs += [(recipe, r["curve"][-1][0], r) for r in find(records, recipe, at)]
        yield from measured((PASS_1, PASS_32), f"from {at}: ", "RL steps", runs)


def parallel(_: list[dict], ends: list[dict]) -> Iterator[Panel]:
    """All recipes side by side at the last checkpoint."""
    at = checkpoints(ends, trained=True)[-1]
    runs = [(r["recipe"], r["recipe"], r) for r in ends if r["at"] == at]
    return measured((PASS_1, PASS_32, "hard pass@32", GENERAL), f"from {at}: ", "", runs)


def forgetting(_: list[dict], ends: list[dict]) -> Iterator[Panel]:
    """Forgetting against accuracy gained, and against the distance from the base; a dot is a run."""
    gained = []
    moved = []
    for r in ends:
        start = base_of(ends, r)
        gain, change = ((values(r, x) - values(start, x)).mean() for x in (PASS_1, GENERAL))
        gained.append((r["recipe"], gain, [change]))
        moved.append((r["recipe"], r["problems"]["easy"].get("kl", np.nan), [change]))
    title = "general mean, change (points)"
    yield title, "easy pass@1 gained over the base (points)", "o", gained
    yield title, "KL to the base on own easy answers (nats per token)", "o", moved


def seeds(_: list[dict], ends: list[dict]) -> Iterator[Panel]:
    """Training reward and validation from the first trained checkpoint, a line per seed."""
    at = checkpoints(ends, trained=True)[0]
    rewards = []
    scores = []
    for r in ends:
        if r["at"] == at and r["curve"]:
            name = "_" * r["seed"] + r["recipe"]         # a label with "_" is not in the legend
            rewards += [(name, step, [100 * reward]) for step, reward, *_ in r["curve"]]
            scores += [(name, step, [100 * score]) for step, score in r["validation"]]
    yield f"from {at}: training reward (%)", "steps of 64 problems", "-", rewards
    yield f"from {at}: validation pass@1 (%)", "steps of 64 problems", "-", scores


def composition(records: list[dict], _: list[dict]) -> Iterator[Panel]:
    """Composition of the data against scale of the model: RL on hard problems from each base model."""
    runs = []
    for base, at in dict.fromkeys((r["base"], r["at"]) for r in records if r["recipe"] == "RL on hard"):
        for recipe in ("base", "RL on hard"):
            runs += [(recipe, f"{base}, {at}", r) for r in find(records, recipe, at, base)]
    return measured(("hard pass@1", "hard pass@32"), "", "", runs)


def dial(_: list[dict], ends: list[dict]) -> Iterator[Panel]:
    """SFT by the foreignness of its demonstrations, from each checkpoint."""
    taught = [r for r in ends if r.get("nll")]
    for at in checkpoints(taught):
        runs = [(r["recipe"], r["nll"][0], r) for r in taught if r["at"] == at]
        yield from measured((PASS_1, PASS_32, "hard pass@32", GENERAL), f"from {at}: ",
                            "demonstrations: nats per token under the base", runs)


def plot(panels: list[Panel], order: tuple[str, ...]) -> Figure:
    """Means and 95 % intervals. A recipe's colour is by its place in `order`, the same in every figure."""
    colors = {"base": "0.5"}
    for i, recipe in enumerate(order):                   # strong colours first
        colors[recipe] = matplotlib.colormaps["tab20"]((2 * i + i // 10) % 20)
    rows = 1 if len(panels) < 4 else 2
    columns = -(-len(panels) // rows)
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows))
    for i, (title, unit, style, points) in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, i, xlabel=unit)
        curves = {}                                      # recipe -> x -> scores
        for recipe, x, scores in points:
            curves.setdefault(recipe, {}).setdefault(x, []).append(scores)
        for recipe, curve in curves.items():
            mean, low, high = np.array([bootstrap(np.array(scores)) for scores in curve.values()]).T
            color = colors.get(recipe.lstrip("_"), "0.75")
            axis.errorbar(list(curve), mean, [mean - low, high - mean], fmt=style, ms=3, lw=1, label=recipe,
                          color=color)
        axis.set_title(title, fontsize=10)
        axis.tick_params("x", rotation=0 if unit else 90)
        axis.grid(alpha=.3)
    figure.axes[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


# ---- text ------------------------------------------------------------------------------------------------
CLAIMS_HEADER = "| claim | what it says | checkpoints | difference in points | margin | verdict | the paper |"
ALL_CLAIMS_HEADER = ("| study | claim | what it says | checkpoints | difference in points [95 %] | margin "
                     "| verdict | the paper (%) |")
BEGIN = b"<!-- claims: made by python study.py --report results -->"
END = b"<!-- end of claims -->"


def markdown(header: str, rows: Iterable[list]) -> str:
    lines = [header, "|" + "---|" * (header.count("|") - 1)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def scores(records: list[dict], runs: list[dict]) -> list[str]:
    """Per metric '43.2 (+2.1 [+0.3, +3.9])': the mean of runs and, if they are not the base, their gain."""
    starts = [base_of(records, r) for r in runs]
    columns = []
    for metric in METRICS:
        x = np.array([values(r, metric) for r in runs])
        column = f"{x.mean():.1f}"
        if runs[0]["recipe"] != "base" or runs[0]["shots"]:
            mean, low, high = bootstrap(x - np.array([values(start, metric) for start in starts]))
            column += f" ({mean:+.1f} [{low:+.1f}, {high:+.1f}])"
        columns.append(column)
    return columns


def summary(ends: list[dict]) -> Iterator[list]:
    """A row per checkpoint and recipe: means over seeds, and the gain over the base."""
    for base, at, recipe in dict.fromkeys((r["base"], r["at"], r["recipe"]) for r in ends):
        runs = find(ends, recipe, at, base)
        yield [base, at, recipe, len(runs), *scores(ends, runs)]


def evaluations(records: list[dict]) -> Iterator[list]:
    """A row per evaluation, paired with the base's, problem by problem."""
    for r in records:
        step = f", step {r['step']}" if r["step"] >= 0 else ""
        shots = f", {r['shots']}-shot" if r["shots"] else ""
        cost = [f"{r['cost']['flops']:.1e}", f"{r['cost']['seconds'] / 60:.1f}"]
        yield [r["base"], r["at"], r["recipe"] + step + shots, r["seed"], *scores(records, [r]),
               f"{r['bits_per_byte']:.4f}", *cost]


def solved(ends: list[dict]) -> Iterator[list]:
    """Expansion or sharpening, problem by problem: a row per run, against its base model."""
    for r in ends:
        start = base_of(ends, r)
        for difficulty, d in r["problems"].items():
            before = np.array(start["problems"][difficulty]["right_per_problem"]) > 0
            after = np.array(d["right_per_problem"]) > 0
            metric = f"{difficulty} pass@32"
            moved = values(r, metric) - values(start, metric)
            sets = (before, after, after & ~before, before & ~after, moved > 50, moved < -50)
            styles = ", ".join(f"{name} {part:.0%}" for name, part in d["styles"].items() if part >= .01)
            yield [r["base"], r["at"], r["recipe"], r["seed"], difficulty, *(x.sum() for x in sets),
                   f"{d['answer_entropy']:.2f}", f"{d['distinct_completions']:.0f}", f"{d['unparsed']:.1%}",
                   f"{d['kl']:.3f}" if "kl" in d else "", styles]


ABOUT = (
    "Made by `study.py`; `python study.py --report results/{name}` redraws it. Test problems, in %. Brackets "
    "are 95 % intervals: in the first table over seeds and problems, in the second over problems, paired "
    "with the base. There is one base model (per size and mixture), so no interval says anything about other "
    "pretraining runs; and three seeds are few: where seeds differ a lot, a nominal 95 % covers rather 75 to "
    "90 %. The rules stand at the top of study.py.")
ABOUT_SOLVED = (
    "Solved: at least one of 64 samples right. Jumped, dropped: pass@32 changed by more than 50 points. KL: "
    "to the base, in nats per token of the model's own answers, sampled at temperature 0.6.")
START_OF_ROW = "| base model | tokens | recipe |"
OF_METRICS = "easy pass@1 | pass@8 | pass@32 | hard pass@1 | pass@32 | general"


def report(out: Path, records: list[dict], order: tuple[str, ...] = ()) -> str:
    """Write report.md and its figures; returns the table of claims. `order`: that of the recipes' colours."""
    records = with_base(records)
    claims = markdown(CLAIMS_HEADER, judge(records))
    ends = [r for r in records if r["base"] == records[0]["base"] and r["step"] < 0 and r["shots"] == 0]
    figures = []
    for function in (main, steps, parallel, forgetting, seeds, composition, dial):
        panels = [panel for panel in function(records, ends) if panel[3]]        # with points
        if panels:
            plot(panels, order).savefig(out / f"{function.__name__}.png", dpi=110)
            figures.append(f"![{function.__name__}]({function.__name__}.png)")
    ordered = sorted(records, key=lambda r: (r["base"], number(r["at"]), r["recipe"] != "base", r["recipe"],
                                             r["seed"], r["step"]))
    all_ends = [r for r in ordered if r["step"] < 0 and not r["shots"]]
    text = "\n\n".join([
        f"# Results of the study `{out.name}`", ABOUT.format(name=out.name),
        "## Claims", claims,
        "## Means over seeds, and the gain over the base",
        markdown(f"{START_OF_ROW} seeds | {OF_METRICS} |", summary(all_ends)),
        "## Figures", "\n".join(figures),
        "## Every evaluation",
        markdown(f"{START_OF_ROW} seed | {OF_METRICS} | bits per byte | FLOPs | minutes |",
                 evaluations(ordered)),
        "## Problem by problem: expansion or sharpening", ABOUT_SOLVED,
        markdown(f"{START_OF_ROW} seed | problems | solved by the base | now | newly solved | newly lost "
                 "| jumped | dropped | answer entropy | distinct of 64 | unparsed | KL | styles |",
                 solved(all_ends))])
    atomic_write(out / "report.md", (text + "\n").encode())
    return claims


def all_claims(folder: Path, studies: dict[str, list[dict]]) -> None:
    """Write the claims of all studies (name -> records) as one table between BEGIN and END of the README."""
    readme = folder / "README.md"
    text = readme.read_bytes() if readme.is_file() else b""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    require(bool(end), f"{readme}: must exist and have the line {BEGIN.decode()} and, below it, "
                                 f"the line {END.decode()}")
    rows = []
    for name, records in studies.items():
        rows += [[name, *row] for row in judge(records) if row[0]]
    order = {(c.id, c.says, c.paper): i for i, c in enumerate(CLAIMS)}       # "the same ..." after its like
    rows.sort(key=lambda row: (row[1], order.get((row[1], row[2], row[-1]), 0)))
    table = markdown(ALL_CLAIMS_HEADER, rows).encode()
    atomic_write(readme, before + BEGIN + b"\n\n" + table + b"\n\n" + END + after)
    print(f"written: {len(rows)} rows into {readme}")
