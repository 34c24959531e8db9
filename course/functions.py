"""The functions to write, with their points, and the text surgery that blanks and grades them.

No test needs a function that comes later. Add a row, and there is one more; `python course/handout.py` brings
README.md up to date.
"""
import ast
import shutil
from pathlib import Path
from typing import NamedTuple

from checkpoint import require

ROOT = Path(__file__).resolve().parent.parent
CODE = ("*.py", "*.toml", "data/*.py", "data/*.json", "beyond/*.py", "tests/*.py", "tests/*.ini",
        "tests/beyond/*.py")


class Function(NamedTuple):
    part: int                       # assignment, from 1
    title: str
    name: str                       # FILE::FUNCTION
    points: int
    seconds: int                    # that its tests take on a CPU, with the import of PyTorch
    tests: tuple[str, ...]          # that grade it, in tests/


FUNCTIONS = (
    Function(1, "byte-level BPE", "data/tokenizer.py::train_bpe", 5, 3,
             ("test_tokenizer.py::test_merges_of_an_example_done_by_hand",
              "test_tokenizer.py::test_merges_equal_the_textbook_algorithm")),
    Function(1, "rotary positions", "model.py::rotate", 3, 3,
             ("test_model.py::test_rope_turns_an_element_with_the_one_half_a_head_further",)),
    Function(1, "attention with a cache", "model.py::Block.attend", 6, 5,
             ("test_model.py::test_logits_equal_the_equations",
              "test_sampling.py::test_prefill_in_chunks_equals_the_full_forward")),
    Function(2, "the loss of pretraining", "pretrain.py::next_token_loss", 3, 3,
             ("test_losses.py::test_pretraining_is_the_mean_over_all_tokens",)),
    Function(2, "warm-up and decay", "pretrain.py::learning_rate", 2, 3,
             ("test_losses.py::test_the_learning_rate_by_hand",)),
    Function(2, "the gradient of SFT", "sft.py::sft_gradient", 4, 3,
             ("test_losses.py::test_sft_is_the_mean_over_solution_tokens",)),
    Function(2, "sampling by inverse CDF", "model.py::inverse_cdf", 4, 3,
             ("test_sampling.py::test_the_inverse_cdf_hits_each_tokens_interval",
              "test_sampling.py::test_a_token_of_probability_zero_is_never_drawn")),
    Function(3, "the verifier", "data/arithmetic.py::grade", 4, 3,
             ("test_scoring.py::test_right_answers", "test_scoring.py::test_wrong_answers",
              "test_scoring.py::test_unparsed_answers", "test_scoring.py::test_cut_off_answers")),
    Function(3, "pass@k without bias", "evaluate.py::pass_at_k", 4, 4,
             ("test_scoring.py::test_pass_at_k_is_the_enumeration",)),
    Function(3, "the bootstrap", "evaluate.py::bootstrap_means", 4, 4,
             ("test_scoring.py::test_bootstrap_is_over_problems",
              "test_scoring.py::test_bootstrap_is_paired")),
    Function(4, "the reward", "rl.py::reward", 1, 3, ("test_losses.py::test_a_right_answer_is_worth_1",)),
    Function(4, "GRPO's advantage", "rl.py::advantages", 4, 3,
             ("test_grpo.py::test_advantage_is_the_groups_z_score",
              "test_grpo.py::test_equal_rewards_give_exactly_zero")),
    Function(4, "the clipped loss", "rl.py::policy_loss", 4, 3, ("test_grpo.py::test_clip_truth_table",)),
    Function(4, "the KL estimator k3", "rl.py::kl_k3", 2, 3,
             ("test_grpo.py::test_kl_k3_values", "test_grpo.py::test_kl_k3_of_small_differences")),
    Function(4, "the rollouts", "rl.py::collect", 6, 4,
             ("test_grpo.py::test_collect_records_what_was_sampled",
              "test_grpo.py::test_a_duplicated_problem_stays_two_groups",
              "test_grpo.py::test_truncated_answers", "test_grpo.py::test_what_is_rewarded")),
    Function(4, "the gradient of GRPO", "rl.py::policy_gradient", 7, 5,
             ("test_grpo.py::test_every_token_counts_the_same", "test_grpo.py::test_gradients_add_up",
              "test_grpo.py::test_the_ratio_weighs_and_clips",
              "test_grpo.py::test_kl_penalty_reaches_all_rows",
              "test_grpo.py::test_no_signal_leaves_no_gradient")),
    Function(5, "the parallel averaging step", "merge.py::parallel_round", 6, 6,
             ("test_merge.py::test_identical_arms_are_one_adamw",
              "test_merge.py::test_inner_updates_before_averaging",
              "test_merge.py::test_an_exception_leaves_the_snapshot")),
    Function(5, "merging (linear, task arithmetic, TIES)", "merge.py::merge_tensors", 5, 3,
             ("test_merge.py::test_linear_merging", "test_merge.py::test_task_arithmetic",
              "test_merge.py::test_ties_is_the_paper_in_loops")),
)


# ---- the text of a file ----------------------------------------------------------------------------------
def definition(source: str, name: str) -> ast.FunctionDef:
    """The last definition of `name`, such as Block.attend, in a file's text. UserError if there is none."""
    try:
        node = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        require(False, f"not Python: {error}")
    for part in name.split("."):
        found = [x for x in node.body if getattr(x, "name", None) == part]
        require(bool(found), f"{name} is not defined")
        node = found[-1]
    require(isinstance(node, ast.FunctionDef), f"{name} is no function")
    return node


def body(node: ast.FunctionDef) -> list[ast.stmt]:
    """Its statements, the docstring left out."""
    return node.body[ast.get_docstring(node) is not None:]


def blank(source: str, name: str) -> str:
    """Source with `raise NotImplementedError` for a function's body; all above its first statement stays."""
    node = definition(source, name)
    first = body(node)[0]
    lines = source.split("\n")
    lines[first.lineno - 1:node.end_lineno] = [" " * first.col_offset + "raise NotImplementedError"]
    return "\n".join(lines)


def is_blank(source: str, name: str) -> bool:
    statements = body(definition(source, name))
    return not statements or isinstance(statements[0], ast.Raise)


def graft(source: str, name: str, donor: str) -> str:
    """Source with the function as the donor's text has it."""
    old, new = definition(source, name), definition(donor, name)
    lines = source.split("\n")
    lines[old.lineno - 1:old.end_lineno] = donor.split("\n")[new.lineno - 1:new.end_lineno]
    return "\n".join(lines)


def copy_files(out: Path, patterns: tuple[str, ...]) -> None:
    """Copy the project's files that fit one of the patterns into a folder."""
    for path in (path for pattern in patterns for path in ROOT.glob(pattern)):
        place = out / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
