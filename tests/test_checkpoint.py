"""Checkpoints, options, seeded generators and the run folder: the properties by which no run is lost and
every run can be repeated."""
import argparse
import contextlib
import functools
import hashlib
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
import weakref
from dataclasses import MISSING, fields, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import worlds
from tqdm import tqdm

import checkpoint
import evaluate
import pretrain
import sft
import test_bad_input
from checkpoint import (Run, UserError, atomic_write, batch_indices, generator, load_checkpoint, load_model,
                        number, parse, save_checkpoint, setup)
from simulated_cuda import simulated_cuda
from test_faults import TRAINERS, config_of, train

CONFIGS = {command: test_bad_input.config_of(command)
           for command in (*test_bad_input.QUICK, *test_bad_input.OTHERS)}


def run_in(folder: Path, **changes) -> Run:
    """A run of nine steps, or what is left of it."""
    options = dict(init=__file__, out=str(folder), lr=.1, checkpoints_at=(1, 2), save_every=1) | changes
    return Run(sft.Config(**options), 9, [], {"problems": "their sha256"})


def weights(path: Path) -> dict:
    return load_checkpoint(path)["model"]


# ---- the file ----------------------------------------------------------------------------------------------

def test_what_is_saved_comes_back(gpt, byte_tokenizer, tmp_path):
    """Weights (bitwise), config, tokenizer, lineage, optimizer, generator state, under weights_only=True."""
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=.01)
    gpt(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    lineage = [test_bad_input.STAGE]
    save_checkpoint(tmp_path / "a.pt", gpt, byte_tokenizer, lineage, optimizer=optimizer.state_dict(),
                    gen=generator(1, "x").get_state(), python=random.getstate())
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert worlds.same(content["model"], gpt.state_dict())
    assert content["config"] == vars(gpt.config) and content["lineage"] == lineage
    assert content["tokenizer"] == byte_tokenizer.spec
    assert torch.equal(content["gen"], generator(1, "x").get_state())
    assert content["python"] == random.getstate()
    assert content["optimizer"]["state"][0]["exp_avg"].abs().sum() > 0


def test_a_loaded_model_computes_the_same(make_gpt, byte_tokenizer, tmp_path):
    """Model and tokenizer from the file give the same logits, bitwise; the lineage is the saved one."""
    gpt, ids = make_gpt(vocab_size=320, n_vocab=258), torch.tensor([[5, 60, 3, 200]])
    lineage = [test_bad_input.STAGE]
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
    """torch.compile prefixes every name of a model with _orig_mod: a checkpoint must not depend on it."""
    save_checkpoint(tmp_path / "a.pt", torch.compile(gpt), byte_tokenizer, [])
    assert weights(tmp_path / "a.pt").keys() == gpt.state_dict().keys()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_mode_follows_umask(mask, tmp_path):
    """Others can read a checkpoint as they can any file."""
    before = os.umask(mask)
    atomic_write(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert os.umask(before) == mask
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), MemoryError()])
def test_an_exception_while_writing_leaves_the_old_file_whole(where, error, tmp_path):
    """Whatever is raised at whatever point of the write, the old content stays and no litter is left."""
    (tmp_path / "last.pt").write_bytes(b"old")
    with mock.patch.object(os, where, side_effect=error), pytest.raises(type(error)):
        atomic_write(tmp_path / "last.pt", b"new" * 1000)
    assert worlds.snapshot(tmp_path) == {"last.pt": b"old"}


@pytest.mark.skipif(os.name != "posix", reason="folders can be brought to disk on POSIX systems only")
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
    model = good.pop("model")
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
            assert worlds.same(content.pop("model"), model) and content == good
    assert refused > 30


# ---- randomness --------------------------------------------------------------------------------------------

def test_generators_are_functions_of_seed_stream_and_step():
    """The same triple gives the same numbers, any other triple others; using one leaves the others alone, and
    nothing draws from torch's global generator, which user code may own."""
    def draw(triple: tuple) -> tuple:
        return tuple(torch.rand(4, generator=generator(*triple)).tolist())
    before = torch.get_rng_state()
    triples = [*itertools.product((0, 1, 10), ("data", "rollouts", "evaluation"), (0, 1, 10))]
    first = {triple: draw(triple) for triple in triples}
    again = {triple: draw(triple) for triple in reversed(triples)}
    assert first == again and len(set(first.values())) == len(triples)
    batch_indices(10, 4, 3, 0, "text")
    assert torch.equal(torch.get_rng_state(), before)


# name -> how many generators of it each trainer needs in 2,000 steps at the defaults: one an epoch, a step
STREAMS = {"weights": 1, "text": 1, "sft": 32, "rl": 64, "rollouts": 2_000, "probe": 1, "evaluation": 1,
           "kl": 1, "own": 1}


def test_no_two_streams_of_a_study_coincide():
    """A seed of 56 bits was announced, but PyTorch takes 32: chance alone would let two of the 6,300 streams
    of seeds 0, 1, 2 coincide once in 216 times. They do not. Published results rest on these numbers."""
    source = "".join((worlds.ROOT / name).read_text(encoding="utf-8") for name in (*TRAINERS, "evaluate.py"))
    assert set(re.findall(r'(?:generator|batch_indices)\(.*"(\w+)"', source)) == STREAMS.keys()
    first = {}                                   # numbers of a stream
    for seed, (name, n) in itertools.product(range(3), STREAMS.items()):
        for step in range(n):
            gen = generator(seed, name, step)
            assert gen.initial_seed() < 2 ** 32
            first[seed, name, step] = tuple(torch.randint(2 ** 31, (3,), generator=gen).tolist())
    assert len(set(first.values())) == len(first) == 6_306
    assert first[0, "rollouts", 3] == (2003182723, 1209444161, 1033740330)
    assert first[1, "weights", 0] == (1884800446, 976315906, 41996024)


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


def short_run(script: str, out: Path, **changes) -> Path:
    """A run of a few steps in which something is learned."""
    fewer = {"pretrain.py": dict(tokens=1_024), "sft.py": dict(epochs=1), "rl.py": dict(steps=3),
             "merge.py": dict(steps=4)}[script]
    return train(script, replace(config_of(script, out), checkpoints_at=(), **fewer, **changes))


@pytest.mark.parametrize("no_bars", [False, True])
def test_the_state_is_saved_when_it_is_due(no_bars, gpt, byte_tokenizer, tmp_path, monkeypatch):
    """Every save_every steps and at the end, with and without bars: only one of several ranks has them."""
    monkeypatch.setattr("checkpoint.tqdm", functools.partial(tqdm, disable=no_bars))
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


@pytest.mark.parametrize("script", TRAINERS)
def test_evaluation_never_changes_training(script, tmp_path):
    """Evaluating at every step and (almost) never gives the same weights, bitwise, and so does repeating."""
    often = short_run(script, tmp_path / "often", eval_every=1)
    never = short_run(script, tmp_path / "never", eval_every=1_000)
    again = short_run(script, tmp_path / "again", eval_every=1_000)
    assert load_checkpoint(often)["lineage"][-1]["updates"] >= 2         # else nothing could differ
    assert worlds.same(weights(often), weights(never))
    assert worlds.same(weights(never), weights(again))
    assert worlds.same(*(worlds.lines(tmp_path / name / "log.jsonl") for name in ("never", "again")))
    other = short_run(script, tmp_path / "other", eval_every=1_000, seed=1)
    assert not worlds.same(weights(never), weights(other))


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
    """Options are fields, with the same defaults; all that draws has --seed, --device and --threads."""
    names = {f.name for f in fields(CONFIGS[name])}
    assert help_of(name).keys() == names
    assert parse(CONFIGS[name], ["a.pt"] * len(positional(name))) == CONFIGS[name](**positional(name))
    assert {"seed", "device", "threads"} <= names or name in ("merge.py weights", *test_bad_input.OTHERS)


GIVEN = {int: ("12k", 12_000), float: ("1.5e-3", .0015), str: ("x y", "x y"),
         (int,): ("3,4k", (3, 4000)), (float,): ("3,1e-3", (3., .001)), (str,): ("3,x y", ("3", "x y"))}


@pytest.mark.parametrize("name, option",
                         [(name, f.name) for name, cls in CONFIGS.items() for f in fields(cls)])
def test_every_option(name, option):
    """--help has the field's comment and default; the option sets its own field, in its type, no other.
    Whoever types -o, as with most programs, names the output."""
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
    if option == "out":
        assert parse(cls, ["a.pt"] * len(positional(name)) + ["-o", value]) == changed


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


def test_tuples_on_the_command_line():
    """Several positional arguments are a tuple; nothing after the equals sign is the empty one."""
    assert parse(evaluate.Config, ["a.pt", "b.pt"]).checkpoints == ("a.pt", "b.pt")
    assert parse(pretrain.Config, ["--checkpoints-at="]).checkpoints_at == ()


# ---- the run folder ----------------------------------------------------------------------------------------

@pytest.mark.skipif(checkpoint.fcntl is None, reason="no locks on Windows")
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_gives_lock_and_signals_back(fails, tmp_path, monkeypatch):
    """From Python, a finished or failed train() must not block the folder for the rest of the process (its
    handler kept the lock alive); in a notebook Ctrl-C must stop the next cell. A run takes both."""
    before, taken = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}, []
    real = sft.sft_gradient

    def gradient(*args):
        taken.append({s: signal.getsignal(s) for s in before})
        with pytest.raises(UserError, match="another process"):
            run_in(tmp_path / "run")
        if fails:
            raise MemoryError
        return real(*args)
    monkeypatch.setattr(sft, "sft_gradient", gradient)
    config = replace(config_of("sft.py", tmp_path / "run"), epochs=1, batch=32, checkpoints_at=())
    for attempt in range(2):
        with pytest.raises(MemoryError) if fails else contextlib.nullcontext():
            sft.train(config)
        assert {s: signal.getsignal(s) for s in before} == before
        assert len(taken) == (attempt + 1 if fails else 1) and taken[-1] != before


def test_device_and_threads_may_differ_when_resuming(tmp_path):
    """A run may be resumed with other threads or on another device, and a folder may have been moved."""
    run_in(tmp_path / "run").close()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    run_in(tmp_path / "moved", threads=2, device="auto").close()


def test_the_books_are_true_after_a_resume(gpt, byte_tokenizer, tmp_path):
    """Tokens, FLOPs, seconds, updates add up over crashes, in every step's line and in the lineage; what was
    written after the last state is cut off, also where nothing was written between two states."""
    optimizer = torch.optim.SGD(gpt.parameters(), lr=.1)
    for step in (1, 2):
        with run_in(tmp_path) as run:
            assert run.restore(gpt, optimizer) == step - 1
            if step == 1:
                run.write("kept")
            assert run.usable(1., optimizer)
            run.count(tokens=10, flops=100)
            run.count(tokens=1, seconds=.5)
            run.log_step(step, loss=1.)
            run.end_step(step, gpt, byte_tokenizer, optimizer)
            run.count(tokens=999)                # from here on lost in the crash
            run.log(step + 1)
            run.write("lost")
    with run_in(tmp_path) as run:
        assert run.restore(gpt, optimizer) == 2
    assert (tmp_path / "samples.txt").read_bytes() == b"kept\n"
    totals = dict(tokens=22, flops=200, seconds=1., updates=2)
    first, second = worlds.lines(tmp_path / "log.jsonl")
    assert first["step"] == 1 and second == dict(step=2, loss=1., skipped=0, **totals)
    stage, = load_checkpoint(tmp_path / "last.pt")["lineage"]
    assert stage == totals | {"script": "sft.py", "data": {"problems": "their sha256"},
                              "parent": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
                              "config": json.loads((tmp_path / "config.json").read_text())}


def test_a_resumed_run_frees_what_it_has_read(gpt, byte_tokenizer, tmp_path):
    """The saved weights and moments stayed in memory beside those at work until the end of the run."""
    with run_in(tmp_path) as run:
        run.restore(gpt)
        run.end_step(1, gpt, byte_tokenizer)
    with run_in(tmp_path) as run:
        saved = weakref.ref(run.last["model"]["head.weight"])
        assert run.restore(gpt) == 1 and saved() is None


def test_a_transcript_does_not_command_the_terminal(gpt, tmp_path):
    """Escape sequences of a problem file or a model went into samples.txt, and from there to the screen."""
    with run_in(tmp_path) as run:
        run.restore(gpt)
        run.write("\x1b[2J\x9b1mü\u202e\r\n#### 7")
    assert (tmp_path / "samples.txt").read_bytes() == "\\x1b[2J\\x9b1mü\\u202e\\r\n#### 7\n".encode()


@pytest.mark.parametrize("share, limits", [(None, []), ("0.25", [mock.call(.25)])])
def test_several_runs_share_a_gpu(share, limits, monkeypatch):
    """Of several commands on one GPU each takes its share of the memory; alone, one takes what it needs."""
    monkeypatch.delenv("EARLYBIRD_GPU_SHARE", raising=False)
    if share:
        monkeypatch.setenv("EARLYBIRD_GPU_SHARE", share)
    with simulated_cuda(), mock.patch("torch.cuda.set_per_process_memory_fraction") as limit:
        setup("cpu", 0)
        assert limit.call_args_list == []
        setup("cuda", 0)
    assert limit.call_args_list == limits


# ---- gradients, finite and not -----------------------------------------------------------------------------

@pytest.mark.parametrize("script", TRAINERS)
def test_gradients_are_clipped_used_and_cleared(script, tmp_path):
    """Each step sees a gradient of norm grad_clip; the norm before is logged; no gradient is left."""
    norms, parameters, real_step = [], [], torch.optim.AdamW.step

    def step(optimizer, *args):
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(sum(p.grad.square().sum() for p in mine) ** .5))
        parameters.extend(mine)
        return real_step(optimizer, *args)
    worlds.parrot()                              # trained before anything is watched
    with mock.patch.object(torch.optim.AdamW, "step", step):
        short_run(script, tmp_path, grad_clip=1e-3)
    assert len(norms) >= 2 and norms == pytest.approx([1e-3] * len(norms), rel=1e-2)
    assert all(p.grad is None for p in parameters)
    logged = re.findall(r'"grad_norm\w*": ([^,]*)', (tmp_path / "log.jsonl").read_text())
    assert len(logged) >= 2 and min(map(float, logged)) > .01


def test_three_bad_gradients_in_a_row_end_the_run(gpt, byte_tokenizer, tmp_path, capsys):
    """Two bad gradients are forgiven if a good one follows; three in a row of one optimizer end the run, even
    if it was killed and resumed before the third."""
    a, b = (torch.optim.SGD(gpt.parameters(), lr=.1) for _ in range(2))
    with run_in(tmp_path) as run:
        run.restore(gpt, a, b)
        usable = [run.usable(norm, a) for norm in (math.nan, math.inf, 1., math.inf)]
        assert usable == [False, False, True, False]
        assert run.usable(1., b) and not run.usable(math.nan, a) and run.usable(0., b)
        assert run.skipped == 4 and run.counts["updates"] == 3
        run.end_step(2, gpt, byte_tokenizer, a, b)
    assert capsys.readouterr().err.count("gradient not finite") == 4
    with run_in(tmp_path) as run:
        run.restore(gpt, a, b)
        assert run.skipped == 4
        with pytest.raises(UserError, match=re.escape(str(tmp_path)) + ".*three gradients in a row"):
            run.usable(math.nan, a)
        assert run.skipped == 5


def test_log_lines_are_json_even_with_nan(tmp_path):
    """NaN is no JSON: a strict reader must read every line. Without a reference the KL is not a number."""
    short_run("rl.py", tmp_path, reference=False, kl=0)
    log = (tmp_path / "log.jsonl").read_text()
    assert '"kl": null' in log and "NaN" not in log and "Infinity" not in log
