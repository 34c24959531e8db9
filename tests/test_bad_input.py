"""Bad input: one clear line that names the file or the option, a non-zero exit, and nothing lost or
half-written. Values are tried on every field of every Config, by the domain that its comment declares; bad
files on every script that reads such a file; the rest is listed row by row."""
import ast
import errno
import functools
import gzip
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import typing
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import worlds

import ranks
from checkpoint import UserError, check_fields, help_texts, load_model, parse, save_checkpoint
from data.arithmetic import grade, style_of
from model import GPT

TRAINING = ("--data {data} --out {out} --threads 1 --eval-problems 1 --eval-samples 1 --max-new 4 "
            "--problem-file {bad}/good.jsonl --init {base} ")
QUICK = {   # command -> options with which it ends soon if it is not refused; later arguments win
    "data/prepare.py": "--out {out} --tokens 2000 --val-tokens 500 --train-problems 5 --eval-problems 2 "
                       "--benchmark-items 3 --vocab-size 270",
    "pretrain.py": "--data {data} --out {out} --threads 1 --size 0.3M --context 32 --batch 2 --micro-batch 2 "
                   "--tokens 64 --checkpoints-at 64",
    "sft.py": TRAINING + "--epochs 1 --teacher native",
    "rl.py": TRAINING + "--steps 1 --n-problems 2 --rollouts 2",
    "merge.py": TRAINING + "--steps 1 --n-problems 2 --rollouts 2 --batch 2 --teacher native",
    "merge.py weights": "--threads 1 --out {out}/merged.pt",
    "evaluate.py": "--data {data} --threads 1 --n-problems 1 --n-samples 2 --k 1 --max-new 4 --no-benchmarks",
    "sample.py": "--data {data} --threads 1 --n-problems 1 --n-samples 2 --max-new 4"}
COPIES = {"merge.py weights": 2, "evaluate.py": 1, "sample.py": 1, "beyond/convert.py": 3}   # files named
WIDTH = 16          # of the model in {base}
TRAINERS = [*QUICK][1:5]
OTHERS = [name for name in ("study.py", "beyond/memory.py", "beyond/convert.py")
          if (worlds.ROOT / name).exists()]


@functools.cache
def base() -> Path:
    """A checkpoint of a model so small that hundreds of calls load it in a moment."""
    model, tokenizer, lineage = load_model(worlds.base())
    path = worlds.folder() / "tiny" / "base.pt"
    path.parent.mkdir()
    config = replace(model.config, d_model=WIDTH, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=16)
    save_checkpoint(path, GPT(config), tokenizer, lineage)
    return path


@pytest.fixture(scope="module", autouse=True)
def scripts_are_parsed_once():
    """The help texts are read from a script's source: by its first call here, not by each of a thousand."""
    with mock.patch("ast.parse", functools.cache(ast.parse)):
        yield


def argv_of(command: str, arguments: str, bad: Path | str, tmp_path: Path) -> list[str]:
    """A command with its options in QUICK and these arguments, in which {base} and the like are paths."""
    return f"{command} {QUICK.get(command, '')} {arguments}".format(
        bad=bad, base=base(), data=worlds.data(), other=worlds.other_data(), sevens=worlds.sevens(),
        out=tmp_path / "out").split()


def run(command: str, arguments: str, bad: Path, tmp_path: Path) -> worlds.Outcome:
    return worlds.run_here(*argv_of(command, arguments, bad, tmp_path))


def assert_refused(outcome: worlds.Outcome, *names: object) -> None:
    """Status 2 and one line with these names in it, and nothing in it that a terminal would obey."""
    assert outcome.status == 2 and len(outcome.errors) == 1 and outcome.errors[0].isprintable(), outcome
    for name in (": error: ", *names):
        assert str(name) in outcome.errors[0]


# ---- values: every field of every Config -------------------------------------------------------------------

def config_of(command: str) -> type:
    module = importlib.import_module(command.split(".")[0].replace("/", "."))
    return module.WeightsConfig if command == "merge.py weights" else module.Config


def inside(domain: str, x) -> bool:
    """Python reads the domain: '>= 0, <= 1' is 'x >= 0 and x <= 1'."""
    if domain.startswith("one of "):
        return x in domain[len("one of "):].split(", ")
    return not domain or math.isfinite(x) and eval("x " + domain.replace(",", " and x"))


def edges(kind: type, domain: str) -> list:
    """The words that a domain lists; or its bounds and their neighbours."""
    if domain.startswith("one of "):
        return domain[len("one of "):].split(", ")
    bounds = [kind(part.split()[1]) for part in domain.split(", ") if domain]
    step = 1 if kind is int else .125
    return [value for bound in bounds for value in (bound - step, bound, bound + step)]


def refusal(command: str, /, **values) -> str:
    """What check_fields says of a Config with these values (and two checkpoints for what has no default)."""
    cls = config_of(command)
    given = {f.name: ("a.pt", "b.pt") for f in fields(cls) if f.default is MISSING}
    try:
        check_fields(cls(**given | values))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("command, name", [(command, f.name) for command in [*QUICK, *OTHERS]
                                           for f in fields(config_of(command))])
def test_every_field_keeps_to_its_domain(command, name, bad, tmp_path):
    """Each number's comment begins with its domain. Values inside are accepted; 0, -1, NaN, infinity, a word,
    other types, both sides of every bound elsewhere: one line with option, value and domain (or type)."""
    option = "--" + name.replace("_", "-")
    hint = typing.get_type_hints(config_of(command))[name]
    many = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if many else hint
    domain, colon, _ = help_texts(config_of(command))[name].partition(":")
    domain = domain if colon and domain.startswith((">", "<", "one of ")) else ""
    assert domain or kind not in (int, float)
    for value in [0, -1, 2.5, math.nan, math.inf, "x", True, None, *edges(kind, domain)]:
        right_type = type(value) in ((int, float) if kind is float else (kind,))
        good = "a.pt" if kind is str else 1
        said = refusal(command, **{name: (good, value) if many else value})
        if right_type and inside(domain, value):
            assert said == ""
            continue
        assert f"{option} {value}:" in said and (domain if right_type else kind.__name__) in said
        typed = f"{good},{value}" if many else value
        if value is not None and (kind is not str or domain):    # any other text is a good path, for example
            copies = "{base} " * COPIES.get(command, 0)
            outcome = run(command, f"{copies} {option}={typed}", bad, tmp_path)
            assert_refused(outcome, option)
            assert str(value) in outcome.errors[0] or str(float(value)) in outcome.errors[0]
    assert not many or option in refusal(command, **{name: 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command, accepted, refused", [
    ("rl.py", dict(rollouts=2, kl=0, warmup=0), dict(rollouts=1, temperature=0, lr=0)),
    ("merge.py", dict(lr_rl=0, lr_sft=0, weight_rl=1), dict(rollouts=1, weight_rl=1.1, inner=0)),
    ("merge.py weights", dict(weights=(2, -1), factor=-1), dict(density=0, weights=(.5, math.nan))),
    ("evaluate.py", dict(shots=0), dict(temperature=0, k=(1, 0), split="train")),
    ("sample.py", dict(temperature=0), dict(temperature=-.1)),
    ("data/prepare.py", dict(vocab_size=260, math_fraction=0), dict(vocab_size=259, text_share=0)),
    ("pretrain.py", dict(decay=1, checkpoints_at=()), dict(decay=1.5, size="2M", threads=5000))])
def test_domains_that_are_easily_lost(command, accepted, refused):
    """Facts that comments might lose: a group of one has no advantage, weights may be negative, ..."""
    assert refusal(command, **accepted) == ""
    assert all(refusal(command, **{name: value}) for name, value in refused.items())


@pytest.mark.parametrize("command, former, now, value", [
    *[(command, "--questions 5", "n_train", 5) for command in TRAINERS[1:]],
    *[(command, "--problems a", "problem_file", "a") for command in (*TRAINERS[1:], "evaluate.py")],
    ("sft.py", "--no-decay", "decay", 0.0)])
def test_former_options_still_work(command, former, now, value):
    """Commands that were published still mean the same; --help shows the new name only."""
    config = parse(config_of(command), ["a.pt"] * COPIES.get(command, 0) + former.split())
    assert getattr(config, now) == value != getattr(config_of(command), now)
    shown = worlds.run_here(command, "--help").out
    assert f"--{now.replace('_', '-')} X" in shown and former.split()[0] not in shown


# ---- bad files ---------------------------------------------------------------------------------------------

def line(**changes) -> str:
    """A line of a problem file; ... takes a key away."""
    good = {"question": "What is 1 plus 2?", "answer": "3", "solutions": ["1+2=3\n#### 3"],
            "difficulty": "easy"}
    return json.dumps({k: v for k, v in (good | changes).items() if v is not ...})


BROKEN = {      # file name -> second line of a problem file, of no use to anybody
    "broken": line()[:40], "not_json": "hello", "array": "[1, 2]", "number": "12", "null": "null",
    "deep": "[" * 100_000, "bad_utf8": '{"question": "What is \udcff?", "answer": "3"}',
    "empty_answer": line(answer=""), "word_answer": line(answer="twelve"), "float_answer": line(answer="3.0"),
    "padded_answer": line(answer="03"), "plus_answer": line(answer="+3"), "int_answer": line(answer=3),
    "underscore_answer": line(answer="1_2"), "fullwidth_answer": line(answer="３"),
    "newline_answer": line(answer="3\n"), "null_answer": line(answer=None), "no_answer": line(answer=...),
    "no_question": line(question=...), "blank_question": line(question="  \n"),
    "list_question": line(question=["What"]), "surrogate": line(question="What is \ud800?"),
    "list_difficulty": line(difficulty=["easy"]), "number_difficulty": line(difficulty=1)}
UNSOLVED = {    # of no use to SFT
    "no_solutions": line(solutions=...), "empty_solutions": line(solutions=[]),
    "text_solutions": line(solutions="#### 3"), "number_solution": line(solutions=[3]),
    "wrong_solution": line(solutions=["1+2=4\n#### 4"]), "two_answers": line(solutions=["#### 3\n#### 3"]),
    "surrogate_solution": line(solutions=["\udfff\n#### 3"])}
UNFIT = {"good": line(), "long_question": line(question="What is 1 plus 2? " * 99),
         "val_problem": line(split="val"), "test_problem": line(split="test")}
TEXTS = {       # file name -> content of a file for --text
    "little.txt": b"One sentence.", "blank.txt": b"\n \n<|endoftext|>\n", "latin.txt": b"caf\xe9\n" * 9,
    "half.txt.gz": gzip.compress(bytes(range(128)) * 9)[:-20], "plain.txt.gz": b"not compressed"}
TEXT_LINES = {"array": "[1]", "key": '{"txt": "x"}', "number": '{"text": 3}', "null": "null",
              "surrogate": '{"text": "\\ud800"}', "half": '{"text": "x'}
STAGE = {"script": "x.py", "config": {"seed": 0}, "tokens": 1, "updates": 1, "flops": 1, "seconds": 1.0}
FORGED = {      # file name -> a place in a good checkpoint, and what is put there (... takes it away)
    "nan": ("model norm", torch.full((WIDTH,), math.nan)), "less": ("model norm", ...),
    "inf": ("model norm", torch.full((WIDTH,), math.inf)), "more": ("model bias", torch.ones(7)),
    "minus_inf": ("model norm", torch.full((WIDTH,), -math.inf)),
    "shape": ("model norm", torch.ones(7)), "text_weight": ("model norm", "ones"),
    "format": ("format", "earlybird checkpoint 0"), "config_extra": ("config colour", "red"),
    **{f"no_{key}": (key, ...) for key in ("model", "config", "tokenizer", "lineage")},
    "lineage": ("lineage", [{"script": "pretrain.py"}]), "lineage_text": ("lineage", "pretrain"),
    **{f"lineage_{key}": ("lineage", [STAGE | {key: value}]) for key, value in (
        ("tokens", "many"), ("config", "x"), ("script", 5), ("merged", 5), ("flops", torch.ones(1)))},
    "escape_config": ("config \x1b[31mred", 1), "escape_weight": ("model \x1b[2J\x9b1m", torch.ones(7)),
    "config_text": ("config n_layers", "five"), "config_heads": ("config n_heads", 3),
    "config_context": ("config context", -1), "config_vocab": ("config n_vocab", 400),
    "tokenizer_less": ("tokenizer merges", [[97, 98]]), "tokenizer_text": ("tokenizer", "gpt2"),
    "tokenizer_pattern": ("tokenizer pattern", "("),
    "tokenizer_future": ("tokenizer merges", [[600, 601]] * 254),
    "tokenizer_twice": ("tokenizer merges", [[97, 98]] * 254)}
UNRELATED = {   # good alone, but with another context or another tokenizer than the base checkpoint
    "context": ("config context", 64), "tokenizer_other": ("tokenizer merges", [[i, i] for i in range(254)])}
NO_CHECKPOINTS = ["absent", "empty", "half", "short", "text", "json", "flipped", "foreign", "list", "module",
                  "evil", "old_evil", *FORGED]
DATA = {        # data folder -> the file in which something is wrong, and how it came about: see spoil
    "d_flipped": ("train.bin", .3), "d_empty_shard": ("train.bin", b""),
    "d_flipped_general": ("val_general.bin", .5), "d_flipped_arithmetic": ("val_arithmetic.bin", .7),
    "d_flipped_train": ("train.jsonl", .6), "d_flipped_val": ("val.jsonl", .4),
    "d_truncated": ("val_general.bin", 1_001), "d_no_shard": ("val_arithmetic.bin", None),
    "d_no_tokenizer": ("tokenizer.json", None),
    "d_tokenizer": ("tokenizer.json", lambda: worlds.other_data() / "tokenizer.json"),
    "d_tokenizer_list": ("tokenizer.json", b"[]"), "d_tokenizer_utf8": ("tokenizer.json", b"\xff\xfe"),
    "d_tokenizer_merges": ("tokenizer.json", b'{"pattern": "x", "merges": 5}'),
    "d_no_manifest": ("manifest.json", None), "d_manifest_text": ("manifest.json", b"hello"),
    "d_manifest_null": ("manifest.json", b'{"sha256": null}'),
    "d_manifest_deep": ("manifest.json", b"[" * 100_000),
    "d_manifest_dtype": ("manifest.json", ('"uint16"', '"object"')),
    "d_manifest_general": ("manifest.json", ('"val_general.bin"', '"part.bin"')),
    "d_manifest_list": ("manifest.json", b"[1, 2]"), "d_manifest_utf8": ("manifest.json", b'{"a": "\xff"}'),
    "d_manifest_sha256": ("manifest.json", ('"sha256"', '"sums"')),
    "d_manifest_shards": ("manifest.json", ('"shards"', '"pieces"')),
    "d_manifest_train": ("manifest.json", ('"train.bin"', '"part.bin"')),
    # still well-formed afterwards: only a checksum can tell
    "d_train_problem": ("train.jsonl", ("How many", "How meny")), "d_no_val": ("val.jsonl", None),
    "d_val_problem": ("val.jsonl", ("How many", "How meny")), "d_no_benchmark": ("benchmarks.jsonl", None),
    "d_benchmark": ("benchmarks.jsonl", ('"answer": 1', '"answer": 0')),
    "d_benchmark_text": ("benchmarks.jsonl", b"hello\n")}
RUNS = {        # likewise a run folder of pretrain.py
    "r_config_text": ("config.json", b"hello"), "r_config_list": ("config.json", b"[]"),
    "r_last_half": ("last.pt", 100_000), "r_last_flipped": ("last.pt", .7),
    "r_last_foreign": ("last.pt", base)}


def spoil(path: Path, how) -> None:
    """Remove a file (None), cut it to a size (int), flip a bit at this fraction of it (float), or put there
    other content (bytes), another file (a function returns its path), or one text for another."""
    raw = bytearray(path.read_bytes())
    if how is None:
        return path.unlink()
    elif callable(how):
        raw = how().read_bytes()
    elif isinstance(how, int):
        del raw[how:]
    elif isinstance(how, float):
        raw[int(how * len(raw))] ^= 4
    else:
        raw = how if isinstance(how, bytes) else raw.decode().replace(*how, 1).encode()
    path.write_bytes(raw)


class Evil:
    """Unpickling this creates a file: code in a checkpoint."""

    def __reduce__(self):
        return open, (str(worlds.folder() / "bad" / "evil-ran"), "w")


@pytest.fixture(scope="module")
def bad() -> Path:
    """A folder of bad files, one fault each."""
    folder = worlds.folder() / "bad"
    (folder / "folder").mkdir(parents=True)
    files = {"folder/keep.txt": "mine", "file": "not a folder", "nothing.jsonl": "",
             "blank.jsonl": "\n \n\n", "empty.pt": "", "text.pt": "weights, honestly\n", "json.pt": "{}"}
    for name, text in TEXT_LINES.items():
        files[f"text_{name}.jsonl"] = f'{{"text": "One sentence."}}\n{text}\n'
    for name, text in (BROKEN | UNSOLVED | UNFIT).items():
        files[f"{name}.jsonl"] = f"{line()}\n{text}\n{line()}"
    for name, text in (files | TEXTS).items():
        raw = text if isinstance(text, bytes) else text.encode(errors="surrogateescape")
        (folder / name).write_bytes(raw)

    size = base().stat().st_size
    for name, how in {"half": size // 2, "short": size - 10, "flipped": .5}.items():
        spoil(Path(shutil.copy(base(), folder / f"{name}.pt")), how)
    torch.save(Evil(), folder / "old_evil.pt", _use_new_zipfile_serialization=False)
    for name, content in {"evil": {"format": "earlybird checkpoint 1", "model": Evil()}, "list": [1, 2],
                          "foreign": {"weights": torch.zeros(3)}, "module": torch.nn.Linear(2, 2)}.items():
        torch.save(content, folder / f"{name}.pt")
    for name, (place, value) in (FORGED | UNRELATED).items():
        forged = torch.load(base(), weights_only=True)
        *outer, key = place.split()
        part = functools.reduce(dict.get, outer, forged)
        part[key] = value
        if value is ...:
            del part[key]
        torch.save(forged, folder / f"{name}.pt")
    assert run("pretrain.py", f"--out {folder / 'r_whole'}", folder, folder).status == 0
    for name, (file, how) in (DATA | RUNS).items():
        whole = folder / "r_whole" if name in RUNS else worlds.data()
        spoil(Path(shutil.copytree(whole, folder / name)) / file, how)
    return folder


# ---- the table ---------------------------------------------------------------------------------------------

ALL = [(command, "{base} " * COPIES.get(command, 0)) for command in QUICK]
PREPARE, PRETRAIN, SFT, RL, MERGE = ([pair] for pair in ALL[:5])
READ_CHECKPOINTS = [
    ("sample.py", ""), ("sample.py", "{base}"), ("evaluate.py", ""), ("evaluate.py", "{base}"),
    ("evaluate.py", "{base} --reference"), ("merge.py weights", "{base}"), ("sft.py", "--init"),
    ("merge.py weights", "{base} {base} --base"), ("rl.py", "--init"), ("merge.py", "--init")]
READ_DATA = [*PRETRAIN, ("evaluate.py", "{base}")]
READ_VAL = [("sample.py", "{base} {base} --n-problems 3"), *SFT, *RL, *MERGE]
READ_PROBLEMS = [("evaluate.py", "{base} --n-problems 3"), *READ_VAL]


def rows(readers: list[tuple[str, str]], arguments: str, names, expected: str) -> list:
    """(command, arguments, texts in the line, with & between them): every name, for X, and every reader."""
    return [(command, f"{before} {arguments}".replace("X", name), expected.replace("X", name))
            for command, before in readers for name in names]


def folders(readers: list[tuple[str, str]], option: str, kinds: dict, file: str = "") -> list:
    """Likewise every folder in which something is wrong with `file`."""
    return [row for name, (damaged, _) in kinds.items() if file in damaged
            for row in rows(readers, f"{option} {{bad}}/X", [name], f"X & {damaged}")]


ROWS = [
    *rows(READ_CHECKPOINTS, "{bad}/X.pt", NO_CHECKPOINTS, "X.pt"),
    *rows(READ_CHECKPOINTS, "{bad}/folder", [""], "folder"),
    *rows(READ_PROBLEMS, "--problem-file {bad}/X.jsonl", BROKEN, "X.jsonl, line 2"),
    *rows(SFT + MERGE, "--problem-file {bad}/X.jsonl", UNSOLVED, "X.jsonl, line 2"),
    *rows(READ_PROBLEMS, "--problem-file {bad}/X", ("absent", "folder", "nothing.jsonl", "blank.jsonl"), "X"),
    *rows(READ_PROBLEMS, "--problem-file {base}", [""], "line 1"),
    *rows(READ_PROBLEMS, "--problem-file {bad}/long_question.jsonl", [""], "context"),
    *rows(SFT + RL + MERGE, "--problem-file {bad}/X_problem.jsonl", ("val", "test"), "X_problem.jsonl"),
    *folders(READ_DATA, "--data", DATA), *folders(READ_VAL, "--data", DATA, "val.jsonl"),
    *folders(SFT + RL + MERGE, "--problem-file= --data", DATA, "train.jsonl"),
    *rows(READ_VAL, "--data {bad}/d_manifest_X", ("text", "list", "utf8"), "d_manifest_X/manifest.json"),
    *rows(READ_PROBLEMS, "--problem-file {bad}/d_manifest_X/train.jsonl", ("text", "list", "null", "deep"),
          "d_manifest_X/manifest.json"),
    *rows(READ_DATA + READ_VAL, "--data {bad}/X", ("nowhere", "file"), "X"),
    *folders(PRETRAIN, "--out", RUNS), *folders(SFT + RL + MERGE, "--out", dict([*RUNS.items()][:-1])),
    *rows(SFT + RL + MERGE, "--out {bad}/X", ("r_whole", "r_last_foreign"), "another configuration"),
    *rows(PRETRAIN + SFT + RL + MERGE, "--out {bad}/file", [""], "file"),
    *rows(ALL[:6], "--out /sys/earlybird/out.pt", [""] * Path("/sys/kernel").is_dir(), "/sys/earlybird"),
    *rows(ALL, "X", ("--colour", "--see 3", "--seed", "--no-seed"), "X"),
    *rows(ALL[1:], "--device X", ("toaster", "meta"), "--device X"),
    *rows(SFT + RL + MERGE, "X", ("--max-new 126", "--checkpoints-at 999", "--init="), "--"),
    *rows(SFT + RL + MERGE, "--difficulty hard", [""], "hard"),
    *rows(PREPARE, "--text {bad}/X", ("none.txt", "folder", *[*TEXTS][2:]), "X"),
    *rows(PREPARE, "--text {bad}/text_X.jsonl", TEXT_LINES, "text_X.jsonl, line 2"),
    *rows(PREPARE, "--text {bad}/X.txt", ("little", "blank"), "not for 2000"),
    *rows(PREPARE, "--problems {bad}/X.jsonl", (
        "broken not_json array null deep bad_utf8 int_answer no_answer no_question blank_question surrogate "
        "list_question text_solutions number_solution wrong_solution two_answers val_problem test_problem"
    ).split(), "X.jsonl, line 2"),
    *rows(PREPARE, "--problems {bad}/X.jsonl", ("nothing", "none"), "X.jsonl"),
    *rows(PREPARE, "--tokenizer {bad}/X", ("half.pt", "none.pt", "tokenizer_text.pt"), "X"),
    *rows(PREPARE, "--tokenizer {bad}/X/tokenizer.json", ("d_tokenizer_list", "d_tokenizer_utf8"), "X"),
    *rows(PREPARE, "--out {bad}/d_manifest_X", ("text", "list", "null", "deep"), "X"),
    *rows(PREPARE, "--out {bad}/X", ("folder", "file"), "X"),
]
for command, pairs in {     # arguments: text that the line must contain, "" for the arguments themselves
    "data/prepare.py": {
        "--tokens": "", f"--tokens {'9' * 400}": "--tokens", "--benchmark-items 400": "--benchmark-items",
        "stray": "", "--problems a,b,c": "", "--problems {bad}/file,{bad}/file": "two different ones",
        "--problems {bad}/good.jsonl": "no problem is left", "--out {data} --seed 3": "seed",
        "--out {bad}/file/d": "bad/file", "--text {bad}/file": "must end in .txt",
        "--tokenizer klingon": ""},
    "pretrain.py": {
        "--context 9999": "", "--batch 4 --micro-batch 3": "--micro-batch 3", "--compile yes": "yes",
        "--checkpoints-at 32,65": "--checkpoints-at 65",
        "--out {bad}/r_whole --lr 0.25": "r_whole/config.json: & lr: 0.003 there, 0.25 asked",
        "--out {bad}/r_whole --checkpoints-at 32,64": "r_whole & checkpoints_at: [64] there, [32, 64] asked"},
    "sft.py": {"--gold maybe": "maybe"},
    "rl.py": {"--n-problems 3 --updates 2": "--updates 2", "--no-reference --kl 1": "--no-reference"},
    "merge.py": {
        "--gold maybe": "maybe", "--inner 2": "", "--inner 2 --steps 4 --checkpoints-at 3": "--inner 2",
        "--inner 2 --steps 4 --mode fused": "--inner 2"},
    "merge.py weights": {
        "": "checkpoints", "{base}": "one checkpoint", "{base} {bad}/context.pt": "context.pt",
        "{base} {bad}/tokenizer_other.pt": "tokenizer_other.pt", "{base} {base} --method task": "--base",
        "{base} {base} --base {bad}/context.pt": "context.pt", "{base} {base} --method ties": "--base",
        "{base} {base} --weights 1": "--weights", "{base} {base} --weights 1,2,3": "--weights",
        "{base} {base} --weights 1,-1": "--weights", "{base} {base} --weights 0,0": "--weights",
        "{base} {base} --out=": "--out",
        "{base} {base} --out {bad}/folder": "folder", "{base} {base} --out {bad}/file/merged.pt": "file"},
    "evaluate.py": {
        "": "checkpoints", "{base} {base} {base}": "3 checkpoints", "{base} --k 3": "--n-samples 2",
        "{base} --k=": "--k", "{base} --max-new 126": "--max-new 126", "{base} --shots 9": "context",
        "{base} --shots 9999": "--shots", "{base} --data {other}": "tokenizer",
        "{base} --reference {bad}/context.pt": "context.pt: its context is shorter",
        "{base} --reference {bad}/tokenizer_other.pt": "tokenizer_other.pt: has another tokenizer",
        "{bad}/context.pt --problem-file {bad}/good.jsonl --benchmarks": "context"},
    "sample.py": {
        "": "checkpoints", "{base} {base} {base}": "3 checkpoints", "{base} --max-new 127": "--max-new 127",
        "{bad}/nan.pt": "nan.pt: norm has values", "{bad}/inf.pt": "inf.pt: norm has values",
        "{base} {base} --max-new 126": "--max-new 126"}}.items():
    ROWS += [(command, arguments, expected or arguments) for arguments, expected in pairs.items()]


def listing(folder: Path) -> dict:
    """Path -> size and time of the last change of every file below a folder, locks aside."""
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture(scope="module")
def watched(bad) -> dict[Path, dict]:
    """Folders that no call may change, as they are at first."""
    return {folder: listing(folder) for folder in (bad, base().parent, worlds.data())}


@pytest.mark.parametrize("command, arguments, expected", ROWS,
                         ids=[f"{command} {arguments[:60]}" for command, arguments, _ in ROWS])
def test_bad_input_is_refused_in_one_line(command, arguments, expected, bad, watched, tmp_path):
    """One line names the culprit, the status is 2, no code of the input ran, no file is new or changed."""
    outcome = run(command, arguments, bad, tmp_path)
    assert_refused(outcome, f"{Path(command.split()[0]).name}: error: ", *expected.split(" & "))
    assert {folder: listing(folder) for folder in watched} == watched and listing(tmp_path) == {}


@pytest.mark.parametrize("command, copies", ALL)
def test_the_table_starts_from_good_input(command, copies, bad, tmp_path):
    """Each row changes one thing: without it the same command succeeds, so the row tests its change."""
    assert len(set(ROWS)) == len(ROWS)
    outcome = run(command, copies.format(base=shutil.copy(base(), tmp_path)), bad, tmp_path)
    assert outcome.status == 0, outcome.errors


# ---- places that cannot be written -------------------------------------------------------------------------

@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("command, copies", [pair for pair in ALL[:7] if pair[0] != "merge.py weights"])
def test_a_read_only_folder(command, copies, bad, tmp_path):
    """A read-only place is named in one line, and nothing in it changes."""
    place = tmp_path / "read_only"
    place.mkdir()
    path = shutil.copy(base(), place)
    place.chmod(0o555)
    outcome = run(command, copies.format(base=path), bad, place)
    place.chmod(0o755)
    assert_refused(outcome, "read_only")
    assert [p.name for p in place.iterdir()] == [Path(path).name]


FULL = os.strerror(errno.ENOSPC)


@contextmanager
def full_disk(after: int):
    """The disk is full once `after` checkpoints are in place: no later write can be brought to the disk."""
    real = os.fsync

    def fsync(handle):
        done = [call for call in moved.call_args_list if str(call.args[1]).endswith(".pt")]
        if len(done) >= after:
            raise OSError(errno.ENOSPC, FULL)
        real(handle)
    with mock.patch("os.replace", wraps=os.replace) as moved, mock.patch("os.fsync", fsync):
        yield


@contextmanager
def largest_file(size: int):
    """No file can grow beyond this size."""
    resource = pytest.importorskip("resource", reason="limits are of POSIX systems")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


DOZEN = {"pretrain.py": "--tokens 2k --checkpoints-at 2000", "rl.py": "--steps 12", "merge.py": "--steps 12",
         "sft.py": "--batch 1 --problem-file {sevens}"}         # options for a dozen steps and more


@pytest.mark.parametrize("script", TRAINERS)
def test_a_full_disk_costs_no_checkpoint(script, bad, tmp_path):
    """Full at the third checkpoint: one line names it, the second is whole; with room again the run ends."""
    options, out = f"{DOZEN[script]} --save-every 1", tmp_path / "out"
    with full_disk(after=2):
        outcome = run(script, options, bad, tmp_path)
    assert_refused(outcome, out, FULL)
    assert {p.name for p in out.iterdir()} == {".lock", "config.json", "last.pt", "log.jsonl", "samples.txt"}
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 2
    outcome = run(script, options, bad, tmp_path)
    assert outcome.status == 0 and "step 2" in outcome.out, outcome


@pytest.mark.parametrize("command, arguments, named, said", [
    ("merge.py weights", "{base} {base} --out HERE", "here.pt", ""),
    ("evaluate.py", "HERE", ".json", "pass@1")])
def test_a_full_disk_leaves_what_was_there(command, arguments, named, said, bad, tmp_path):
    """The old file stays; what was measured is on the screen already; one line names the file, no litter."""
    here = shutil.copy(base(), tmp_path / "here.pt")
    with full_disk(after=0):
        outcome = run(command, arguments.replace("HERE", str(here)), bad, tmp_path)
    assert_refused(outcome, named, FULL)
    assert said in outcome.out
    assert worlds.snapshot(tmp_path) == {"here.pt": base().read_bytes()}


def test_a_full_disk_leaves_no_half_data_set(bad, tmp_path):
    """A write that fails half-way leaves no folder, not even a partial one; the line names the file."""
    with largest_file(20_000):
        outcome = run("data/prepare.py", "--tokens 30_000", bad, tmp_path)
    assert_refused(outcome, "train.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script, run", [*((script, worlds.run_here) for script in TRAINERS),
                                         ("sft.py", worlds.run_process)])
def test_a_log_that_outgrows_the_disk(script, run, bad, tmp_path):
    """A log that cannot grow: one line names it (once: a process's interpreter would report the rest at its
    end); with room again it continues after its last whole line."""
    argv = argv_of(script, f"{DOZEN[script]} --save-every 1000", bad, tmp_path)
    with largest_file(1_500):
        outcome = run(*argv)
    assert_refused(outcome, ": not written")
    assert "log.jsonl" in outcome.errors[0] or "samples.txt" in outcome.errors[0]
    assert run(*argv).status == 0
    steps = [line["step"] for line in worlds.lines(tmp_path / "out" / "log.jsonl") if "skipped" in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 12


# ---- processes of their own --------------------------------------------------------------------------------

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written():
    """A table sent to a full disk must not end in success: the caller's script would continue without it."""
    with open("/dev/full", "w") as full:
        outcome = worlds.run_process("sample.py", base(), "--threads", 1, stdout=full)
    said = " ".join(outcome.errors)
    assert outcome.status != 0 and FULL in said and "Traceback" not in said


@pytest.mark.parametrize("script, arguments, expected", [
    ("rl.py", "--init none.pt", "none.pt"), ("sft.py", "--colour red", "--colour"),
    ("merge.py", "weights none.pt nothing.pt", "none.pt"),
    ("evaluate.py", "none.pt --k 32 --n-samples 8", "--n-samples 8")])
def test_real_processes_do_the_same(script, arguments, expected, tmp_path):
    """A shell sees the same as this process: status 2, one line on stderr, nothing on stdout."""
    outcome = worlds.run_process(script, *arguments.split(), cwd=tmp_path)
    assert_refused(outcome, expected)
    assert outcome.out == "" and list(tmp_path.iterdir()) == []


def test_a_typed_line_that_is_not_utf8():
    """sample.py: a pasted line that is not UTF-8 is answered or refused in a line, and the next one too."""
    argv = [sys.executable, worlds.ROOT / "sample.py", base(), "--threads", "1", "--max-new", "4"]
    done = subprocess.run(argv, input=b"caf\xe9?\nNora\n", capture_output=True, timeout=300,
                          env=worlds.environment(PYTHONIOENCODING="utf-8:strict"))
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"> ") == 3 and done.stderr == b""


# ---- and the rest ------------------------------------------------------------------------------------------

def test_an_interrupted_evaluation(bad, tmp_path):
    """Ctrl-C gives status 130, no traceback and no half-written result."""
    path = shutil.copy(base(), tmp_path)
    with mock.patch.object(ranks, "sample_together", side_effect=KeyboardInterrupt):
        outcome = run("evaluate.py", str(path), bad, tmp_path)
    assert outcome.status == 130 and outcome.errors == ["interrupted"]
    assert [p.name for p in tmp_path.iterdir()] == [Path(path).name]


def test_models_text_stays_text(tmp_path):
    """Text from a model never reaches an interpreter, a shell or a path: code is graded as text."""
    ran = tmp_path / "ran"
    evil = f"__import__('pathlib').Path('{ran}').touch() $(touch {ran}) `touch {ran}`; touch {ran}"
    for text in (evil, f"{evil}\n#### 3", f"#### {evil}", "9**9**9\n#### 9**9**9", f"#### 3\n{evil}"):
        assert grade(text, "3") == ("right" if text == f"{evil}\n#### 3" else "unparsed")
        assert style_of(text) in ("other", "bare")
    assert list(tmp_path.iterdir()) == []


def test_the_evil_checkpoints_did_not_run(bad):
    """After the whole table no pickle was executed. The instrument works: unpickling it does run."""
    assert not (bad / "evil-ran").exists()
    torch.load(bad / "old_evil.pt", weights_only=False).close()
    assert (bad / "evil-ran").exists()
