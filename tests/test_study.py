"""The grid, its resumption, its waves, and how long it will take."""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import worlds

import rl
import study
from checkpoint import UserError, load_checkpoint

ROOT = Path(study.__file__).parent
ALL = ("RL", "SFT", "SFT-Gold", "SFT→RL", "SFT-Gold→RL", "parallel")
RECIPES = ALL if worlds.LONG else ("RL", "SFT", "SFT→RL")
STARTS = ("0.016M", "0.032M") if worlds.LONG else ("0.016M",)
MINI = f"""
import sys
import study
study.EVALUATION = "--split test --n-problems 2 --n-samples 32 --max-new 8"
small = " --eval-problems 2 --eval-samples 2 --max-new 8"
data = ("--tokens 40000 --val-tokens 5000 --train-problems 60 --eval-problems 4 --benchmark-items 4 "
        "--vocab-size 300")
pretraining = ("--size 0.3M --context 192 --batch 8 --micro-batch 8 --tokens {STARTS[-1]} "
               "--checkpoints-at {','.join(STARTS)}")
for name, command in study.RECIPES.items():
    size = " --epochs 1 --batch 4 --n-train 8" if command.startswith("sft") else (
        " --steps 2 --n-problems 2 --rollouts 2 --n-train 8")
    command = command.replace(" --checkpoints-at 10,25", " --checkpoints-at 1")
    study.RECIPES[name] = command + size + small
study.STUDIES["mini"] = study.Study(
    {{"base": (data, pretraining, {STARTS})}}, {RECIPES}, seeds=(0,), shots=0,
    trace={{("0.016M", "RL"): (1,)}})
study.main(study.study, study.Config)
"""


def start(folder: Path) -> subprocess.Popen:
    """The miniature study in a process group of its own, as a terminal would start it."""
    command = [sys.executable, "-c", MINI, "--preset", "mini", "--jobs", "2"]
    return subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                            # a shell's background job ignores Ctrl-C, and its children would inherit that
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def results(folder: Path) -> list[dict]:
    """results.jsonl without times."""
    records = [json.loads(line) for line in (folder / "results/mini/results.jsonl").read_text().splitlines()]
    for r in records:
        del r["cost"]["seconds"]
    return records


def scripts(folder: Path) -> Path:
    """A folder that has the scripts, but runs and results of its own."""
    folder.mkdir()
    for script in ("data", *(p.name for p in ROOT.glob("*.py"))):
        (folder / script).symlink_to(ROOT / script)
    return folder


def test_a_miniature_study_interrupted_and_continued_gives_the_same_results(tmp_path):
    """Two steps of each recipe; Ctrl-C after the first recipes, and the command again. EARLYBIRD_LONG=1: from
    two checkpoints, all recipes of the main study, and data and base model made twice too."""
    broken, whole = (scripts(tmp_path / name) for name in ("broken", "whole"))
    process = start(broken)
    while not list((broken / "runs").glob("sft-*/final.pt")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() != 0 and not (broken / "results").exists()
    for run in () if worlds.LONG else [*(broken / "runs").glob("data-*"), *(broken / "runs").glob("base-*")]:
        shutil.copytree(run, whole / run.relative_to(broken))

    for process in [start(folder) for folder in (broken, whole)]:
        output = process.communicate()[0]
        assert process.returncode == 0, output
    assert "SFT→RL" in (broken / "results/mini/report.md").read_text()
    assert len(results(whole)) == len(STARTS) * (1 + len(RECIPES)) + 1
    assert results(whole) == results(broken)


def cell(tmp_path: Path, name: str, code: str, needs: tuple[str, ...] = ()) -> study.Cell:
    """A cell that runs Python code instead of a script (a 'data' cell gets no --threads option)."""
    return study.Cell("b", "", "data", 0, ["-c", code.format(out=str(tmp_path / name))], tmp_path / name,
                      [tmp_path / n for n in needs], 1.0)


def test_failures_are_named_and_do_not_stop_the_others(tmp_path):
    """A cell that waits for a failed one is reported too; the others are run, unless their file exists."""
    write = "open({out!r}, 'a').write('x')"
    (tmp_path / "there").write_text("old")
    cells = [cell(tmp_path, "there", write), cell(tmp_path, "broken", "raise SystemExit(3)"),
             cell(tmp_path, "orphan", write, ("broken",)), cell(tmp_path, "fresh", write, ("there",))]
    failed = study.run_cells(cells, tmp_path, jobs=2)
    assert (tmp_path / "there").read_text() == "old" and (tmp_path / "fresh").read_text() == "x"
    assert len(failed) == 2 and not (tmp_path / "orphan").exists()


@pytest.mark.parametrize("preset", study.STUDIES)
def test_every_cell_comes_after_what_it_needs(preset):
    """A grid whose cells wait for files that no cell makes would never end."""
    made: set[Path] = set()
    for x in study.grid(study.STUDIES[preset], study.Config()):
        assert set(x.needs) <= made, x.name
        assert x.makes not in made, x.name
        made.add(x.makes)


# ---- waves, for a cluster's queue -----------------------------------------------------------------------

@pytest.mark.parametrize("preset", study.STUDIES)
def test_a_wave_needs_only_earlier_waves(preset):
    """Else a queue would start cells whose parents are missing; and no cell waits longer than it must."""
    cells = study.grid(study.STUDIES[preset], study.Config())
    rounds = study.waves(cells)
    assert sorted(x.name for wave in rounds for x in wave) == sorted(x.name for x in cells)
    made: set[Path] = set()
    latest: set[Path] = set()
    for wave in rounds:
        for x in wave:
            assert set(x.needs) <= made and (set(x.needs) & latest or not made), x.name
        latest = {x.makes for x in wave}
        made |= latest


@pytest.fixture
def tiny(monkeypatch):
    """A study of three cells, one per wave: data, a base model after three updates, its evaluation."""
    monkeypatch.setattr(study, "EVALUATION", "--split test --n-problems 1 --n-samples 32 --max-new 4")
    data = ("--tokens 3000 --val-tokens 1000 --train-problems 20 --eval-problems 5 --benchmark-items 5 "
            "--vocab-size 280 --seed 3")
    pretraining = "--tokens 2k --size 0.3M --context 192 --batch 4 --micro-batch 4 --checkpoints-at 2k"
    monkeypatch.setitem(study.STUDIES, "tiny", study.Study({"base": (data, pretraining, ())}, ()))


def commands(capsys, wave: int, **options) -> list[str]:
    """What --wave prints."""
    capsys.readouterr()
    study.study(study.Config(preset="tiny", wave=wave, **options))
    return capsys.readouterr().out.splitlines()


def test_waves_from_a_shell_make_the_files_that_the_study_makes(tiny, tmp_path, monkeypatch, capsys):
    """Line by line through `sh -c`, in a folder whose name needs quotes; then nothing is left to do, and the
    study finds every file as its own. Without EARLYBIRD_LONG=1 only the first wave is run: the others are the
    study's commands, word by word."""
    runs = "my 'runs'"
    for name in ("study", "queue"):
        scripts(tmp_path / name)
    cells = study.grid(study.STUDIES["tiny"], study.Config(runs=runs))
    run = cells if worlds.LONG else cells[:1]
    monkeypatch.chdir(tmp_path / "study")
    assert study.run_cells(run, Path(runs), jobs=1) == []
    monkeypatch.chdir(tmp_path / "queue")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for wave, x in enumerate(cells, 1):
        lines = commands(capsys, wave, runs=runs)
        assert [shlex.split(line) for line in lines] == [["python", *x.argv(threads=1)]]
        if x in run:
            subprocess.run(["sh", "-c", lines[0]], check=True, capture_output=True)
            assert commands(capsys, wave, runs=runs) == [] and study.done(x)

    data, base, evaluation = (x.makes for x in cells)
    assert (tmp_path / "study" / data).read_bytes() == (tmp_path / "queue" / data).read_bytes()
    if worlds.LONG:
        a, b = (load_checkpoint(tmp_path / name / base) for name in ("study", "queue"))
        assert worlds.same(a, b) and a["lineage"][0]["updates"] == 3
        a, b = (json.loads((tmp_path / name / evaluation).read_text()) for name in ("study", "queue"))
        assert worlds.same(a, b) and a["problems"]["easy"]["samples"] == 32


def test_the_list_has_a_heading_per_wave(tiny, capsys):
    """And each command once, with a comment, so that the whole list is a shell script too."""
    study.study(study.Config(preset="tiny", list=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("# wave") for line in lines] == [True, False] * 3
    assert [shlex.split(line, comments=True)[1] for line in lines[1::2]] == [
        "data/prepare.py", "pretrain.py", "evaluate.py"]


@pytest.mark.parametrize("wave", [-1, 4])
def test_a_wave_that_is_not_there_is_refused(tiny, wave):
    with pytest.raises(UserError, match=f"--wave {wave}: must be"):
        study.study(study.Config(preset="tiny", wave=wave))


@pytest.mark.parametrize("changed, expected", [
    ({}, True), ({"n_samples": 64}, False), ({"seed": 1}, False), ({"reference": "other.pt"}, False)])
def test_an_evaluation_with_other_options_is_not_done(tiny, tmp_path, changed, expected):
    """The file beside a checkpoint has the same name whatever the options were."""
    x = study.grid(study.STUDIES["tiny"], study.Config(runs=str(tmp_path)))[-1]
    x.makes.parent.mkdir()
    x.makes.write_text(json.dumps({"config": study.configuration(x.command) | changed}))
    assert study.done(x) == expected


@pytest.mark.parametrize("recipe, expected", [("base", True), ("RL", False)])
def test_an_evaluation_older_than_an_option_had_its_default(tmp_path, recipe, expected):
    """--reference is younger than some evaluations: without it, those of the base are whole, no others."""
    x = next(x for x in study.grid(study.STUDIES["quick"], study.Config(runs=str(tmp_path)))
             if x.evaluation and x.recipe == recipe)
    config = {k: v for k, v in study.configuration(x.command).items() if k != "reference"}
    x.makes.parent.mkdir()
    x.makes.write_text(json.dumps({"config": config}))
    assert study.done(x) == expected


def folder_of(recipe: str) -> Path:
    return next(x.makes for x in study.grid(study.STUDIES["controls"], study.Config())
                if x.recipe == recipe and not x.evaluation)


def test_a_changed_option_gives_a_new_folder_to_it_and_its_descendants(monkeypatch):
    """SFT's learning rate concerns SFT and the merges with it, not RL."""
    before = {name: folder_of(name) for name in ("SFT", "ties", "RL")}
    monkeypatch.setitem(study.RECIPES, "SFT", study.RECIPES["SFT"] + " --lr 0.002")
    after = {name: folder_of(name) for name in before}
    assert after["SFT"] != before["SFT"] and after["ties"] != before["ties"] and after["RL"] == before["RL"]


def test_a_changed_default_gives_a_new_folder(monkeypatch):
    """A researcher edits a default in rl.py: all options are hashed, not only those on the command line."""
    before = folder_of("RL")
    monkeypatch.setattr(rl.Config.__dataclass_fields__["lr"], "default", 7e-4)
    assert folder_of("RL") != before


def test_an_arrow_in_a_recipe_s_name_says_where_it_starts():
    """The figures rely on it: SFT→RL starts from SFT's result, a name without an arrow from the base."""
    for name, command in study.RECIPES.items():
        if not study.merges(command.split()):
            assert f"--init {{{name.rpartition('→')[0] or 'base'}}}" in command, name


# ---- how long it will take --------------------------------------------------------------------------------

@pytest.mark.parametrize("preset, recipe, expected", [
    ("main", "base", 1954), ("main", "SFT", 188), ("main", "SFT-Gold", 500), ("main", "RL", 50),
    ("long", "RL×4", 200), ("controls", "fused", 50), ("controls", "ties", 0), ("main", "data", 0)])
def test_the_steps_of_a_cell_are_known_before_it_runs(preset, recipe, expected):
    """As many as the published studies counted updates (results/*/results.jsonl)."""
    x = next(x for x in study.grid(study.STUDIES[preset], study.Config()) if x.recipe == recipe)
    assert x.steps == expected


def planned(name: str, minutes: float, *needs: str, **more) -> study.Cell:
    return study.Cell("b", "", "data", 0, [], Path(name, "final.pt"), [Path(n, "final.pt") for n in needs],
                      minutes, **more)


@pytest.mark.parametrize("log, steps, expected", [
    (None, 20, 0), ("", 20, 0), ('{"step": 0, "val": 1}\n{"step": 5}\n{"st', 20, .25),
    ('{"step": 20}\n', 20, 1), (None, 0, .5), ('{"step": 5}\n', 0, .5)])
def test_the_part_done_is_read_from_the_last_step_of_the_log(tmp_path, log, steps, expected):
    """A line that is being written does not count; without steps 2 of 4 minutes are half."""
    x = planned(str(tmp_path), 4, steps=steps)
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    assert study.part_done(x, minutes=2) == expected


def test_a_cell_that_takes_longer_than_estimated_is_not_done():
    assert study.part_done(planned("x", 4), minutes=40) < 1


A, B, C = planned("a", 3), planned("b", 2, "a"), planned("c", 4)
E = planned("e", 1, "c", evaluation=True)


@pytest.mark.parametrize("jobs, expected", [(1, 10), (2, 5), (3, 5)])
def test_the_time_left_is_that_of_a_schedule(jobs, expected):
    """A 3 min, then B 2; C 4, then E 1. In two slots: A 0-3, C 0-4, B 3-5, E 4-5."""
    assert study.time_left([E, A, B, C], {}, jobs) == pytest.approx(expected)


def test_the_time_left_begins_with_the_running_cells():
    """A has 1 min left: B 1-3, C 0-4, E 4-5; with one slot A, B, C, E one after the other: 1 + 2 + 4 + 1."""
    assert study.time_left([B, C, E], {A.makes: 1}, jobs=2) == pytest.approx(5)
    assert study.time_left([B, C, E], {A.makes: 1}, jobs=1) == pytest.approx(8)
    assert study.time_left([], {A.makes: 1, C.makes: 2.5}, jobs=2) == 2.5


def test_a_pretraining_alone_has_all_cores(monkeypatch):
    """If two threads are twice as fast, 6 min become 3; beside another pretraining it has one core. If a
    third of the work is serial, 6 min become 2 + 4/2."""
    monkeypatch.setattr(study, "SERIAL", 0.0)
    base, other = planned("base", 6), planned("other", 6)
    base.recipe = other.recipe = "base"
    assert study.time_left([base], {}, jobs=2) == pytest.approx(3)
    assert study.time_left([base, other], {}, jobs=2) == pytest.approx(6)
    monkeypatch.setattr(study, "SERIAL", 1 / 3)
    assert study.time_left([base], {}, jobs=2) == pytest.approx(4)


def test_the_forecast_learns_the_speed_of_the_machine(tmp_path, monkeypatch):
    """10 min were estimated for 100 steps; 40 steps took 2 min, so the machine is twice as fast: 3 min for
    the other 60 steps and 2 for the 4 that wait. If 20 of the 40 steps were made in an earlier attempt, it is
    as fast as estimated."""
    monkeypatch.setattr(study.time, "monotonic", lambda: 1_000.0)
    (tmp_path / "log.jsonl").write_text('{"step": 40}\n')
    x = planned(str(tmp_path), 10, steps=100)
    for before, pace in ((0., .5), (.2, 1.)):
        r = study.Running(x, None, minutes=10, before=before, since=1_000.0 - 120)
        minutes, work = study.forecast([planned("y", 4, str(tmp_path))], [r], [(0.0, 0.0)], jobs=1)
        assert minutes == pytest.approx(10 * pace, rel=.1) and work == pytest.approx(10)


def test_the_bar_moves_while_a_cell_runs(tmp_path, monkeypatch, capsys):
    """A cell that logs two steps of four, waits and ends: the bar shows 50 %, and its name."""
    monkeypatch.setattr(study, "REDRAW", 0.0)
    code = ("import pathlib, time; pathlib.Path({log!r}).write_text(chr(123) + '\"step\": 2' + chr(125)); "
            "time.sleep(1.5); pathlib.Path({out!r}).write_text('')")
    x = cell(tmp_path, "made", code.replace("{log!r}", repr(str(tmp_path / "log.jsonl"))))
    x.steps = 4
    assert study.run_cells([x], tmp_path, jobs=1) == []
    states = [line for line in capsys.readouterr().err.split("\r") if "50%" in line]
    assert states and all("min left: b  data seed 0" in line for line in states)
