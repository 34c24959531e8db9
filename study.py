"""The whole study by one command: a grid of the other scripts' commands, then tables, figures and verdicts.

    python study.py                           the quick study
    python study.py --preset main             or raw, dial, luck, wide, controls, rollouts, composition, gpu-8
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
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import evaluate
import report
from checkpoint import atomic_write, check_fields, main, number, parse, require

# ---- recipes and studies ---------------------------------------------------------------------------------
# Recipe -> command. {base} is the checkpoint that a cell starts from, {SFT} the one that recipe SFT made of
# it; so A→B in a name means B from A's result. Their order is that of the colours in the figures. RL has the
# same settings wherever it appears, chosen on validation problems: results/README.md, "The search".
RL = "rl.py --init {base} --checkpoints-at 50,100"
PLAIN = "--lr 1e-4 --warmup 0"                           # pretraining at RL's learning rate, constant
RECIPES = {
    "RL": RL,
    "SFT": "sft.py --init {base}",
    "SFT→RL": RL.replace("{base}", "{SFT}"),
    "parallel": "merge.py --init {base}",
    "continued": "pretrain.py --init {base} --tokens 614400 " + PLAIN,       # as many updates as RL
    # in pretraining's own words, and more solutions of each problem
    "SFT native": "sft.py --init {base} --teacher native",
    "SFT native→RL": RL.replace("{base}", "{SFT native}"),
    "SFT-Gold": "sft.py --init {base} --gold",
    "SFT-Gold→RL": RL.replace("{base}", "{SFT-Gold}"),
    # controls: more passes, the model's own words, as many FLOPs as RL
    "SFT 30 passes": "sft.py --init {base} --epochs 30",
    "self-SFT": "sft.py --init {base} --own 16",
    "continued 3.2M": "pretrain.py --init {base} --tokens 3.2M --lr 1e-3 --decay 1",     # as many FLOPs
    "annealed again": "pretrain.py --init {base} --tokens 614400 --lr 1e-3 --decay 1 --warmup 10",
    # the dial: the same problems in ever more foreign words
    "SFT spoken": "sft.py --init {base} --teacher spoken",
    "SFT prose": "sft.py --init {base} --teacher prose",
    # RL at a third of its learning rate, and luck: what is rewarded
    "RL gentle": RL + " --lr 3e-5",
    "RL steps": RL + " --reward steps",
    "RL random": RL + " --reward random",
    # controls: is it the averaging, or only the smaller step, the second data set, the second optimizer?
    "parallel native": "merge.py --init {base} --teacher native",
    "parallel at RL's lr": "merge.py --init {base} --lr-sft 1e-4",
    "SFT at RL's lr": "sft.py --init {base} --lr 1e-4",
    "RL at lr/2": "rl.py --init {base} --lr 5e-5",
    "SFT at lr/2": "sft.py --init {base} --lr 5e-4 --decay 0",
    "fused": "merge.py --init {base} --mode fused",
    "alternating": "merge.py --init {base} --mode alternating",
    "H=10": "merge.py --init {base} --inner 10",
    "linear": "merge.py weights {RL} {SFT} --base {base} --method linear",
    "task": "merge.py weights {RL} {SFT} --base {base} --method task --weights 1,1 --factor 0.3",
    "ties": "merge.py weights {RL} {SFT} --base {base} --method ties",
    # few against many rollouts per problem: 153,600 rollouts each
    "G=4": "rl.py --init {base} --rollouts 4 --steps 600 --eval-every 40 --checkpoints-at 38",
    "G=64": "rl.py --init {base} --rollouts 64 --steps 38 --eval-every 5",
    # composition: judged on hard problems, so trained on hard ones
    "RL on hard": "rl.py --init {base} --difficulty hard",
    # controls of controls: as many updates as averaging's; the native teacher; pretraining's own rate
    "SFT at lr/2 short": "sft.py --init {base} --lr 5e-4 --decay 0 --n-train 1600",
    "SFT native at lr/2": "sft.py --init {base} --teacher native --lr 5e-4 --decay 0",
    "continued at its lr": "pretrain.py --init {base} --tokens 614400 --lr 3e-3 --warmup 0",
}


@dataclass
class Study:
    """Which bases (name -> options of data/prepare.py, options of pretrain.py, checkpoints to start from) and
    which recipes; a seed is one of pretraining and of all that follows."""
    bases: dict[str, tuple[str, str, tuple[str, ...]]]
    recipes: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    anneal: float = .1                           # share of its tokens over which a base is annealed first
    few: dict[str, tuple[str, ...]] = field(default_factory=dict)    # checkpoint -> only these recipes
    trace: dict[str, tuple[int, ...]] = field(default_factory=dict)  # recipe -> steps to evaluate
    also: dict[str, tuple[str, ...]] = field(default_factory=dict)   # other evaluation -> of these recipes
    more: dict[str, str] = field(default_factory=dict)   # script -> options that its commands get besides
    per_gpu: int = 4                             # --jobs 0: so many commands share a GPU and its memory


def gpu(size: str, width: int, kept: tuple[str, ...], more: str = "") -> Study:
    """For one consumer GPU, by the plan of beyond/memory.py; nobody has measured it. The learning rates are
    those of the default model, of width 96, times 96 / `width` (Yang et al. 2022), not searched."""
    pretrain, sft, rl = (f"{lr * 96 / width:.1e}" for lr in (3e-3, 1e-3, 1e-4))
    pretraining = (f"--size {size} --batch 64 --lr {pretrain} --tokens {kept[-1]} "
                   f"--checkpoints-at {','.join(kept)}")
    options = {"rl.py": f"--lr {rl} {more}", "sft.py": f"--lr {sft}",
               "merge.py": f"--lr-sft {sft} --lr-rl {rl} {more}"}
    return Study({"base": (f"--tokens {kept[-1]}", pretraining, kept)}, PIPELINES, more=options, per_gpu=1)


PIPELINES = ("RL", "SFT", "SFT→RL", "parallel", "SFT-Gold", "SFT-Gold→RL")
EVALUATION = "--split test --n-problems 300"         # the same for every cell: 300 easy, 300 hard problems
WARM, WIDE = report.HOW["T=1"], report.HOW["512 samples"]
KEPT = "--checkpoints-at 1M,2M,3M,4M,5M,6M,8M"
STUDIES = {
    "quick": Study({"base": ("--math-fraction 0.6", "--tokens 4M --checkpoints-at 2M,3M,4M", ("4M",))},
                   ("continued", "RL", "SFT", "SFT→RL", "parallel"), seeds=(0,),
                   more={"rl.py": "--steps 100", "merge.py": "--steps 100",
                         "pretrain.py": "--tokens 409600"}),
    "main": Study({"base": ("", KEPT, ("3M", "4M", "6M"))},
                  (*PIPELINES, "continued", "RL gentle", "SFT native", "SFT native→RL", "SFT 30 passes",
                   "self-SFT", "continued 3.2M", "annealed again"),
                  few={"3M": ("RL", "SFT", "continued", "SFT native")}),
    "raw": Study({"base": ("", KEPT, ("6M",))}, ("RL", "SFT", "continued", "SFT native", "continued 3.2M",
                                                 "continued at its lr", "RL random"), anneal=0),
    "dial": Study({"base": ("", KEPT, ("4M", "6M"))},
                  ("SFT native", "SFT", "SFT spoken", "SFT prose", "self-SFT", "RL")),
    "luck": Study({"base": ("", KEPT, ("3M", "4M", "6M"))}, ("RL", "RL steps", "RL random")),
    "wide": Study({"base": ("", KEPT, ("6M",))}, ("RL", "SFT", "SFT→RL", "parallel"),
                  trace={"RL": (50, 100), "SFT→RL": (50, 100)},
                  also={WARM: ("base", "RL", "SFT", "SFT→RL", "parallel"), "--shots 2": ("base",),
                        WIDE: ("base", "RL", "SFT", "SFT→RL")}),
    "controls": Study({"base": ("", KEPT, ("6M",))},
                      ("RL", "SFT", "parallel", "parallel native", "parallel at RL's lr", "SFT at RL's lr",
                       "RL at lr/2", "SFT at lr/2", "fused", "alternating", "H=10", "linear", "task",
                       "ties", "SFT at lr/2 short", "SFT native at lr/2")),
    "rollouts": Study({"base": ("", KEPT, ("6M",))}, ("G=4", "RL", "G=64"), trace={"G=4": (38,)}),
    # 30 % arithmetic against 60 %, and 0.5M against 1M parameters: 2.1 times the FLOPs per token
    "composition": Study({"0.5M, 30 %": ("", KEPT, ("6M",)),
                          "0.5M, 60 %": ("--math-fraction 0.6", "--tokens 6M --checkpoints-at 6M", ("6M",)),
                          "1M, 30 %": ("", "--size 1M --tokens 6M --checkpoints-at 6M", ("6M",))},
                         ("RL on hard",)),
    "gpu-8": gpu("10M", 320, ("100M", "200M", "400M"), "--micro-tokens 8192"),       # 8, 12 and 24 GB
    "gpu-12": gpu("30M", 512, ("300M", "600M", "1200M"), "--micro-tokens 8192"),
    "gpu-24": gpu("124M", 768, ("600M", "1200M", "2400M"), "--micro-tokens 8192"),
}


@dataclass
class Config:
    preset: str = "quick"           # main raw dial luck wide controls rollouts composition gpu-8 ...
    runs: str = "runs"              # where data sets and runs go
    out: str = "results"            # results.jsonl, report.md and figures go into OUT/PRESET
    jobs: int = 0                   # >= 0: cells at once, one thread each; 0 = one per core (4 per GPU)
    list: bool = False              # print commands and estimated minutes, run nothing
    wave: int = 0                   # >= 0: print this wave's commands that are not done; run nothing
    report: str = ""                # only redraw the report in this folder, or the claims of its studies


# ---- the grid --------------------------------------------------------------------------------------------
def slug(text: str) -> str:
    """As part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()


@dataclass
class Cell:
    base: str                       # which base model
    at: str                         # which of its checkpoints
    recipe: str                     # "data" and "base" too
    seed: int
    command: list[str]
    makes: Path
    needs: list[Path]
    minutes: float                  # estimate
    steps: int = 0                  # in its log.jsonl at the end; 0: it has no log
    step: int = -1                  # of the run that is evaluated; -1: its end
    how: str = ""                   # other than usual options of an evaluation
    threads: int = 1

    @property
    def evaluation(self) -> bool:
        return self.command[0] == "evaluate.py"

    @property
    def name(self) -> str:
        step = f" step {self.step}" if self.step >= 0 else ""
        measured = f" evaluation {self.how}".rstrip() if self.evaluation else ""
        return f"{self.base} {self.at} {self.recipe} seed {self.seed}{step}{measured}"

    def argv(self) -> list[str]:
        """The command; only making data has no threads to choose."""
        return self.command + (["--threads", str(self.threads)] if self.recipe != "data" else [])


def configuration(command: list[str]) -> dict:
    """All options of a command, defaults included, but those that do not change the result."""
    script = importlib.import_module(command[0].removesuffix(".py").replace("/", "."))
    merges = command[1:2] == ["weights"]                 # merge.py weights has options of its own
    options = asdict(parse(script.WeightsConfig if merges else script.Config, command[1 + merges:]))
    return {k: v for k, v in options.items() if k not in ("out", "device", "threads")}


def estimate(c: dict) -> tuple[float, int]:
    """(minutes on one thread while the other core of two is busy, steps in log.jsonl) of a command with
    options c. Measured with the default model; assumed: pretraining costs in proportion to the model's size.
    CPUs differ, but the time left needs only the proportions."""
    start = .07                                          # 4 s: Python, and a check of the files
    if "context" in c:                                   # pretraining: 730 k tokens a minute
        steps = math.ceil(c["tokens"] / (c["batch"] * c["context"]))
        return start + c["tokens"] / 7.3e5 * number(c["size"]) / 5e5, steps
    if "epochs" in c:                                    # SFT: 16 k examples; gold: all of a problem
        solutions = 4 if c["teacher"] == "native" else 8
        examples = c["epochs"] * c["n_train"] * (solutions if c["gold"] else 1)
        sampling = c["n_train"] * c["own"] / 4.5e4
        return start + sampling + examples / 1.6e4, math.ceil(examples / c["batch"])
    if "rollouts" in c:
        return start + c["steps"] * c["n_problems"] * c["rollouts"] / 3.5e4, c["steps"]
    if "n_samples" in c:                                 # evaluation: two solved examples double its time
        return start + c["n_problems"] * c["n_samples"] * (1 + c["shots"] / 2) / 2.7e4, 0
    return start + c.get("tokens", 0) / 3e7, 0           # making data; merging weights


def new_cell(runs: str, base: str, at: str, recipe: str, seed: int, command: str,
             needs: list[Path]) -> Cell:
    """The cell of a command that makes the last file of its script in a run folder of its own."""
    argv = shlex.split(command)
    options = configuration(argv)
    key = blake2b(json.dumps([argv[0], options], sort_keys=True).encode(), digest_size=4).hexdigest()
    folder = Path(runs, slug(f"{recipe} {at} {seed if at else ''}") + f"-{key}")
    final = "final.pt"
    if argv[0] == "data/prepare.py":
        final = "manifest.json"
    elif argv[0] == "pretrain.py":
        final = f"{options['tokens'] / 1e6:g}M.pt"
    out = folder / final if "weights" in argv else folder
    return Cell(base, at, recipe, seed, [*argv, "--out", str(out)], folder / final, needs, *estimate(options))


def evaluation(run: Cell, file: Path, options: str, how: str = "", step: int = -1) -> Cell:
    """The cell that evaluates a file that `run` makes."""
    argv = shlex.split(f"evaluate.py {shlex.quote(str(file))} {EVALUATION} {options} {how}")
    c = parse(evaluate.Config, argv[1:])
    return Cell(run.base, run.at or file.stem, run.recipe, run.seed, argv, evaluate.result_path(file, c),
                [run.makes], *estimate(asdict(c)), step, how)


def evaluations(study: Study, run: Cell, file: Path, options: str) -> Iterator[Cell]:
    """All evaluations of a file that `run` makes, and of the steps before it."""
    for step in study.trace.get(run.recipe, ()):
        yield evaluation(run, file.with_name(f"step{step}.pt"), options, step=step)
    yield evaluation(run, file, options)
    for how, recipes in study.also.items():
        if run.recipe in recipes:
            yield evaluation(run, file, options, how)


def annealed(study: Study, runs: str, model: Cell, at: str, data: str) -> Cell:
    """The cell that lowers the learning rate of one of the model's checkpoints to 0."""
    same = re.sub(r"--(tokens|checkpoints-at) \S+", "", study.bases[model.base][1])      # size, batch, lr
    tokens = round(study.anneal * number(at))
    command = (f"pretrain.py --init {shlex.quote(str(model.makes.with_name(f'{at}.pt')))} {data} {same} "
               f"--seed {model.seed} --tokens {tokens} --decay 1 --warmup 10")
    return new_cell(runs, model.base, at, "base", model.seed, command, [model.makes])


def trained_cells(study: Study, runs: str, model: Cell, at: str, data: str) -> Iterator[Cell]:
    """All recipes from one checkpoint of a base model, each with its evaluations."""
    base = replace(model, at=at, recipe="base")
    checkpoint = model.makes.with_name(f"{at}.pt")
    if study.anneal:
        yield evaluation(replace(model, at=at), checkpoint, data)
        base = annealed(study, runs, model, at, data)
        checkpoint = base.makes
        yield base
    yield from evaluations(study, base, checkpoint, data)
    start = {"base": shlex.quote(str(checkpoint))}                               # recipe -> checkpoint
    makers = {"base": base.makes}
    measuring = f"{data} --reference {start['base']}"
    for recipe in study.few.get(at, study.recipes):
        command = RECIPES[recipe].format(**start)
        if " weights " not in command:
            command += f" --seed {model.seed} {data} {study.more.get(command.split()[0], '')}"
        needs = [makers[name] for name in re.findall(r"{(.+?)}", RECIPES[recipe])]
        run = new_cell(runs, model.base, at, recipe, model.seed, command, needs)
        start[recipe] = shlex.quote(str(run.makes))
        makers[recipe] = run.makes
        yield run
        yield from evaluations(study, run, run.makes, measuring)


def base_cells(study: Study, runs: str, base: str) -> Iterator[Cell]:
    """The data, the base models, and everything that starts from them."""
    prepare_options, pretrain_options, starts = study.bases[base]
    prepare = new_cell(runs, base, "", "data", 0, f"data/prepare.py {prepare_options}", [])
    data = shlex.join(["--data", str(prepare.makes.parent)])
    yield prepare
    models = []
    for seed in study.seeds:
        pretraining = f"pretrain.py {data} {pretrain_options} --seed {seed}"
        models.append(new_cell(runs, base, "", "raw", seed, pretraining, [prepare.makes]))
    yield from models
    for model in models:
        for at in starts:
            yield from trained_cells(study, runs, model, at, data)


def grid(study: Study, c: Config) -> list[Cell]:
    """Every cell, each after those that it needs; once, though two bases may share their data. Recipe by
    recipe: if the grid is stopped, the first recipes have all their seeds."""
    unique = {}
    for base in study.bases:
        for x in base_cells(study, c.runs, base):
            unique.setdefault(x.makes, x)
    order = list(RECIPES)
    return sorted(unique.values(), key=lambda x: order.index(x.recipe) if x.recipe in order else -1)


def waves(cells: list[Cell]) -> list[list[Cell]]:
    """The cells in groups: each needs only files that earlier groups make."""
    groups = []
    made = set()
    while left := [x for x in cells if x.makes not in made]:
        groups.append([x for x in left if made.issuperset(x.needs)])
        made.update(x.makes for x in groups[-1])
    return groups


def print_commands(rounds: list[list[Cell]], only: int = 0) -> None:
    """All waves with estimated minutes; or of wave number `only` the cells to do, a command per line."""
    require(0 <= only <= len(rounds), f"--wave {only}: must be one of the study's waves, 1 to {len(rounds)}")
    if only:
        for x in rounds[only - 1]:
            if not x.makes.exists():
                print(shlex.join(["python", *x.argv()]))
        return
    for i, cells in enumerate(rounds, 1):
        minutes = sum(x.minutes for x in cells)
        print(f"# wave {i}: {len(cells)} cell{'s' * (len(cells) > 1)}, {minutes:.1f} min")
        for x in cells:
            print(f"{shlex.join(['python', *x.argv()])}   # {x.name}, {x.minutes:.1f} min")


# ---- running it ------------------------------------------------------------------------------------------
def with_threads(cells: list[Cell], jobs: int) -> list[Cell]:
    """If there is only one base model, all others wait for it: it gets every core, as does its data."""
    if sum(x.recipe == "raw" and not x.evaluation for x in cells) != 1:
        return cells
    data, model, *others = cells                         # as in base_cells
    faster = model.minutes * (.08 + .92 / jobs)          # measured: two threads take .54 of the time
    return [replace(data, threads=jobs), replace(model, threads=jobs, minutes=faster), *others]


def work_left(cells: list[Cell]) -> dict[Path, float]:
    """File -> estimated minutes until it is made, less the part of the steps that are in its log."""
    left = {}
    for x in cells:
        log = x.makes.with_name("log.jsonl")
        steps = re.findall(r'"step": (\d+)', log.read_text()) if x.steps and log.exists() else []
        left[x.makes] = x.minutes * (1 - int(steps[-1]) / x.steps if steps else 1)
    return left


def schedule(cells: list[Cell], left: dict[Path, float], jobs: int) -> float:
    """Estimated minutes until all is made: the work `left`, shared by all jobs, or the longest chain."""
    work = sum(x.threads * left.get(x.makes, 0.0) for x in cells)
    chain: dict[Path, float] = {}
    for x in cells:
        chain[x.makes] = left.get(x.makes, 0.0) + max((chain[made] for made in x.needs), default=0.0)
    return max(work / jobs, *chain.values())


def start(x: Cell, slot: int, jobs: int, runs: Path) -> subprocess.Popen:
    """Start a cell's process; its output is appended to its log. Slots take turns on the GPUs; a process is
    told its share of the GPU's memory (checkpoint.setup)."""
    environment = os.environ | {"TQDM_MININTERVAL": "30", "PYTHONUTF8": "1"}
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[slot % gpus]
        sharing = len(range(slot % gpus, jobs, gpus))
        if sharing > 1:                          # CUDA itself needs some for every process
            environment["EARLYBIRD_GPU_SHARE"] = f"{.9 / sharing:.3f}"
    with open(runs / "logs" / f"{slug(x.name)}.log", "ab") as log:
        return subprocess.Popen([sys.executable, *x.argv()], stdout=log, stderr=log, env=environment)


def run_cells(cells: list[Cell], runs: Path, jobs: int) -> list[str]:
    """Run every cell that is not done as soon as its needs are made; returns the names that failed. The time
    left is the estimate, times the minutes spent per estimated minute of work that was done in them."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)            # as Ctrl-C
    cells = with_threads(cells, jobs)
    waiting = [x for x in cells if not x.makes.exists()]
    running: dict[int, tuple[subprocess.Popen, Cell]] = {}               # slot -> process
    failed: list[str] = []
    first = schedule(cells, work_left(waiting), jobs)
    began = time.monotonic()
    (runs / "logs").mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=schedule(cells, {x.makes: x.minutes for x in cells}, jobs), desc="study", mininterval=2,
               miniters=0, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}")
    try:
        while waiting or running:
            ready = [x for x in waiting if all(file.exists() for file in x.needs)]
            free = [slot for slot in range(jobs) if slot not in running]
            for x, slot in zip(ready, free):
                running[slot] = (start(x, slot, jobs, runs), x)
                waiting.remove(x)
            if not running:                              # the rest needs something that failed
                break
            busy = [x for _, x in running.values()]
            left = schedule(cells, work_left(waiting + busy), jobs)
            spent = (time.monotonic() - began) / 60
            minutes = left * (spent + .2) / (first - left + .2)
            bar.set_postfix_str(f"{minutes:.1f} min left: {', '.join(x.name for x in busy)}", refresh=False)
            bar.update(bar.total - left - bar.n)
            time.sleep(.5)                               # each look reads the logs
            for slot, (process, x) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode or not x.makes.exists():
                        failed.append(x.name)
                        bar.write(f"FAILED: {x.name}, see {runs / 'logs' / slug(x.name)}.log")
    finally:                                             # after Ctrl-C or an error: they save and stop
        for process, _ in running.values():
            if os.name == "posix":                       # on Windows it would kill them
                process.terminate()
        for process, _ in running.values():
            process.wait()
    bar.update(bar.total - schedule(cells, work_left(waiting), jobs) - bar.n)
    bar.close()
    return failed + [x.name for x in waiting]


# ---- its results -----------------------------------------------------------------------------------------
def json_lines(path: Path) -> list[dict]:
    """The lines of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def record(x: Cell) -> dict:
    """Of an evaluation that is done: its cell, its cost, everything measured, its curves."""
    result = json.loads(x.makes.read_text())
    stages = result["lineage"]
    if x.recipe not in ("base", "raw"):          # what came after the base
        bases = sum(s["script"] == "pretrain.py" for s in stages)
        stages = stages[bases - RECIPES[x.recipe].startswith("pretrain.py"):]
    lines = json_lines(x.makes.with_name("log.jsonl"))
    for b in result.get("benchmarks", {}).values():
        b["hits"] = "".join(map(str, b["hits"]))
    for d in result.get("problems", {}).values():
        d["operations"] = "".join(map(str, d["operations"]))
    return {
        **{k: getattr(x, k) for k in ("base", "at", "recipe", "seed", "step", "how")},
        "cost": {k: sum(s[k] for s in stages) for k in ("tokens", "updates", "flops", "seconds")},
        **rl_curves([line for line in lines if "reward" in line]),
        "nll": [line["demonstration_nll"] for line in lines if "demonstration_nll" in line],
        "validation": [[line["step"], line["val_pass@1"]] for line in lines if "val_pass@1" in line],
        **{k: result[k] for k in ("problems", "benchmarks", "general_mean", "bits_per_byte") if k in result}}


def mean(lines: list[dict], name: str) -> float:
    return round(sum(line.get(name, 0) for line in lines) / len(lines), 4)


def rl_curves(lines: list[dict]) -> dict[str, list]:
    """Of RL's log, means of ten steps: curve (step, reward, KL to the reference, FLOPs, right, sound), styles
    (step, shares); and noise, the means of the gradient's square and of its trace."""
    curve, styles = [], []
    for i in range(0, len(lines), 10):
        part = lines[i:i + 10]
        last = part[-1]
        values = [mean(part, name) for name in ("reward", "kl", "right", "sound")]
        curve.append([last["step"], *values[:2], last["flops"], *values[2:]])
        names = sorted({name for line in part for name in line if name.startswith("style ")})
        styles.append([last["step"], {name.removeprefix("style "): mean(part, name) for name in names}])
    measured = [line for line in lines if "gradient_square" in line]
    noise = [float(np.mean([line[name] for line in measured])) if measured else 0.0
             for name in ("gradient_square", "gradient_trace")]
    return {"curve": curve, "styles": styles, "noise": noise}


def stored(folder: Path) -> list[dict]:
    """The records of a study's folder, as far as there is a base to compare them with."""
    path = folder / "results.jsonl"
    records = report.with_base(json_lines(path))
    require(bool(records), f"{path}: not found, or without a base's result; run the study, without --report")
    return records


def study(c: Config) -> None:
    """Run the preset's grid (or print it), then report; or only report."""
    check_fields(c)
    require(c.preset in STUDIES, f"--preset {c.preset}: must be one of {', '.join(STUDIES)}")
    out = Path(c.report or Path(c.out, c.preset))
    several = sorted(out.glob("*/results.jsonl"))
    if c.report and several and not (out / "results.jsonl").exists():
        return report.all_claims(out, {path.parent.name: stored(path.parent) for path in several})
    failed = ""
    if not c.report:
        cells = grid(STUDIES[c.preset], c)
        if c.list or c.wave:
            return print_commands(waves(cells), c.wave)
        jobs = c.jobs or torch.cuda.device_count() * STUDIES[c.preset].per_gpu or os.cpu_count() or 1
        if names := run_cells(cells, Path(c.runs), jobs):
            failed = f"{len(names)} cells failed or could not start: {', '.join(names)}"
        records = report.with_base([record(x) for x in cells if x.evaluation and x.makes.exists()])
        require(bool(records), failed)                   # earlier results stay
        out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(r, separators=(",", ":")) + "\n" for r in records]
        atomic_write(out / "results.jsonl", "".join(lines).encode())
    claims = report.report(out, stored(out), tuple(RECIPES))
    print(claims, f"\nwritten: {out / 'report.md'}", sep="\n")
    require(not failed, failed)


if __name__ == "__main__":
    main(study, Config)
