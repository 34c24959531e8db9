"""The whole study by one command: a grid of the other scripts' commands, then tables, figures and verdicts.

    python study.py                           the quick study
    python study.py --preset main             or long, early, composition, rollouts, controls, gpu-8/12/24
    python study.py --preset main --list      only print every command and its estimated minutes
    python study.py --preset main --wave 3    what can run at once when waves 1 and 2 are done, for a queue
    python study.py --report results/main     redraw the report from results.jsonl, in seconds

A cell of the grid is one command that makes one file. Its folder is named by a hash of all its options and
its parents', so what is done is not done again, and what has other options is. Code is not in the hash: after
a change of code, name a new place for the runs (--runs). Ctrl-C, and the same command again, goes on. What is
run and how it is judged stands below as data: change it.
"""
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import atomic_write, main, number, parse, require
from evaluate import Config as EvaluateConfig
from evaluate import pass_at_k

# ---- what is run -----------------------------------------------------------------------------------------

# Recipe -> command. {base} is the checkpoint that a cell starts from, {SFT} what the recipe SFT made of it.
# The settings of RL are the same wherever RL appears. Chosen on validation problems: README, "The search".
RL = "rl.py --init {base} --checkpoints-at 10,25"
SFT_50 = "sft.py --init {base} --no-decay --warmup 0 --questions 1600 --epochs 1"     # 50 updates
RECIPES = {
    "RL": RL,
    "SFT": "sft.py --init {base}",
    "SFT-Gold": "sft.py --init {base} --gold --epochs 2",
    "SFT→RL": RL.replace("{base}", "{SFT}"),
    "SFT-Gold→RL": RL.replace("{base}", "{SFT-Gold}"),
    "parallel": "merge.py --init {base}",
    # longer: does RL fall behind SFT, or do 50 steps of it?
    "RL×4": "rl.py --init {base} --steps 200 --checkpoints-at 50,100",
    "SFT→RL×4": "rl.py --init {SFT} --steps 200 --checkpoints-at 50,100",
    # controls: is it the averaging, or only the smaller step, the second data set, the second optimizer?
    "SFT at RL's lr": SFT_50 + " --lr 3e-4",
    "RL at lr/2": "rl.py --init {base} --lr 1.5e-4",
    "SFT at lr/2": SFT_50 + " --lr 5e-4",
    "fused": "merge.py --init {base} --mode fused",
    "alternating": "merge.py --init {base} --mode alternating",
    "H=10": "merge.py --init {base} --inner 10",
    "H=all": "merge.py --init {base} --inner 50",
    "linear": "merge.py weights {RL} {SFT} --base {base} --method linear",
    "task": "merge.py weights {RL} {SFT} --base {base} --method task --weights 1,1",
    "ties": "merge.py weights {RL} {SFT} --base {base} --method ties",
    # few against many rollouts per problem: 51,200 rollouts each (G=64: 53,248)
    "G=4": "rl.py --init {base} --rollouts 4 --steps 200 --eval-every 20 --checkpoints-at 13",
    "G=16": "rl.py --init {base} --rollouts 16 --steps 50 --eval-every 5",
    "G=64": "rl.py --init {base} --rollouts 64 --steps 13 --eval-every 1",
    # composition: judged on hard problems, so trained on hard ones
    "RL on hard": "rl.py --init {base} --difficulty hard",
    # early checkpoints, where successes are rare: more rollouts a problem, as many in all as RL×4
    "RL wide": "rl.py --init {base} --rollouts 64",
}


@dataclass
class Study:
    """Which bases (name -> options of data/prepare.py, options of pretrain.py, checkpoints to start from),
    which recipes and seeds; `trace`: (checkpoint, recipe) -> steps at which the run is evaluated too."""
    bases: dict[str, tuple[str, str, tuple[str, ...]]]
    recipes: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    trace: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    shots: int = 2                               # the base is also evaluated with so many solved examples
    more: dict[str, str] = field(default_factory=dict)   # script -> options that its commands get besides


def gpu(size: str, width: int, millions: int, micro_batch: int) -> Study:
    """For one consumer GPU, by scale.py's memory plan; nobody has measured it. The learning rates are those
    of the default model, of width 96, times 96 / `width` (Yang et al. 2022), not searched."""
    kept, slower = [f"{millions // part}M" for part in (4, 2, 1)], 96 / width
    rl_options, sft_lr = f"{3e-4 * slower:.1e} --micro-batch {micro_batch}", f"{1e-3 * slower:.1e}"
    pretraining = (f"--size {size} --batch 64 --micro-batch 64 --lr {3e-3 * slower:.1e} --tokens {millions}M "
                   f"--checkpoints-at {','.join(kept)}")
    return Study({"base": (f"--tokens {millions}M", pretraining, tuple(kept))}, PIPELINES,
                 more={"rl.py": f"--lr {rl_options}", "sft.py": f"--lr {sft_lr}",
                       "merge.py": f"--lr-sft {sft_lr} --lr-rl {rl_options}"})


PIPELINES = ("RL", "SFT", "SFT-Gold", "SFT→RL", "SFT-Gold→RL", "parallel")
EVALUATION = "--split test --n-problems 150"         # the same for every cell: 150 easy, 150 hard problems
KEPT = "--checkpoints-at 1M,2M,3M,4M,5M,6M,8M"
STUDIES = {
    "quick": Study({"base": ("--math-fraction 0.6", "--tokens 4M --checkpoints-at 2M,3M,4M", ("4M",))},
                   ("RL", "SFT", "SFT→RL", "parallel"), seeds=(0,)),
    "main": Study({"base": ("", KEPT, ("4M", "5M", "6M", "8M"))}, PIPELINES,
                  trace={(at, recipe): (10, 25) for at in ("6M",) for recipe in ("RL", "SFT→RL")}),
    "controls": Study({"base": ("", KEPT, ("6M",))},
                      ("RL", "SFT", "parallel", "SFT at RL's lr", "RL at lr/2", "SFT at lr/2", "fused",
                       "alternating", "H=10", "H=all", "linear", "task", "ties")),
    "rollouts": Study({"base": ("", KEPT, ("6M",))}, ("G=4", "G=16", "G=64"), trace={("6M", "G=4"): (13,)}),
    "long": Study({"base": ("", KEPT, ("8M",))}, ("RL", "SFT", "SFT→RL", "RL×4", "SFT→RL×4"),
                  trace={("8M", recipe): (50, 100) for recipe in ("RL×4", "SFT→RL×4")}),
    "early": Study({"base": ("", KEPT, ("4M", "5M"))}, ("RL×4", "RL wide"),
                   trace={(at, "RL×4"): (50, 100) for at in ("4M", "5M")}),
    # 30 % arithmetic against 60 %, and 0.5M against 1M parameters: 2.1 times the FLOPs per token
    "composition": Study({"0.5M, 30 %": ("", KEPT, ("8M",)),
                          "0.5M, 60 %": ("--math-fraction 0.6", "--checkpoints-at 8M", ("8M",)),
                          "1M, 30 %": ("", "--size 1M --checkpoints-at 3.8M,8M", ("3.8M", "8M"))},
                         ("RL on hard",)),
    "gpu-8": gpu("10M", 320, 400, 16_384),               # 8, 12 and 24 GB
    "gpu-12": gpu("30M", 512, 1_200, 16_384),
    "gpu-24": gpu("124M", 768, 2_400, 8_192),
}

# ---- how it is judged (written before the runs) ----------------------------------------------------------

# Claim, what it says, recipe a, recipe b, metric, at which checkpoints, margin in points, the paper's figure.
# The statistic is a − b, averaged over those checkpoints, the seeds and the test problems. Reproduced: its
# 95 % interval over seeds and problems lies above the margin. Not reproduced: below it. Else undecided.
# "early" checkpoints have seen at most two thirds of the pretraining tokens.
CLAIMS = (
    ("C1", "RL lifts pass@1 of early checkpoints", "RL", "base", "easy pass@1", "early", 10,
     "15.6 after 4B of 50B tokens, base about 2"),
    # added with their preset after RL's result for C1 was known: two more chances
    ("C1", "200 steps of RL lift pass@1 of early checkpoints", "RL×4", "base", "easy pass@1", "early", 10,
     "15.6 after 4B of 50B tokens, base about 2"),
    ("C1", "64 rollouts a problem lift pass@1 of early checkpoints", "RL wide", "base", "easy pass@1",
     "early", 10, "15.6 after 4B of 50B tokens, base about 2"),
    ("C1", "RL lifts pass@32 of early checkpoints", "RL", "base", "easy pass@32", "early", 0,
     "35.5 after 4B tokens, base about 14"),
    ("C1", "200 steps of RL lift pass@32 of early checkpoints", "RL×4", "base", "easy pass@32", "early", 0,
     "35.5 after 4B tokens, base about 14"),
    ("C1", "64 rollouts a problem lift pass@32 of early checkpoints", "RL wide", "base", "easy pass@32",
     "early", 0, "35.5 after 4B tokens, base about 14"),
    ("C2", "direct RL is at most 5 points below SFT→RL", "RL", "SFT→RL", "easy pass@1", "all", -5,
     "47.4 against 48.5"),
    ("C2", "the same after 200 steps of RL", "RL×4", "SFT→RL×4", "easy pass@1", "all", -5, "the same"),
    ("C3", "RL beats SFT on pass@1", "RL", "SFT", "easy pass@1", "all", 0, "47.4 against 31.5"),
    ("C3", "the same after 200 steps of RL", "RL×4", "SFT", "easy pass@1", "all", 0, "the same"),
    ("C3", "SFT-Gold beats RL on pass@32", "SFT-Gold", "RL", "easy pass@32", "all", 0, "84 against 72.8"),
    ("C3", "SFT-Gold→RL beats RL on pass@1", "SFT-Gold→RL", "RL", "easy pass@1", "all", 0, "the highest"),
    ("C5", "direct RL lifts pass@1", "RL", "base", "easy pass@1", "all", 0, "4 → 39 along RL"),
    ("C5", "direct RL expands: pass@32 rises", "RL", "base", "easy pass@32", "all", 0, "45 → 69 along RL"),
    ("C5", "the same after 200 steps", "RL×4", "base", "easy pass@32", "all", 0, "45 → 69 along RL"),
    ("C5", "RL after SFT sharpens: pass@32 falls", "SFT", "SFT→RL", "easy pass@32", "all", 0,
     "80 → 75 along RL"),
    ("C5", "the same after 200 steps", "SFT", "SFT→RL×4", "easy pass@32", "all", 0, "80 → 75 along RL"),
    ("C5", "RL after SFT lifts pass@1", "SFT→RL", "SFT", "easy pass@1", "all", 0, "33 → 49 along RL"),
    ("C6", "RL costs at most 2 points of general capability", "RL", "base", "general", "all", -2,
     "44.4 against 44.3"),
    ("C6", "the same after 200 steps", "RL×4", "base", "general", "all", -2, "44.4 against 44.3"),
    ("C6", "SFT costs more than 2 points of it", "base", "SFT", "general", "all", 2, "44.3 against 39.5"),
    ("C7", "parallel averaging beats RL on pass@32", "parallel", "RL", "easy pass@32", "all", 0,
     "81 against 72.8"),
    ("C7", "parallel averaging beats SFT on pass@32", "parallel", "SFT", "easy pass@32", "all", 0,
     "81 against 70"),
    ("C7", "parallel averaging beats SFT→RL on pass@32", "parallel", "SFT→RL", "easy pass@32", "all", 0,
     "81 against 65"),
    *(("C7", f"control: it beats {control} on pass@32", "parallel", control, "easy pass@32", "all", 0, "–")
      for control in ("SFT at lr/2", "RL at lr/2", "fused", "alternating", "H=10", "H=all", "linear", "task",
                      "ties")),
    ("C7", "it costs at most 2 points of general capability", "parallel", "base", "general", "all", -2,
     "45.8–47.5 against 44.3"),
    ("C7", "its pass@1 is below RL's", "RL", "parallel", "easy pass@1", "all", 0, "47.4 against 33–41"),
    ("C8", "few rollouts per problem are more FLOP-efficient: G=4 ahead after equal rollouts", "G=4", "G=64",
     "easy pass@1", "all", 0, "early, n=5 against n=64"),
    ("C8", "many are more sample-efficient: G=64 ahead after equal problems (13 steps)", "G=64", "G=4@13",
     "easy pass@1", "all", 0, "n=64 against n=5"),
)
# C8 also for test problems split by the base's success, right answers of 64 samples (the paper's split).
SPLITS = (("16 to 64", 16, 64), ("0 to 8", 0, 8))
# C4: gain of RL on hard problems, a's minus b's: the data mix must beat the scale, at equal tokens and FLOPs.
COMPOSITION = ((("0.5M, 60 %", "8M"), ("1M, 30 %", "8M")), (("0.5M, 60 %", "8M"), ("1M, 30 %", "3.8M")))
# C9: at the earliest checkpoint where RL gains 5 points, two seeds whose training rewards (last 10 steps)
# differ by less than .03 differ by more than 3 points of test pass@1. The interval is over problems and, as
# the largest of several pairs is judged, wider by Bonferroni's rule.
BRITTLE = (5, .03, 3)


@dataclass
class Config:
    preset: str = "quick"           # quick main long early composition rollouts controls gpu-8/12/24
    runs: str = "runs"              # where data sets and runs go
    out: str = "results"            # results.jsonl, report.md and figures go into OUT/PRESET
    jobs: int = 0                   # cells at once, one thread each; 0 = one per core (per GPU on CUDA)
    list: bool = False              # print commands and estimated minutes, run nothing
    wave: int = 0                   # print this wave's commands that are not done, one a line, run nothing
    report: str = ""                # only redraw the report in this folder from its results.jsonl


# ---- the grid --------------------------------------------------------------------------------------------

@dataclass
class Cell:
    base: str                       # which base model
    at: str                         # which of its checkpoints
    recipe: str                     # "data" and "base" too
    seed: int
    command: list[str]
    makes: Path
    needs: list[Path]
    minutes: float                  # estimate, one core of the machine in the README
    evaluation: bool = False
    step: int = -1                  # of the run that is evaluated; -1: its end

    @property
    def name(self) -> str:
        step = f" step {self.step}" if self.step >= 0 else ""
        shots = " " + self.makes.suffixes[-2][1:] if self.evaluation else ""
        return f"{self.base} {self.at} {self.recipe} seed {self.seed}{step}{shots}"

    @property
    def log(self) -> str:
        return re.sub(r"[^A-Za-z0-9]+", "-", self.name) + ".log"

    def argv(self, threads: int) -> list[str]:
        """The command; only making data has no threads to choose."""
        return [*self.command, *(["--threads", str(threads)] if self.recipe != "data" else [])]


def merges(command: list[str]) -> bool:
    """Is it `merge.py weights`, which has options of its own and writes a file, not a run folder?"""
    return command[:2] == ["merge.py", "weights"]


def configuration(command: list[str]) -> dict:
    """All options of a command, defaults included, but those that do not change the result."""
    script = importlib.import_module(command[0].removesuffix(".py").replace("/", "."))
    weights = merges(command)
    config = parse(script.WeightsConfig if weights else script.Config, command[1 + weights:])
    return {k: v for k, v in asdict(config).items() if k not in ("out", "device", "threads", "memory")}


def estimate(command: list[str], c: dict) -> float:
    """Minutes on one core, from what was measured; good for planning only."""
    rollouts = c.get("steps", 0) * c.get("n_problems", 0) * c.get("rollouts", 0)
    examples = c.get("epochs", 0) * c.get("questions", 0) * (4 if c.get("gold") else 1)
    return {"data/prepare.py": c.get("tokens", 0) / 4e7, "pretrain.py": c.get("tokens", 0) / 5.4e5,
            "sft.py": examples / 9e3, "rl.py": rollouts / 2.2e4, "merge.py": rollouts / 2e4,
            "evaluate.py": c.get("n_problems", 0) * c.get("n_samples", 0) / 1.9e4}.get(command[0], 1.0)


def grid(study: Study, c: Config) -> list[Cell]:
    """Every cell, each after those that it needs."""
    cells: list[Cell] = []

    def cell(base: str, at: str, recipe: str, seed: int, command: str, final: str, needs: list[Path]) -> Path:
        argv = shlex.split(command)
        options = configuration(argv)
        key = blake2b(json.dumps([argv[0], options], sort_keys=True).encode(), digest_size=4).hexdigest()
        label = re.sub(r"[^A-Za-z0-9]+", "-", f"{recipe} {at} {seed if at else ''}").strip("-").lower()
        folder = Path(c.runs, f"{label}-{key}")
        makes = folder / final
        if makes not in {x.makes for x in cells}:        # two bases may share their data
            out = makes if merges(argv) else folder
            cells.append(Cell(base, at, recipe, seed, [*argv, "--out", str(out)], makes, needs,
                              estimate(argv, options)))
        return folder

    def evaluation(base: str, at: str, recipe: str, seed: int, made: Path, after: Path, shots: int = 0,
                   step: int = -1) -> None:
        command = ["evaluate.py", str(made), "--data", str(data), *EVALUATION.split(), "--shots", str(shots)]
        command += ["--reference", str(folder / f"{at}.pt")] if recipe != "base" else []
        needs = [after, folder / f"{last}.pt"]
        cells.append(Cell(base, at, recipe, seed, command, made.with_suffix(f".test.{shots}shot.json"), needs,
                          estimate(command, configuration(command)), True, step))
    for base, (prepare_options, pretrain_options, starts) in study.bases.items():
        data = cell(base, "", "data", 0, f"data/prepare.py {prepare_options}", "manifest.json", [])
        from_data = shlex.join(["--data", str(data)])
        pretraining = f"pretrain.py {from_data} {pretrain_options}"
        kept = [f"{t / 1e6:g}M" for t in configuration(shlex.split(pretraining))["checkpoints_at"]]
        last = kept[-1]
        folder = cell(base, "", "base", 0, pretraining, f"{last}.pt", [data / "manifest.json"])
        for at in kept:
            for shots in sorted({0, study.shots}) if at in starts else [0]:
                evaluation(base, at, "base", 0, folder / f"{at}.pt", folder / f"{last}.pt", shots)
        for seed in study.seeds:
            for at in starts:
                made = {"base": folder / f"{at}.pt"}
                for recipe in study.recipes:
                    parents = [folder / f"{last}.pt" if name == "base" else made[name]
                               for name in re.findall(r"{(.+?)}", RECIPES[recipe])]
                    quoted = {name: shlex.quote(str(path)) for name, path in made.items()}
                    command = f"{RECIPES[recipe].format(**quoted)} --seed {seed} "
                    command += study.more.get(command.split()[0], "")
                    command += "" if merges(command.split()) else f" {from_data}"
                    run = cell(base, at, recipe, seed, command, "final.pt", parents)
                    made[recipe] = run / "final.pt"
                    for step in study.trace.get((at, recipe), ()):
                        evaluation(base, at, recipe, seed, run / f"step{step}.pt", made[recipe], 0, step)
                    evaluation(base, at, recipe, seed, made[recipe], made[recipe])
    return cells


def waves(cells: list[Cell]) -> list[list[Cell]]:
    """The cells in groups: each needs only what earlier groups make."""
    depth: dict[Path, int] = {}
    for x in cells:                              # each comes after those that it needs
        depth[x.makes] = 1 + max((depth[made] for made in x.needs), default=-1)
    return [[x for x in cells if depth[x.makes] == i] for i in sorted(set(depth.values()))]


def print_commands(rounds: list[list[Cell]], only: int = 0) -> None:
    """All waves with estimated minutes; or of wave number `only` what is not done, a command per line."""
    require(0 <= only <= len(rounds), f"--wave {only}: must be one of the study's waves, 1 to {len(rounds)}")
    for i, cells in enumerate(rounds, 1):
        if not only:
            minutes = sum(x.minutes for x in cells)
            print(f"# wave {i}: {len(cells)} cell{'s' * (len(cells) > 1)}, {minutes:.0f} min")
        for x in cells:
            command = shlex.join(["python", *x.argv(threads=1)])
            if not only:
                print(f"{command}   # {x.name}, {x.minutes:.1f} min")
            elif only == i and not done(x):
                print(command)


def done(x: Cell) -> bool:
    """Its file exists; of an evaluation: with the same configuration (options younger than it: defaults)."""
    if not x.makes.exists() or not x.evaluation:
        return x.makes.exists()
    wanted = configuration(x.command)
    stored = json.loads(x.makes.read_text())["config"]
    return all(stored.get(k, getattr(EvaluateConfig, k)) == json.loads(json.dumps(v))
               for k, v in wanted.items() if k not in ("checkpoints", "samples"))


def run_cells(cells: list[Cell], runs: Path, jobs: int) -> list[str]:
    """Run every cell that is not done as soon as what it needs is made; returns the names that failed."""
    waiting = [x for x in cells if not done(x)]
    unmade = {x.makes for x in waiting}
    running: dict[int, tuple[subprocess.Popen, Cell]] = {}               # slot -> process
    failed: list[str] = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    gpus = visible.split(",") if torch.cuda.is_available() else []
    (runs / "logs").mkdir(parents=True, exist_ok=True)
    total = sum(x.minutes for x in cells)
    bar = tqdm(total=total, initial=max(0.0, total - sum(x.minutes for x in waiting)),
               desc="study", unit="min", smoothing=0,
               bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}")
    try:
        while waiting or running:
            # evaluations last: nothing waits for them, and they are short enough to end together
            ready = sorted((x for x in waiting if not unmade & set(x.needs)), key=lambda x: x.evaluation)
            free = [slot for slot in range(jobs) if slot not in running]
            while ready and free:
                x, slot = ready.pop(0), free.pop(0)
                waiting.remove(x)
                # a pretraining that all others wait for gets every core
                alone = x.recipe == "base" and not x.evaluation and not running and not ready
                command = [sys.executable, *x.argv(jobs if alone else 1)]
                device = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
                with open(runs / "logs" / x.log, "ab") as log:
                    quiet = os.environ | device | {"TQDM_MININTERVAL": "30"}
                    running[slot] = (subprocess.Popen(command, stdout=log, stderr=log, env=quiet), x)
            if not running:                      # what still waits needs something that failed
                failed += [x.name for x in waiting]
                break
            bar.set_postfix_str(", ".join(x.name for _, x in running.values()), refresh=False)
            time.sleep(.5)
            for slot, (process, x) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    bar.update(min(x.minutes, bar.total - bar.n))        # floats add up to a little more
                    unmade.discard(x.makes)
                    if process.returncode or not x.makes.exists():
                        unmade.add(x.makes)
                        failed.append(x.name)
                        bar.write(f"FAILED: {x.name}, see {runs / 'logs' / x.log}")
    except BaseException:
        for process, _ in running.values():      # after Ctrl-C, which they received too, they save and stop
            process.wait()
        raise
    bar.close()
    return failed


def gather(cells: list[Cell]) -> list[dict]:
    """One record per evaluation that is done: what was run, what it cost, everything measured, its curve."""
    records = []
    for x in cells:
        if x.evaluation and done(x):
            result = json.loads(x.makes.read_text())
            stages = [s for s in result["lineage"] if s["script"] != "pretrain.py" or x.recipe == "base"]
            log = x.makes.with_name("log.jsonl")
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            for b in result["benchmarks"].values():
                b["hits"] = "".join(map(str, b["hits"]))
            records.append({
                "base": x.base, "at": x.at, "recipe": x.recipe, "seed": x.seed, "step": x.step,
                "shots": result["config"]["shots"],
                "cost": {k: sum(s[k] for s in stages) for k in ("tokens", "updates", "flops", "seconds")},
                # (step, reward, KL to the start, FLOPs) and (step, validation pass@1)
                "curve": [[r["step"], r["reward"], r["kl"], r["flops"]] for r in lines if "reward" in r],
                "validation": [[r["step"], r["val_pass@1"]] for r in lines if "val_pass@1" in r],
                **{k: result[k] for k in ("problems", "benchmarks", "general_mean", "bits_per_byte")}})
    return records


# ---- statistics ------------------------------------------------------------------------------------------

METRICS = ("easy pass@1", "easy pass@8", "easy pass@32", "hard pass@1", "hard pass@32", "general")


def values(r: dict, metric: str) -> np.ndarray:
    """What is averaged, (N,) in %: pass@k of each problem ('easy pass@32'), hit of each item ('general')."""
    if metric == "general":
        return 100.0 * np.array([int(hit) for b in r["benchmarks"].values() for hit in b["hits"]])
    difficulty, k = metric.split(" pass@")
    d = r["problems"][difficulty]
    return 100 * np.array([pass_at_k(d["samples"], right, int(k)) for right in d["right_per_problem"]])


def find(records: list[dict], recipe: str, at: str, base: str = "", step: int = -1,
         shots: int = 0) -> list[dict]:
    """Evaluations of one recipe from one checkpoint, in the order of seeds."""
    base = base or records[0]["base"]
    return sorted((r for r in records if (r["base"], r["at"], r["recipe"], r["step"], r["shots"])
                   == (base, at, recipe, step, shots)), key=lambda r: r["seed"])


def difference(records: list[dict], a: str, b: str, metric: str, ats: list[str],
               base: str = "") -> np.ndarray | None:
    """a − b (S, N) per seed and problem, averaged over the checkpoints, for the seeds that both have at all
    of them (the base's only model stands for every seed); None if there are none. 'G=4@13': after step 13."""
    parts = []                                           # per checkpoint: seed -> (N,)
    for at in ats:
        x, y = ({r["seed"]: values(r, metric)
                 for r in find(records, name, at, base, int(step or -1))}
                for name, _, step in (a.partition("@"), b.partition("@")))
        if b == "base" and y:
            y = dict.fromkeys(x, *y.values())
        if a == "base" and x:
            x = dict.fromkeys(y, *x.values())
        parts.append({seed: x[seed] - y[seed] for seed in x.keys() & y.keys()})
    seeds = sorted(set.intersection(*map(set, parts))) if parts else []
    return np.stack([np.mean([part[seed] for part in parts], axis=0) for seed in seeds]) if seeds else None


@functools.cache
def resamples(S: int, N: int, replicates: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed (replicates, S) and each problem (replicates, N) is drawn, S and N times with
    replacement: the same in every comparison."""
    rng = np.random.default_rng(0)
    drawn = [[np.bincount(rng.integers(0, n, n), minlength=n) for n in (S, N)] for _ in range(replicates)]
    return tuple(np.array(times, float) for times in zip(*drawn))


def bootstrap(x: np.ndarray, comparisons: int = 1, replicates: int = 2_000) -> tuple[float, float, float]:
    """(mean, low, high): 95 % interval of the mean of x (S, N), seeds and problems drawn with replacement; if
    it is the most striking of several comparisons, with their number Bonferroni's correction is made."""
    seeds, problems = resamples(*x.shape, replicates)
    means = ((seeds @ x) * problems).sum(1) / x.size
    low, high = np.percentile(means, (2.5 / comparisons, 100 - 2.5 / comparisons))
    return float(x.mean()), float(low), float(high)


def verdict(low: float, high: float, margin: float) -> str:
    """The rule for every claim: where does the interval lie?"""
    return "reproduced" if low > margin else "not reproduced" if high < margin else "undecided"


CLAIMS_HEADER = ("| claim | what it says | checkpoints | difference in points | margin | verdict "
                 "| the paper |")


def millions(at: str) -> float:
    return number(at) / 1e6


def judge(records: list[dict]) -> list[list[str]]:
    """A row per claim that these records can answer: id, claim, checkpoints, statistic, verdict, paper."""
    trained = sorted({r["at"] for r in records if r["recipe"] != "base"}, key=millions)
    last = max((r["at"] for r in records), key=millions)
    early = [at for at in trained if millions(at) <= 2 / 3 * millions(last)]
    rows = []

    def row(claim: str, text: str, where: str, x: np.ndarray, margin: float, paper: str, *pairs: int) -> None:
        mean, low, high = bootstrap(x, *pairs)
        seeds = "" if len(x) > 2 or claim == "C9" else f" ({len(x)} seed{'s' * (len(x) > 1)})"
        rows.append([claim, text, where, f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", f"{margin:+g}",
                     verdict(low, high, margin) + seeds, paper])
    for claim, text, a, b, metric, where, margin, paper in CLAIMS:
        ats = [at for at in (early if where == "early" else trained)
               if difference(records, a, b, metric, [at]) is not None]
        x = difference(records, a, b, metric, ats)
        if x is not None:
            row(claim, text, f"{', '.join(ats)} of {last}", x, margin, paper)
            for at in ats if len(ats) > 1 else ():
                row("", "", at, difference(records, a, b, metric, [at]), margin, "")
            right = [np.array(r["problems"]["easy"]["right_per_problem"])
                     for at in ats[:claim == "C8"] for r in find(records, "base", at)]
            for name, low, high in SPLITS if right else ():
                chosen = (low <= right[0]) & (right[0] <= high)
                if chosen.any():
                    row("", f"problems of which the base solves {name} of 64", f"{chosen.sum()} problems",
                        x[:, chosen], margin, "")
    for pair in COMPOSITION:
        a, b = (difference(records, "RL on hard", "base", "hard pass@1", [at], base) for base, at in pair)
        if a is not None and b is not None:
            row("C4", f"RL gains more on hard problems from {pair[0][0]} than from {pair[1][0]}",
                f"{pair[0][1]}, {pair[1][1]}", a - b, 0, "+24.5…29.5 (math-heavy 1B) against +10 (4B)")
    gain, alike, margin = BRITTLE
    working = [at for at in trained for x in [difference(records, "RL", "base", "easy pass@1", [at])]
               if x is not None and x.mean() >= gain]
    if working and len(trained) > 1:
        at = working[0]
        runs = find(records, "RL", at)
        reward = [np.mean([point[1] for point in r["curve"][-10:]]) for r in runs]
        gaps = [values(a, "easy pass@1") - values(b, "easy pass@1") for i, a in enumerate(runs)
                for j, b in enumerate(runs) if i != j and abs(reward[i] - reward[j]) < alike]
        if gaps:
            row("C9", "seeds with equal training reward differ in test pass@1 (largest pair)", at,
                max(gaps, key=np.mean)[None], margin, "validation .26, .134, .149 at reward .21",
                len(gaps) // 2)
        else:
            rows.append(["C9", "no two seeds have equal training reward", at, *"  ", "undecided", ""])
    return rows


def in_order(r: dict) -> tuple:
    return r["base"], millions(r["at"]), r["recipe"] != "base", r["recipe"], r["seed"], r["step"]


def solved(records: list[dict]) -> list[list[str]]:
    """Expansion or sharpening, problem by problem: a row per run, against the base it started from."""
    rows = []
    for r in sorted(records, key=in_order):
        start = find(records, "base", r["at"], r["base"])
        if r["step"] >= 0 or r["shots"] or not start:
            continue
        for difficulty, d in r["problems"].items():
            before, after = (np.array(x["problems"][difficulty]["right_per_problem"]) > 0
                             for x in (start[0], r))
            moved = values(r, f"{difficulty} pass@32") - values(start[0], f"{difficulty} pass@32")
            styles = ", ".join(f"{name} {share:.0%}" for name, share in d["styles"].items() if share >= .01)
            rows.append([r["base"], r["at"], r["recipe"], r["seed"], difficulty, before.sum(), after.sum(),
                         (after & ~before).sum(), (before & ~after).sum(), (moved > 50).sum(),
                         (moved < -50).sum(), f"{d['answer_entropy']:.2f}",
                         f"{d['distinct_completions']:.0f}", f"{d['unparsed']:.1%}",
                         f"{d['kl']:.3f}" if "kl" in d else "", styles])
    return rows


def summary(records: list[dict]) -> list[list[str]]:
    """A row per checkpoint and recipe: means over seeds, and what was gained over the base."""
    rows = []
    ordered = sorted(records, key=in_order)
    for base, at, recipe in dict.fromkeys((r["base"], r["at"], r["recipe"]) for r in ordered):
        runs = find(records, recipe, at, base)
        row = [base, at, recipe, len(runs)]
        for metric in METRICS if runs else ():
            x = difference(records, recipe, "base", metric, [at], base)
            row.append(f"{np.mean([values(r, metric).mean() for r in runs]):.1f}"
                       + ("" if recipe == "base" or x is None else
                          " ({:+.1f} [{:+.1f}, {:+.1f}])".format(*bootstrap(x))))
        rows += [row] if runs else []
    return rows


def markdown(header: str, rows: list[list]) -> str:
    lines = [header, "|" + "---|" * (header.count("|") - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


# ---- figures ---------------------------------------------------------------------------------------------

def color(recipe: str) -> str:
    """The same colour for a recipe in every figure."""
    import matplotlib
    i = 2 * list(RECIPES).index(recipe) if recipe in RECIPES else 0      # 20 colours: the strong ones first
    return "0.5" if recipe == "base" else matplotlib.colormaps["tab20"]((i + i // 20) % 20)


def draw(out: Path, records: list[dict]) -> list[str]:
    """Every figure that these records allow, as PNG; returns their names."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = []
    ends = [r for r in records if r["step"] < 0 and r["shots"] == 0]
    recipes = [r for r in dict.fromkeys(r["recipe"] for r in ends) if r != "base"]
    first, shots = records[0]["base"], max(r["shots"] for r in records)
    here = [r for r in ends if r["base"] == first]
    ats = sorted({r["at"] for r in here}, key=millions)
    trained = [at for at in ats if any(find(here, recipe, at) for recipe in recipes)]

    def save(figure: plt.Figure, name: str) -> None:
        for axis in figure.axes:
            axis.grid(alpha=.3)
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=110)
        plt.close(figure)
        names.append(name)

    def bar(axis: plt.Axes, x: float, runs: list[dict], metric: str, recipe: str, **style: object) -> None:
        mean, low, high = bootstrap(np.stack([values(r, metric) for r in runs]))
        axis.errorbar([x], [mean], [[mean - low], [high - mean]], color=color(recipe), capsize=2, **style)
    # 1. everything against pretraining tokens
    figure, axes = plt.subplots(2, 3, figsize=(13, 7))
    for axis, metric in zip(axes.flat, METRICS):
        base_runs = {at: find(here, "base", at) for at in ats}
        axis.plot([millions(at) for at in ats], [values(base_runs[at][0], metric).mean() for at in ats],
                  "o-", color=color("base"), label="base")
        few = {at: find(records, "base", at, first, shots=shots) for at in ats}
        axis.plot([millions(at) for at in ats if few[at]],
                  [values(few[at][0], metric).mean() for at in ats if few[at]], ":", color="0.5",
                  label=f"base, {shots}-shot")
        for i, recipe in enumerate(recipes):
            points = [(millions(at), find(here, recipe, at)) for at in ats if find(here, recipe, at)]
            axis.plot([x for x, _ in points],
                      [np.mean([values(r, metric).mean() for r in runs]) for _, runs in points],
                      "-" if len(recipes) < 8 else "", color=color(recipe), lw=1)
            for x, runs in points:
                bar(axis, x + .06 * (i - len(recipes) / 2), runs, metric, recipe, fmt="o", ms=4, lw=1,
                    label=recipe if x == points[0][0] else None)
        axis.set_title(f"{metric} (%)")
        axis.set_xlabel("pretraining tokens (millions)")
    axes[0, 0].legend(fontsize=7)
    save(figure, "main")
    # 2. along the steps of RL, after SFT and from the base
    traced = [at for at in trained if any(r["step"] >= 0 and r["at"] == at for r in records)]
    if traced:
        figure, axes = plt.subplots(2, len(traced), figsize=(3.4 * len(traced), 6), squeeze=False)
        for column, at in zip(axes.T, traced):
            for axis, metric in zip(column, ("easy pass@1", "easy pass@32")):
                for recipe in dict.fromkeys(r["recipe"] for r in records if r["step"] >= 0):
                    steps = sorted({r["step"] for r in records if r["recipe"] == recipe and r["step"] >= 0})
                    start = "SFT" if "{SFT}" in RECIPES[recipe] else "base"
                    points = [(0, find(records, start, at)), *((s, find(records, recipe, at, first, s))
                                                              for s in steps)]
                    end = find(records, recipe, at)
                    points += [(end[0]["curve"][-1][0], end)] if end and end[0]["curve"] else []
                    points = [(x, runs) for x, runs in points if runs]
                    for x, runs in points:
                        bar(axis, x, runs, metric, recipe, fmt="o", ms=4)
                    means = [np.mean([values(r, metric).mean() for r in runs]) for _, runs in points]
                    axis.plot([x for x, _ in points], means, color=color(recipe), label=recipe)
                axis.set_title(f"from {at}: {metric} (%)")
                axis.set_xlabel("RL steps")
        axes[0, 0].legend()
        save(figure, "steps")
    # 3. recipes side by side at the last checkpoint: parallel averaging, two by two
    at = trained[-1] if trained else ats[-1]
    shown = [r for r in ("base", *recipes) if find(here, r, at)]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7))
    for axis, metric in zip(axes.flat, ("easy pass@1", "easy pass@32", "hard pass@32", "general")):
        for x, recipe in enumerate(shown):
            bar(axis, x, find(here, recipe, at), metric, recipe, fmt="s")
            axis.plot([x] * len(find(here, recipe, at)),
                      [values(r, metric).mean() for r in find(here, recipe, at)], "k_", ms=9, alpha=.5)
        axis.set_xticks(range(len(shown)), shown, rotation=35, ha="right", fontsize=8)
        axis.set_title(f"from {at}: {metric} (%), seeds as dashes")
    save(figure, "parallel")
    # 4. forgetting against accuracy gained, and against the distance from the base, where it was measured
    panels = 1 + any("kl" in r["problems"]["easy"] for r in here)
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4.5), sharey=True, squeeze=False)
    axes = axes[0]
    for recipe in recipes:
        runs = [r for r in here if r["recipe"] == recipe]
        gained, forgotten = ([values(r, m).mean() - values(find(here, "base", r["at"])[0], m).mean()
                              for r in runs] for m in ("easy pass@1", "general"))
        for axis, x in zip(axes, (gained, [r["problems"]["easy"].get("kl", np.nan) for r in runs])):
            axis.plot(x, forgotten, "o", color=color(recipe), label=recipe, ms=4)
    for axis, what in zip(axes, ("easy pass@1 gained over the base (points)",
                                 "KL to the base on its own answers to easy problems (nats per token)")):
        axis.axhline(0, color="0.5", lw=1)
        axis.set_xlabel(what)
    axes[0].set_ylabel("general mean, change (points)")
    axes[0].legend(fontsize=7)
    save(figure, "forgetting")
    # 5. seeds: training reward and validation, a line each; by rollouts and by FLOPs
    rl_runs = [r for r in here if r["curve"] and r["at"] == (trained or ats)[0]]
    if rl_runs:
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
        for r in rl_runs:
            flops = {0: 0.0} | {step: f / 1e12 for step, _, _, f in r["curve"]}
            at_steps = [(step, v) for step, v in r["validation"] if step in flops]
            label = r["recipe"] if r["seed"] == 0 else None
            axes[0].plot([p[0] for p in r["curve"]], [100 * p[1] for p in r["curve"]], lw=1,
                         color=color(r["recipe"]))
            axes[1].plot([s for s, _ in at_steps], [100 * v for _, v in at_steps], lw=1,
                         color=color(r["recipe"]), label=label)
            axes[2].plot([flops[s] for s, _ in at_steps], [100 * v for _, v in at_steps], lw=1,
                         color=color(r["recipe"]))
        for axis, title, unit in zip(axes, ("training reward (%)", "validation pass@1 (%)", "the same"),
                                     ("steps of 64 problems", "steps of 64 problems", "10¹² FLOPs")):
            axis.set_title(f"from {rl_runs[0]['at']}: {title}, a line per seed")
            axis.set_xlabel(unit)
        axes[1].legend(fontsize=7)
        save(figure, "seeds")
    # 6. composition against scale
    places = dict.fromkeys((r["base"], r["at"]) for r in ends if r["recipe"] == "RL on hard")
    if places:
        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
        for axis, metric in zip(axes, ("hard pass@1", "hard pass@32")):
            for x, (base, at) in enumerate(places):
                bar(axis, x - .1, find(ends, "base", at, base), metric, "base", fmt="s")
                bar(axis, x + .1, find(ends, "RL on hard", at, base), metric, "RL on hard", fmt="s")
            axis.set_xticks(range(len(places)), [f"{base}\n{at} tokens" for base, at in places], fontsize=8)
            axis.set_title(f"{metric} (%), base (grey) and after RL on hard ones", fontsize=10)
        save(figure, "composition")
    return names


def report(out: Path, records: list[dict], claims: str) -> str:
    """Write report.md, with the table of `claims`, and its figures from the records; returns the text."""
    figures = draw(out, records)
    rows = []
    for r in sorted(records, key=in_order):
        start = find(records, "base", r["at"], r["base"])
        row = [r["base"], r["at"], r["recipe"] + (f", step {r['step']}" if r["step"] >= 0 else "")
               + (f", {r['shots']}-shot" if r["shots"] else ""), r["seed"]]
        for metric in METRICS:
            gap = values(r, metric) - values(start[0], metric)
            mean, low, high = bootstrap(gap[None])
            gained = "" if r is start[0] else f" ({mean:+.1f} [{low:+.1f}, {high:+.1f}])"
            row.append(f"{values(r, metric).mean():.1f}{gained}")
        rows.append(row + [f"{r['bits_per_byte']:.4f}", f"{r['cost']['flops']:.1e}",
                           f"{r['cost']['seconds'] / 60:.1f}"])
    text = "\n\n".join([
        f"# Results of the study `{out.name}`",
        f"Made by `study.py`; `python study.py --report results/{out.name}` redraws it. Test problems, in %. "
        "Brackets are 95 % intervals: in the first table over seeds and problems, in the second over "
        "problems, paired with the base. There is one base model (per size and mixture), so no interval says "
        "anything about other pretraining runs; and three seeds are few: where seeds differ a lot, a nominal "
        "95 % covers rather 75 to 90 %. The rules stand at the top of study.py.",
        "## Claims", claims,
        "## Means over seeds, and the gain over the base", markdown(
            "| base model | tokens | recipe | seeds | easy pass@1 | pass@8 | pass@32 | hard pass@1 | pass@32 "
            "| general |", summary(records)),
        "## Figures", "\n".join(f"![{name}]({name}.png)" for name in figures),
        "## Every evaluation", markdown(
            "| base model | tokens | recipe | seed | easy pass@1 | pass@8 | pass@32 | hard pass@1 | pass@32 "
            "| general | bits per byte | FLOPs | minutes |", rows),
        "## Problem by problem: expansion or sharpening",
        "Solved: at least one of 64 samples right. Jumped, dropped: pass@32 changed by more than 50 points. "
        "KL: to the base, in nats per token of the model's own answers, sampled at temperature 0.6.",
        markdown("| base model | tokens | recipe | seed | problems | solved by the base | now | newly solved "
                 "| newly lost | jumped | dropped | answer entropy | distinct of 64 | unparsed | KL "
                 "| styles |",
                 solved(records))])
    atomic_write(out / "report.md", (text + "\n").encode())
    return text


def study(c: Config) -> None:
    """Run the preset's grid (or print it), then report; or only report."""
    require(c.jobs >= 0, f"--jobs {c.jobs}: must be 0 (one per core, or per GPU) or more")
    require(c.preset in STUDIES, f"--preset {c.preset}: must be one of {', '.join(STUDIES)}")
    out, failed = Path(c.report or Path(c.out, c.preset)), []
    if not c.report:
        cells = grid(STUDIES[c.preset], c)
        if c.list or c.wave:
            return print_commands(waves(cells), c.wave)
        failed = run_cells(cells, Path(c.runs), c.jobs or torch.cuda.device_count() or os.cpu_count() or 1)
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "results.jsonl", "".join(json.dumps(r) + "\n" for r in gather(cells)).encode())
    stored = out / "results.jsonl"
    require(stored.is_file(), f"{stored}: not found; run the study first, without --report")
    records = [json.loads(line) for line in stored.read_text().splitlines()]
    require(bool(records), f"{stored}: holds no result; see {c.runs}/logs")
    claims = markdown(CLAIMS_HEADER, judge(records))
    report(out, records, claims)
    print(claims, f"\nwritten: {out / 'report.md'}", sep="\n")
    require(not failed, f"{len(failed)} cells failed or could not start: {', '.join(failed)}")


if __name__ == "__main__":
    main(study, Config)
