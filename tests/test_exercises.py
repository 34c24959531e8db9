"""The exercises of README.md: a test fails without its function and passes as soon as that is written."""
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import exercises
import pytest
import worlds

from checkpoint import UserError

TABLE = exercises.table()
NAMES = list(TABLE)


def run_tests(folder: Path, tests: list[str]) -> dict[str, set[str]]:
    """Test -> the outcome of its cases, and why they failed."""
    command = [sys.executable, "-m", "pytest", "-rfEp", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]
    out = subprocess.run(command, cwd=folder, env=worlds.environment(COLUMNS="500"), text=True,
                         capture_output=True, timeout=300).stdout
    outcomes: dict[str, set[str]] = {}
    for status, test, why in re.findall(r"^([A-Z]+) (tests/\S+?)(?:\[.*\])?(?: - (.*))?$", out, re.M):
        outcomes.setdefault(test, set()).add(f"{status} {why}".strip())
    return outcomes


@pytest.mark.parametrize("done", range(len(NAMES) + 1))
def test_a_student_works_down_the_table(done, tmp_path):
    """The first `done` functions are written, the others blank: the last one's tests pass, and the next one's
    fail because its body is missing. So each test needs its function, and none that comes later."""
    course, missing = tmp_path / "course", ",".join(NAMES[done:])
    if missing:
        outcome = worlds.run_here("tests/exercises.py", course, "--only", missing)
        assert outcome.status == 0, outcome.errors
    expected = {test: {"PASSED"} for name in NAMES[:done][-1:] for test in TABLE[name]}
    expected |= {test: {"FAILED NotImplementedError"} for name in NAMES[done:][:1] for test in TABLE[name]}
    assert run_tests(course if missing else exercises.ROOT, list(expected)) == expected


def test_every_row_of_the_table_is_an_exercise():
    """A row that the tool cannot read would be promised to students and never blanked out."""
    section = (exercises.ROOT / "README.md").read_text().split("\n## Exercises\n")[1].split("\n\n")
    rows = next(part for part in section if part.startswith("|")).splitlines()[2:]
    assert len(rows) == len(TABLE) > 9


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
    indent = " " * (len(body) - len(body.lstrip()))
    assert exercises.blank(SOURCE, name) == SOURCE.replace(body, f"{indent}raise NotImplementedError\n")


def test_without_options_every_function_is_blank(tmp_path):
    """And in the other files nothing changes."""
    exercises.write(exercises.Config((str(tmp_path / "course"),)))
    missing = Counter(name.split("::")[0] for name in NAMES)
    for path in (tmp_path / "course").rglob("*.*"):
        file, blank = str(path.relative_to(tmp_path / "course")), "raise NotImplementedError\n"
        old, new = (exercises.ROOT / file).read_text(), path.read_text()
        assert new.count(blank) - old.count(blank) == missing.pop(file, 0), file
        assert new == old or new.count(blank) > old.count(blank), file
    assert not missing


@pytest.mark.parametrize("folder, only, line", [
    ("", (), "exists already"), ("new", ("rl.py::loss",), "rl.py::loss.*table")])
def test_what_cannot_be_written_is_refused(folder, only, line, tmp_path):
    """An existing folder may hold a student's work."""
    with pytest.raises(UserError, match=line):
        exercises.write(exercises.Config((str(tmp_path / folder),), only))
