"""Whatever happens to a run, it is not lost: kills at random moments, Ctrl-C, flipped bytes, gradients that
are not finite, two processes in one folder, each for all four trainers. Writes that fail and bad inputs are
in test_bad_input.py, exceptions inside a write in test_checkpoint.py.

EARLYBIRD_LONG=1 kills each trainer 25 times instead of twice."""
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import worlds

import merge
import pretrain
import rl
import sft
from checkpoint import UserError, load_checkpoint

KILLS = 25 if worlds.LONG else 2
LONGER = 6 if worlds.LONG else 1        # more steps, so that there is something left to kill

# Importing torch takes seconds. This process does it once (and an optimizer step, which imports the other
# half), and forks for every run that it is asked for: it reads [output, script, options...] as JSON, answers
# with the process id, and, when that process has ended, with its exit status.
SERVER = """
import json, os, runpy, sys, traceback
sys.path.insert(0, os.getcwd())
import merge, pretrain, torch
torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.zeros(1))
weight.grad = torch.zeros(1)
torch.optim.AdamW([weight], fused=True).step()
for line in sys.stdin:
    out, *argv = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        sys.argv, status = argv, 0
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(child, flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
"""


class Server:
    def __init__(self, out: Path):
        self.out = out                  # where the runs' output is appended
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, cwd=worlds.ROOT, env=worlds.environment())

    def start(self, script: str, argv: list[str]) -> int:
        """Process id of a new run."""
        request = json.dumps([str(self.out), str(worlds.ROOT / script), *argv])
        print(request, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def begin(self, script: str, argv: list[str], log: Path, key: str) -> int:
        """Process id of a new run whose log has this key by now, and whose output is the only one."""
        self.out.write_text("")
        pid = self.start(script, argv)
        while not log.exists() or key not in log.read_text():
            time.sleep(.005)
        return pid

    def wait(self) -> int:
        """Exit status of the run; -9 if it was killed."""
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server():
    server = Server(worlds.folder() / "output.txt")
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=30)


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
        options |= dict(init=str(worlds.base() if script == "sft.py" else worlds.parrot()),
                        problem_file=str(worlds.sevens()))
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


def state_of(log: Path) -> tuple[int, int]:
    """Size and time of a log, which both change when a run opens it; (-1, -1) if there is none."""
    return (log.stat().st_size, log.stat().st_mtime_ns) if log.exists() else (-1, -1)


def started(log: Path, before: tuple[int, int], pid: int) -> None:
    """Wait until the run has opened its log or has ended."""
    for _ in range(20_000):
        if state_of(log) != before or not Path(f"/proc/{pid}/stat").exists():
            return
        time.sleep(.005)
    raise AssertionError("the run does not start")


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc").exists(), reason="needs fork and /proc")
@pytest.mark.parametrize("script", TRAINERS)
def test_a_killed_run_ends_in_the_same_bits(script, server, tmp_path):
    """After SIGKILL at random moments weights, moments, kept checkpoints, log and transcripts are equal to
    the uninterrupted run's; no kill leaves a half-written file, and there is no litter at the end."""
    reference = uninterrupted(script)
    rng, out, kills, moments = random.Random(f"kill {script}"), tmp_path / "run", 0, []
    length = max(line.get("seconds", 0) for line in worlds.lines(reference / "log.jsonl"))
    argv, log = command_line(config_of(script, out)), out / "log.jsonl"
    while kills < KILLS:
        before = state_of(log)
        pid = server.start(script, argv)
        started(log, before, pid)
        time.sleep(rng.uniform(0, .8 * length / (KILLS + 1)) if worlds.LONG else rng.uniform(0, .6 * length))
        os.kill(pid, signal.SIGKILL)
        if server.wait() != -signal.SIGKILL:
            break                                                        # it had finished before
        kills += 1
        moments.append(len(log.read_text().splitlines()))
        for path in out.glob("*.pt"):
            load_checkpoint(path)
        json.loads((out / "config.json").read_text())
    server.start(script, argv)
    assert server.wait() == 0, server.out.read_text()[-2_000:]
    assert kills >= KILLS // 2, f"killed {kills} times, at lines {moments}"
    worlds.assert_same_run(out, reference)


@pytest.mark.parametrize("script, sign", [("pretrain.py", signal.SIGINT), ("sft.py", signal.SIGINT),
                                          ("rl.py", signal.SIGINT), ("rl.py", signal.SIGTERM),
                                          ("merge.py", signal.SIGINT)])
def test_ctrl_c_saves_and_says_how_to_go_on(script, sign, server, tmp_path):
    """Ctrl-C (or SIGTERM) ends after the step at hand with status 130, saved; resumed, the bits are equal."""
    out, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    argv = command_line(config_of(script, out))
    os.kill(server.begin(script, argv, log, '"skipped"'), sign)             # after the first step
    assert server.wait() == 130
    steps = max(line["step"] for line in worlds.lines(log) if "skipped" in line)
    assert load_checkpoint(out / "last.pt")["step"] == steps
    said = server.out.read_text()
    assert "run the same command again" in said and str(out) in said and "Traceback" not in said
    server.start(script, argv)
    assert server.wait() == 0
    assert f"resuming after step {steps}" in server.out.read_text()
    worlds.assert_same_run(out, uninterrupted(script))


def test_a_second_ctrl_c_stops_at_once(server, tmp_path):
    """Whoever presses Ctrl-C twice does not wait for the step; the state saved before is whole."""
    out = tmp_path / "run"
    argv = command_line(config_of("rl.py", out)) + ["--n-problems=8", "--rollouts=48", "--eval-every=99"]
    pid = server.begin("rl.py", argv, out / "log.jsonl", "step")
    os.kill(pid, signal.SIGINT)
    time.sleep(.05)
    os.kill(pid, signal.SIGINT)
    assert server.wait() == 130
    assert "Traceback" not in server.out.read_text()
    for path in out.glob("*.pt"):
        load_checkpoint(path)


@pytest.mark.parametrize("script", TRAINERS)
def test_a_run_killed_while_it_writes_is_completed(script, tmp_path):
    """All steps are done, but the final checkpoint was not written: the next call writes it, and the log has
    its last lines once. A temporary file of the kill is removed; other hidden files are not ours to touch."""
    reference, out = uninterrupted(script), tmp_path / "run"
    shutil.copytree(reference, out)
    (out / final_of(script)).unlink()
    (out / ".last.pt.x7_kd93a").write_bytes(b"half")
    (out / ".mine").write_text("keep")
    train(script, config_of(script, out))
    (out / ".mine").unlink()
    worlds.assert_same_run(out, reference)


@pytest.mark.parametrize("script", TRAINERS)
def test_resuming_from_a_changed_start_is_refused(script, tmp_path):
    """An --init or --data overwritten since is another start: reference and lineage would be those of a
    model, or data, that this run never saw. The line names what changed; nothing in the run's folder does."""
    out, start, config = tmp_path / "run", tmp_path / "start", config_of(script, tmp_path / "run")
    if script == "pretrain.py":
        config.data, before, after = str(start), worlds.data(), worlds.other_data()
    else:
        config.init, before, after = str(start), worlds.base(), worlds.parrot()
    put = shutil.copytree if before.is_dir() else shutil.copy
    put(before, start)
    train(script, config)
    (out / final_of(script)).unlink()
    shutil.rmtree(start) if start.is_dir() else start.unlink()
    put(after, start)
    there = worlds.snapshot(out)
    with pytest.raises(UserError, match=f"{start}: changed since"):
        train(script, config)
    assert worlds.snapshot(out) == there


# ---- flipped bytes -----------------------------------------------------------------------------------------

READ = {"pretrain.py": ("train.bin", "val_general.bin", "val_arithmetic.bin", "last.pt"),
        **dict.fromkeys(("sft.py", "rl.py", "merge.py"), ("init.pt", "train.jsonl", "val.jsonl", "last.pt"))}


@pytest.mark.parametrize("script, name", [(script, name) for script, names in READ.items() for name in names])
def test_a_flipped_byte_is_detected(script, name, tmp_path):
    """A bit flipped in a file that a run reads, at three places: one line names it, the run is as it was."""
    data, out, rng = tmp_path / "data", tmp_path / "run", random.Random(f"{script} {name}")
    shutil.copytree(worlds.data(), data)
    config = config_of(script, out)
    if name == "last.pt":
        shutil.copytree(uninterrupted(script), out)
    else:
        config.data = str(data)
    if script != "pretrain.py" and name != "last.pt":
        config.init, config.problem_file = shutil.copy(worlds.base(), tmp_path / "init.pt"), ""
    path = {"last.pt": out / name, "init.pt": tmp_path / name}.get(name, data / name)
    whole = path.read_bytes()
    stored = range(len(whole))
    if path.suffix == ".pt":             # between the tensors is padding, where nothing can be lost
        weight = load_checkpoint(path)["model"]["blocks.2.down.weight"].numpy().tobytes()
        stored = range(whole.index(weight), whole.index(weight) + len(weight))
    for _ in range(3):
        damaged = bytearray(whole)
        damaged[rng.choice(stored)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        before = worlds.snapshot(out)
        outcome = worlds.run_here(script, *command_line(config))
        assert outcome.status == 2 and len(outcome.errors) == 1 and str(path) in outcome.errors[0], outcome
        assert worlds.snapshot(out) == before


# ---- gradients that are not finite -------------------------------------------------------------------------

def poison(patch, bad) -> tuple[list[int], list[int]]:
    """NaN into the gradient of every update whose number is bad. Returns numbers tried, numbers done."""
    tried, done, real_clip, real_step = [], [], rl.clip_grad_norm_, torch.optim.AdamW.step

    def clip(parameters, *args):
        parameters = list(parameters)
        tried.append(len(tried) + 1)
        if bad(len(tried)):
            parameters[3].grad.view(-1)[5] = math.nan
        return real_clip(parameters, *args)

    def step(optimizer, *args):
        done.append(len(tried))
        return real_step(optimizer, *args)
    for module in (pretrain, sft, rl, merge):
        patch.setattr(module, "clip_grad_norm_", clip)
    patch.setattr(torch.optim.AdamW, "step", step)
    return tried, done


@pytest.mark.parametrize("script", TRAINERS)
def test_a_bad_gradient_is_skipped_counted_and_reported(script, tmp_path, monkeypatch, capsys):
    """NaN in the second gradient: that step is not done (neither weights nor moments change), one line says
    so, the log counts it from then on, the lineage counts the updates done, the weights are finite."""
    out = tmp_path / "run"
    config = config_of(script, out)              # may train the base: before anything is poisoned
    with monkeypatch.context() as patch:
        tried, done = poison(patch, lambda n: n == 2)
        path = Path(TRAINERS[script][0].train(config))
    assert done == [1, *range(3, len(tried) + 1)]
    skipped = [line["skipped"] for line in worlds.lines(out / "log.jsonl") if "skipped" in line]
    assert set(skipped) <= {0, 1} and skipped == sorted(skipped) and skipped[-1] == 1
    content = load_checkpoint(path)
    assert content["lineage"][-1]["updates"] == len(done)
    assert all(w.isfinite().all() for w in content["model"].values())
    said = [line for line in worlds.without_bars(capsys.readouterr().err) if "not finite" in line]
    assert len(said) == 1 and str(out) in said[0]


@pytest.mark.parametrize("script", TRAINERS)
def test_three_bad_gradients_leave_the_last_good_state(script, tmp_path, monkeypatch):
    """The third bad gradient in a row ends the run; the last state is whole, and the same call resumes it."""
    out, config = tmp_path / "run", config_of(script, tmp_path / "run")
    with monkeypatch.context() as patch:
        tried, done = poison(patch, lambda n: n > 9)
        with pytest.raises(UserError, match="three gradients in a row.*last.pt"):
            train(script, config)
    last = load_checkpoint(out / "last.pt")
    seen = 14 if script == "merge.py" else 12    # merge.py: per arm, rl rl sft sft rl ..., bad from 10
    assert len(tried) == seen and done == [*range(1, 10)]
    assert last["step"] >= 2 and not (out / final_of(script)).exists()
    assert all(w.isfinite().all() for w in last["model"].values())
    train(script, config)
    assert all(w.isfinite().all() for w in load_checkpoint(out / final_of(script))["model"].values())


@pytest.mark.parametrize("arm", [1, 0])
def test_three_bad_gradients_of_one_arm_end_the_run(arm, tmp_path, monkeypatch):
    """RL's (or SFT's) gradient is NaN in every step while the other arm's is fine: that is no parallel
    averaging any more but half the other arm; the run must not continue as if nothing had happened."""
    config = config_of("merge.py", tmp_path / "run")
    config.inner = 1
    with monkeypatch.context() as patch:
        poison(patch, lambda n: n % 2 == arm)
        with pytest.raises(UserError, match="three gradients in a row.*last.pt"):
            train("merge.py", config)


# ---- two processes -----------------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(signal, "SIGSTOP") or not Path("/proc").exists(), reason="needs SIGSTOP")
@pytest.mark.parametrize("script", TRAINERS)
def test_a_second_process_is_refused(script, server, tmp_path):
    """While a run is in progress (it is held still for the moment) a second call on its folder would mix the
    two logs: it is told so in one line and changes nothing; the first run ends as if nothing had happened."""
    out = tmp_path / "run"
    argv = command_line(config_of(script, out))
    pid = server.start(script, argv)
    started(out / "log.jsonl", (-1, -1), pid)
    os.kill(pid, signal.SIGSTOP)
    try:
        before = worlds.snapshot(out)
        outcome = worlds.run_here(script, *argv)
        assert outcome.status == 2 and len(outcome.errors) == 1, outcome
        assert str(out) in outcome.errors[0] and "another process" in outcome.errors[0]
        assert worlds.snapshot(out) == before
    finally:
        os.kill(pid, signal.SIGCONT)
    assert server.wait() == 0
    worlds.assert_same_run(out, uninterrupted(script))
