"""The report of a study from its stored records: claims and their verdicts, tables, figures.

Only arithmetic: `python study.py --report results/main` redraws a report in seconds. Left out: a correction
for the number of claims; the reader sees all of them, whatever came out. The claims stand below as data, the
recipes and studies that they name in study.py.
"""
import functools
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from checkpoint import atomic_write, number, require
from evaluate import pass_at_k

# ---- how it is judged (written before the runs) ----------------------------------------------------------


class Claim(NamedTuple):
    """The statistic is a − b, averaged over the checkpoints, the seeds and the test problems. Reproduced: its
    95 % interval over seeds and problems lies above the margin. Not reproduced: below it. Else undecided."""
    id: str
    says: str
    a: str                          # recipe; "G=4@13": after step 13
    b: str
    metric: str
    margin: float                   # points
    paper: str                      # the paper's figures, %
    early: bool = False             # only checkpoints with at most two thirds of the pretraining tokens


PASS_1, PASS_32 = "easy pass@1", "easy pass@32"
EARLY_1 = "15.6 after 4B of 50B tokens, base about 2"
EARLY_32 = "35.5 after 4B tokens, base about 14"
CONTROLS = ("SFT at lr/2", "RL at lr/2", "fused", "alternating", "H=10", "H=all", "linear", "task", "ties")
CLAIMS = [Claim(*row) for row in (
    ("C1", "RL lifts pass@1 of early checkpoints", "RL", "base", PASS_1, 10, EARLY_1, True),
    # added with their preset after RL's result for C1 was known: two more chances
    ("C1", "200 steps of RL lift pass@1 of early checkpoints", "RL×4", "base", PASS_1, 10, EARLY_1, True),
    ("C1", "64 rollouts a problem lift pass@1 of early checkpoints", "RL wide", "base", PASS_1, 10, EARLY_1,
     True),
    ("C1", "RL lifts pass@32 of early checkpoints", "RL", "base", PASS_32, 0, EARLY_32, True),
    ("C1", "200 steps of RL lift pass@32 of early checkpoints", "RL×4", "base", PASS_32, 0, EARLY_32, True),
    ("C1", "64 rollouts a problem lift pass@32 of early checkpoints", "RL wide", "base", PASS_32, 0, EARLY_32,
     True),
    ("C2", "direct RL is at most 5 points below SFT→RL", "RL", "SFT→RL", PASS_1, -5, "47.4 against 48.5"),
    ("C2", "the same after 200 steps of RL", "RL×4", "SFT→RL×4", PASS_1, -5, "the same"),
    ("C3", "RL beats SFT on pass@1", "RL", "SFT", PASS_1, 0, "47.4 against 31.5"),
    ("C3", "the same after 200 steps of RL", "RL×4", "SFT", PASS_1, 0, "the same"),
    ("C3", "SFT-Gold beats RL on pass@32", "SFT-Gold", "RL", PASS_32, 0, "84 against 72.8"),
    ("C3", "SFT-Gold→RL beats RL on pass@1", "SFT-Gold→RL", "RL", PASS_1, 0, "the highest"),
    ("C5", "direct RL lifts pass@1", "RL", "base", PASS_1, 0, "4 → 39 along RL"),
    ("C5", "direct RL expands: pass@32 rises", "RL", "base", PASS_32, 0, "45 → 69 along RL"),
    ("C5", "the same after 200 steps", "RL×4", "base", PASS_32, 0, "45 → 69 along RL"),
    ("C5", "RL after SFT sharpens: pass@32 falls", "SFT", "SFT→RL", PASS_32, 0, "80 → 75 along RL"),
    ("C5", "the same after 200 steps", "SFT", "SFT→RL×4", PASS_32, 0, "80 → 75 along RL"),
    ("C5", "RL after SFT lifts pass@1", "SFT→RL", "SFT", PASS_1, 0, "33 → 49 along RL"),
    ("C6", "RL costs at most 2 points of general capability", "RL", "base", "general", -2,
     "44.4 against 44.3"),
    ("C6", "the same after 200 steps", "RL×4", "base", "general", -2, "44.4 against 44.3"),
    ("C6", "SFT costs more than 2 points of it", "base", "SFT", "general", 2, "44.3 against 39.5"),
    ("C7", "parallel averaging beats RL on pass@32", "parallel", "RL", PASS_32, 0, "81 against 72.8"),
    ("C7", "parallel averaging beats SFT on pass@32", "parallel", "SFT", PASS_32, 0, "81 against 70"),
    ("C7", "parallel averaging beats SFT→RL on pass@32", "parallel", "SFT→RL", PASS_32, 0, "81 against 65"),
    *(("C7", f"control: it beats {x} on pass@32", "parallel", x, PASS_32, 0, "–") for x in CONTROLS),
    ("C7", "it costs at most 2 points of general capability", "parallel", "base", "general", -2,
     "45.8–47.5 against 44.3"),
    ("C7", "its pass@1 is below RL's", "RL", "parallel", PASS_1, 0, "47.4 against 33–41"),
    ("C8", "few rollouts per problem are more FLOP-efficient: G=4 ahead after equal rollouts", "G=4", "G=64",
     PASS_1, 0, "early, n=5 against n=64"),
    ("C8", "many are more sample-efficient: G=64 ahead after equal problems (13 steps)", "G=64", "G=4@13",
     PASS_1, 0, "n=64 against n=5"),
)]
# C8 also for test problems split by the base's success, right answers of 64 samples (the paper's split).
SPLITS = (("16 to 64", 16, 64), ("0 to 8", 0, 8))
# C4: gain of RL on hard problems, a's minus b's: the data mix must beat the scale, at equal tokens and FLOPs.
COMPOSITION = ((("0.5M, 60 %", "8M"), ("1M, 30 %", "8M")), (("0.5M, 60 %", "8M"), ("1M, 30 %", "3.8M")))
# C9: at the earliest checkpoint where RL gains 5 points, two seeds whose training rewards (last 10 steps)
# differ by less than .03 differ by more than 3 points of test pass@1. The interval is over problems and, as
# the largest of several pairs is judged, wider by Bonferroni's rule.
BRITTLE = (5, .03, 3)

# ---- statistics ------------------------------------------------------------------------------------------
METRICS = (PASS_1, "easy pass@8", PASS_32, "hard pass@1", "hard pass@32", "general")


def millions(at: str) -> float:
    return number(at) / 1e6


def in_order(r: dict) -> tuple:
    """The order of records in every table."""
    return r["base"], millions(r["at"]), r["recipe"] != "base", r["recipe"], r["seed"], r["step"]


def values(r: dict, metric: str) -> np.ndarray:
    """(N,) in %: pass@k of each problem ('easy pass@32') or hit of each benchmark item ('general')."""
    if metric == "general":
        return 100.0 * np.array([int(hit) for b in r["benchmarks"].values() for hit in b["hits"]])
    difficulty, k = metric.split(" pass@")
    d = r["problems"][difficulty]
    return 100 * np.array([pass_at_k(d["samples"], right, int(k)) for right in d["right_per_problem"]])


def find(records: list[dict], recipe: str, at: str, base: str = "", step: int = -1,
         shots: int = 0) -> list[dict]:
    """Evaluations of one recipe from one checkpoint, in the order of seeds. Without `base`: of the first."""
    wanted = (base or records[0]["base"], at, recipe, step, shots)
    found = [r for r in records if (r["base"], r["at"], r["recipe"], r["step"], r["shots"]) == wanted]
    return sorted(found, key=lambda r: r["seed"])


def by_seed(records: list[dict], recipe: str, metric: str, at: str, base: str) -> dict[int, np.ndarray]:
    """Seed -> values (N,)."""
    name, _, step = recipe.partition("@")
    return {r["seed"]: values(r, metric) for r in find(records, name, at, base, int(step or -1))}


def difference(records: list[dict], a: str, b: str, metric: str, ats: list[str],
               base: str = "") -> np.ndarray | None:
    """a − b (S, N) per seed and problem, averaged over the checkpoints, for the seeds that both have at all
    of them (the base's only model stands for every seed); None if there are none."""
    parts = []                                           # per checkpoint: seed -> (N,)
    for at in ats:
        x = by_seed(records, a, metric, at, base)
        y = by_seed(records, b, metric, at, base)
        if b == "base" and y:
            y = dict.fromkeys(x, *y.values())
        if a == "base" and x:
            x = dict.fromkeys(y, *x.values())
        parts.append({seed: x[seed] - y[seed] for seed in x.keys() & y.keys()})

    seeds = sorted(set.intersection(*map(set, parts))) if parts else []
    if not seeds:
        return None
    return np.mean([np.stack([part[seed] for seed in seeds]) for part in parts], axis=0)


@functools.cache
def resamples(S: int, N: int, replicates: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed (replicates, S) and each problem (replicates, N) is drawn, S and N times with
    replacement: the same in every comparison."""
    rng = np.random.default_rng(0)
    seeds = np.zeros((replicates, S))
    problems = np.zeros((replicates, N))
    for i in range(replicates):
        seeds[i] = np.bincount(rng.integers(0, S, S), minlength=S)
        problems[i] = np.bincount(rng.integers(0, N, N), minlength=N)
    return seeds, problems


def bootstrap(x: np.ndarray, comparisons: int = 1, replicates: int = 2_000) -> tuple[float, float, float]:
    """(mean, low, high): 95 % interval of the mean of x (S, N), seeds and problems drawn with replacement;
    wider by Bonferroni's correction if x is the most striking of several comparisons."""
    seeds, problems = resamples(*x.shape, replicates)
    means = ((seeds @ x) * problems).sum(1) / x.size
    low, high = np.percentile(means, (2.5 / comparisons, 100 - 2.5 / comparisons))
    return float(x.mean()), float(low), float(high)


def verdict(low: float, high: float, margin: float) -> str:
    """The rule for every claim: where does the interval lie?"""
    return "reproduced" if low > margin else "not reproduced" if high < margin else "undecided"


# ---- claims ----------------------------------------------------------------------------------------------
def judged(claim: str, says: str, where: str, x: np.ndarray, margin: float, paper: str = "",
           comparisons: int = 1) -> list[str]:
    """A row of the table: id, claim, checkpoints, statistic of x (S, N), margin, verdict, paper."""
    mean, low, high = bootstrap(x, comparisons)
    seeds = "" if len(x) > 2 or claim == "C9" else f" ({len(x)} seed{'s' * (len(x) > 1)})"
    return [claim, says, where, f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", f"{margin:+g}",
            verdict(low, high, margin) + seeds, paper]


def judge_claim(records: list[dict], c: Claim, candidates: list[str], last: str) -> list[list[str]]:
    """The claim over all checkpoints that have both recipes, then each of these checkpoints alone."""
    ats = [at for at in candidates if difference(records, c.a, c.b, c.metric, [at]) is not None]
    x = difference(records, c.a, c.b, c.metric, ats)
    if x is None:                                        # no seed has both at every checkpoint
        return []
    rows = [judged(c.id, c.says, f"{', '.join(ats)} of {last}", x, c.margin, c.paper)]
    for at in ats if len(ats) > 1 else ():
        rows.append(judged("", "", at, difference(records, c.a, c.b, c.metric, [at]), c.margin))

    start = find(records, "base", ats[0])
    for name, low, high in SPLITS if c.id == "C8" and start else ():
        right = np.array(start[0]["problems"]["easy"]["right_per_problem"])
        chosen = (low <= right) & (right <= high)
        if chosen.any():
            rows.append(judged("", f"problems of which the base solves {name} of 64",
                               f"{chosen.sum()} problems", x[:, chosen], c.margin))
    return rows


def judge_composition(records: list[dict]) -> list[list[str]]:
    """C4: is the gain of RL on hard problems larger from one base model than from another?"""
    rows = []
    for (base_a, at_a), (base_b, at_b) in COMPOSITION:
        a = difference(records, "RL on hard", "base", "hard pass@1", [at_a], base_a)
        b = difference(records, "RL on hard", "base", "hard pass@1", [at_b], base_b)
        if a is not None and b is not None:
            rows.append(judged("C4", f"RL gains more on hard problems from {base_a} than from {base_b}",
                               f"{at_a}, {at_b}", a - b, 0, "+24.5…29.5 (math-heavy 1B) against +10 (4B)"))
    return rows


def judge_brittle(records: list[dict], trained: list[str]) -> list[list[str]]:
    """C9: do two seeds of RL with equal training reward differ in test pass@1?"""
    gain, alike, margin = BRITTLE
    gains = {at: difference(records, "RL", "base", PASS_1, [at]) for at in trained}
    working = [at for at, x in gains.items() if x is not None and x.mean() >= gain]
    if not working or len(trained) < 2:
        return []

    at = working[0]
    gaps = []
    for a, b in permutations(find(records, "RL", at), 2):
        rewards = [np.mean([point[1] for point in r["curve"][-10:]]) for r in (a, b)]
        if abs(rewards[0] - rewards[1]) < alike:
            gaps.append(values(a, PASS_1) - values(b, PASS_1))
    if not gaps:
        return [["C9", "no two seeds have equal training reward", at, *"  ", "undecided", ""]]
    return [judged("C9", "seeds with equal training reward differ in test pass@1 (largest pair)", at,
                   max(gaps, key=np.mean)[None], margin, "validation .26, .134, .149 at reward .21",
                   len(gaps) // 2)]


def judge(records: list[dict]) -> list[list[str]]:
    """The rows for every claim that these records can answer; rows without an id belong to the one above."""
    trained = sorted({r["at"] for r in records if r["recipe"] != "base"}, key=millions)
    last = max((r["at"] for r in records), key=millions)
    early = [at for at in trained if millions(at) <= 2 / 3 * millions(last)]
    rows = []
    for claim in CLAIMS:
        rows += judge_claim(records, claim, early if claim.early else trained, last)
    return rows + judge_composition(records) + judge_brittle(records, trained)


# ---- figures ---------------------------------------------------------------------------------------------
class Shown:
    """The checkpoints of the first base model, the recipes, and the evaluations at the ends of their runs."""

    def __init__(self, records: list[dict], order: tuple[str, ...]):
        self.records = records
        self.base = records[0]["base"]
        self.ends = [r for r in records if r["step"] < 0 and r["shots"] == 0]
        self.here = [r for r in self.ends if r["base"] == self.base]
        self.recipes = list(dict.fromkeys(r["recipe"] for r in self.ends if r["recipe"] != "base"))
        self.ats = sorted({r["at"] for r in self.here}, key=millions)
        trained = {r["at"] for r in self.here if r["recipe"] != "base"}
        self.trained = [at for at in self.ats if at in trained]

        self.colors = {"base": "0.5"}            # a recipe's is the same in every figure; strong ones first
        for i, name in enumerate(dict.fromkeys([*order, *self.recipes])):
            self.colors[name] = matplotlib.colormaps["tab20"]((2 * i + i // 10) % 20)


def mean(runs: list[dict], metric: str) -> float:
    return float(np.mean([values(r, metric).mean() for r in runs]))


def curve(axis: Axes, points: list[tuple[float, list[dict]]], metric: str, fmt: str, color: object,
          label: str = "", bars: bool = True) -> None:
    """The mean over seeds at each x of points (x, runs), where there are runs, with its 95 % interval."""
    points = [(x, runs) for x, runs in points if runs]
    if not points:
        return
    intervals = []
    for _, runs in points:
        intervals.append(bootstrap(np.stack([values(r, metric) for r in runs])))
    middle, low, high = np.array(intervals).T
    around = [middle - low, high - middle] if bars else None
    axis.errorbar([x for x, _ in points], middle, around, fmt=fmt, color=color, ms=4, lw=1, capsize=2,
                  label=label or None)


def against_tokens(s: Shown) -> Figure:
    """Everything against pretraining tokens."""
    figure = Figure(figsize=(13, 7))
    shots = max(r["shots"] for r in s.records)

    for axis, metric in zip(figure.subplots(2, 3).flat, METRICS):
        base = [(millions(at), find(s.here, "base", at)) for at in s.ats]
        curve(axis, base, metric, "o-", "0.5", "base", bars=False)
        few = [(millions(at), find(s.records, "base", at, s.base, shots=shots)) for at in s.ats]
        curve(axis, few, metric, ":", "0.5", f"base, {shots}-shot", bars=False)
        for i, recipe in enumerate(s.recipes):
            aside = .06 * (i - len(s.recipes) / 2)       # else error bars would cover each other
            points = [(millions(at) + aside, find(s.here, recipe, at)) for at in s.ats]
            curve(axis, points, metric, "o-" if len(s.recipes) < 8 else "o", s.colors[recipe], recipe)
        axis.set_title(f"{metric} (%)")
        axis.set_xlabel("pretraining tokens (millions)")
    figure.axes[0].legend(fontsize=7)
    return figure


def along_steps(s: Shown) -> Figure | None:
    """Along the steps of RL. The recipe A→B starts from A's result, others start from the base."""
    traced = [r for r in s.records if r["step"] >= 0]
    ats = sorted({r["at"] for r in traced}, key=millions)
    if not traced:
        return None

    figure = Figure(figsize=(3.4 * len(ats), 6))
    for at, column in zip(ats, figure.subplots(2, len(ats), squeeze=False).T):
        for axis, metric in zip(column, (PASS_1, PASS_32)):
            for recipe in dict.fromkeys(r["recipe"] for r in traced):
                points = [(0, find(s.records, recipe.rpartition("→")[0] or "base", at))]
                for step in sorted({r["step"] for r in traced if r["recipe"] == recipe}):
                    points.append((step, find(s.records, recipe, at, s.base, step)))
                end = find(s.records, recipe, at)
                if end and end[0]["curve"]:
                    points.append((end[0]["curve"][-1][0], end))
                curve(axis, points, metric, "o-", s.colors[recipe], recipe)

            axis.set_title(f"from {at}: {metric} (%)")
            axis.set_xlabel("RL steps")
    figure.axes[0].legend()
    return figure


def side_by_side(s: Shown) -> Figure:
    """All recipes at the last checkpoint: parallel averaging, two by two."""
    at = (s.trained or s.ats)[-1]
    recipes = [name for name in ("base", *s.recipes) if find(s.here, name, at)]
    figure = Figure(figsize=(11, 7))
    for axis, metric in zip(figure.subplots(2, 2).flat, (PASS_1, PASS_32, "hard pass@32", "general")):
        for x, recipe in enumerate(recipes):
            runs = find(s.here, recipe, at)
            curve(axis, [(x, runs)], metric, "s", s.colors[recipe])
            axis.plot([x] * len(runs), [mean([r], metric) for r in runs], "k_", ms=9, alpha=.5)
        axis.set_xticks(range(len(recipes)), recipes, rotation=35, ha="right", fontsize=8)
        axis.set_title(f"from {at}: {metric} (%), seeds as dashes")
    return figure


def forgetting(s: Shown) -> Figure:
    """Forgetting against accuracy gained, and against the distance from the base, where it was measured."""
    panels = 1 + any("kl" in r["problems"]["easy"] for r in s.here)
    figure = Figure(figsize=(5.5 * panels, 4.5))
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]

    for recipe in s.recipes:
        runs = [r for r in s.here if r["recipe"] == recipe]
        starts = [find(s.here, "base", r["at"]) for r in runs]
        gained = [mean([r], PASS_1) - mean(start, PASS_1) for r, start in zip(runs, starts)]
        lost = [mean([r], "general") - mean(start, "general") for r, start in zip(runs, starts)]
        moved = [r["problems"]["easy"].get("kl", np.nan) for r in runs]
        for axis, x in zip(axes, (gained, moved)):
            axis.plot(x, lost, "o", color=s.colors[recipe], label=recipe, ms=4)

    labels = ("easy pass@1 gained over the base (points)",
              "KL to the base on its own answers to easy problems (nats per token)")
    for axis, label in zip(axes, labels):
        axis.axhline(0, color="0.5", lw=1)
        axis.set_xlabel(label)
    axes[0].set_ylabel("general mean, change (points)")
    axes[0].legend(fontsize=7)
    return figure


def seeds(s: Shown) -> Figure | None:
    """Training reward and validation of the first trained checkpoint, a line per seed; by FLOPs too."""
    at = (s.trained or s.ats)[0]
    runs = [r for r in s.here if r["curve"] and r["at"] == at]
    if not runs:
        return None
    figure = Figure(figsize=(13, 3.8))
    axes = figure.subplots(1, 3)

    for r in runs:
        style = {"color": s.colors[r["recipe"]], "lw": 1}
        flops = {0: 0.0} | {step: f / 1e12 for step, _, _, f in r["curve"]}
        validated = [(step, 100 * score) for step, score in r["validation"] if step in flops]
        scores = [score for _, score in validated]
        steps = [point[0] for point in r["curve"]]
        rewards = [100 * point[1] for point in r["curve"]]
        axes[0].plot(steps, rewards, **style)
        axes[1].plot([step for step, _ in validated], scores, **style,
                     label=r["recipe"] if r["seed"] == 0 else None)
        axes[2].plot([flops[step] for step, _ in validated], scores, **style)

    for axis, title, unit in zip(axes, ("training reward (%)", "validation pass@1 (%)", "the same"),
                                 ("steps of 64 problems", "steps of 64 problems", "10¹² FLOPs")):
        axis.set_title(f"from {at}: {title}, a line per seed")
        axis.set_xlabel(unit)
    axes[1].legend(fontsize=7)
    return figure


def composition(s: Shown) -> Figure | None:
    """Composition of the data against scale of the model: RL on hard problems from each base model."""
    places = list(dict.fromkeys((r["base"], r["at"]) for r in s.ends if r["recipe"] == "RL on hard"))
    if not places:
        return None
    figure = Figure(figsize=(10, 4))
    for axis, metric in zip(figure.subplots(1, 2), ("hard pass@1", "hard pass@32")):
        for x, (base, at) in enumerate(places):
            for aside, recipe in ((-.1, "base"), (.1, "RL on hard")):
                runs = find(s.ends, recipe, at, base)
                curve(axis, [(x + aside, runs)], metric, "s", s.colors[recipe])
        axis.set_xticks(range(len(places)), [f"{base}\n{at} tokens" for base, at in places], fontsize=8)
        axis.set_title(f"{metric} (%), base (grey) and after RL on hard ones", fontsize=10)
    return figure


FIGURES = {"main": against_tokens, "steps": along_steps, "parallel": side_by_side, "forgetting": forgetting,
           "seeds": seeds, "composition": composition}


def draw(out: Path, records: list[dict], order: tuple[str, ...] = ()) -> list[str]:
    """Every figure that these records allow, as PNG; returns their names. `order`: of the colours."""
    names = []
    for name, function in FIGURES.items():
        figure = function(Shown(records, order))
        if figure is None:
            continue
        for axis in figure.axes:
            axis.grid(alpha=.3)
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=110)
        names.append(name)
    return names


# ---- text ------------------------------------------------------------------------------------------------
CLAIMS_HEADER = "| claim | what it says | checkpoints | difference in points | margin | verdict | the paper |"
ALL_CLAIMS_HEADER = ("| study | claim | what it says | checkpoints | difference in points [95 %] | margin "
                     "| verdict | the paper (%) |")
BEGIN = "<!-- claims: made by python study.py --report results -->"
END = "<!-- end of claims -->"


def markdown(header: str, rows: list[list]) -> str:
    lines = [header, "|" + "---|" * (header.count("|") - 1)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def with_gain(x: np.ndarray, gained: np.ndarray | None) -> str:
    """'43.2 (+2.1 [+0.3, +3.9])': the mean of x and, where there is a comparison, the gain."""
    if gained is None:
        return f"{x.mean():.1f}"
    middle, low, high = bootstrap(gained)
    return f"{x.mean():.1f} ({middle:+.1f} [{low:+.1f}, {high:+.1f}])"


def summary(records: list[dict]) -> list[list]:
    """A row per checkpoint and recipe: means over seeds, and the gain over the base."""
    rows = []
    ordered = sorted(records, key=in_order)
    for base, at, recipe in dict.fromkeys((r["base"], r["at"], r["recipe"]) for r in ordered):
        runs = find(records, recipe, at, base)
        if not runs:
            continue
        row = [base, at, recipe, len(runs)]
        for metric in METRICS:
            gained = None
            if recipe != "base":
                gained = difference(records, recipe, "base", metric, [at], base)
            row.append(with_gain(np.array([values(r, metric).mean() for r in runs]), gained))
        rows.append(row)
    return rows


def evaluations(records: list[dict]) -> list[list]:
    """A row per evaluation, paired with the base's, problem by problem."""
    rows = []
    for r in sorted(records, key=in_order):
        start = find(records, "base", r["at"], r["base"])[0]
        step = f", step {r['step']}" if r["step"] >= 0 else ""
        shots = f", {r['shots']}-shot" if r["shots"] else ""
        row = [r["base"], r["at"], r["recipe"] + step + shots, r["seed"]]
        for metric in METRICS:
            x = values(r, metric)
            row.append(with_gain(x, None if r is start else (x - values(start, metric))[None]))
        minutes = r["cost"]["seconds"] / 60
        rows.append(row + [f"{r['bits_per_byte']:.4f}", f"{r['cost']['flops']:.1e}", f"{minutes:.1f}"])
    return rows


def solved(records: list[dict]) -> list[list]:
    """Expansion or sharpening, problem by problem: a row per run, against its base model."""
    rows = []
    for r in sorted(records, key=in_order):
        start = find(records, "base", r["at"], r["base"])
        if r["step"] >= 0 or r["shots"] or not start:
            continue
        for difficulty, d in r["problems"].items():
            before = np.array(start[0]["problems"][difficulty]["right_per_problem"]) > 0
            after = np.array(d["right_per_problem"]) > 0

            moved = values(r, f"{difficulty} pass@32") - values(start[0], f"{difficulty} pass@32")
            styles = ", ".join(f"{name} {part:.0%}" for name, part in d["styles"].items() if part >= .01)
            rows.append([
                r["base"], r["at"], r["recipe"], r["seed"], difficulty, before.sum(), after.sum(),
                (after & ~before).sum(), (before & ~after).sum(), (moved > 50).sum(), (moved < -50).sum(),
                f"{d['answer_entropy']:.2f}", f"{d['distinct_completions']:.0f}", f"{d['unparsed']:.1%}",
                f"{d['kl']:.3f}" if "kl" in d else "", styles])
    return rows


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


def report(out: Path, records: list[dict], claims: str, order: tuple[str, ...] = ()) -> str:
    """Write report.md, with the table of `claims`, and its figures from the records; returns the text.
    `order`: of the recipes, for their colours."""
    figures = draw(out, records, order)
    text = "\n\n".join([
        f"# Results of the study `{out.name}`", ABOUT.format(name=out.name),
        "## Claims", claims,
        "## Means over seeds, and the gain over the base",
        markdown(f"{START_OF_ROW} seeds | {OF_METRICS} |", summary(records)),
        "## Figures", "\n".join(f"![{name}]({name}.png)" for name in figures),
        "## Every evaluation",
        markdown(f"{START_OF_ROW} seed | {OF_METRICS} | bits per byte | FLOPs | minutes |",
                 evaluations(records)),
        "## Problem by problem: expansion or sharpening", ABOUT_SOLVED,
        markdown(f"{START_OF_ROW} seed | problems | solved by the base | now | newly solved | newly lost "
                 "| jumped | dropped | answer entropy | distinct of 64 | unparsed | KL | styles |",
                 solved(records))])

    atomic_write(out / "report.md", (text + "\n").encode())
    return text + "\n"


def all_claims(folder: Path, studies: dict[str, list[dict]]) -> None:
    """Write the claims of all studies (name -> records) as one table into folder/README.md, between BEGIN and
    END; the rest of the file stays as it is."""
    readme = folder / "README.md"
    begin = BEGIN.encode()
    end = END.encode()
    lines = readme.read_bytes().split(b"\n") if readme.is_file() else []
    require(begin in lines and end in lines[lines.index(begin):],
            f"{readme}: must exist and have the line {BEGIN} and, below it, the line {END}")
    rows = []
    for name, records in studies.items():
        rows += [[name, *row] for row in judge(records) if row[0]]
    order = {(c.id, c.says, c.paper): i for i, c in enumerate(CLAIMS)}       # "the same ..." after its like
    rows.sort(key=lambda row: (row[1], order.get((row[1], row[2], row[-1]), 0)))
    table = markdown(ALL_CLAIMS_HEADER, rows).encode()

    before = lines[:lines.index(begin) + 1]
    after = lines[lines.index(end):]
    atomic_write(readme, b"\n".join([*before, b"", table, b"", *after]))
    print(f"written: {len(rows)} rows into {readme}")
