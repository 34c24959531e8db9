"""The grid, its resumption, its waves, and how long it will take."""
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import worlds

import evaluate
import rl
import study
from checkpoint import UserError, load_checkpoint, parse

ROOT = Path(study.__file__).parent
ALL = ("RL", "SFT", "SFT-Gold", "SFT→RL", "SFT-Gold→RL", "parallel")
RECIPES = ALL if worlds.LONG else ("RL", "SFT", "SFT→RL")
STARTS = ("0.016M", "0.032M") if worlds.LONG else ("0.016M",)
MINI = f"""
import study
study.EVALUATION = "--split test --n-problems 2 --n-samples 32 --max-new 8"
small = " --eval-problems 2 --eval-samples 2 --max-new 8"
data = ("--tokens 40000 --val-tokens 5000 --train-problems 60 --eval-problems 4 --benchmark-items 4 "
        "--vocab-size 300")
pretraining = "--tokens {STARTS[-1]} --checkpoints-at {','.join(STARTS)}"
for name, command in study.RECIPES.items():
    size = " --epochs 1 --batch 4 --n-train 8" if command.startswith("sft") else (
        " --steps 2 --n-problems 2 --rollouts 2 --n-train 8")
    command = command.replace(" --checkpoints-at 50,100", " --checkpoints-at 1")
    study.RECIPES[name] = command + size + small
study.STUDIES["mini"] = study.Study(
    {{"base": (data, pretraining, {STARTS})}}, {RECIPES}, seeds=(0,), trace={{"RL": (1,)}},
    also={{"--no-benchmarks": ("base",)}})
study.main(study.study, study.Config)
"""


def start(folder: Path) -> subprocess.Popen:
    """The miniature study in a process group of its own, as a terminal would start it."""
    command = [sys.executable, "-c", MINI, "--preset", "mini", "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                            # a shell's background job ignores Ctrl-C, and its children would inherit that
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def scripts(folder: Path) -> Path:
    """A folder that has the scripts, but runs and results of its own."""
    folder.mkdir()
    for script in ("data", *(p.name for p in ROOT.glob("*.py"))):
        (folder / script).symlink_to(ROOT / script)
    return folder


def test_a_miniature_study_interrupted_and_continued_gives_the_same_results(tmp_path):
    """Two steps of each recipe; Ctrl-C after the first recipes, and the command again. EARLYBIRD_LONG=1: from
    two checkpoints, all recipes of the main study, and data and base model made twice too."""
    broken = scripts(tmp_path / "broken")
    whole = scripts(tmp_path / "whole")
    process = start(broken)
    while not list((broken / "runs").glob("sft-*/final.pt")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() != 0 and not (broken / "results").exists()
    models = [path for kind in ("data", "raw", "base") for path in broken.glob(f"runs/{kind}-*")]
    for run in () if worlds.LONG else models:
        shutil.copytree(run, whole / run.relative_to(broken))
    for process in [start(folder) for folder in (broken, whole)]:
        output = process.communicate()[0]
        assert process.returncode == 0, output
    assert "SFT→RL" in (broken / "results/mini/report.md").read_text(encoding="utf-8")
    a, b = (study.stored(folder / "results/mini") for folder in (broken, whole))
    assert len(a) == len(STARTS) * (3 + len(RECIPES) + 1)        # raw, base twice, RL after a step and two
    assert worlds.same(a, b)


def cell(folder: Path, name: str, code: str = "", needs: str = "", minutes: float = 1, **more) -> study.Cell:
    """A cell that runs Python code instead of a script (a 'data' cell gets no --threads option)."""
    command = ["-c", code.format(out=str(folder / name))]
    return study.Cell("b", "", "data", 0, command, folder / name, [folder / n for n in needs.split()],
                      minutes, **more)


def test_failures_are_named_and_do_not_stop_the_others(tmp_path):
    """A cell that waits for a failed one is reported too; the others are run, unless their file exists."""
    write = "open({out!r}, 'a').write('x')"
    (tmp_path / "there").write_text("old")
    cells = [cell(tmp_path, "there", write), cell(tmp_path, "broken", "raise SystemExit(3)"),
             cell(tmp_path, "orphan", write, "broken"), cell(tmp_path, "fresh", write, "there")]
    failed = study.run_cells(cells, tmp_path, jobs=2)
    assert (tmp_path / "there").read_text() == "old" and (tmp_path / "fresh").read_text() == "x"
    assert len(failed) == 2 and not (tmp_path / "orphan").exists()


def test_earlier_results_stay_if_everything_fails(tmp_path, monkeypatch):
    """They were replaced by an empty file, and the message asked to run the study first."""
    there = tmp_path / "quick/results.jsonl"
    there.parent.mkdir()
    there.write_text("old")
    monkeypatch.setattr(study, "grid", lambda *_: [cell(tmp_path, "made", "raise SystemExit(3)")])
    with pytest.raises(UserError, match="1 cells failed"):
        study.study(study.Config(runs=str(tmp_path), out=str(tmp_path)))
    assert there.read_text() == "old"


STUBBORN = """
import os, signal, time
def stop(sign, frame):
    time.sleep(.3)
    open({out!r}, "w").write(signal.Signals(sign).name)
    raise SystemExit
signal.signal(signal.SIGTERM, stop)
open({out!r}, "w")
time.sleep(20)
"""


@pytest.mark.parametrize("base, error", [("b", KeyboardInterrupt), ("full", OSError)])
def test_no_process_is_left_running(tmp_path, base, error):
    """The children of a study that got SIGTERM alone ran on, as did those of one whose disk was full: here
    the log of the second cell cannot be opened. They are told to save and stop, and waited for."""
    (tmp_path / "logs/full-data-seed-0.log").mkdir(parents=True)
    second = cell(tmp_path, "next", "import os; os.kill(os.getppid(), 15)", "busy")
    with worlds.captured(), pytest.raises(error):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)            # so that a failure does not end this process
        study.run_cells([cell(tmp_path, "busy", STUBBORN), replace(second, base=base)], tmp_path, jobs=2)
    assert (tmp_path / "busy").read_text() == "SIGTERM"


def test_a_command_prints_in_utf_8(tmp_path, monkeypatch):
    """Where the locale has no arrow, as on Windows, a command that printed SFT→RL into its log failed."""
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    for name, value in {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}.items():
        monkeypatch.setenv(name, value)
    arrow = cell(tmp_path, "made", "print(chr(0x2192)); open({out!r}, 'w')")
    assert study.run_cells([arrow], tmp_path, jobs=1) == []
    assert (tmp_path / "logs/b-data-seed-0.log").read_text(encoding="utf-8") == "→\n"


@pytest.mark.parametrize("preset, jobs, gpus, visible, expected", [
    ("quick", 0, 2, None, ["0 0.225", "1 0.225"] * 4), ("quick", 0, 2, "3,5", ["3 0.225", "5 0.225"] * 4),
    ("quick", 3, 2, None, ["0 0.450", "1 None", "0 0.450"]), ("quick", 1, 2, "GPU-a,GPU-b", ["GPU-a None"]),
    ("gpu-24", 0, 2, None, ["0 None", "1 None"]), ("quick", 0, 0, None, ["None None"] * 5)])
def test_commands_share_the_gpus(tmp_path, monkeypatch, preset, jobs, gpus, visible, expected):
    """By default four at once on each GPU, each told its share of the memory; one if the model is large, and
    one on each of 5 cores without a GPU. Here are ten cells, which fail."""
    started = []
    at_once = []

    def popen(argv: list[str], env: dict, **_) -> SimpleNamespace:
        started.append(f"{env.get('CUDA_VISIBLE_DEVICES')} {env.get('EARLYBIRD_GPU_SHARE')}")
        return SimpleNamespace(poll=lambda: at_once.append(len(started)) or 1, returncode=1)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(study.os, "cpu_count", lambda: 5)
    monkeypatch.setattr(study.subprocess, "Popen", popen)
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(study, "grid", lambda *_: [cell(tmp_path, str(i)) for i in range(10)])
    with pytest.raises(UserError):
        study.study(study.Config(preset=preset, jobs=jobs, runs=str(tmp_path)))
    assert started[:at_once[0]] == expected


# ---- waves, for a cluster's queue -----------------------------------------------------------------------
@pytest.mark.parametrize("preset", study.STUDIES)
def test_every_file_is_made_once_and_after_its_needs(preset, capsys):
    """A grid whose cells wait for files that no cell makes would never end, and a wave that needs more than
    earlier waves would start cells whose parents are missing. No cell waits longer than it must. The list
    has every command."""
    cells = study.grid(study.STUDIES[preset], study.Config())
    files = [x.makes for x in cells]
    assert len(set(files)) == len(files)
    assert all(set(x.needs) <= set(files[:i]) for i, x in enumerate(cells))
    earlier = set()
    latest = set()
    for i, wave in enumerate(study.waves(cells)):
        needs = [set(x.needs) for x in wave]
        assert all(made <= earlier for made in needs)
        assert i == 0 or all(made & latest for made in needs)
        latest = {x.makes for x in wave}
        earlier |= latest
    assert earlier == set(files)
    study.study(study.Config(preset=preset, list=True))
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    assert len(listed) == len(cells)


def options_of(x: study.Cell) -> dict:
    """Options of a command that is no evaluation."""
    return study.configuration(x.command)


@pytest.mark.parametrize("preset", study.STUDIES)
def test_every_checkpoint_that_a_command_reads_is_kept(preset):
    """Final or on the way: an earlier command says --checkpoints-at for it, such as the steps of a trace."""
    kept = set()
    for x in study.grid(study.STUDIES[preset], study.Config()):
        words = x.command[:-2] if x.command[-2] == "--out" else x.command
        assert {word for word in words if word.endswith(".pt")} <= kept, x.command
        kept.add(str(x.makes))
        for at in () if x.evaluation else options_of(x).get("checkpoints_at", ()):
            name = f"{at / 1e6:g}M.pt" if x.command[0] == "pretrain.py" else f"step{at}.pt"
            kept.add(str(x.makes.with_name(name)))


@pytest.mark.parametrize("preset", study.STUDIES)
def test_pretraining_goes_on_with_the_same_model(preset):
    """A command that continues a base has its size and context, which pretrain.py compares with the model's;
    annealing begins at its learning rate and has its batch."""
    runs = [x for x in study.grid(study.STUDIES[preset], study.Config()) if x.command[0] == "pretrain.py"]
    first = {x.makes.parent: options_of(x) for x in runs}
    for x in runs:
        options = options_of(x)
        names = ("size", "context", *("lr", "batch", "seed") * (x.recipe == "base"))
        if options["init"]:
            before = first[Path(options["init"]).parent]
            assert {name: options[name] for name in names} == {name: before[name] for name in names}


def test_every_recipe_is_done_before_the_next_begins():
    """A main study that is stopped early has whole recipes, each with all its seeds and checkpoints; base
    models come first."""
    cells = study.grid(study.STUDIES["main"], study.Config())
    order = [recipe for recipe, _ in itertools.groupby(cells, lambda x: x.recipe)]
    trained = [recipe for recipe in order if recipe not in ("data", "raw", "base")]
    assert trained == [recipe for recipe in study.RECIPES if recipe in study.STUDIES["main"].recipes]
    assert set(order[:-len(trained)]) == {"data", "raw", "base"}
    for recipe in trained:
        found = {(x.at, x.seed) for x in cells if x.recipe == recipe}
        starts = {at for at, _ in found}
        assert {"4M", "6M"} <= starts and found == set(itertools.product(starts, range(3)))


def test_what_is_evaluated():
    """Before and after annealing, and after every recipe; only few recipes from 2M, RL after step 50 too, and
    RL and the base in another way. The KL is that to the base that a recipe started from."""
    warm = "--temperature 1.0"
    small = study.Study({"base": ("", "--tokens 4M --checkpoints-at 2M,4M", ("2M", "4M"))},
                        ("RL", "SFT", "SFT→RL"), seeds=(0, 5), few={"2M": ("RL",)}, trace={"RL": (50,)},
                        also={warm: ("base", "RL")})
    cells = study.grid(small, study.Config())
    bases = {(x.at, x.seed): x.makes for x in cells if x.recipe == "base" and not x.evaluation}
    measured = [x for x in cells if x.evaluation]
    found = Counter((x.at, x.recipe, x.step, x.how, x.seed) for x in measured)
    both = [("raw", -1, ""), ("base", -1, ""), ("base", -1, warm), ("RL", 50, ""), ("RL", -1, ""),
            ("RL", -1, warm)]
    late = [*both, ("SFT", -1, ""), ("SFT→RL", -1, "")]
    assert found == Counter((at, *what, seed) for at, all_of in (("2M", both), ("4M", late))
                            for what in all_of for seed in (0, 5))
    for x in measured:
        options = parse(evaluate.Config, x.command[1:])
        trained = x.recipe not in ("raw", "base")
        assert options.reference == (str(bases[x.at, x.seed]) if trained else "")
        assert options.temperature == (1. if x.how else .6) and options.split == "test"


@pytest.fixture
def tiny(monkeypatch):
    """A study of three cells, one per wave: data, a base model after three updates, its evaluation."""
    monkeypatch.setattr(study, "EVALUATION", "--split test --n-problems 1 --n-samples 32 --max-new 4")
    data = ("--tokens 3000 --val-tokens 1000 --train-problems 20 --eval-problems 5 --benchmark-items 5 "
            "--vocab-size 280 --seed 3")
    pretraining = "--tokens 2k --size 0.3M --context 192 --batch 4 --micro-batch 4 --checkpoints-at 2k"
    bases = {"base": (data, pretraining, ("0.002M",))}
    monkeypatch.setitem(study.STUDIES, "tiny", study.Study(bases, (), seeds=(0,), anneal=0))


def test_waves_from_a_shell_make_the_files_that_the_study_makes(tiny, tmp_path, monkeypatch, capsys):
    """Line by line through `sh -c`, in a folder whose name needs quotes; then nothing is left to do, and the
    study finds every file as its own. Without EARLYBIRD_LONG=1 only the first wave is run: the others are the
    study's commands, word by word."""
    def commands(wave: int) -> list[str]:
        capsys.readouterr()
        study.study(study.Config(preset="tiny", wave=wave, runs="my 'runs'"))
        return capsys.readouterr().out.splitlines()
    cells = study.grid(study.STUDIES["tiny"], study.Config(runs="my 'runs'"))
    run = cells if worlds.LONG else cells[:1]
    monkeypatch.chdir(scripts(tmp_path / "study"))
    assert study.run_cells(run, Path("my 'runs'"), jobs=1) == []
    monkeypatch.chdir(scripts(tmp_path / "queue"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for wave, x in enumerate(cells, 1):
        line, = commands(wave)
        assert shlex.split(line) == ["python", *x.argv()]
        if x in run:
            subprocess.run(["sh", "-c", line], check=True, capture_output=True)
            assert commands(wave) == [] and x.makes.exists()

    data, base, evaluation = ([tmp_path / name / x.makes for name in ("study", "queue")] for x in cells)
    assert data[0].read_bytes() == data[1].read_bytes()
    if worlds.LONG:
        a, b = map(load_checkpoint, base)
        assert worlds.same(a, b) and a["lineage"][0]["updates"] == 3
        a, b = (json.loads(path.read_text()) for path in evaluation)
        assert worlds.same(a, b) and a["problems"]["easy"]["samples"] == 32


def test_the_list_has_a_heading_per_wave(tiny, capsys):
    """And each command once, with a comment: it is a shell script too. Any other wave is refused."""
    study.study(study.Config(preset="tiny", list=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("# wave") for line in lines] == [True, False] * 3
    assert [shlex.split(line, comments=True)[1] for line in lines[1::2]] == [
        "data/prepare.py", "pretrain.py", "evaluate.py"]
    for wave in (-1, 4):
        with pytest.raises(UserError, match=f"--wave {wave}: must be"):
            study.study(study.Config(preset="tiny", wave=wave))


@pytest.mark.parametrize("preset, starts, anneal", [("dial", ("4M", "6M"), True), ("raw", ("6M",), False)])
def test_every_seed_has_its_own_base(preset, starts, anneal):
    """Data, then per seed a trunk whose checkpoints are annealed over a tenth of their tokens (or are bases
    as they are); every recipe starts from the base of its seed; all are evaluated."""
    recipes = study.STUDIES[preset].recipes
    cells = study.grid(study.STUDIES[preset], study.Config())
    runs = [x for x in cells if not x.evaluation and x.recipe != "data"]
    trunks = {x.seed: x for x in runs if x.recipe == "raw"}
    assert {seed: options_of(x)["seed"] for seed, x in trunks.items()} == {0: 0, 1: 1, 2: 2}
    start = {(seed, at): str(trunks[seed].makes.with_name(f"{at}.pt")) for seed in range(3) for at in starts}
    bases = {(x.seed, x.at): x for x in runs if x.recipe == "base"}
    assert bases.keys() == (start.keys() if anneal else set())
    for (seed, at), x in bases.items():
        options = options_of(x)
        assert options["init"] == start[seed, at]
        assert (options["tokens"], options["decay"], options["seed"]) == (int(at[0]) * 100_000, 1, seed)
        start[seed, at] = str(x.makes)
    trained = [x for x in runs if x.recipe not in ("raw", "base")]
    assert len(trained) == len(start) * len(recipes)
    for x in trained:
        options = options_of(x)
        assert options["init"] == start[x.seed, x.at] and options["seed"] == x.seed
    measured = {(x.recipe, x.seed, x.at) for x in cells if x.evaluation}
    assert measured == {(recipe, *key) for key in start for recipe in ("raw",) * anneal + ("base", *recipes)}


@pytest.mark.parametrize("recipe, stages, tokens", [
    ("raw", [("pretrain.py", 8)], 8), ("base", [("pretrain.py", 8), ("pretrain.py", 1)], 9),
    ("continued", [("pretrain.py", 8), ("pretrain.py", 1), ("pretrain.py", 2)], 2),
    ("RL", [("pretrain.py", 8), ("pretrain.py", 1), ("rl.py", 3)], 3),
    ("SFT→RL", [("pretrain.py", 8), ("sft.py", 4), ("rl.py", 3)], 7)])
def test_the_cost_of_a_recipe_begins_after_its_base(tmp_path, recipe, stages, tokens):
    """So has an evaluation --no-benchmarks: study.py failed there, after all the work."""
    lineage = [dict(script=script, tokens=n, updates=n, flops=n, seconds=n) for script, n in stages]
    result = dict(lineage=lineage, problems={})
    x = replace(cell(tmp_path, "x.json"), recipe=recipe)
    for more in (dict(benchmarks={}, general_mean=0, bits_per_byte=0), {}):
        x.makes.write_text(json.dumps(result | more))
        assert study.record(x)["cost"] == dict.fromkeys(("tokens", "updates", "flops", "seconds"), tokens)


def folders() -> dict[str, Path]:
    cells = study.grid(study.STUDIES["controls"], study.Config())
    return {x.recipe: x.makes for x in cells if x.recipe in ("SFT", "ties", "RL") and not x.evaluation}


def test_a_changed_option_gives_a_new_folder_to_it_and_its_descendants(monkeypatch):
    """SFT's learning rate concerns SFT and its merges, not RL. A default edited in rl.py counts too."""
    before = folders()
    monkeypatch.setitem(study.RECIPES, "SFT", study.RECIPES["SFT"] + " --lr 0.002")
    after = folders()
    assert [name for name in before if before[name] != after[name]] == ["SFT", "ties"]
    monkeypatch.setattr(rl.Config.__dataclass_fields__["lr"], "default", 7e-4)
    assert folders()["RL"] != before["RL"]


def test_an_arrow_in_a_recipe_s_name_says_where_it_starts():
    """The figures rely on it: SFT→RL starts from SFT's result, a name without an arrow from the base."""
    for name, command in study.RECIPES.items():
        if not command.startswith("merge.py weights"):
            assert f"--init {{{name.rpartition('→')[0] or 'base'}}}" in command, name


# ---- how long it will take --------------------------------------------------------------------------------
@pytest.mark.parametrize("preset, recipe, expected", [
    ("main", "raw", 1954), ("main", "base", 74), ("main", "continued", 150), ("main", "SFT", 188),
    ("main", "SFT-Gold", 1500), ("main", "RL", 150), ("rollouts", "G=4", 600), ("controls", "fused", 150),
    ("controls", "ties", 0), ("main", "data", 0)])
def test_the_steps_of_a_cell_are_known_before_it_runs(preset, recipe, expected):
    """8 M tokens or .3 M in updates of 4,096; thrice 2,000 solutions, or all eight, in updates of 32."""
    x = next(x for x in study.grid(study.STUDIES[preset], study.Config()) if x.recipe == recipe)
    assert x.steps == expected


@pytest.mark.parametrize("log, steps, expected", [
    (None, 20, 4), ("", 20, 4), ('{"step": 0, "val": 1}\n{"step": 5}\n{"st', 20, 3),
    ('{"step": 20}\n', 20, 0), (None, 0, 4), ('{"step": 5}\n', 0, 4)])
def test_the_work_left_is_read_from_the_last_step_of_the_log(tmp_path, log, steps, expected):
    """Of 4 minutes. A line that is being written does not count, nor the log of another cell (no steps)."""
    x = cell(tmp_path, "final.pt", minutes=4, steps=steps)
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    assert study.work_left([x]) == {x.makes: expected}


@pytest.mark.parametrize("left, jobs, expected", [
    ((3, 2, 4, 1), 1, 10), ((3, 2, 4, 1), 2, 5), ((3, 2, 4, 1), 3, 5), ((1, 2, 4, 1), 1, 8),
    ((1, 2, 4, 1), 2, 5), ((1, 0, 2.5, 0), 2, 2.5), ((0, 0, 0, 0), 2, 0)])
def test_the_time_left_is_that_of_a_schedule(left, jobs, expected):
    """A, then B; C, then E, with the minutes left. In two slots at first: A 0-3, C 0-4, B 3-5, E 4-5."""
    cells = [cell(Path(), "a"), cell(Path(), "b", needs="a"), cell(Path(), "c"), cell(Path(), "e", needs="c")]
    assert study.schedule(cells, dict(zip(map(Path, "abce"), left)), jobs) == pytest.approx(expected)


@pytest.mark.parametrize("preset, threads, part", [("quick", [2], .54), ("composition", [1] * 9, 1)])
def test_a_pretraining_alone_has_all_cores(preset, threads, part):
    """All wait for it. Two threads take .54 of the time; beside another pretraining it has one core, as have
    commands that start from it."""
    cells = study.grid(study.STUDIES[preset], study.Config())
    models = [i for i, x in enumerate(cells) if x.recipe == "raw" and not x.evaluation]
    after = study.with_threads(cells, 2)
    assert all(x.threads == 1 for i, x in enumerate(after) if i not in (0, *models))
    assert [after[i].threads for i in models] == threads
    assert [after[i].minutes for i in models] == pytest.approx([part * cells[i].minutes for i in models])


@pytest.mark.parametrize("earlier, minutes", [(0, 20), (1, 40)])
def test_the_bar_moves_and_learns_the_speed(tmp_path, monkeypatch, capsys, earlier, minutes):
    """40 min are estimated for 4 steps, and after 20 min two of them are in the log: 50 %, and 20 min for the
    other two; 40 min if one of the two was made in an earlier attempt."""
    clock = iter([0.0])
    monkeypatch.setattr(study.time, "monotonic", lambda: next(clock, 1_200.0))
    (tmp_path / "log.jsonl").write_text(f'"step": {earlier}')
    (tmp_path / "next").write_text('"step": 2')
    code = ("import os, time; os.chdir(os.path.dirname({out!r})); os.replace('next', 'log.jsonl'); "
            "time.sleep(3); open({out!r}, 'w')")
    assert study.run_cells([cell(tmp_path, "made", code, minutes=40, steps=4)], tmp_path, jobs=1) == []
    states = [line for line in capsys.readouterr().err.split("\r") if "50%" in line]
    shown = re.findall(r"([0-9.]+) min left: b  data seed 0", "".join(states))
    assert len(shown) == len(states) > 0
    assert all(float(x) == pytest.approx(minutes, .02) for x in shown)
