"""The course: what is handed out holds no solution, and a grade is neither given away nor lost."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import worlds

import rl
from checkpoint import UserError
from course import curves, experiments, grade, handout, leaderboard, make
from course.functions import FUNCTIONS, ROOT, blank, definition
from merge import Config as MergeConfig
from merge import parallel_round
from model import GPT, Cache, ModelConfig

NAMES = [f.name for f in FUNCTIONS]
KEY = json.loads(grade.KEY.read_bytes())
ENDS = [sum(f.part <= part for f in FUNCTIONS) for part in range(6)]
STAGES = [0, *range(len(NAMES) + 1)] if worlds.LONG else [0, *ENDS]      # each function, or each assignment


def copy_of(folder: Path, only: list[str] = ()) -> Path:
    """A student's copy without these functions (none named: without all)."""
    worlds.quietly(make.write, make.Config((str(folder),), tuple(only)))
    return folder


def graded(copy: Path, **options) -> dict:
    """grade.py's result, as its JSON file has it."""
    out = copy.parent / "result.json"
    with pytest.raises(SystemExit) as stop:
        worlds.quietly(grade.grade, grade.Config((str(copy),), json=str(out), **options))
    result = json.loads(out.read_text())
    assert stop.value.code == (result["score"] < sum(row["max_score"] for row in result["tests"]))
    return result


# ---- the copy --------------------------------------------------------------------------------------------
def outcomes(folder: Path, functions: tuple) -> dict[str, set[str]]:
    """Test of these functions -> the outcome of its cases in a folder, and why they failed."""
    tests = [f"tests/{test}" for f in functions for test in f.tests]
    options = "-m pytest -q -n 0 -rfEp --tb=line -p no:cacheprovider".split()
    done = subprocess.run([sys.executable, *options, *tests], cwd=folder, capture_output=True, text=True,
                          env=worlds.environment(COLUMNS="500"))
    found: dict[str, set[str]] = {test: set() for test in tests}
    for status, test, why in re.findall(r"^([A-Z]+) (tests/\S+?)(?:\[.*\])?(?: - (.*))?$", done.stdout, re.M):
        found[test].add(f"{status} {why}".strip())
    return found


@pytest.mark.parametrize("before, done", list(pairwise(STAGES)))
def test_a_student_works_down_the_list(before, done, tmp_path):
    """With the first `done` functions written, the tests of the newest pass and those of all others fail for
    want of a body: no test needs a function that comes later, none passes without any."""
    copy = copy_of(tmp_path / "copy", NAMES[done:]) if done < len(NAMES) else ROOT
    for test, found in outcomes(copy, FUNCTIONS[before:]).items():
        newest = any(test == f"tests/{name}" for f in FUNCTIONS[before:done] for name in f.tests)
        assert found == {"PASSED" if newest else "FAILED NotImplementedError"}, test


def test_the_copy_holds_no_solution(tmp_path):
    """No body of a function to write (rl.reward's one line aside), no key, history, cache or maker; all else
    is unchanged."""
    copy = copy_of(tmp_path / "copy")
    files = [path for path in copy.rglob("*") if path.is_file()]
    names = {str(path.relative_to(copy)) for path in files}
    assert not [name for name in names if re.search(r"\.git|pycache|key|make\.py|test_course", name)]
    texts = {name: (copy / name).read_text() for name in names if not name.endswith((".png", ".pt"))}
    for f in FUNCTIONS:
        source = (ROOT / f.name.split("::")[0]).read_text()
        node = definition(source, f.name.split("::")[1])
        solution = "\n".join(source.split("\n")[node.body[1].lineno - 1:node.end_lineno])
        found = [name for name, text in texts.items() if solution in text]
        assert not found or f.name == "rl.py::reward", (f.name, found)
    changed = {name: text.count("raise NotImplementedError\n") for name, text in texts.items()
               if name != "course/answers.json" and text != (ROOT / name).read_text()}
    assert changed == Counter(name.split("::")[0] for name in NAMES)
    assert json.loads(texts["course/answers.json"]) == dict.fromkeys(KEY)


def test_every_picture_and_link_of_the_copy_is_there(tmp_path):
    """README.md's and the handout's, and those of the pages that they lead to; the maker and key aside."""
    copy = copy_of(tmp_path / "copy")
    for page in copy.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            there = (page.parent / target).exists()
            assert there or not (ROOT / page.relative_to(copy).parent / target).exists(), (page.name, target)
    assert (copy / "results/main/main.png").read_bytes() == (ROOT / "results/main/main.png").read_bytes()


SOURCE = '''def f(a,
      b=2):
    """Doc,\u2028
    more."""
    # why
    return (a +
            b)   # sum


class A:
    def f(self):
        x = 1

        return x

    y = 3
'''


@pytest.mark.parametrize("name, body", [("f", "    return (a +\n            b)   # sum\n"),
                                        ("A.f", "        x = 1\n\n        return x\n")])
def test_only_the_body_goes(name, body):
    """Signature, docstring, the comment above the body and another function of that name stay."""
    left = body[:len(body) - len(body.lstrip())] + "raise NotImplementedError\n"
    assert blank(SOURCE, name) == SOURCE.replace(body, left)


@pytest.mark.parametrize("folder, only, line", [
    ("", (), "exists already"), ("new", ("rl.py::loss",), "rl.py::loss.*not an exercise")])
def test_what_cannot_be_written_is_refused(folder, only, line, tmp_path):
    """An existing folder may hold a student's work."""
    with pytest.raises(UserError, match=line):
        make.write(make.Config((str(tmp_path / folder),), only))


# ---- grades ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("written", [[], *([name] for name in NAMES), NAMES],
                         ids=["nothing", *NAMES, "everything"])
def test_each_function_has_its_own_points(written, tmp_path, monkeypatch):
    """One alone brings its points and no others, all bring all, with the key 100. Without EARLYBIRD_LONG no
    test is run: the graded file must be the teacher's."""
    if not worlds.LONG:
        monkeypatch.setattr(grade, "run_tests", lambda source, f, c:
                            "" if source == (ROOT / f.name.split("::")[0]).read_text() else "another file")
    copy = copy_of(tmp_path / "copy", [name for name in NAMES if name not in written] or NAMES[:1])
    if written == NAMES:
        (copy / "data/tokenizer.py").write_text((ROOT / "data/tokenizer.py").read_text())
        (copy / "course/answers.json").write_text(json.dumps(KEY))
    result = graded(copy)
    expected = {f"{f.part} {f.name}": f.points for f in FUNCTIONS if f.name in written}
    assert {row["name"]: row["score"] for row in result["tests"] if row["score"] and row["name"][0].isdigit()
            } == expected
    assert result["score"] == (100 if written == NAMES else sum(expected.values()))


RIGHT = "    d = reference_logp - logp\n    return torch.expm1(d) - d\n"


@pytest.mark.parametrize("code, why", [
    ("    return reference_logp - logp\n", "test_kl_k3_values.*: assert"),
    ("    return helper(reference_logp - logp)\n\n\ndef helper(d):\n    return torch.expm1(d) - d\n", ""),
    ("    while True:\n        pass\n", "stopped after 9 s"),
    (RIGHT + "\n\nimport os\nos._exit(0)\n", "did not end"),
    (RIGHT + "\n\nunknown\n", "NameError"),
    ("    return (\n", "not Python"),
    ("    pass\n\n\nkl_k3 = None\n\n\nclass kl_k3:\n    pass\n", "is no function")])
def test_what_goes_wrong_costs_its_own_points(code, why, tmp_path):
    """A student's file is only ever run in another process, by the teacher's tests."""
    copy = copy_of(tmp_path / "copy", ["rl.py::kl_k3"])
    marker = tmp_path / "marker"
    first = f"__import__('pathlib').Path({str(marker)!r}).write_text(str(__import__('os').getpid()))\n"
    source = (copy / "rl.py").read_text().replace("    raise NotImplementedError\n", code)
    (copy / "rl.py").write_text(source + "\n\n" + first)
    (copy / "tests/test_grpo.py").write_text("def test_kl_k3_values():\n    pass\n")
    options = dict(limit=9 if "stop" in why else 200, junit=str(tmp_path / "xml"))
    row, = graded(copy, only=("rl.py::kl_k3",), **options)["tests"]
    assert (row["score"] == 2) == (why == "") and re.search(why or "^$", row["output"]), row
    if marker.exists():
        assert int(marker.read_text()) != os.getpid()
    assert (tmp_path / "xml/rl.kl_k3.xml").exists() == (why in ("", "NameError") or "assert" in why)


@pytest.mark.parametrize("text, right", [
    ("{}", 0), ("[1", 0), ("[]", 0), (None, 0), ('{"parameters": true}', 0), ('{"parameters": "542304"}', 0),
    ('{"parameters": 542304}', 1), ('{"parameters": 547000}', 1), ('{"parameters": 549000}', 0),
    ('{"parameters": NaN, "moments": 1' + 400 * "0" + "}", 0), ('{"parameters": [1]}', 0)])
def test_an_answer_may_be_off_by_a_hundredth(text, right, tmp_path):
    """And an answers.json that is damaged or missing has no points, but stops nothing."""
    (tmp_path / "course").mkdir()
    if text is not None:
        (tmp_path / "course/answers.json").write_text(text)
    rows = worlds.quietly(grade.grade_answers, tmp_path)
    assert [row["score"] for row in rows].count(2) == right and len(rows) == len(KEY)


@pytest.mark.parametrize("folders, only, line", [
    (("a", "b"), (), "2 folders"), (("none",), (), "not a copy"),
    ((str(ROOT),), ("rl.py::loss",), "must be of")])
def test_what_cannot_be_graded_is_refused(folders, only, line):
    """In one line that says what would be right."""
    with pytest.raises(UserError, match=line):
        grade.grade(grade.Config(folders, only))


# ---- the handout -----------------------------------------------------------------------------------------
def test_the_key_is_what_the_code_gives():
    """Each answer from the model, its cache, the optimizer or an enumeration."""
    model = GPT(ModelConfig(*[512, 512, 256, 96, 4, 3, 256]))
    n = sum(p.numel() for p in model.parameters())
    cache = Cache(model.config, torch.zeros(1024, dtype=torch.long), 128)
    for layer in range(4):
        cache.store(layer, *torch.zeros(2, 1024, 3, 128, 32))
    cache_bytes = sum(x.nbytes for x in cache.keys_values)
    groups = [rl.signal_probability([1.] * 5_000 + [0.] * 95_000, group) for group in (16, 4)]
    w = torch.nn.Linear(1, 1, bias=False)
    start, c = w.weight.item(), MergeConfig()
    steps = [torch.optim.AdamW(w.parameters(), lr, weight_decay=0) for lr in (c.lr_rl, c.lr_sft)]

    def arm(optimizer):
        w.weight.grad = torch.ones(1, 1)
        optimizer.step()
    parallel_round(w, [lambda h, o=o: arm(o) for o in steps], [c.weight_rl, 1 - c.weight_rl])
    assert KEY == pytest.approx({
        "parameters": n, "cache_mib": cache_bytes / 2 ** 20, "start_loss": np.log(512),
        "flops_token": model.flops_per_token(256), "flops_run": 3 * model.flops_per_token(256) * 8e6,
        "pass_8": 1 - math.comb(60, 8) / math.comb(64, 8), "guess_32": 1 - .995 ** 32,
        "problems": (1.96 * .5 / .03) ** 2, "signal_16": groups[0], "signal_4": groups[1],
        "advantage": float(rl.advantages(torch.eye(16)[:1]).max()), "moments": 2 * 2 * n * 4,
        "first_step": start - w.weight.item()}, rel=2e-3)


def test_the_handout_says_what_the_tables_say():
    """Its generated tables are up to date; it names every answer and the options of every arm."""
    text = handout.HANDOUT.read_text()
    measured = json.loads(experiments.RANGES.read_text()) if experiments.RANGES.exists() else {}
    assert handout.handout(text, measured) == text
    for part, (first, last) in enumerate(pairwise(ENDS), 1):
        section = text.partition(f"\n## {part}. ")[2].partition("\n## ")[0]
        points = sum(f.points for f in FUNCTIONS[first:last]) + 2 * section.count("\n- `")
        assert re.search(rf"\| {part} \| [\w ]+ \| {points} \| 10 \|", text) and NAMES[first] in section
        for name, e in experiments.EXPERIMENTS.items():
            assert (f"experiments.py {name}`" in section) == (e.part == part)
            arms = {f"`{options}`" for options in e.arms.values()} - {"``"}
            assert e.part != part or all(arm in " ".join(section.split()) for arm in arms)
    assert re.findall("\n- `(.*?)`", text) == list(KEY)


# ---- experiments and leaderboard -------------------------------------------------------------------------
FAST = ("--n-problems 2 --rollouts 4 --max-new 8 --eval-problems 1 --eval-samples 1 --steps 2 --threads 1 "
        f"--problem-file {worlds.sevens()}")


def test_experiments_write_numbers_a_figure_and_ranges(tmp_path, monkeypatch, capsys):
    """Without a baseline the advantage is the reward, so the share of signals is that of rewards. The table
    has mean ± 15.6 standard deviations of two seeds."""
    e = experiments.EXPERIMENTS["baseline"]._replace(options=FAST, numbers=("reward", "signal", "general"))
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"baseline": e})
    monkeypatch.setattr(experiments, "RANGES", tmp_path / "ranges.json")
    monkeypatch.setattr(handout, "EXPERIMENTS", {"baseline": e})
    places = map(str, (worlds.parrot(), worlds.data(), tmp_path))
    experiments.run(experiments.Config(("all",), (0, 1), *places))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("with", 0), ("with", 1), ("without", 0), ("without", 1)]
    assert all(row["signal"] == row["reward"] for row in rows[2:]) and (tmp_path / "baseline.png").exists()
    table = handout.ranges("baseline", json.loads((tmp_path / "ranges.json").read_text()))
    a, b = (row["reward"] for row in rows[:2])
    assert table[2].startswith(f"| with | {(a + b) / 2:.3g} ± {15.6 * abs(a - b) / 2 ** .5:.2g} |")


def test_the_page_of_curves_has_each_command_and_figure():
    page = (ROOT / "course/curves.md").read_text("utf-8")
    for name, (base, options) in curves.RUNS.items():
        assert f"python rl.py --init results/bases/{base}.pt {options} --out runs/{name}\n" in page
        assert f"](curves/{name}.png)" in page and (ROOT / f"course/curves/{name}.png").is_file()


def test_a_curve_is_drawn_from_its_run(tmp_path, monkeypatch):
    """From a base of the project, again without training; an unknown name is refused."""
    base = tmp_path / "results/bases/3M.pt"
    base.parent.mkdir(parents=True)
    shutil.copy(worlds.parrot(), base)
    monkeypatch.setattr(curves, "ROOT", tmp_path)
    monkeypatch.setattr(curves, "RUNS", {"short": ("3M", FAST)})
    c = curves.Config(("short",), str(worlds.data()), str(tmp_path / "runs"), str(tmp_path / "out"))
    worlds.quietly(curves.run, c)
    figure = (tmp_path / "out/short.png").read_bytes()
    monkeypatch.setattr(rl, "collect", None)
    worlds.quietly(curves.run, c)
    assert (tmp_path / "out/short.png").read_bytes() == figure and len(figure) > 5_000
    with pytest.raises(UserError, match="long: must be of short"):
        curves.run(curves.Config(("long",)))


def test_the_points_of_a_curve_are_means_of_ten_steps():
    lines = [{"step": step, "right": step / 2} for step in range(1, 16)] + [{"step": 15, "val_pass@1": .5}]
    assert [list(x) for x in curves.smooth(lines, "right")] == [[5.5, 13], [2.75, 6.5]]
    assert [list(x) for x in curves.smooth(lines, "val_pass@1")] == [[15], [.5]]


def test_the_leaderboard_reruns_and_ranks(tmp_path, capsys):
    """A run that is stopped counts as far as it came; one that does not start, leaves no checkpoint or brings
    another model has 0 and a reason. The score is the share of sound answers."""
    commands = {"stopped": "python rl.py --init {init} --data {data} --seed {seed} --out {out} "
                           f"{FAST} --save-every 1 --steps 9999",
                "shell": "rm -rf {out}", "idle": "python -c pass",
                "foreign": f"python -c \"import os, shutil; os.mkdir('{{out}}'); "
                           f"shutil.copy('{worlds.base()}', '{{out}}/final.pt')\""}
    for name, command in commands.items():
        copy_of(tmp_path / name, NAMES[:1])
        (tmp_path / name / "data/tokenizer.py").write_text((ROOT / "data/tokenizer.py").read_text())
        (tmp_path / name / "course/submission.txt").write_text(command + "\n")
    leaderboard.run(leaderboard.Config(tuple(str(tmp_path / name) for name in commands), str(worlds.parrot()),
                                       str(worlds.data()), 7, minutes=.15, n_problems=2, n_samples=2))
    board = capsys.readouterr().out.splitlines()
    lines = {Path(line.split()[1]).name: line for line in board if "sound" in line}
    assert re.search(r"\d%\]\s*$", lines["stopped"])
    assert "begins with python" in lines["shell"] and "no checkpoint" in lines["idle"]
    assert "not grown" in lines["foreign"]
