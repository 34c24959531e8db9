"""Write a copy of the project for a course: the functions in README.md's table of exercises without bodies.

    python tests/exercises.py ../course                          all of them
    python tests/exercises.py ../course --only rl.py::kl_k3       one (or several, with commas)

Signatures and docstrings stay. The table is the only list of exercises: add a row, and there is one more.
"""
import ast
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import main, require

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("*.py", "*.md", "*.txt", "*.toml", "data/*.py", "tests/*.py")


@dataclass
class Config:
    folder: tuple[str, ...]         # new folder for the copy
    only: tuple[str, ...] = ()      # functions to blank out, as the table names them (empty: all)


def table() -> dict[str, list[str]]:
    """Function ('model.py::Block.forward') -> the tests that grade it, in the order of README.md's table."""
    section = (ROOT / "README.md").read_text().partition("\n## Exercises\n")[2].partition("\n## ")[0]
    return {name: tests.split() for name, tests in re.findall(r"\| `(\S+::\S+)` \| `(.+?)` \|", section)}


def blank(source: str, function: str) -> str:
    """Python source with `raise NotImplementedError` for the body of a function ('advantages',
    'Block.forward'); everything above its first statement stays."""
    node = ast.parse(source)
    for name in function.split("."):
        found = [x for x in node.body if getattr(x, "name", None) == name]
        require(len(found) == 1, f"README.md: {function} is in the table of exercises, but not in the code")
        node = found[0]
    first, lines = node.body[1 if ast.get_docstring(node) else 0], source.splitlines(keepends=True)
    lines[first.lineno - 1:node.end_lineno] = [" " * first.col_offset + "raise NotImplementedError\n"]
    return "".join(lines)


def write(c: Config) -> None:
    """Write the copy. UserError if the folder exists: a student's work may be in it."""
    require(len(c.folder) == 1, f"{len(c.folder)} folders given: one, please")
    out, names = Path(c.folder[0]), c.only or tuple(table())
    require(not out.exists(), f"{out}: exists already; choose another folder")
    unknown = [name for name in names if name not in table()]
    require(not unknown, f"--only {','.join(unknown)}: not in README.md's table of exercises")
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        (out / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / path.relative_to(ROOT))
    for name in names:
        file, function = name.split("::")
        (out / file).write_text(blank((out / file).read_text(), function))
    print(f"{out}: {len(names)} functions to write; README.md, \"Exercises\", names the test of each")


if __name__ == "__main__":
    main(write, Config)
