"""Grade a student's copy: the points of every function and of every answer.

    python course/grade.py ../student                a table; status 1 if a point is missing
    python course/grade.py ../student --json results.json --junit xml        Gradescope's format, JUnit XML
    python course/grade.py . --only rl.py::kl_k3     while writing, in one's own copy

Every function is graded alone: its file from the student's copy, but with the teacher's version of the others
to write, in a fresh copy of the teacher's project, by the teacher's tests. So a mistake costs its own points
only, and what a student changed elsewhere counts nothing. The student's code runs in a process with a time
limit; that guards against accidents, not against malice, so grade strangers in a container.
"""
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

from checkpoint import UserError, atomic_write, check_fields, main, printable, require  # noqa: E402
from course.functions import (  # noqa: E402
    CODE, FUNCTIONS, ROOT, Function, copy_files, definition, graft, is_blank)

KEY = ROOT / "course/key.json"      # not in the student's copy
ANSWER = 2                          # points of an answer
TOLERANCE = .01                     # of an answer, relative


@dataclass
class Config:
    copy: tuple[str, ...]           # folder of a student's copy
    only: tuple[str, ...] = ()      # functions to grade, such as rl.py::kl_k3 (empty: all, and the answers)
    json: str = ""                  # file for the result in Gradescope's format
    junit: str = ""                 # folder for pytest's JUnit XML, a file for each function
    limit: int = 180                # > 0: seconds that the tests of a function may take


def limited(command: list[str], folder: Path, log: Path, seconds: float, grace: float = 0) -> int | None:
    """Exit status of a command, whose output goes to the file `log`; None if it ran past the limit: then it
    has `grace` seconds after SIGTERM. What it started is killed with it."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as f:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=f,
                                   stderr=f, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return None
    finally:
        with suppress(OSError):                  # if none of them is left
            os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
        process.wait()


def student_file(copy: Path, f: Function) -> str:
    """The student's file of a function, the others to write in it replaced by the teacher's. UserError if it
    cannot be read, or lacks the function, or has left it blank."""
    file, function = f.name.split("::")
    try:
        source = (copy / file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error})") from None
    definition(source, function)
    require(not is_blank(source, function), "not written")
    teachers = (ROOT / file).read_text(encoding="utf-8")
    for other in FUNCTIONS:
        other_file, name = other.name.split("::")
        if other_file == file and name != function:
            with suppress(UserError):            # one that was deleted stays deleted
                source = graft(source, name, teachers)
    return source


def verdict(report: Path, tests: tuple[str, ...]) -> str:
    """Why the tests of a JUnit file have not all passed; '' if they have."""
    missing = {test.partition("::")[2] for test in tests}
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return "the tests did not end"
    for case in cases:
        for fault in case:
            if fault.tag in ("failure", "error", "skipped"):
                errors = re.findall("^E +(.+)$", fault.text or "", re.MULTILINE) or [fault.tag]
                return printable(f"{case.get('name')}: {errors[0][:80]}")
        missing.discard(case.get("name").partition("[")[0])
    return f"{min(missing)} did not run" if missing else ""


def run_tests(source: str, f: Function, c: Config) -> str:
    """Why the tests of a function have not all passed with this text of its file; '' if they have."""
    file, function = f.name.split("::")
    with TemporaryDirectory(prefix="earlybird-grade-") as temporary:
        folder = Path(temporary)
        copy_files(folder, CODE)
        (folder / file).write_text(source, encoding="utf-8")
        report = Path(c.junit or folder).absolute() / f"{Path(file).stem}.{function}.xml"
        report.unlink(missing_ok=True)
        tests = [f"tests/{test}" for test in f.tests]
        command = [sys.executable, *"-m pytest -q -n 0 -p no:cacheprovider".split(), f"--junitxml={report}"]
        status = limited([*command, *tests], folder, folder / "log", c.limit)
        if status is None:
            return f"stopped after {c.limit} s"
        return verdict(report, f.tests) or (f"pytest ended with status {status}" if status else "")


def grade_functions(copy: Path, c: Config) -> list[dict]:
    """A row with the points of every function, shown as soon as it is known."""
    rows = []
    for f in FUNCTIONS:
        if not c.only or f.name in c.only:
            try:
                why = run_tests(student_file(copy, f), f, c)
            except UserError as error:
                why = str(error)
            rows.append(row(f"{f.part} {f.name}", f.points, why))
    return rows


def grade_answers(copy: Path) -> list[dict]:
    """A row with the points of every answer in course/answers.json; none without a key."""
    key = json.loads(KEY.read_bytes()) if KEY.exists() else {}
    damaged = ""
    try:
        answers = dict(json.loads((copy / "course/answers.json").read_bytes(), parse_int=float))
    except (OSError, ValueError, TypeError, RecursionError):
        answers = {}
        damaged = "course/answers.json: missing or damaged"
    rows = []
    for name, expected in key.items():
        answer = answers.get(name)
        number = isinstance(answer, float)
        right = number and abs(answer - expected) <= TOLERANCE * expected
        rows.append(row(name, ANSWER, "" if right else damaged or ("wrong" if number else "no number")))
    return rows


def row(name: str, points: int, why: str) -> dict:
    """Print a line and return it in Gradescope's format: all points, or none because of something."""
    score = 0 if why else points
    print(f"{name:42s}{score:3d} /{points:3d}  {why}", flush=True)
    return {"name": name, "score": score, "max_score": points, "output": why}


def grade(c: Config) -> None:
    """Grade, print the table, write the files; status 1 if a point is missing."""
    check_fields(c)
    require(len(c.copy) == 1, f"{len(c.copy)} folders given: one, please")
    copy = Path(c.copy[0])
    require((copy / "model.py").is_file(), f"{copy}: not a copy of the project (it has no model.py)")
    known = [f.name for f in FUNCTIONS]
    require(set(c.only) <= set(known), f"--only {','.join(c.only)}: must be of {', '.join(known)}")
    if c.junit:
        Path(c.junit).mkdir(parents=True, exist_ok=True)
    rows = grade_functions(copy, c)
    if not c.only:
        rows += grade_answers(copy)
    score = sum(row["score"] for row in rows)
    most = sum(row["max_score"] for row in rows)
    print(f"{'total':42s}{score:3d} /{most:3d}" + "  (without the answers)" * (not KEY.exists()))
    if c.json:
        atomic_write(Path(c.json), json.dumps({"score": score, "tests": rows}, indent=1).encode())
    sys.exit(score < most)


if __name__ == "__main__":
    main(grade, Config)
