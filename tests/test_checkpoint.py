"""Checkpoints, options, seeded generators and the run folder: the properties by which no run is lost and
every run can be repeated."""
import argparse
import contextlib
import copy
import functools
import importlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import stat
import typing
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from unittest import mock

import pytest
import torch
import worlds
from tqdm import tqdm

import evaluate
import merge
import pretrain
import rl
import sft
from checkpoint import (Run, UserError, atomic_write, batch_indices, generator, load_checkpoint, load_model,
                        number, parse, save_checkpoint)

TRAINERS = {"pretrain": pretrain, "sft": sft, "rl": rl, "merge": merge}
CONFIGS = {name: importlib.import_module(name).Config
           for name in ("data.prepare", *TRAINERS, "evaluate", "sample", "study", "beyond.memory")
           if (worlds.ROOT / f"{name.replace('.', '/')}.py").exists()}
CONFIGS["merge weights"] = merge.WeightsConfig


@dataclass
class Config:
    """A configuration such as the trainers have."""
    out: str
    init: str = ""
    lr: float = .1
    checkpoints_at: tuple[int, ...] = (1, 2)
    save_every: int = 1
    device: str = "cpu"
    threads: int = 1


def run_in(folder: Path, **changes) -> Run:
    """A run of nine steps, or what is left of it."""
    return Run(Config(str(folder), **changes), 9, [], start={"": "sha256 of the start"})


def weights(path: Path) -> dict:
    return load_checkpoint(path)["model"]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_lines(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in worlds.lines(folder / "log.jsonl")]


# ---- the file ----------------------------------------------------------------------------------------------

def test_what_is_saved_comes_back(gpt, byte_tokenizer, tmp_path):
    """Weights (bitwise), config, tokenizer, lineage, optimizer, generator state, under weights_only=True."""
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=.01)
    gpt(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    lineage = [{"script": "x.py", "tokens": 1}]
    save_checkpoint(tmp_path / "a.pt", gpt, byte_tokenizer, lineage, optimizer=optimizer.state_dict(),
                    gen=generator(1, "x").get_state(), python=random.getstate())
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert same_weights(content["model"], gpt.state_dict())
    assert content["config"] == vars(gpt.config) and content["lineage"] == lineage
    assert content["tokenizer"] == byte_tokenizer.spec
    assert torch.equal(content["gen"], generator(1, "x").get_state())
    assert content["python"] == random.getstate()
    assert content["optimizer"]["state"][0]["exp_avg"].abs().sum() > 0


def test_a_loaded_model_computes_the_same(make_gpt, byte_tokenizer, tmp_path):
    """Model and tokenizer from the file give the same logits, bitwise; the lineage is the saved one."""
    gpt, ids = make_gpt(vocab_size=320, n_vocab=258), torch.tensor([[5, 60, 3, 200]])
    lineage = [dict.fromkeys(("script", "config", "tokens", "updates", "flops", "seconds"), 1)]
    save_checkpoint(tmp_path / "a.pt", gpt, byte_tokenizer, lineage)
    again, tokenizer_again, lineage_again = load_model(tmp_path / "a.pt")
    assert torch.equal(again(ids), gpt(ids))
    assert tokenizer_again.spec == byte_tokenizer.spec and lineage_again == lineage


def test_a_view_does_not_save_its_whole_storage(gpt, byte_tokenizer, tmp_path):
    """A weight that is a slice of a large tensor takes the slice's bytes on disk."""
    save_checkpoint(tmp_path / "plain.pt", gpt, byte_tokenizer, [])
    big = torch.zeros(100_000, 32)
    big[:64] = gpt.head.weight.detach()
    gpt.head.weight = torch.nn.Parameter(big[:64])
    save_checkpoint(tmp_path / "view.pt", gpt, byte_tokenizer, [])
    assert (tmp_path / "view.pt").stat().st_size < 1.1 * (tmp_path / "plain.pt").stat().st_size


def test_compiled_names_are_stripped(gpt, byte_tokenizer, tmp_path):
    """The checkpoint must not depend on --compile; torch.compile prefixes every name with _orig_mod."""
    save_checkpoint(tmp_path / "a.pt", torch.compile(gpt), byte_tokenizer, [])
    assert weights(tmp_path / "a.pt").keys() == gpt.state_dict().keys()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_mode_follows_umask(mask, tmp_path):
    """Others can read a checkpoint as they can any file."""
    before = os.umask(mask)
    try:
        atomic_write(tmp_path / "a", b"x")
        (tmp_path / "b").write_bytes(b"x")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), MemoryError()])
def test_an_exception_while_writing_leaves_the_old_file_whole(where, error, tmp_path):
    """Whatever is raised at whatever point of the write, the old content stays and no litter is left."""
    (tmp_path / "last.pt").write_bytes(b"old")
    with mock.patch.object(os, where, side_effect=error), pytest.raises(type(error)):
        atomic_write(tmp_path / "last.pt", b"new" * 1000)
    assert worlds.snapshot(tmp_path) == {"last.pt": b"old"}


def test_the_new_file_is_on_disk_before_it_replaces_the_old(tmp_path):
    """Write, fsync the file, rename, fsync the folder, in this order: a power cut shows old or new."""
    calls, real_fsync, real_replace = [], os.fsync, os.replace

    def fsync(handle):
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"file of {os.fstat(handle).st_size}"
        calls.append(f"fsync {kind}")
        real_fsync(handle)

    def replace(a, b):
        assert Path(a).parent == Path(b).parent                # a rename is atomic within a folder only
        calls.append("replace")
        real_replace(a, b)
    with mock.patch("os.fsync", fsync), mock.patch("os.replace", replace):
        atomic_write(tmp_path / "a", b"12345")
    assert calls == ["fsync file of 5", "replace", "fsync folder"]
    assert worlds.snapshot(tmp_path) == {"a": b"12345"}


def test_every_truncation_is_refused(tmp_path):
    """A file cut anywhere gives one line with its name, not a traceback."""
    whole, path, rng = worlds.base().read_bytes(), tmp_path / "cut.pt", random.Random(0)
    for size in [0, 1, 100, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(15))]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut.pt"):
            load_checkpoint(path)


def test_a_flipped_byte_is_detected(tmp_path):
    """A flipped byte anywhere is named and refused, or lies where nothing is stored (padding of the zip)."""
    whole, path, rng = worlds.base().read_bytes(), tmp_path / "flipped.pt", random.Random(0)
    good, refused = load_checkpoint(worlds.base()), 0
    for _ in range(40):
        raw = bytearray(whole)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        try:
            content = load_checkpoint(path)
        except UserError as error:
            assert "flipped.pt" in str(error)
            refused += 1
        else:
            assert same_weights(content.pop("model"), good["model"])
            assert content == {k: v for k, v in good.items() if k != "model"}
    assert refused > 30


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value, make_gpt, byte_tokenizer, tmp_path):
    """One NaN weight makes every number NaN; the line names the file and the weight."""
    gpt = make_gpt(vocab_size=320, n_vocab=258)
    with torch.no_grad():
        gpt.blocks[1].down.weight[3, 4] = value
    save_checkpoint(tmp_path / "nan.pt", gpt, byte_tokenizer, [])
    with pytest.raises(UserError, match=r"nan\.pt: blocks\.1\.down\.weight"):
        load_model(tmp_path / "nan.pt")


# ---- randomness --------------------------------------------------------------------------------------------

def test_generators_are_functions_of_seed_stream_and_step():
    """The same triple gives the same numbers, any other triple others; using one leaves the others alone."""
    triples = [*itertools.product((0, 1, 10), ("data", "rollouts", "evaluation"), (0, 1, 10))]
    first = {t: tuple(torch.rand(4, generator=generator(*t)).tolist()) for t in triples}
    again = {t: tuple(torch.rand(4, generator=generator(*t)).tolist()) for t in reversed(triples)}
    assert first == again
    assert len(set(first.values())) == len(triples)
    assert generator(1, "data", 11).initial_seed() != generator(11, "data", 1).initial_seed()


def test_generators_leave_the_global_generators_alone():
    """Nothing draws from torch's global generator, which user code may own."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    torch.rand(9, generator=generator(0, "data"))
    batch_indices(10, 4, 3, 0, "text")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n, batch", [(10, 5), (10, 4), (7, 3), (3, 8), (1, 2)])
def test_every_epoch_visits_every_example_once(n, batch):
    """The data position is a function of the step alone; n consecutive draws are a permutation of the n."""
    order = [i for step in range(5 * n) for i in batch_indices(n, batch, step, 3, "text")]
    epochs = [order[i:i + n] for i in range(0, len(order) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 5:
        assert len({tuple(epoch) for epoch in epochs}) > 1   # not the same order again and again
        assert order != [i for step in range(5 * n) for i in batch_indices(n, batch, step, 4, "text")]


def test_every_stream_has_its_own_order():
    """RL and SFT on the same questions with the same seed do not see them in the same order, nor does
    pretraining; each order is the same again whatever was asked in between (the last few are remembered)."""
    orders = {(stream, seed): tuple(batch_indices(50, 50, epoch, seed, stream) for epoch in range(3))
              for stream in ("text", "sft", "rl") for seed in (0, 1)}
    assert len({str(order) for order in orders.values()}) == 6
    assert orders["sft", 0][1] == batch_indices(50, 50, 1, 0, "sft")


def short_run(kind: str, out: Path, **changes) -> Path:
    """A run of a few steps in which something is learned."""
    brief = dict(problem_file=str(worlds.sevens()), max_new=12, eval_problems=2, eval_samples=2)
    grpo = brief | dict(init=str(worlds.parrot()), n_problems=4, rollouts=4)
    options = {"pretrain": worlds.PRETRAIN, "sft": brief | dict(init=str(worlds.base()), batch=8, epochs=1),
               "rl": grpo | dict(steps=3), "merge": grpo | dict(batch=8, steps=4, inner=2)}[kind]
    options = options | dict(data=str(worlds.data()), out=str(out), threads=1) | changes
    return worlds.quietly(TRAINERS[kind].train, TRAINERS[kind].Config(**options))


@pytest.mark.parametrize("bars", ["shown", "disabled"])
def test_the_state_is_saved_when_it_is_due(bars, gpt, byte_tokenizer, tmp_path, monkeypatch):
    """Every save_every steps and at the end, with and without bars: only one of several ranks has them."""
    if bars == "disabled":
        monkeypatch.setattr("checkpoint.tqdm", functools.partial(tqdm, disable=True))
    with run_in(tmp_path, save_every=3) as run, mock.patch.object(run, "_save_last") as save:
        run.steps = 8
        run.restore(gpt)
        for step in range(1, 9):
            run.end_step(step, gpt, byte_tokenizer)
    assert [call.args[0] for call in save.call_args_list] == [3, 6, 8]


def test_sft_decays_over_the_last_share_of_the_run():
    """Constant, then linearly to 0 over the last half of 20 steps."""
    rates = [sft.learning_rate(sft.Config(lr=1.0, warmup=0, decay=.5), step, 20) for step in range(20)]
    assert rates == pytest.approx([1.0] * 11 + [1 - i / 10 for i in range(1, 10)])


def test_weight_decay_spares_the_embedding_and_the_norms(gpt):
    """OLMo-2 decays the matrices only, and not the embedding."""
    decayed, others = pretrain.new_optimizer(gpt, pretrain.Config(weight_decay=.1)).param_groups
    names = {id(p): name for name, p in gpt.named_parameters()}
    spared = {names[id(p)] for p in others["params"]}
    assert decayed["weight_decay"] == .1 and others["weight_decay"] == 0
    assert spared == {name for name in names.values() if "norm" in name or name == "embed.weight"}


@pytest.mark.parametrize("kind", TRAINERS)
def test_evaluation_never_changes_training(kind, tmp_path):
    """Evaluating at every step and (almost) never gives the same weights, bitwise, and so does repeating."""
    often = short_run(kind, tmp_path / "often", eval_every=1)
    never = short_run(kind, tmp_path / "never", eval_every=1_000)
    again = short_run(kind, tmp_path / "again", eval_every=1_000)
    assert load_checkpoint(often)["lineage"][-1]["updates"] >= 2         # else nothing could differ
    assert same_weights(weights(often), weights(never))
    assert same_weights(weights(never), weights(again))
    assert log_lines(tmp_path / "never") == log_lines(tmp_path / "again")
    other = short_run(kind, tmp_path / "other", eval_every=1_000, seed=1)
    assert not same_weights(weights(never), weights(other))


# ---- options -----------------------------------------------------------------------------------------------

@functools.cache
def help_of(name: str) -> dict[str, str]:
    """Option or positional -> its help text, read from the output of --help."""
    printed = io.StringIO()
    with (mock.patch.dict(os.environ, COLUMNS="1000"), contextlib.redirect_stdout(printed),
          pytest.raises(SystemExit) as stop):
        parse(CONFIGS[name], ["--help"])
    assert not stop.value.code
    options = re.split("positional arguments:|options:", printed.getvalue(), maxsplit=1)[1]
    found = re.findall(r"^  (?:-o X, )?(?:--)?([a-z0-9][a-z0-9-]*)(?:, --no-[a-z0-9-]+)?(?: X)?\s{2,}(\S.*)$",
                       options, re.MULTILINE)          # a long option's text is on the next line
    return {name.replace("-", "_"): text for name, text in found}


def positional(name: str) -> dict:
    return {f.name: ("a.pt",) for f in fields(CONFIGS[name]) if f.default is MISSING}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_line_and_python_are_the_same(name):
    """Options are fields, with the same defaults; every run has --seed, --device and --threads."""
    names = {f.name for f in fields(CONFIGS[name])}
    assert help_of(name).keys() == names
    assert parse(CONFIGS[name], ["a.pt"] * len(positional(name))) == CONFIGS[name](**positional(name))
    assert {"seed", "device", "threads"} <= names or name in ("study", "beyond.memory")


GIVEN = {int: ("12k", 12_000), float: ("1.5e-3", .0015), str: ("x y", "x y"),
         (int,): ("3,4k", (3, 4000)), (float,): ("3,1e-3", (3., .001)), (str,): ("3,x y", ("3", "x y"))}


@pytest.mark.parametrize("name, option",
                         [(name, f.name) for name, cls in CONFIGS.items() for f in fields(cls)])
def test_every_option(name, option):
    """--help has the field's comment and default; the option sets its own field, in its type, no other."""
    cls, text = CONFIGS[name], help_of(name)[option]
    default, hint = cls.__dataclass_fields__[option].default, typing.get_type_hints(cls)[option]
    explained = text.rsplit(" (default:", 1)[0]
    assert len(explained) >= 8 and " " in explained
    comment = re.search(rf"^ +{option}:.*# *(.*)$", inspect.getsource(cls), re.MULTILINE)
    assert explained == comment[1].strip()
    if default is MISSING:
        return
    if default not in ("", ()) and hint is not bool:
        shown = default if isinstance(default, tuple) else (default,)
        assert f"(default: {','.join(map(str, shown))})" in text
    typed = "--" + option.replace("_", "-")
    if hint is bool:
        given, expected = [typed if not default else typed.replace("--", "--no-", 1)], not default
    else:
        value, expected = GIVEN[typing.get_args(hint)[:1] or hint]
        given = [typed, value]
    plain, changed = (parse(cls, ["a.pt"] * len(positional(name)) + more) for more in ([], given))
    assert getattr(changed, option) == expected and type(getattr(changed, option)) is type(expected)
    assert vars(changed) == vars(plain) | {option: expected}


def test_o_means_out():
    """Whoever types -o, as with most programs, names the output; every script that writes one knows both."""
    for name in ("data.prepare", *TRAINERS, "merge weights"):
        checkpoints = ["a.pt", "b.pt"] if name == "merge weights" else []
        short, long = (parse(CONFIGS[name], [*checkpoints, option, "x/y"]) for option in ("-o", "--out"))
        assert short == long and short.out == "x/y"


@pytest.mark.parametrize("text, value", [
    ("8000000", 8_000_000), ("8_000_000", 8_000_000), ("8e6", 8_000_000), ("8M", 8_000_000),
    ("500k", 500_000), ("1.5M", 1_500_000), ("2G", 2_000_000_000), ("0", 0), ("-3", -3), ("0.5k", 500),
    ("1.2e3", 1200), ("9007199254740993", 2 ** 53 + 1), ("18446744073709551615", 2 ** 64 - 1)])
def test_numbers_as_people_write_them(text, value):
    """The number is exact: a seed of 2^53 + 1 is not 2^53."""
    assert number(text) == value and type(number(text)) is int


@pytest.mark.parametrize("text", ["", "M", "1.5", "8m", "8MB", "0x10", "８", "٣", "1e-3", "nan", "inf",
                                  "1,000", "8 M", "--5", "1.2.3", "9" * 400, "1e400", "0.0001k"])
def test_what_is_not_a_whole_number(text):
    """Refused in the way that argparse turns into one line."""
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        number(text)


def test_tuples_are_written_with_commas():
    """--k 1,8 and --checkpoints-at 1M,2M; nothing between the quotes is the empty tuple."""
    assert parse(evaluate.Config, ["a.pt", "b.pt", "--k", "1,8"]).k == (1, 8)
    assert parse(evaluate.Config, ["a.pt", "b.pt"]).checkpoints == ("a.pt", "b.pt")
    assert parse(pretrain.Config, ["--checkpoints-at", "1M,2M"]).checkpoints_at == (1_000_000, 2_000_000)
    assert parse(pretrain.Config, ["--checkpoints-at="]).checkpoints_at == ()


def test_options_are_not_abbreviated(capsys):
    """--step is not --steps: a later option of that name would change the meaning of a script."""
    with pytest.raises((SystemExit, UserError)) as error:
        parse(rl.Config, ["--step", "3"])
    assert "--step" in capsys.readouterr().err + str(error.value)


# ---- the run folder ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("fails", [False, True])
def test_a_run_gives_lock_and_signals_back(fails, tmp_path, monkeypatch):
    """From Python, a finished or failed train() must not block the folder for the rest of the process (its
    handler kept the lock alive); in a notebook Ctrl-C must stop the next cell. A run takes both."""
    before, taken = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}, []
    real = sft.sft_gradient

    def gradient(*args):
        taken.append({s: signal.getsignal(s) for s in before})
        with pytest.raises(UserError, match="another process"):
            Run(Config(str(tmp_path / "run"), init=str(worlds.base())), 9, [])
        if fails:
            raise MemoryError
        return real(*args)
    monkeypatch.setattr(sft, "sft_gradient", gradient)
    config = sft.Config(init=str(worlds.base()), data=str(worlds.data()), problem_file=str(worlds.sevens()),
                        out=str(tmp_path / "run"), epochs=1, batch=32, max_new=4, eval_problems=1,
                        eval_samples=1, threads=1)
    for attempt in range(2):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
                pytest.raises(MemoryError) if fails else contextlib.nullcontext():
            sft.train(config)
        assert {s: signal.getsignal(s) for s in before} == before
        assert len(taken) == (attempt + 1 if fails else 1) and taken[-1] != before


@pytest.mark.parametrize("changes, named", [(dict(lr=.25), ("lr", "0.1", "0.25")),
                                            (dict(checkpoints_at=(1, 3)), ("checkpoints_at", "[1, 2]", "3"))])
def test_another_configuration_is_refused(changes, named, tmp_path):
    """Resuming with another option would be neither run; the line names option and values."""
    with run_in(tmp_path / "run"):
        pass
    with pytest.raises(UserError) as error:
        run_in(tmp_path / "run", **changes)
    assert all(part in str(error.value) for part in (str(tmp_path / "run"), *named))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == .1


def test_device_and_threads_may_differ_when_resuming(tmp_path):
    """A run may be resumed with other threads or on another device, and a folder may have been moved."""
    with run_in(tmp_path / "run"):
        pass
    shutil.move(tmp_path / "run", tmp_path / "moved")
    with run_in(tmp_path / "moved", threads=2, device="auto"):
        pass


def test_log_sizes_are_true_after_resuming(gpt, byte_tokenizer, tmp_path):
    """Lines logged after the last state are cut off, also where nothing was written between two states."""
    optimizer = torch.optim.SGD(gpt.parameters(), lr=.1)
    with run_in(tmp_path) as run:
        assert run.restore(gpt, optimizer) == 0
        run.log(step=1)
        run.write("kept")
        run.end_step(1, gpt, byte_tokenizer, optimizer)
        run.log(step=2)
        run.write("written after the state was saved, lost in the crash")
    with run_in(tmp_path) as run:
        assert run.restore(gpt, optimizer) == 1
        run.log(step=2)
        run.end_step(2, gpt, byte_tokenizer, optimizer)
    with run_in(tmp_path) as run:
        assert run.restore(gpt, optimizer) == 2
    assert (tmp_path / "samples.txt").read_bytes() == b"kept\n"
    assert worlds.lines(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]


def test_each_optimizer_gets_its_own_state_back(gpt, byte_tokenizer, tmp_path):
    """Two AdamW over the same weights, as in merge.py: each continues exactly where it was."""
    before, after = ([torch.optim.AdamW(gpt.parameters(), lr=lr) for lr in (.1, .2)] for _ in range(2))
    with run_in(tmp_path) as run:
        run.restore(gpt, *before)
        for p in gpt.parameters():
            p.grad = torch.ones_like(p)
        for _ in range(3):
            before[1].step()
        run.end_step(3, gpt, byte_tokenizer, *before)
    saved = copy.deepcopy(gpt.state_dict())
    with torch.no_grad():
        gpt.norm.zero_()
    with run_in(tmp_path) as run:
        assert not run.finished()
        run.restore(gpt, *after)
    assert same_weights(gpt.state_dict(), saved)
    assert after[0].state_dict() == before[0].state_dict() and not after[0].state
    assert after[1].state_dict()["state"][0]["step"] == 3
    assert worlds.same(after[1].state_dict(), before[1].state_dict())


def test_totals_are_counted_across_a_resume(gpt, byte_tokenizer, tmp_path):
    """Tokens, FLOPs, seconds, updates add up over crashes, in every line of a step and in the lineage."""
    optimizer = torch.optim.SGD(gpt.parameters(), lr=.1)
    for step in (1, 2):
        with run_in(tmp_path) as run:
            run.restore(gpt, optimizer)
            assert run.usable(1., optimizer)
            run.count(tokens=10, flops=100)
            run.count(tokens=1, seconds=.5)
            run.log_step(step, loss=1.)
            run.end_step(step, gpt, byte_tokenizer, optimizer)
            run.count(tokens=999)                # lost in the crash
    totals = dict(tokens=22, flops=200, seconds=1., updates=2)
    assert worlds.lines(tmp_path / "log.jsonl")[1] == dict(step=2, loss=1., skipped=0, **totals)
    stage, = load_checkpoint(tmp_path / "last.pt")["lineage"]
    assert stage == totals | {"script": Path(__file__).name, "parent": "sha256 of the start",
                              "config": json.loads((tmp_path / "config.json").read_text())}


# ---- gradients, finite and not -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", TRAINERS)
def test_gradients_are_clipped_used_and_cleared(kind, tmp_path):
    """Each step sees a gradient of norm grad_clip; the norm before is logged; no gradient is left."""
    norms, parameters, left = [], {}, []
    real_step, real_log = torch.optim.AdamW.step, Run.log_step

    def step(optimizer, *args):
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(sum(p.grad.square().sum() for p in mine) ** .5))
        parameters.update({id(p): p for p in mine})
        return real_step(optimizer, *args)

    def log_step(run, *args, **metrics):
        left.extend(p for p in parameters.values() if p.grad is not None)
        return real_log(run, *args, **metrics)
    worlds.parrot()                              # trained before anything is watched
    with mock.patch.object(torch.optim.AdamW, "step", step), mock.patch.object(Run, "log_step", log_step):
        short_run(kind, tmp_path, grad_clip=1e-3)
    assert len(norms) >= 2 and norms == pytest.approx([1e-3] * len(norms), rel=1e-2)
    logged = [v for line in log_lines(tmp_path) for k, v in line.items() if k.startswith("grad_norm")]
    assert len(logged) >= 2 and min(logged) > .01
    assert left == []


def test_three_bad_gradients_in_a_row_end_the_run(gpt, tmp_path, capsys):
    """Two bad gradients are forgiven if a good one follows; three in a row of one optimizer end the run."""
    run, a, b = run_in(tmp_path), *(torch.optim.SGD(gpt.parameters(), lr=.1) for _ in range(2))
    nan, inf = math.nan, math.inf
    assert [run.usable(norm, a) for norm in (nan, inf, 1., inf)] == [False, False, True, False]
    assert run.usable(1., b) and not run.usable(nan, a) and run.usable(0., b)
    assert run.skipped == 4 and run.counts["updates"] == 3
    assert capsys.readouterr().err.count("not finite") == 4
    with run, pytest.raises(UserError, match=re.escape(str(tmp_path)) + ".*three gradients in a row"):
        run.usable(nan, a)
    assert run.skipped == 5


def test_bad_gradients_are_counted_across_a_resume(gpt, byte_tokenizer, tmp_path):
    """Killing and resuming a run forgives nothing: two bad gradients, a resume and a third one end it."""
    optimizer = torch.optim.SGD(gpt.parameters(), lr=.1)
    with run_in(tmp_path) as run:
        run.restore(gpt, optimizer)
        assert not run.usable(math.nan, optimizer) and not run.usable(math.nan, optimizer)
        run.end_step(2, gpt, byte_tokenizer, optimizer)
    with run_in(tmp_path) as run:
        run.restore(gpt, optimizer)
        assert run.skipped == 2
        with pytest.raises(UserError):
            run.usable(math.nan, optimizer)


def test_log_lines_are_json_even_with_nan(tmp_path):
    """NaN is no JSON: a strict reader must read every line. Without a reference the KL is not a number."""
    short_run("rl", tmp_path / "run", reference=False)

    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert None in [json.loads(line, parse_constant=refuse).get("kl", 0) for line in lines]
