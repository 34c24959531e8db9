"""Twelve functions to write yourself. Makes a copy of the project for a course, in which they have no bodies.

    python tests/exercises.py                                    the list: exercise, function, test command
    python tests/exercises.py ../course                          a copy without all of them
    python tests/exercises.py ../course --only rl.py::kl_k3      without this one (or several, with commas)

Signatures and docstrings stay. To be done in the order of EXERCISES: no test needs a function that comes
later. An exercise is solved when its tests pass in the copy. Add a row to EXERCISES, and there is one more.
"""
import ast
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import main, require

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("*.py", "*.md", "*.txt", "*.toml", "data/*.py", "data/*.md", "beyond/*.py", "beyond/*.md",
          "beyond/*.txt", "tests/*.py", "tests/*.ini", "tests/beyond/*.py", "results/README.md")


class Exercise(NamedTuple):
    title: str
    function: str
    tests: tuple[str, ...]          # that grade it, in tests/
    seconds: int                    # of a CPU, with the 2 that the import of PyTorch takes


EXERCISES = (
    Exercise("byte-level BPE", "data/tokenizer.py::train_bpe",
             ("test_tokenizer.py::test_merges_of_an_example_done_by_hand",
              "test_tokenizer.py::test_merges_equal_the_textbook_algorithm"), 3),
    Exercise("rotary positions", "model.py::rotate",
             ("test_model.py::test_rope_turns_an_element_with_the_one_half_a_head_further",), 3),
    Exercise("attention with a cache", "model.py::Block.attend",
             ("test_model.py::test_logits_equal_the_equations",
              "test_sampling.py::test_prefill_in_chunks_equals_the_full_forward"), 5),
    Exercise("sampling by inverse CDF", "model.py::inverse_cdf",
             ("test_sampling.py::test_the_inverse_cdf_hits_each_tokens_interval",
              "test_sampling.py::test_a_token_of_probability_zero_is_never_drawn"), 3),
    Exercise("the reward", "data/arithmetic.py::grade",
             ("test_scoring.py::test_right_answers", "test_scoring.py::test_wrong_answers",
              "test_scoring.py::test_unparsed_answers", "test_scoring.py::test_cut_off_answers"), 3),
    Exercise("pass@k without bias", "evaluate.py::pass_at_k",
             ("test_scoring.py::test_pass_at_k_is_the_enumeration",), 4),
    Exercise("the bootstrap", "evaluate.py::bootstrap_means",
             ("test_scoring.py::test_bootstrap_is_over_problems",
              "test_scoring.py::test_bootstrap_is_paired"), 4),
    Exercise("GRPO's advantage", "rl.py::advantages",
             ("test_grpo.py::test_advantage_is_the_groups_z_score",
              "test_grpo.py::test_equal_rewards_give_exactly_zero"), 3),
    Exercise("the clipped loss", "rl.py::policy_loss", ("test_grpo.py::test_clip_truth_table",), 3),
    Exercise("the KL estimator k3", "rl.py::kl_k3",
             ("test_grpo.py::test_kl_k3_values", "test_grpo.py::test_kl_k3_of_small_differences"), 3),
    Exercise("the parallel averaging step", "merge.py::parallel_round",
             ("test_merge.py::test_identical_arms_are_one_adamw",
              "test_merge.py::test_inner_updates_before_averaging",
              "test_merge.py::test_an_exception_leaves_the_snapshot"), 6),
    Exercise("merging (linear, task arithmetic, TIES)", "merge.py::merge_tensors",
             ("test_merge.py::test_linear_merging", "test_merge.py::test_task_arithmetic",
              "test_merge.py::test_ties_is_the_paper_in_loops"), 3),
)


@dataclass
class Config:
    folder: tuple[str, ...]         # new folder for the copy
    only: tuple[str, ...] = ()      # functions to blank out, as the list names them (empty: all)


def show() -> None:
    """Print the list: number, exercise, function, and the command that grades it with its seconds."""
    for i, e in enumerate(EXERCISES, 1):
        tests = " ".join(f"tests/{test}" for test in e.tests)
        print(f"{i:2d}  {e.title}: {e.function}\n      python -m pytest -q {tests}   # {e.seconds} s")


def blank(source: str, function: str) -> str:
    """Source with `raise NotImplementedError` for a function's body; all above its first statement stays."""
    node = ast.parse(source)
    for name in function.split("."):
        node, = (x for x in node.body if getattr(x, "name", None) == name)
    first = node.body[1 if ast.get_docstring(node) else 0]
    lines = source.splitlines(keepends=True)
    lines[first.lineno - 1:node.end_lineno] = [" " * first.col_offset + "raise NotImplementedError\n"]
    return "".join(lines)


def write(c: Config) -> None:
    """Write the copy. UserError if the folder exists: a student's work may be in it."""
    require(len(c.folder) == 1, f"{len(c.folder)} folders given: one, please")
    out = Path(c.folder[0])
    known = [e.function for e in EXERCISES]
    require(not out.exists(), f"{out}: exists already; choose another folder")
    require(set(c.only) <= set(known), f"--only {','.join(c.only)}: not an exercise")
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        copy = out / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    names = c.only or known
    for name in names:
        file, function = name.split("::")
        (out / file).write_text(blank((out / file).read_text(), function))
    print(f"{out}: {len(names)} functions to write; python tests/exercises.py lists them with their tests")


if __name__ == "__main__":
    main(write, Config) if sys.argv[1:] else show()
