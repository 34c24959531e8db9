"""Several processes (torchrun, gloo on the CPU) do the same as one."""
import dataclasses
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
import worlds

import pretrain
import ranks
import rl
from checkpoint import UserError, generator, load_checkpoint
from model import sample
from test_faults import TRAINERS, command_line, config_of


def run_two(script: str, config: object) -> str:
    """The output of `torchrun --nproc_per_node=2 SCRIPT` with these options."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, str(worlds.ROOT / script), *command_line(config)], cwd=worlds.ROOT,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
                          env=worlds.environment())
    assert done.returncode == 0, done.stdout[-3_000:]
    return done.stdout


def options(script: str, out: Path, **more: object):
    """The config of a run of three updates; the state is saved after every second."""
    fewer = {"pretrain.py": dict(tokens=768, checkpoints_at=(256,), save_every=2),
             "sft.py": dict(n_train=24, epochs=1, checkpoints_at=(1,)),
             "rl.py": dict(n_problems=6, steps=3, checkpoints_at=(1,)),
             "merge.py": dict(n_problems=6, steps=3, inner=1, save_every=2, checkpoints_at=(1,))}[script]
    return dataclasses.replace(config_of(script, out), **fewer, **more)


def assert_same_weights(a: dict, b: dict) -> None:
    gaps = torch.cat([(x - b["model"][name]).abs().flatten() for name, x in a["model"].items()])
    assert (gaps > 1e-6).float().mean() < 1e-3 and gaps.max() < 5e-5     # learning rates: 3e-4 to 3e-3


@pytest.mark.parametrize("n, parts", [(1, [5]), (2, [2, 3]), (3, [1, 2, 2]), (8, [1] * 5)])
def test_all_ranks_receive_the_rows_of_one_process(n, parts, small_gpt, monkeypatch):
    """With one rank sample_together is model.sample, bit for bit. Of n ranks (threads here) each decodes
    every n-th prompt, or none if there are more ranks than prompts, and each has all rows in their order."""
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8], [2, 3], [1]]
    arguments = small_gpt, prompts, 4, 9, 9, 10
    expected = sample(*arguments, generator(0, "test"), .7)
    me = threading.local()
    meet = threading.Barrier(n, timeout=60)
    sent = {}

    def gather(mine: list) -> list:
        sent[me.rank] = mine
        meet.wait()
        everything = [x for rank in range(n) for x in sent[rank]]
        meet.wait()
        return everything

    def one(rank: int):
        me.rank = rank
        return ranks.sample_together(*arguments, generator(0, "test"), .7)
    decode_all = mock.Mock(wraps=ranks.decode_all)
    monkeypatch.setattr(ranks, "decode_all", decode_all)
    monkeypatch.setattr(ranks, "gather", gather)
    monkeypatch.setattr(ranks, "rank", lambda: me.rank)
    monkeypatch.setattr(ranks, "world_size", lambda: n)
    with ThreadPoolExecutor(n) as threads:
        results = list(threads.map(one, range(n)))
    drawn = [len(call.args[1]) for call in decode_all.call_args_list]
    assert sorted(drawn) == parts
    tolerance = 0 if n == 1 else 1e-5
    for out in results:
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("script", TRAINERS)
def test_two_ranks_make_the_updates_of_one_process(script, tmp_path):
    """Gradients (as the moments hold them) agree to 1e-6, and so do the weights after one and three updates,
    but for the few whose gradient is next to nothing, which AdamW divides by its own size; log and
    transcripts are of all rows, and nothing is written twice."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    worlds.quietly(TRAINERS[script][0].train, options(script, alone))
    said = run_two(script, options(script, together))
    assert said.count("next: python") == 1, said
    assert sorted(os.listdir(alone)) == sorted(os.listdir(together))
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


def test_a_run_is_resumed_with_another_number_of_ranks(tmp_path):
    """One process stops after the second of three steps; two ranks do the third."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    worlds.quietly(rl.train, options("rl.py", whole))
    effects = [mock.DEFAULT] * 2 + [RuntimeError("power cut")]
    with (mock.patch.object(rl, "grpo_flops", wraps=rl.grpo_flops, side_effect=effects),
          pytest.raises(RuntimeError, match="power cut")):
        worlds.quietly(rl.train, options("rl.py", broken))
    assert "resuming after step 2 of 3" in run_two("rl.py", options("rl.py", broken))
    assert_same_weights(load_checkpoint(whole / "final.pt"), load_checkpoint(broken / "final.pt"))
    steps = [line["step"] for line in worlds.lines(broken / "log.jsonl") if "reward" in line]
    assert steps == [1, 2, 3]


def test_more_processes_than_sequences_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "world_size", lambda: 9)
    with pytest.raises(UserError, match="--batch 8: fewer sequences than the 9 processes"):
        worlds.quietly(pretrain.train, options("pretrain.py", tmp_path / "run"))


@pytest.mark.parametrize("script", ["pretrain", "sft", "rl", "merge", "evaluate", "sample"])
def test_idle_threads_are_told_to_sleep_before_torch_is_imported(script):
    """OpenMP reads the variable when torch is imported; later it has no effect."""
    code = f"""
import os, sys
sys.modules["torch"] = None         # its import is an error
try:
    import {script}
except ImportError:
    print(os.environ.get("GOMP_SPINCOUNT"))"""
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], cwd=worlds.ROOT, env=env, capture_output=True,
                          text=True)
    assert done.stdout == "1000\n", done.stderr
