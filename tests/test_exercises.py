"""The exercises: a test fails without its function and passes as soon as that is written."""
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import exercises
import pytest
import worlds

from checkpoint import UserError

TABLE = {e.function: [f"tests/{test}" for test in e.tests] for e in exercises.EXERCISES}
NAMES = list(TABLE)


def run_tests(folder: Path, tests: list[str]) -> dict[str, set[str]]:
    """Test -> the outcome of its cases, and why they failed."""
    options = "-m pytest -q -n 0 -rfEp --tb=line -p no:cacheprovider".split()
    done = subprocess.run([sys.executable, *options, *tests], cwd=folder, capture_output=True, text=True,
                          env=worlds.environment(COLUMNS="500"))
    outcomes: dict[str, set[str]] = {}
    for status, test, why in re.findall(r"^([A-Z]+) (tests/\S+?)(?:\[.*\])?(?: - (.*))?$", done.stdout, re.M):
        outcomes.setdefault(test, set()).add(f"{status} {why}".strip())
    return outcomes


@pytest.mark.parametrize("done", range(len(NAMES) + 1))
def test_a_student_works_down_the_list(done, tmp_path):
    """The first `done` functions are written, the others blank: the last one's tests pass, and the next one's
    fail because its body is missing. So each test needs its function, and none that comes later."""
    course = exercises.ROOT
    if done < len(NAMES):
        course = tmp_path / "course"
        outcome = worlds.run_here("tests/exercises.py", course, "--only", ",".join(NAMES[done:]))
        assert outcome.status == 0, outcome.errors
    expected = {test: {"PASSED"} for name in NAMES[:done][-1:] for test in TABLE[name]}
    expected |= {test: {"FAILED NotImplementedError"} for name in NAMES[done:][:1] for test in TABLE[name]}
    assert run_tests(course, list(expected)) == expected


def test_the_list_names_every_exercise_and_its_command():
    """Title, function, seconds, command of every exercise; README.md names the same twelve in this order."""
    lines = worlds.run_here("tests/exercises.py").out.splitlines()
    assert lines[::2] == [f"{i:2d}  {e.title}: {e.function}" for i, e in enumerate(exercises.EXERCISES, 1)]
    assert [line.strip() for line in lines[1::2]] == [
        f"python -m pytest -q {' '.join(TABLE[e.function])}   # {e.seconds} s" for e in exercises.EXERCISES]
    section = (exercises.ROOT / "README.md").read_text().partition("\n## Exercises\n")[2]
    text = " ".join(section.partition("\n## ")[0].split())
    assert ", ".join(e.title for e in exercises.EXERCISES) in text and len(NAMES) == 12


SOURCE = '''def f(a,
      b=2):
    """Doc,
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
    blank = body[:len(body) - len(body.lstrip())] + "raise NotImplementedError\n"
    assert exercises.blank(SOURCE, name) == SOURCE.replace(body, blank)


def test_without_options_every_function_is_blank(tmp_path):
    """And in the other files nothing changes."""
    course = tmp_path / "course"
    exercises.write(exercises.Config((str(course),)))
    blanks = {}
    for path in course.rglob("*.*"):
        file = str(path.relative_to(course))
        old, new = ((root / file).read_text() for root in (exercises.ROOT, course))
        if new != old:
            blanks[file] = new.count("raise NotImplementedError\n") - old.count("raise NotImplementedError\n")
    assert blanks == Counter(name.split("::")[0] for name in NAMES)


@pytest.mark.parametrize("folder, only, line", [
    ("", (), "exists already"), ("new", ("rl.py::loss",), "rl.py::loss.*not an exercise")])
def test_what_cannot_be_written_is_refused(folder, only, line, tmp_path):
    """An existing folder may hold a student's work."""
    with pytest.raises(UserError, match=line):
        exercises.write(exercises.Config((str(tmp_path / folder),), only))
