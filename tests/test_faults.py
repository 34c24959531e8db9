"""Whatever happens to a run, it is not lost: kills at random moments, Ctrl-C, gradients that are not finite,
two processes in one folder, each for all four trainers. Writes that fail, flipped bytes and other bad inputs
are in test_bad_input.py, exceptions inside a write in test_checkpoint.py.

EARLYBIRD_LONG=1 kills each trainer 25 times instead of twice."""
import functools
import itertools
import json
import math
import multiprocessing.forkserver
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import worlds

import merge
import pretrain
import rl
import sft
from checkpoint import Run, UserError, load_checkpoint

KILLS = 25 if worlds.LONG else 2
LONGER = 6 if worlds.LONG else 1        # more steps, so that there is something left to kill


def run_script(script: str, argv: list[str], output: Path) -> None:
    """What a process of its own does: `python SCRIPT ARGV...` with its output in a file."""
    file = open(output, "wb")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.argv = [script, *argv]
    runpy.run_path(str(worlds.ROOT / script), run_name="__main__")


@pytest.fixture
def start(tmp_path):
    """start(script, argv) -> a new process, whose run has its lock and its logs and is about to go on.
    Importing torch takes seconds: a server does it once, and forks for every process."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])          # which the first step would import
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        multiprocessing.forkserver.ensure_running()
    output = tmp_path / "output"

    def begin(script: str, argv: list[str]) -> multiprocessing.Process:
        output.write_text("")
        process = context.Process(target=run_script, args=(script, argv, output))
        process.start()
        while process.is_alive() and "step/s]" not in output.read_text():
            time.sleep(.005)                     # until the bar is there
        return process
    return begin


def grow_old(folder: Path) -> None:
    """Make every temporary file in a folder older than an hour: only then it is nobody's any more."""
    for path in folder.glob(".*.*"):
        os.utime(path, (0, 0))


def finish(process: multiprocessing.Process) -> int:
    """Exit status of a process at its end, minus the signal's number if it was killed."""
    process.join()
    return process.exitcode


BRIEF = dict(max_new=12, eval_every=3, eval_problems=2, eval_samples=2, save_every=2, checkpoints_at=(5,))
GRPO = BRIEF | dict(n_problems=4, rollouts=4, steps=12 * LONGER)
TOKENS = 20 * LONGER * 256              # of pretraining
TRAINERS = {
    "pretrain.py": (pretrain, dict(size="0.3M", context=32, batch=8, micro_batch=4, tokens=TOKENS, warmup=3,
                                   decay=.5, eval_every=9, save_every=2, checkpoints_at=(1_000, TOKENS))),
    "sft.py": (sft, BRIEF | dict(batch=8, epochs=5 * LONGER, lr=1e-3)),
    "rl.py": (rl, GRPO | dict(updates=2, kl=.01)),
    "merge.py": (merge, GRPO | dict(batch=8, inner=2, eval_every=4, save_every=3, checkpoints_at=(6,))),
}


def config_of(script: str, out: Path):
    module, options = TRAINERS[script]
    options = dict(data=str(worlds.data()), out=str(out), threads=1, **options)
    if script != "pretrain.py":
        start = worlds.base() if script == "sft.py" else worlds.parrot()
        options |= dict(init=str(start), problem_file=str(worlds.sevens()))
    return module.Config(**options)


def final_of(script: str) -> str:
    return f"{TOKENS / 1e6:g}M.pt" if script == "pretrain.py" else "final.pt"


def command_line(config) -> list[str]:
    values = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value
              for name, value in vars(config).items() if not isinstance(value, bool)}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def train(script: str, config) -> Path:
    return worlds.quietly(TRAINERS[script][0].train, config)


@functools.cache
def uninterrupted(script: str) -> Path:
    """The run folder of a run from beginning to end."""
    out = worlds.folder() / f"uninterrupted-{script}"
    train(script, config_of(script, out))
    return out


@pytest.mark.parametrize("script", TRAINERS)
def test_a_killed_run_ends_in_the_same_bits(script, start, tmp_path):
    """After SIGKILL at random moments weights, moments, kept checkpoints, log and transcripts are equal to
    the uninterrupted run's; no kill leaves a half-written file, and there is no litter at the end."""
    reference = uninterrupted(script)
    out, kills = tmp_path / "run", 0
    rng = random.Random(f"kill {script}")
    length = max(line.get("seconds", 0) for line in worlds.lines(reference / "log.jsonl"))
    argv = command_line(config_of(script, out))
    longest = .8 * length / (KILLS + 1) if worlds.LONG else .6 * length
    while kills < KILLS:
        process = start(script, argv)
        time.sleep(rng.uniform(0, longest))
        process.kill()
        if finish(process) != -signal.SIGKILL:
            break                                                        # it had finished before
        kills += 1
        for path in out.glob("*.pt"):
            load_checkpoint(path)
        json.loads((out / "config.json").read_text())
    grow_old(out)
    assert finish(start(script, argv)) == 0
    assert kills >= KILLS // 2
    worlds.assert_same_run(out, reference)


@pytest.mark.parametrize("script, sign", [*((script, signal.SIGINT) for script in TRAINERS),
                                          ("rl.py", signal.SIGTERM)])
def test_ctrl_c_saves_and_says_how_to_go_on(script, sign, start, tmp_path):
    """Ctrl-C (or SIGTERM) ends after the step at hand with status 130, saved; resumed, the bits are equal."""
    out = tmp_path / "run"
    argv = command_line(config_of(script, out))
    process = start(script, argv)
    os.kill(process.pid, sign)
    assert finish(process) == 130
    steps = max(line["step"] for line in worlds.lines(out / "log.jsonl") if "skipped" in line)
    assert load_checkpoint(out / "last.pt")["step"] == steps
    said = (tmp_path / "output").read_text()
    assert "run the same command again" in said and str(out) in said and "Traceback" not in said
    assert finish(start(script, argv)) == 0
    assert f"resuming after step {steps}" in (tmp_path / "output").read_text()
    worlds.assert_same_run(out, uninterrupted(script))


def test_a_second_ctrl_c_stops_at_once(start, tmp_path):
    """Whoever presses Ctrl-C twice does not wait for the step; the state saved before is whole."""
    out = tmp_path / "run"
    config = replace(config_of("rl.py", out), n_problems=64, rollouts=64, eval_every=99, decode_rows=64,
                     micro_tokens=256)           # a step of many seconds, of operations of milliseconds
    process = start("rl.py", command_line(config))
    os.kill(process.pid, signal.SIGINT)
    while process.is_alive() and "once more" not in (tmp_path / "output").read_text():
        time.sleep(.005)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    said = (tmp_path / "output").read_text()
    assert "saved" not in said and "Traceback" not in said
    for path in out.glob("*.pt"):
        load_checkpoint(path)


@pytest.mark.parametrize("script", TRAINERS)
def test_a_run_killed_while_it_writes_is_completed(script, tmp_path):
    """All steps are done, but the final checkpoint was not written: the next call writes it, and the log has
    its last lines once. A temporary file of the kill is removed; other hidden files are not ours to touch,
    nor is one of this minute: `merge.py weights -o RUN/x.pt`, writing at that moment, lost its file to it."""
    reference, out = uninterrupted(script), tmp_path / "run"
    shutil.copytree(reference, out)
    (out / final_of(script)).unlink()
    (out / ".last.pt.12345").write_bytes(b"half")
    grow_old(out)
    keep = {out / ".mine", out / ".x.pt.12346"}
    for path in keep:
        path.write_text("keep")
    train(script, config_of(script, out))
    for path in keep:
        path.unlink()
    worlds.assert_same_run(out, reference)


@pytest.mark.parametrize("script", TRAINERS)
def test_torch_compile_is_decided_by_the_whole_run(script, tmp_path):
    """Also when it is resumed, so that it goes on in the same code; a finished one asks no more."""
    c, flops = config_of(script, tmp_path / "run"), []
    with mock.patch.object(TRAINERS[script][0], "compile_if_it_pays", lambda *a, **_: flops.append(a[2])):
        with mock.patch.object(Run, "finish", side_effect=RuntimeError), pytest.raises(RuntimeError):
            train(script, c)
        train(script, c)
        train(script, c)
    assert flops[0] > 0 and flops[1:] == flops[:1]


def eights() -> Path:
    """The problems of `sevens`, each with another answer."""
    path = worlds.folder() / "eights.jsonl"
    path.write_text(worlds.sevens().read_text().replace('"7"', '"8"').replace("#### 7", "#### 8"))
    return path


STARTS = {      # option -> what is there first, what it is changed to, the file that is named
    "init": (worlds.base, worlds.parrot, ""), "problem_file": (worlds.sevens, eights, ""),
    "data": (worlds.data, worlds.other_data, "/val.jsonl")}


@pytest.mark.parametrize("script, option", [
    ("pretrain.py", "data"), *itertools.product(("sft.py", "rl.py", "merge.py"), STARTS)])
def test_resuming_from_a_changed_start_is_refused(script, option, tmp_path):
    """A file overwritten since is another start: reference and lineage would be those of a model, or data,
    that this run never saw. Only --init was pinned: with every answer changed a run went on in silence. The
    line names the file; nothing in the run's folder changes."""
    out, start = tmp_path / "run", tmp_path / "start"
    before, after, file = STARTS[option]
    config = replace(config_of(script, out), **{option: str(start)})
    put = functools.partial(shutil.copytree, dirs_exist_ok=True) if option == "data" else shutil.copy
    put(before(), start)
    train(script, config)
    (out / final_of(script)).unlink()
    put(after(), start)
    there = worlds.snapshot(out)
    named = str(start) + ("" if script == "pretrain.py" else file)
    with pytest.raises(UserError, match=re.escape(f"{named}: changed since")):
        train(script, config)
    assert worlds.snapshot(out) == there


# ---- gradients that are not finite -------------------------------------------------------------------------

def poison(patch, bad) -> tuple[list[int], list[int]]:
    """NaN into the gradient of every update whose number in `bad`. Returns numbers tried, numbers done."""
    tried, done = [], []
    real_clip, real_step = rl.clip_grad_norm_, torch.optim.AdamW.step

    def clip(parameters, *args):
        parameters = list(parameters)
        tried.append(len(tried) + 1)
        if len(tried) in bad:
            parameters[3].grad.view(-1)[5] = math.nan
        return real_clip(parameters, *args)

    def step(optimizer, *args):
        done.append(len(tried))
        return real_step(optimizer, *args)
    for module in (pretrain, sft, rl, merge):
        patch.setattr(module, "clip_grad_norm_", clip)
    patch.setattr(torch.optim.AdamW, "step", step)
    return tried, done


def is_finite(path: Path) -> bool:
    return all(weight.isfinite().all() for weight in load_checkpoint(path)["model"].values())


@pytest.mark.parametrize("script", TRAINERS)
def test_a_bad_gradient_is_skipped_counted_and_reported(script, tmp_path, monkeypatch, capsys):
    """NaN in the second gradient: that step is not done (neither weights nor moments change), one line says
    so, the log counts it from then on, the lineage counts the updates done, the weights are finite."""
    out = tmp_path / "run"
    config = config_of(script, out)              # may train the base: before anything is poisoned
    with monkeypatch.context() as patch:
        tried, done = poison(patch, [2])
        path = Path(TRAINERS[script][0].train(config))
    assert done == [1, *range(3, len(tried) + 1)]
    skipped = [line["skipped"] for line in worlds.lines(out / "log.jsonl") if "skipped" in line]
    assert skipped == sorted(skipped)
    assert set(skipped) <= {0, 1} and skipped[-1] == 1
    assert load_checkpoint(path)["lineage"][-1]["updates"] == len(done)
    assert is_finite(path)
    assert capsys.readouterr().err.count(f"\n{out}: gradient not finite") == 1


@pytest.mark.parametrize("script, changes, bad, seen", [
    ("pretrain.py", {}, range(10, 99), 12),
    ("sft.py", {}, range(10, 99), 12),
    ("rl.py", {}, range(10, 99), 12),
    ("merge.py", {}, range(10, 99), 14),                                 # per arm: rl rl sft sft rl ...
    ("merge.py", dict(inner=1), range(11, 99, 2), 15),
    ("merge.py", dict(inner=1), range(10, 99, 2), 14)],
    ids=[*TRAINERS, "merge.py, RL alone", "merge.py, SFT alone"])
def test_three_bad_gradients_leave_the_last_good_state(script, changes, bad, seen, tmp_path, monkeypatch):
    """The third bad gradient in a row ends the run; the last state is whole, and the same call resumes it.
    If one arm's gradients are bad, the rest is no parallel averaging any more but half the other arm."""
    out = tmp_path / "run"
    config = replace(config_of(script, out), **changes)
    with monkeypatch.context() as patch:
        tried, done = poison(patch, bad)
        with pytest.raises(UserError, match="three gradients in a row.*last.pt"):
            train(script, config)
    assert len(tried) == seen
    assert done == [n for n in range(1, seen + 1) if n not in bad]
    assert load_checkpoint(out / "last.pt")["step"] >= 2
    assert is_finite(out / "last.pt")
    assert not (out / final_of(script)).exists()
    train(script, config)
    assert is_finite(out / final_of(script))


# ---- two processes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", TRAINERS)
def test_a_second_process_is_refused(script, start, tmp_path):
    """While a run is in progress (it is held still for the moment) a second call on its folder would mix the
    two logs: it is told so in one line and changes nothing; the first run ends as if nothing had happened."""
    out = tmp_path / "run"
    argv = command_line(config_of(script, out))
    process = start(script, argv)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        before = worlds.snapshot(out)
        outcome = worlds.run_here(script, *argv)
        assert outcome.status == 2 and len(outcome.errors) == 1, outcome
        assert str(out) in outcome.errors[0] and "another process" in outcome.errors[0]
        assert worlds.snapshot(out) == before
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert finish(process) == 0
    worlds.assert_same_run(out, uninterrupted(script))
