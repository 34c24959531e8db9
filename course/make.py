"""Write the student's copy of the project: no bodies of the functions to write, no key, no history.

    python course/make.py ../student
    python course/make.py ../student --only rl.py::kl_k3     without this one (or several, with commas)

Signatures and docstrings stay, and so do tests, texts and pictures; course/answers.json is to be filled in.
"""
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that this file also runs as a script

from checkpoint import main, require  # noqa: E402
from course.functions import CODE, FUNCTIONS, ROOT, blank, copy_files  # noqa: E402

COPIED = (*CODE, "LICENSE", "*.md", "*.txt", "data/*.md", "beyond/*.md", "beyond/*.txt", "results/**/*.md",
          "results/**/*.png", "results/benchmark/*.json", "results/bases/*.pt", "course/*.py", "course/*.md",
          "course/*.txt", "course/curves/*.png")
KEPT_BACK = ("course/make.py", "course/handout.py", "tests/test_course.py")


@dataclass
class Config:
    folder: tuple[str, ...]         # new folder for the copy
    only: tuple[str, ...] = ()      # functions to blank out, as README.md names them (empty: all)


def write(c: Config) -> None:
    """Write the copy. UserError if the folder exists: a student's work may be in it."""
    require(len(c.folder) == 1, f"{len(c.folder)} folders given: one, please")
    out = Path(c.folder[0])
    known = [f.name for f in FUNCTIONS]
    require(not out.exists(), f"{out}: exists already; choose another folder")
    require(set(c.only) <= set(known), f"--only {','.join(c.only)}: not an exercise")
    try:
        copy_files(out, COPIED)
        for name in KEPT_BACK:
            (out / name).unlink()
        for name in c.only or known:
            file, function = name.split("::")
            (out / file).write_text(blank((out / file).read_text(), function))
        answers = dict.fromkeys(json.loads((ROOT / "course/key.json").read_bytes()))
        (out / "course/answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)   # no half copy, which might hold a solution
        raise
    print(f"{out}: {len(c.only or known)} functions to write, {len(answers)} answers; see course/README.md")


if __name__ == "__main__":
    main(write, Config)
