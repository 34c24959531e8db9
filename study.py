"""The whole study by one command: a grid of the other scripts' commands, then tables, figures and verdicts.

    python study.py                           the quick study
    python study.py --preset main             or long, early, composition, rollouts, controls, gpu-8/12/24
    python study.py --preset main --list      only print every command and its estimated minutes
    python study.py --preset main --wave 3    the commands to run when waves 1 and 2 are done, for a queue
    python study.py --report results/main     redraw the report from results.jsonl, in seconds
    python study.py --report results          the claims of all studies into one table of results/README.md

A cell of the grid is one command that makes one file. Its folder is named by a hash of all its options and
its parents', so a finished cell is reused and one with other options is run. Code is not in the hash: after a
change of code, name a new place for the runs (--runs). Ctrl-C stops the study, the same command resumes it.
The recipes and studies stand below as data, the claims in report.py: change them.
"""
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

import torch
from tqdm import tqdm

import report
from checkpoint import atomic_write, check_fields, main, number, parse, require
from evaluate import Config as EvaluateConfig

# ---- recipes and studies ---------------------------------------------------------------------------------
# Recipe -> command. {base} is the checkpoint that a cell starts from, {SFT} the one that recipe SFT made of
# it; so A→B in a name means B from A's result. Their order is that of the colours in the figures.
# The settings of RL are the same wherever RL appears. Chosen on validation problems: results/README.md.
RL = "rl.py --init {base} --checkpoints-at 10,25"
SFT_50 = "sft.py --init {base} --decay 0 --warmup 0 --n-train 1600 --epochs 1"        # 50 updates
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
    shots: int = 2                               # the base is also evaluated with this many solved examples
    more: dict[str, str] = field(default_factory=dict)   # script -> options that its commands get besides


def gpu(size: str, width: int, millions: int, micro_tokens: int) -> Study:
    """For one consumer GPU, by the plan of beyond/memory.py; nobody has measured it. The learning rates are
    those of the default model, of width 96, times 96 / `width` (Yang et al. 2022), not searched."""
    kept = [f"{millions // part}M" for part in (4, 2, 1)]
    slower = 96 / width
    sft_lr = f"{1e-3 * slower:.1e}"
    rl_lr = f"{3e-4 * slower:.1e} --micro-tokens {micro_tokens}"
    pretraining = (f"--size {size} --batch 64 --micro-batch 64 --lr {3e-3 * slower:.1e} --tokens {millions}M "
                   f"--checkpoints-at {','.join(kept)}")
    more = {"rl.py": f"--lr {rl_lr}", "sft.py": f"--lr {sft_lr}",
            "merge.py": f"--lr-sft {sft_lr} --lr-rl {rl_lr}"}
    return Study({"base": (f"--tokens {millions}M", pretraining, tuple(kept))}, PIPELINES, more=more)


PIPELINES = ("RL", "SFT", "SFT-Gold", "SFT→RL", "SFT-Gold→RL", "parallel")
EVALUATION = "--split test --n-problems 150"         # the same for every cell: 150 easy, 150 hard problems
KEPT = "--checkpoints-at 1M,2M,3M,4M,5M,6M,8M"
STUDIES = {
    "quick": Study({"base": ("--math-fraction 0.6", "--tokens 4M --checkpoints-at 2M,3M,4M", ("4M",))},
                   ("RL", "SFT", "SFT→RL", "parallel"), seeds=(0,)),
    "main": Study({"base": ("", KEPT, ("4M", "5M", "6M", "8M"))}, PIPELINES,
                  trace={("6M", recipe): (10, 25) for recipe in ("RL", "SFT→RL")}),
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

@dataclass
class Config:
    preset: str = "quick"           # quick main long early composition rollouts controls gpu-8/12/24
    runs: str = "runs"              # where data sets and runs go
    out: str = "results"            # results.jsonl, report.md and figures go into OUT/PRESET
    jobs: int = 0                   # >= 0: cells at once, one thread each; 0 = one per core (per GPU on CUDA)
    list: bool = False              # print commands and estimated minutes, run nothing
    wave: int = 0                   # >= 0: print this wave's commands that are not done; run nothing
    report: str = ""                # only redraw the report in this folder, or the claims of its studies


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
    minutes: float                  # estimate, one thread
    evaluation: bool = False
    step: int = -1                  # of the run that is evaluated; -1: its end
    steps: int = 0                  # in its log.jsonl at the end; 0: it has no log

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
    return {k: v for k, v in asdict(config).items() if k not in ("out", "device", "threads")}


def examples(c: dict) -> int:
    """Solutions that SFT sees in one epoch; --gold takes all four of a problem."""
    return c["n_train"] * (4 if c["gold"] else 1)


def steps_of(script: str, c: dict) -> int:
    """Steps in its log.jsonl at the end; 0 if it has no log."""
    if script == "pretrain.py":
        return -(-c["tokens"] // (c["batch"] * c["context"]))
    if script == "sft.py":
        return -(-c["epochs"] * examples(c) // c["batch"])
    return c.get("steps", 0)


def estimate(script: str, c: dict) -> float:
    """Minutes on one thread while the other core of two is busy. Measured with the default model, per
    minute: 730 k tokens of pretraining, 16 k examples of SFT, 23 k rollouts, 27 k samples of an evaluation of
    either difficulty (two solved examples before each problem double its time). Assumed: pretraining costs in
    proportion to the model's size. CPUs differ, but the time left needs only the proportions."""
    rollouts = c.get("steps", 0) * c.get("n_problems", 0) * c.get("rollouts", 0)
    minutes = {"data/prepare.py": lambda: c["tokens"] / 3e7,
               "pretrain.py": lambda: c["tokens"] / 7.3e5 * number(c["size"]) / 5e5,
               "sft.py": lambda: c["epochs"] * examples(c) / 1.6e4,
               "rl.py": lambda: rollouts / 2.3e4,
               "merge.py": lambda: rollouts / 2.3e4,
               "evaluate.py": lambda: c["n_problems"] * c["n_samples"] * (1 + c["shots"] / 2) / 2.7e4}
    return .07 + minutes[script]()                       # 4 s: to start Python and check the files


SERIAL = .08                # part of pretraining that more threads do not shorten (measured: two, 1.85 times)


def new_cell(runs: str, base: str, at: str, recipe: str, seed: int, command: str, final: str,
             needs: list[Path]) -> Cell:
    """The cell of a command that makes the file `final` in a run folder of its own."""
    argv = shlex.split(command)
    options = configuration(argv)
    key = blake2b(json.dumps([argv[0], options], sort_keys=True).encode(), digest_size=4).hexdigest()
    label = re.sub(r"[^A-Za-z0-9]+", "-", f"{recipe} {at} {seed if at else ''}").strip("-").lower()
    folder = Path(runs, f"{label}-{key}")
    out = folder / final if merges(argv) else folder
    return Cell(base, at, recipe, seed, [*argv, "--out", str(out)], folder / final, needs,
                estimate(argv[0], options), steps=steps_of(argv[0], options))


def evaluation(run: Cell, at: str, file: Path, data: Path, shots: int = 0, step: int = -1,
               reference: Path | None = None) -> Cell:
    """The cell that evaluates a file that `run` makes, by its KL to `reference` too."""
    command = ["evaluate.py", str(file), "--data", str(data), *EVALUATION.split(), "--shots", str(shots)]
    if reference:
        command += ["--reference", str(reference)]
    return Cell(run.base, at, run.recipe, run.seed, command, file.with_suffix(f".test.{shots}shot.json"),
                [run.makes], estimate(command[0], configuration(command)), True, step)


def trained_cells(study: Study, runs: str, model: Cell, at: str, seed: int, data: Path) -> list[Cell]:
    """All recipes from one checkpoint of a base model with one seed, each with its evaluations."""
    start = model.makes.with_name(f"{at}.pt")
    made = {"base": start}                               # recipe -> checkpoint
    cells = []
    for recipe in study.recipes:
        parents = re.findall(r"{(.+?)}", RECIPES[recipe])
        quoted = {name: shlex.quote(str(path)) for name, path in made.items()}
        command = f"{RECIPES[recipe].format(**quoted)} --seed {seed}"
        command += " " + study.more.get(command.split()[0], "")
        if not merges(command.split()):
            command += " " + shlex.join(["--data", str(data)])
        needs = [model.makes if name == "base" else made[name] for name in parents]
        run = new_cell(runs, model.base, at, recipe, seed, command, "final.pt", needs)
        made[recipe] = run.makes

        cells.append(run)
        for step in study.trace.get((at, recipe), ()):
            file = run.makes.with_name(f"step{step}.pt")
            cells.append(evaluation(run, at, file, data, step=step, reference=start))
        cells.append(evaluation(run, at, run.makes, data, reference=start))
    return cells


def grid(study: Study, c: Config) -> list[Cell]:
    """Every cell, each after those that it needs."""
    cells: list[Cell] = []
    for base, (prepare_options, pretrain_options, starts) in study.bases.items():
        prepare = new_cell(c.runs, base, "", "data", 0, f"data/prepare.py {prepare_options}", "manifest.json",
                           [])
        data = prepare.makes.parent
        pretraining = f"pretrain.py {shlex.join(['--data', str(data)])} {pretrain_options}"
        kept = [f"{t / 1e6:g}M" for t in configuration(shlex.split(pretraining))["checkpoints_at"]]
        model = new_cell(c.runs, base, "", "base", 0, pretraining, f"{kept[-1]}.pt", [prepare.makes])

        cells += [prepare, model]
        for at in kept:
            for shots in sorted({0, study.shots}) if at in starts else [0]:
                cells.append(evaluation(model, at, model.makes.with_name(f"{at}.pt"), data, shots))
        for seed in study.seeds:
            for at in starts:
                cells += trained_cells(study, c.runs, model, at, seed, data)

    unique: dict[Path, Cell] = {}                        # two bases may share their data
    for x in cells:
        unique.setdefault(x.makes, x)
    return list(unique.values())


def waves(cells: list[Cell]) -> list[list[Cell]]:
    """The cells in groups: each needs only files that earlier groups make."""
    depth: dict[Path, int] = {}
    for x in cells:                                      # each comes after those that it needs
        depth[x.makes] = 1 + max((depth[made] for made in x.needs), default=-1)
    groups: list[list[Cell]] = [[] for _ in set(depth.values())]
    for x in cells:
        groups[depth[x.makes]].append(x)
    return groups


def print_commands(rounds: list[list[Cell]], only: int = 0) -> None:
    """All waves with estimated minutes; or of wave number `only` the cells to do, a command per line."""
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
    stored = json.loads(x.makes.read_text())["config"]
    wanted = json.loads(json.dumps(configuration(x.command)))
    del wanted["checkpoints"]
    return all(stored.get(k, getattr(EvaluateConfig, k)) == v for k, v in wanted.items())


# ---- running it ------------------------------------------------------------------------------------------
REDRAW = 2.0                # seconds between two states of the progress bar


@dataclass
class Running:
    """A cell that a process works on."""
    cell: Cell
    process: subprocess.Popen
    minutes: float                  # estimate, with its threads
    before: float                   # the part of it that was done when it started, 0 to 1
    since: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        return (time.monotonic() - self.since) / 60


def ready(waiting: list[Cell], unmade: set[Path]) -> list[Cell]:
    """The cells that can start, in order; evaluations last: nothing waits for them, and they are short enough
    to end together."""
    return sorted((x for x in waiting if unmade.isdisjoint(x.needs)), key=lambda x: x.evaluation)


def expected(x: Cell, threads: int) -> float:
    """Minutes that a cell takes with this number of threads, by Amdahl's law."""
    return x.minutes * (SERIAL + (1 - SERIAL) / threads)


def threads_of(x: Cell, startable: int, busy: int, jobs: int) -> int:
    """One; but a pretraining that all others wait for gets every core."""
    alone = x.recipe == "base" and not x.evaluation and startable == 1 and not busy
    return jobs if alone else 1


def part_done(x: Cell, minutes: float) -> float:
    """The part of a cell that is done, 0 to 1: by the last step in its log; if it has no log, by the
    `minutes` that it has had."""
    if not x.steps:
        return min(.95, minutes / x.minutes)
    log = x.makes.with_name("log.jsonl")
    steps = re.findall(r'"step": (\d+)', log.read_text()) if log.exists() else []
    return int(steps[-1]) / x.steps if steps else 0.0


def time_left(waiting: list[Cell], running: dict[Path, float], jobs: int) -> float:
    """Minutes until all is made, if run_cells goes by the estimates; `running`: file -> minutes left."""
    waiting = list(waiting)
    ends = dict(running)                                 # file -> when it will be there
    now = 0.0

    while waiting:
        busy = {made for made, end in ends.items() if end > now}
        unmade = busy.union(x.makes for x in waiting)
        startable = ready(waiting, unmade)
        if startable and len(busy) < jobs:
            x = startable[0]
            waiting.remove(x)
            ends[x.makes] = now + expected(x, threads_of(x, len(startable), len(busy), jobs))
        else:
            now = min(ends[made] for made in busy)
    return max(ends.values(), default=0.0)


def forecast(waiting: list[Cell], running: list[Running], past: list[tuple[float, float]],
             jobs: int) -> tuple[float, float]:
    """(minutes until all is made, estimated minutes of work left). `past`: (minutes, estimate) of each cell
    that has finished; with the steps in the logs they tell the minutes that an estimated one takes here."""
    seen = [(.2, .2), *past]                             # before anything is known, the estimate
    for r in running:
        if r.cell.steps:
            seen.append((r.spent, (part_done(r.cell, 0) - r.before) * r.minutes))
    minutes, estimated = map(sum, zip(*seen))
    pace = minutes / estimated

    ends = {}                                            # file -> estimated minutes left
    work = sum(x.minutes for x in waiting)
    for r in running:
        left = 1 - part_done(r.cell, r.spent / pace)
        ends[r.cell.makes] = left * r.minutes
        work += left * r.cell.minutes
    return pace * time_left(waiting, ends, jobs), work


def start(x: Cell, threads: int, slot: int, runs: Path) -> Running:
    """Start a cell's process; its output is appended to its log. On GPUs, every slot has one."""
    quiet = os.environ | {"TQDM_MININTERVAL": "30"}
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        quiet["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
    with open(runs / "logs" / x.log, "ab") as log:
        process = subprocess.Popen([sys.executable, *x.argv(threads)], stdout=log, stderr=log, env=quiet)
    return Running(x, process, expected(x, threads), part_done(x, 0))


def run_cells(cells: list[Cell], runs: Path, jobs: int) -> list[str]:
    """Run every cell that is not done as soon as its needs are made; returns the names that failed."""
    waiting = [x for x in cells if not done(x)]
    unmade = {x.makes for x in waiting}
    running: dict[int, Running] = {}                     # slot -> process
    past: list[tuple[float, float]] = []                 # (minutes, estimate) of finished cells
    failed: list[str] = []
    drawn = 0.0
    (runs / "logs").mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=sum(x.minutes for x in cells), desc="study",
               bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}")
    try:
        while waiting or running:
            startable = ready(waiting, unmade)
            free = [slot for slot in range(jobs) if slot not in running]
            for x, slot in zip(startable, free):
                threads = threads_of(x, len(startable), len(running), jobs)
                running[slot] = start(x, threads, slot, runs)
                waiting.remove(x)
            if not running:                              # the rest needs something that failed
                failed += [x.name for x in waiting]
                break

            if time.monotonic() > drawn + REDRAW:
                minutes, work = forecast(waiting, list(running.values()), past, jobs)
                bar.n = max(0.0, bar.total - work)
                names = ", ".join(r.cell.name for r in running.values())
                bar.set_postfix_str(f"{minutes:.0f} min left: {names}")
                drawn = time.monotonic()
            time.sleep(.2)

            for slot, r in list(running.items()):
                if r.process.poll() is None:
                    continue
                del running[slot]
                if r.process.returncode == 0 and r.cell.makes.exists():
                    unmade.discard(r.cell.makes)
                    past.append((r.spent, (1 - r.before) * r.minutes))
                else:
                    failed.append(r.cell.name)
                    bar.write(f"FAILED: {r.cell.name}, see {runs / 'logs' / r.cell.log}")
    except BaseException:
        for r in running.values():       # after Ctrl-C, which they received too, they save and stop
            r.process.wait()
        raise
    bar.n = bar.total - sum(x.minutes for x in waiting)
    bar.set_postfix_str("")
    bar.close()
    return failed


def gather(cells: list[Cell]) -> list[dict]:
    """One record per evaluation that is done: its cell, its cost, everything measured, its curve."""
    records = []
    for x in cells:
        if not x.evaluation or not done(x):
            continue
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
            # (step, reward, KL to the reference, FLOPs) and (step, validation pass@1)
            "curve": [[r["step"], r["reward"], r["kl"], r["flops"]] for r in lines if "reward" in r],
            "validation": [[r["step"], r["val_pass@1"]] for r in lines if "val_pass@1" in r],
            **{k: result[k] for k in ("problems", "benchmarks", "general_mean", "bits_per_byte")}})
    return records


def stored(folder: Path) -> list[dict]:
    """The records of a study's folder."""
    path = folder / "results.jsonl"
    require(path.is_file(), f"{path}: not found; run the study first, without --report")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    require(bool(records), f"{path}: holds no result; see the logs of its runs")
    return records


def study(c: Config) -> None:
    """Run the preset's grid (or print it), then report; or only report."""
    check_fields(c)
    require(c.preset in STUDIES, f"--preset {c.preset}: must be one of {', '.join(STUDIES)}")
    out = Path(c.report or Path(c.out, c.preset))
    several = [] if (out / "results.jsonl").exists() else sorted(out.glob("*/results.jsonl"))
    if c.report and several:
        report.all_claims(out, {path.parent.name: stored(path.parent) for path in several})
        return

    failed = []
    if not c.report:
        cells = grid(STUDIES[c.preset], c)
        if c.list or c.wave:
            return print_commands(waves(cells), c.wave)
        failed = run_cells(cells, Path(c.runs), c.jobs or torch.cuda.device_count() or os.cpu_count() or 1)
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "results.jsonl", "".join(json.dumps(r) + "\n" for r in gather(cells)).encode())

    records = stored(out)
    claims = report.markdown(report.CLAIMS_HEADER, report.judge(records))
    report.report(out, records, claims, tuple(RECIPES))
    print(claims, f"\nwritten: {out / 'report.md'}", sep="\n")
    require(not failed, f"{len(failed)} cells failed or could not start: {', '.join(failed)}")


if __name__ == "__main__":
    main(study, Config)
