"""The grid, its resumption, the statistics behind the verdicts, and the report from stored results."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import worlds

import merge
import rl
import scale
import study
from checkpoint import UserError, load_checkpoint, parse

ROOT = Path(study.__file__).parent
STORED = sorted((ROOT / "results").glob("*/results.jsonl"))
MINI = """
import sys
import study
study.EVALUATION = "--split test --n-problems 2 --n-samples 32 --max-new 8"
small = " --eval-problems 2 --eval-samples 2 --max-new 8"
data = ("--tokens 40000 --val-tokens 5000 --train-problems 60 --eval-problems 4 --benchmark-items 4 "
        "--vocab-size 300")
pretraining = "--tokens 32k --size 0.3M --context 192 --batch 8 --micro-batch 8 --checkpoints-at 16k,32k"
for name, command in study.RECIPES.items():
    size = " --epochs 1 --batch 4 --questions 8" if command.startswith("sft") else (
        " --steps 2 --n-problems 2 --rollouts 2 --questions 8")
    command = command.replace(" --checkpoints-at 10,25", " --checkpoints-at 1")
    study.RECIPES[name] = command + size + small
study.STUDIES["mini"] = study.Study(
    {"base": (data, pretraining, ("0.016M", "0.032M"))},
    ("RL", "SFT", "SFT-Gold", "SFT→RL", "SFT-Gold→RL", "parallel"), seeds=(0,), shots=0,
    trace={("0.016M", "RL"): (1,)})
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


def test_a_miniature_study_interrupted_and_continued_gives_the_same_results(tmp_path):
    """Two checkpoints, all recipes, two steps each; Ctrl-C after the first recipes, and the command again."""
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        for script in ("data", *(p.name for p in ROOT.glob("*.py"))):
            (tmp_path / name / script).symlink_to(ROOT / script)
    broken = start(tmp_path / "broken")
    while not list((tmp_path / "broken/runs").glob("sft-*/final.pt")):
        assert broken.poll() is None, broken.stdout.read()
        time.sleep(.1)
    os.killpg(broken.pid, signal.SIGINT)
    assert broken.wait() != 0 and not (tmp_path / "broken/results").exists()
    for name in ("broken", "whole"):
        process = start(tmp_path / name)
        output = process.communicate()[0]
        assert process.returncode == 0, output
    assert "SFT→RL" in (tmp_path / "broken/results/mini/report.md").read_text()
    assert len(results(tmp_path / "whole")) == 2 * 7 + 1
    assert results(tmp_path / "whole") == results(tmp_path / "broken")


def cell(tmp_path: Path, name: str, code: str, needs: tuple[str, ...] = ()) -> study.Cell:
    """A cell that runs Python code instead of a script (a 'data' cell gets no --threads option)."""
    return study.Cell("b", "", "data", 0, ["-c", code.format(out=str(tmp_path / name))], tmp_path / name,
                      [tmp_path / n for n in needs], 1.0)


def test_failures_are_named_and_do_not_stop_the_others(tmp_path):
    """What waits for a failed cell is reported too; what does not wait for it is run; what exists is not."""
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
    study finds every file as its own."""
    runs = "my 'runs'"
    for name in ("study", "queue"):
        (tmp_path / name).mkdir()
        for script in ("data", *(p.name for p in ROOT.glob("*.py"))):
            (tmp_path / name / script).symlink_to(ROOT / script)
    monkeypatch.chdir(tmp_path / "study")
    cells = study.grid(study.STUDIES["tiny"], study.Config(runs=runs))
    assert study.run_cells(cells, Path(runs), jobs=1) == []
    monkeypatch.chdir(tmp_path / "queue")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for wave in (1, 2, 3):
        lines = commands(capsys, wave, runs=runs)
        assert len(lines) == 1
        subprocess.run(["sh", "-c", lines[0]], check=True, capture_output=True)
        assert commands(capsys, wave, runs=runs) == []
    data, base, evaluation = (x.makes for x in cells)
    assert (tmp_path / "study" / data).read_bytes() == (tmp_path / "queue" / data).read_bytes()
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
    with pytest.raises(UserError, match=f"--wave {wave}: .*1 to 3"):
        study.study(study.Config(preset="tiny", wave=wave))


@pytest.mark.parametrize("changed, expected", [
    ({}, True), ({"n_samples": 64}, False), ({"seed": 1}, False), ({"reference": "other.pt"}, False)])
def test_an_evaluation_with_other_options_is_not_done(tiny, tmp_path, changed, expected):
    """The file beside a checkpoint has the same name whatever the options were."""
    x = study.grid(study.STUDIES["tiny"], study.Config(runs=str(tmp_path)))[-1]
    config = {k: v for k, v in study.configuration(x.command).items() if k != "samples"}
    x.makes.parent.mkdir()
    x.makes.write_text(json.dumps({"config": config | changed}))
    assert study.done(x) == expected


@pytest.mark.parametrize("recipe, expected", [("base", True), ("RL", False)])
def test_an_evaluation_older_than_an_option_had_its_default(tmp_path, recipe, expected):
    """--reference is younger than some evaluations: without it, those of the base are whole, no others."""
    x = next(x for x in study.grid(study.STUDIES["quick"], study.Config(runs=str(tmp_path)))
             if x.evaluation and x.recipe == recipe)
    config = {k: v for k, v in study.configuration(x.command).items() if k not in ("samples", "reference")}
    x.makes.parent.mkdir()
    x.makes.write_text(json.dumps({"config": config}))
    assert study.done(x) == expected


def folder_of(recipe: str) -> Path:
    return next(x.makes for x in study.grid(study.STUDIES["controls"], study.Config())
                if x.recipe == recipe and not x.evaluation)


def test_a_changed_option_gives_a_new_folder_to_it_and_its_descendants(monkeypatch):
    """SFT's learning rate concerns SFT and what is merged from it, not RL."""
    before = {name: folder_of(name) for name in ("SFT", "ties", "RL")}
    monkeypatch.setitem(study.RECIPES, "SFT", study.RECIPES["SFT"] + " --lr 0.002")
    after = {name: folder_of(name) for name in before}
    assert after["SFT"] != before["SFT"] and after["ties"] != before["ties"] and after["RL"] == before["RL"]


def test_a_changed_default_gives_a_new_folder(monkeypatch):
    """A researcher edits a default in rl.py: all options are hashed, not only those on the command line."""
    import rl
    before = folder_of("RL")
    monkeypatch.setattr(rl.Config.__dataclass_fields__["lr"], "default", 7e-4)
    assert folder_of("RL") != before


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
    assert study.verdict(low, high, 10) == expected


def test_the_interval_of_equal_values_is_a_point():
    assert study.bootstrap(np.full((3, 50), 7.0)) == (7.0, 7.0, 7.0)


def test_the_interval_has_the_width_of_the_normal_approximation():
    """One seed, many problems: mean ± 1.96 sd/√N."""
    x = np.random.default_rng(1).normal(5, 10, (1, 400))
    mean, low, high = study.bootstrap(x)
    assert (high - low) / 2 == pytest.approx(1.96 * 10 / 20, rel=.15) and low < mean < high


def test_seeds_that_disagree_widen_the_interval():
    """Three seeds with means 0, 10, 20 and no spread over problems: the interval reaches the extremes."""
    x = np.repeat([[0.0], [10.0], [20.0]], 100, axis=1)
    mean, low, high = study.bootstrap(x)
    assert mean == 10 and low == 0 and high == 20


def test_a_difference_pairs_seeds_and_repeats_the_base():
    records = [record("base", [0, 32]), record("RL", [32, 32]), record("RL", [64, 32], seed=1)]
    x = study.difference(records, "RL", "base", "easy pass@1", ["4M"])
    assert x == pytest.approx(np.array([[50, 0], [100, 0]]))
    assert study.difference(records, "RL", "SFT", "easy pass@1", ["4M"]) is None


def test_a_missing_run_leaves_the_seeds_that_both_have():
    """RL has seeds 0 and 2, SFT 0 and 1: only seed 0 is compared, and never one seed with another."""
    records = [record("RL", [64]), record("RL", [0], 2), record("SFT", [32]), record("SFT", [48], 1)]
    assert study.difference(records, "RL", "SFT", "easy pass@1", ["4M"]) == pytest.approx(np.array([[50]]))


def test_the_largest_of_several_pairs_is_judged_by_a_wider_interval():
    x = np.random.default_rng(1).normal(0, 10, (1, 200))
    assert study.bootstrap(x, 3)[1] < study.bootstrap(x)[1] < study.bootstrap(x)[2] < study.bootstrap(x, 3)[2]


@pytest.mark.parametrize("gain, expected", [(0, "not reproduced"), (32, "reproduced")])
def test_claim_1_is_judged_by_the_gain_at_early_checkpoints(gain, expected):
    """4 M of 8 M tokens is early; a gain of 50 points is above the margin of 10, none is below it."""
    records = [record("base", [16] * 20), record("base", [40] * 20, at="8M")]
    records += [record("RL", [16 + gain] * 20, seed) for seed in range(3)]
    rows = [row for row in study.judge(records) if row[0] == "C1"]
    assert [row[2] for row in rows] == ["4M of 8M", "4M of 8M"] and rows[0][5] == expected


@pytest.mark.parametrize("lost, expected", [(0, "not reproduced"), (1, "reproduced")])
def test_claim_6_is_judged_by_what_sft_loses(lost, expected):
    """Half of the benchmark items lost is more than 2 points; none is not."""
    records = [record("base", [1] * 5, hits="1" * 40),
               *(record("SFT", [1] * 5, seed, hits="01"[1 - lost] * 40) for seed in range(3))]
    row = next(row for row in study.judge(records) if row[1].startswith("SFT costs"))
    assert row[5] == expected


@pytest.mark.parametrize("right, reward, expected", [
    (16, .2, "not reproduced"), (32, .2, "reproduced"), (32, .3, "undecided")])
def test_claim_9_needs_equal_rewards_and_different_scores(right, reward, expected):
    """Seeds at 25 % and 50 % count only if their training rewards agree."""
    records = [record("base", [0] * 30), record("RL", [16] * 30), record("RL", [16] * 30, at="8M"),
               record("RL", [right] * 30, 1, curve=[[1, reward, 0., 5]]), record("base", [0] * 30, at="8M")]
    verdicts = [row[5] for row in study.judge(records) if row[0] == "C9"]
    assert len(verdicts) == 1 and verdicts[0].startswith(expected)


def test_problems_newly_solved_and_lost_are_counted():
    """Base solves problems 0 and 1, the run solves 1 and 2: one new, one lost."""
    records = [record("base", [64, 1, 0]), record("RL", [0, 64, 64])]
    row = next(r for r in study.solved(records) if r[2] == "RL" and r[4] == "easy")
    assert row[5:11] == [2, 2, 1, 1, 1, 1]


# ---- the report ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stored", STORED, ids=lambda p: p.parent.name)
def test_the_published_report_is_what_its_results_say(stored, tmp_path):
    """Text equal to the published one; pass@1 of the first record is its share of right samples."""
    records = [json.loads(line) for line in stored.read_text().splitlines()]
    out = tmp_path / stored.parent.name
    out.mkdir()
    claims = study.markdown(study.CLAIMS_HEADER, study.judge(records))
    assert study.report(out, records, claims) + "\n" == stored.with_name("report.md").read_text()
    assert all((out / f"{name}.png").stat().st_size > 5_000 for name in ("main", "parallel", "forgetting"))
    easy = records[0]["problems"]["easy"]
    share = 100 * sum(easy["right_per_problem"]) / (easy["problems"] * easy["samples"])
    assert study.values(records[0], "easy pass@1").mean() == pytest.approx(share)


# ---- one consumer GPU -------------------------------------------------------------------------------------

@pytest.mark.parametrize("gib", [8, 12, 24])
def test_the_gpu_presets_fit_by_the_memory_plan(gib):
    """RL, and parallel averaging with its two optimizers, as the grid calls them; a size more would not fit a
    card of 8 GB, so that the plan decides something."""
    cells = study.grid(study.STUDIES[f"gpu-{gib}"], study.Config())
    base = next(x.command for x in cells if x.recipe == "base" and not x.evaluation)
    size = base[base.index("--size") + 1]
    for script in (rl, merge):
        name = f"{script.__name__}.py"
        config = parse(script.Config, next(x.command for x in cells if x.command[0] == name)[1:])
        assert config.micro_batch >= 8192

        def gpu(model: str, config=config) -> float:
            return scale.needed(scale.plan(scale.MODELS[model], config, 64, True)) + scale.CONTEXT
        assert gpu(size) <= scale.CARD * gib
        assert gpu("124M") > scale.CARD * 8
