"""Checkpoints, options, seeded generators and the run folder: the properties by which no run is lost and
every run can be repeated."""
import argparse
import contextlib
import copy
import inspect
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import typing
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import pytest
import torch
import worlds

import checkpoint
import evaluate
import merge
import model
import pretrain
import rl
import sft
from checkpoint import (Run, UserError, atomic_write, batch_indices, generator, load_checkpoint, load_model,
                        number, parse, save_checkpoint)
from data import prepare
from data.tokenizer import PATTERN, Tokenizer

CONFIGS = {m.__name__.split(".")[-1]: m.Config for m in (prepare, pretrain, sft, rl, merge, evaluate)}
CONFIGS |= {"merge weights": merge.WeightsConfig, "model": evaluate.ChatConfig}


@dataclass
class Config:
    """A configuration such as the trainers have."""
    out: str
    lr: float = .1
    steps: tuple[int, ...] = (1, 2)
    device: str = "cpu"
    threads: int = 1


@pytest.fixture(autouse=True)
def own_signals():
    """Ctrl-C stops pytest again after a test that made a Run."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for sign, handler in handlers.items():
        signal.signal(sign, handler)


def weights(path: Path) -> dict:
    return load_checkpoint(path)["model"]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_lines(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in worlds.lines(folder / "log.jsonl")]


# ---- the file ----------------------------------------------------------------------------------------------

def test_what_is_saved_comes_back(gpt, byte_tokenizer, tmp_path):
    """Weights (bitwise), config, tokenizer, lineage, optimizer and generator state come back under
    weights_only=True."""
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


def test_a_loaded_model_computes_the_same(make_gpt, tmp_path):
    """The checkpoint is self-contained; model and tokenizer rebuilt from it give the same logits, bitwise."""
    gpt, tokenizer = make_gpt(vocab_size=320, n_vocab=258), Tokenizer({"pattern": PATTERN, "merges": []})
    save_checkpoint(tmp_path / "a.pt", gpt, tokenizer, [])
    again, tokenizer_again, _ = load_model(tmp_path / "a.pt")
    ids = torch.tensor([[5, 60, 3, 200]])
    assert torch.equal(again(ids), gpt(ids))
    assert tokenizer_again.spec == tokenizer.spec


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
    """Others can read a checkpoint as they can any file (mkstemp alone leaves 0600)."""
    before = os.umask(mask)
    try:
        atomic_write(tmp_path / "a", b"x")
        (tmp_path / "b").write_bytes(b"x")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.parametrize("where", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), MemoryError()])
def test_an_exception_while_writing_leaves_the_old_file_whole(where, error, tmp_path, monkeypatch):
    """Whatever is raised at whatever point of the write, the old content stays and no litter is left."""
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def fail(*args):
        raise error
    monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)):
        atomic_write(path, b"new" * 1000)
    monkeypatch.undo()
    assert worlds.snapshot(tmp_path) == {"last.pt": b"old"}


def test_the_new_file_is_on_disk_before_it_replaces_the_old(tmp_path, monkeypatch):
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
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
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
            assert same_weights(content["model"], good["model"])
            assert {k: v for k, v in content.items() if k != "model"} == {
                k: v for k, v in good.items() if k != "model"}
    assert refused > 30


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    """A pickle that would run code on loading is refused without running it, zipped or in the old format."""
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")
    for zipped in (True, False):
        torch.save({"format": checkpoint.FORMAT, "model": Evil()}, tmp_path / "evil.pt",
                   _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="evil.pt"):
            load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value, gpt, tmp_path):
    """One NaN weight makes every number NaN; the line names the file and the weight."""
    tokenizer = Tokenizer({"pattern": PATTERN, "merges": []})
    big = model.GPT(model.ModelConfig(320, 258, 64, 32, 2, 2, 64))
    with torch.no_grad():
        big.blocks[1].down.weight[3, 4] = value
    save_checkpoint(tmp_path / "nan.pt", big, tokenizer, [])
    with pytest.raises(UserError, match=r"nan\.pt: blocks\.1\.down\.weight"):
        load_model(tmp_path / "nan.pt")


# ---- randomness --------------------------------------------------------------------------------------------

def test_generators_are_functions_of_seed_stream_and_step():
    """The same triple gives the same numbers, any other triple others; using one leaves the others alone."""
    triples = [(s, stream, step) for s in (0, 1, 10) for stream in ("data", "rollouts", "evaluation")
               for step in (0, 1, 10)]
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
    options = dict(problems=str(worlds.sevens()), max_new=12, eval_problems=2, eval_samples=2)
    if kind == "pretrain":
        module, options = pretrain, worlds.PRETRAIN
    elif kind == "sft":
        module, options = sft, options | dict(init=str(worlds.base()), batch=8, epochs=1)
    elif kind == "merge":
        module, options = merge, options | dict(init=str(worlds.parrot()), n_problems=4, rollouts=4, batch=8,
                                                steps=4, inner=2)
    else:
        module, options = rl, options | dict(init=str(worlds.parrot()), n_problems=4, rollouts=4, steps=3)
    options = options | dict(data=str(worlds.data()), out=str(out), threads=1) | changes
    return worlds.quietly(module.train, module.Config(**options))


@pytest.mark.parametrize("kind", ["pretrain", "sft", "rl", "merge"])
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

def help_of(cls) -> dict[str, str]:
    """Option or positional -> its help text, read from the output of --help."""
    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
            parse(cls, ["--help"])
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    assert not stop.value.code
    after = printed.getvalue().split("positional arguments:" if "positional arguments:" in printed.getvalue()
                                     else "options:")[1]
    found, option = {}, None
    for line in after.splitlines():
        match = re.match(r"  (?:-h, |-o X, )?(?:--)?([a-z0-9-]+)(?:, --no-[a-z0-9-]+|)(?: X|)(?:  +(.*))?$",
                         line)
        if match and line[2] != " ":
            option = match[1].replace("-", "_")
            found[option] = match[2] or ""
        elif line.startswith("    ") and option:   # a long option's text is on the next line
            found[option] += line.strip()
    found.pop("help")
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_a_field_and_the_other_way_round(name):
    """Everything the command line does, train(Config(...)) can do, and the reverse."""
    assert help_of(CONFIGS[name]).keys() == {f.name for f in fields(CONFIGS[name])}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_explained(name):
    """Every hyperparameter has a reason or a unit, and --help shows it beside the default."""
    for option, text in help_of(CONFIGS[name]).items():
        field = CONFIGS[name].__dataclass_fields__[option]
        explained = text.split("(default")[0].strip()
        assert len(explained) >= 8 and " " in explained, f"{option}: {text!r}"
        source = "".join(map(inspect.getsource, CONFIGS[name].__mro__[:-1]))     # all but object
        comment = re.search(rf"^ +{option}:.*# *(.*)$", source, re.MULTILINE)
        assert explained == comment[1].strip()
        if field.default not in (MISSING, "", ()) and field.type not in (bool, "bool"):
            shown = field.default if isinstance(field.default, tuple) else (field.default,)
            assert f"(default: {','.join(map(str, shown))})" in text


@pytest.mark.parametrize("name", CONFIGS)
def test_no_option_means_the_default(name):
    """There are no two defaults for one option."""
    cls = CONFIGS[name]
    positional = {f.name: ("a.pt",) for f in fields(cls) if f.default is MISSING}
    assert parse(cls, ["a.pt"] if positional else []) == cls(**positional)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_reaches_its_field(name):
    """An option sets its own field, with its own type, and no other."""
    cls = CONFIGS[name]
    positional = ["a.pt"] if any(f.default is MISSING for f in fields(cls)) else []
    plain = parse(cls, positional)
    for f in (f for f in fields(cls) if f.default is not MISSING):
        option, default = "--" + f.name.replace("_", "-"), f.default
        if isinstance(default, bool):
            given, expected = [option if not default else option.replace("--", "--no-", 1)], not default
        elif isinstance(default, tuple):
            given, expected = {int: ([option, "3,4k"], (3, 4000)), float: ([option, "3,1e-3"], (3., .001)),
                               str: ([option, "3,x y"], ("3", "x y"))}[
                                   typing.get_args(typing.get_type_hints(cls)[f.name])[0]]
        else:
            given, expected = {int: ([option, "12k"], 12_000), float: ([option, "1.5e-3"], .0015),
                               str: ([option, "x y"], "x y")}[type(default)]
        changed = parse(cls, positional + given)
        assert getattr(changed, f.name) == expected and type(getattr(changed, f.name)) is type(expected)
        assert {k: v for k, v in vars(changed).items() if k != f.name} == {
            k: v for k, v in vars(plain).items() if k != f.name}


@pytest.mark.parametrize("name", CONFIGS.keys() - {"prepare"})
def test_common_options_exist_everywhere(name):
    """Every script takes --seed, --device and --threads."""
    assert {"seed", "device", "threads"} <= {f.name for f in fields(CONFIGS[name])}


def test_o_means_out():
    """Whoever types -o, as with most programs, names the output; every script that writes one knows both."""
    for name in ("prepare", "pretrain", "sft", "rl", "merge", "merge weights"):
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

def one_update(out: Path) -> None:
    """SFT of one update, with the signal handlers and the lock left as train() leaves them."""
    config = sft.Config(init=str(worlds.base()), data=str(worlds.data()), problems=str(worlds.sevens()),
                        out=str(out), epochs=1, batch=32, max_new=4, eval_problems=1, eval_samples=1,
                        threads=1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sft.train(config)


def test_the_lock_goes_with_the_run(tmp_path):
    """From Python, a finished or failed train() must not block the folder for the rest of the process (it
    did: the signal handler kept the Run, and with it the lock, alive)."""
    for _ in range(2):
        one_update(tmp_path / "run")


def test_training_gives_the_signal_handlers_back(tmp_path):
    """After train() in a notebook Ctrl-C must stop the next cell, not announce 'stopping after this step'."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    one_update(tmp_path / "run")
    assert {s: signal.getsignal(s) for s in before} == before


def test_another_configuration_is_refused(tmp_path):
    """Resuming with another option would be neither run; the line names option and values."""
    free(Run(Config(str(tmp_path / "run"))))
    with pytest.raises(UserError) as error:
        Run(Config(str(tmp_path / "run"), lr=.25))
    assert all(part in str(error.value) for part in (str(tmp_path / "run"), "lr", "0.1", "0.25"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == .1
    free(Run(Config(str(tmp_path / "b"))))
    with pytest.raises(UserError, match="steps"):
        Run(Config(str(tmp_path / "b"), steps=(1, 3)))


def test_device_and_threads_may_differ_when_resuming(tmp_path):
    """A run may be resumed with other threads or on another device, and a folder may have been moved."""
    free(Run(Config(str(tmp_path / "run"))))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    Run(Config(str(tmp_path / "moved"), threads=2, device="auto"))


def test_log_sizes_are_true_after_resuming(gpt, byte_tokenizer, tmp_path):
    """Lines logged after the last state are cut off on resuming. (The next state once recorded the old,
    longer size of a file that nothing had been written to since, and resuming from it appended NUL bytes.)"""
    optimizer = torch.optim.SGD(gpt.parameters(), lr=.1)
    run = Run(Config(str(tmp_path)))
    run.log(step=1)
    run.write("kept")
    run.save_last(gpt, byte_tokenizer, [], [optimizer], 1)
    run.log(step=2)
    run.write("written after the state was saved, lost in the crash")
    run = resume(run, tmp_path)
    run.log(step=2)
    run.save_last(gpt, byte_tokenizer, [], [optimizer], 2)
    run = resume(run, tmp_path)
    assert (tmp_path / "samples.txt").read_bytes() == b"kept\n"
    assert worlds.lines(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]


def test_each_optimizer_gets_its_own_state_back(gpt, byte_tokenizer, tmp_path):
    """Two AdamW over the same weights, as merge.py has: one has done three updates and one none; after a
    resume each continues exactly where it was, on the weights that were saved."""
    def optimizers() -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(gpt.parameters(), lr=lr) for lr in (.1, .2)]
    run, before = Run(Config(str(tmp_path))), optimizers()
    for _ in range(3):
        give_gradient(gpt.parameters(), 1.)
        run.step(gpt, before[1], 1.)
    run.save_last(gpt, byte_tokenizer, [], before, 3)
    saved, after = copy.deepcopy(gpt.state_dict()), optimizers()
    with torch.no_grad():
        gpt.norm.zero_()
    resume(run, tmp_path).restore(gpt, *after)
    assert same_weights(gpt.state_dict(), saved)
    assert after[0].state_dict() == before[0].state_dict() and not after[0].state
    a, b = (optimizer.state_dict() for optimizer in (after[1], before[1]))
    assert a["param_groups"] == b["param_groups"] and a["state"][0]["step"] == 3
    for i, moments in b["state"].items():
        assert all(torch.equal(a["state"][i][key], moments[key]) for key in moments)


def free(run: Run) -> None:
    """Like the end of a process: the files are closed and the lock is free."""
    for f in run.files.values():
        f.close()
    run.lock.close()


def resume(run: Run, folder: Path) -> Run:
    """A crash and a second call."""
    free(run)
    run = Run(Config(str(folder)))
    assert not run.finished(folder / "final.pt", 9)
    return run


# ---- a gradient that is not finite -------------------------------------------------------------------------

def give_gradient(parameters, value: float) -> None:
    for p in parameters:
        p.grad = torch.full_like(p, value)


def test_a_step_clips_updates_and_clears(gpt, tmp_path):
    """The norm returned is that before clipping; the update is -lr · g · clip/norm; no gradient is left."""
    run, before = Run(Config(str(tmp_path))), copy.deepcopy(gpt.state_dict())
    n = sum(p.numel() for p in gpt.parameters())
    give_gradient(gpt.parameters(), 2.)
    norm = run.step(gpt, torch.optim.SGD(gpt.parameters(), lr=.5), grad_clip=1.)
    assert norm == pytest.approx(2 * n ** .5, rel=1e-5)
    assert all(p.grad is None for p in gpt.parameters())
    moved = (gpt.norm - before["norm"]).detach()
    assert torch.allclose(moved, torch.full_like(moved, -.5 / n ** .5), rtol=1e-3)
    assert run.skipped == 0 and not any(run.bad_in_a_row.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(value, gpt, tmp_path, capsys):
    """Neither weights nor moments change, the skip is counted and reported, the run continues."""
    run, optimizer = Run(Config(str(tmp_path))), torch.optim.AdamW(gpt.parameters(), lr=.1, weight_decay=.1)
    give_gradient(gpt.parameters(), 1.)
    run.step(gpt, optimizer, 1.)
    before = copy.deepcopy((gpt.state_dict(), optimizer.state_dict()))
    give_gradient(gpt.parameters(), 1.)
    gpt.norm.grad[3] = value
    run.step(gpt, optimizer, 1.)
    assert same_weights(gpt.state_dict(), before[0])
    for a, b in zip(optimizer.state_dict()["state"].values(), before[1]["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in b)
    assert all(p.grad is None for p in gpt.parameters())
    assert run.skipped == 1
    assert "not finite" in capsys.readouterr().err


def test_three_bad_gradients_in_a_row_end_the_run(gpt, tmp_path):
    """Two bad gradients are forgiven when a good one follows; the third in a row ends the run, weights
    untouched."""
    run, optimizer = Run(Config(str(tmp_path))), torch.optim.SGD(gpt.parameters(), lr=.1)

    def step(value: float) -> None:
        give_gradient(gpt.parameters(), value)
        run.step(gpt, optimizer, 1.)
    nan = float("nan")
    for value in (nan, nan, 1., nan, nan):
        step(value)
    before = copy.deepcopy(gpt.state_dict())
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        step(nan)
    assert same_weights(gpt.state_dict(), before)
    assert run.skipped == 5


def test_bad_gradients_are_counted_across_a_resume(gpt, byte_tokenizer, tmp_path):
    """Killing and resuming a run forgives nothing: two bad gradients, a resume and a third one end it."""
    run, optimizer = Run(Config(str(tmp_path))), torch.optim.SGD(gpt.parameters(), lr=.1)
    for _ in range(2):
        give_gradient(gpt.parameters(), float("nan"))
        run.step(gpt, optimizer, 1.)
    run.save_last(gpt, byte_tokenizer, [], [optimizer], 2)
    run = resume(run, tmp_path)
    run.restore(gpt, optimizer)
    assert run.skipped == 2
    give_gradient(gpt.parameters(), float("nan"))
    with pytest.raises(UserError):
        run.step(gpt, optimizer, 1.)


def test_log_lines_are_json_even_with_nan(tmp_path, monkeypatch):
    """A line with NaN is not JSON: jq and JavaScript refuse it. Every line must be read by a strict
    reader."""
    real = sft.sft_gradient

    def poisoned(gpt, *args):
        figures = real(gpt, *args)
        if not calls:
            gpt.norm.grad[0] = float("nan")
            figures["loss"] = float("nan")
        calls.append(1)
        return figures
    calls = []
    monkeypatch.setattr(sft, "sft_gradient", poisoned)
    short_run("sft", tmp_path / "run")

    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
