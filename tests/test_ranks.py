"""Several processes (torchrun, gloo on the CPU) do the same as one."""
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worlds

import pretrain
import rl
from checkpoint import UserError, load_checkpoint
from test_faults import TRAINERS, command_line, config_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def run(ranks: int, script: str, *argv: str) -> str:
    """`torchrun --nproc_per_node=RANKS SCRIPT ARGV...`; returns its output."""
    done = subprocess.run([*TORCHRUN, str(ranks), str(worlds.ROOT / script), *argv], cwd=worlds.ROOT,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
                          env=worlds.environment())
    assert done.returncode == 0, done.stdout[-3_000:]
    return done.stdout


def options(script: str, out: Path, **more: object):
    """The config of a run of three updates; the state is saved after every second."""
    fewer = {"pretrain.py": dict(tokens=768, checkpoints_at=(256,), save_every=2),
             "sft.py": dict(questions=24, epochs=1, checkpoints_at=(1,)),
             "rl.py": dict(n_problems=6, steps=3, checkpoints_at=(1,)),
             "merge.py": dict(n_problems=6, steps=3, inner=1, save_every=2, checkpoints_at=(1,))}[script]
    return dataclasses.replace(config_of(script, out), **fewer, **more)


def assert_same_weights(a: dict, b: dict) -> None:
    gaps = torch.cat([(x - b["model"][name]).abs().flatten() for name, x in a["model"].items()])
    assert (gaps > 1e-6).float().mean() < 1e-3 and gaps.max() < 5e-5     # learning rates: 3e-4 to 3e-3


@pytest.mark.parametrize("script", TRAINERS)
def test_two_ranks_make_the_updates_of_one_process(script, tmp_path):
    """Gradients (as the moments hold them) agree to 1e-6, and so do the weights after one and three updates,
    but for the few whose gradient is next to nothing, which AdamW divides by its own size; log and
    transcripts are of all rows, and nothing is written twice."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    worlds.quietly(TRAINERS[script][0].train, options(script, alone))
    said = run(2, script, *command_line(options(script, together)))
    assert said.count("next: python") == 1, said
    assert {p.name for p in alone.iterdir()} == {p.name for p in together.iterdir()}
    for name in (p.name for p in alone.glob("*.pt")):
        a, b = load_checkpoint(alone / name), load_checkpoint(together / name)
        assert_same_weights(a, b)
        for x, y in zip(a.get("optimizers", []), b.get("optimizers", [])):
            for i, state in x["state"].items():
                torch.testing.assert_close(y["state"][i]["exp_avg"], state["exp_avg"], atol=1e-6, rtol=1e-5)
    for x, y in zip(worlds.lines(alone / "log.jsonl"), worlds.lines(together / "log.jsonl"), strict=True):
        assert x.keys() == y.keys()
        for k in x.keys() - {"seconds"}:
            assert x[k] == pytest.approx(y[k], rel=1e-4, abs=1e-6), k
    assert (alone / "samples.txt").read_text() == (together / "samples.txt").read_text()


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, monkeypatch):
    """One process stops after the second of three steps; two ranks do the third."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    worlds.quietly(rl.train, options("rl.py", whole))
    flops = rl.grpo_flops

    def power_cut(*args: object) -> int:
        power_cut.calls += 1
        if power_cut.calls == 3:
            raise RuntimeError("power cut")
        return flops(*args)
    power_cut.calls = 0
    monkeypatch.setattr(rl, "grpo_flops", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        worlds.quietly(rl.train, options("rl.py", broken))
    assert "resuming after step 2 of 3" in run(2, "rl.py", *command_line(options("rl.py", broken)))
    assert_same_weights(load_checkpoint(whole / "final.pt"), load_checkpoint(broken / "final.pt"))
    steps = [line["step"] for line in worlds.lines(broken / "log.jsonl") if "reward" in line]
    assert steps == [1, 2, 3]


def test_more_processes_than_sequences_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "world_size", lambda: 9)
    with pytest.raises(UserError, match="--batch 8: fewer sequences than the 9 processes"):
        worlds.quietly(pretrain.train, options("pretrain.py", tmp_path / "run"))
