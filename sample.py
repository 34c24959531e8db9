"""Talk to a checkpoint, or show the answers of two checkpoints side by side.

    python sample.py runs/base/8M.pt                      its sizes and lineage, then answers to questions
    python sample.py runs/base/8M.pt runs/rl/final.pt     the same validation problems, before and after

Nothing is written.
"""
import sys
import textwrap
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, zip_longest

from checkpoint import check_fields, generator, load_model, main, printable, require, setup
from data.arithmetic import numbers_of
from data.tokenizer import EOS
from evaluate import Attempts, attempt, problems_of
from model import GPT, sample


@dataclass
class Config:
    checkpoints: tuple[str, ...]    # one to talk to, or two to show side by side
    data: str = "data/tiny"         # of two: folder made by data/prepare.py
    split: str = "val"              # one of val, test: of two, whose problems to answer
    problem_file: str = ""          # of two: problem file to use instead of DATA/SPLIT.jsonl
    n_problems: int = 5             # > 0: of two: problems of each difficulty
    n_samples: int = 64             # > 0: of two: answers to each problem; the commonest are shown
    temperature: float = 0.6        # >= 0: 0 = always the most probable token
    max_new: int = 80               # > 0: longest answer, tokens
    seed: int = 0                   # >= 0: of the sampling
    device: str = "auto"            # cpu, cuda, auto
    threads: int = 0                # >= 0, <= 4096: CPU threads, 0 = all cores


def describe(path: str, model: GPT, lineage: list[dict]) -> None:
    """Print the sizes of a checkpoint and the stages that made it."""
    m = model.config
    n = sum(p.numel() for p in model.parameters())
    core = n - 2 * m.vocab_size * m.d_model
    print(f"{path}: {n:,} parameters, {core:,} without embedding and head\n"
          f"  {m.n_layers} layers, width {m.d_model}, {m.n_heads} heads ({m.n_kv_heads} of keys and values), "
          f"feed-forward {m.d_ff}, context {m.context}, vocabulary {m.n_vocab}\n  lineage:")
    for stage in lineage:
        print(f"    {printable(stage['script'])}: {stage['tokens']:,} tokens, {stage['updates']} updates, "
              f"{stage['flops']:.2e} FLOPs, {stage['seconds'] / 60:.1f} min, "
              f"seed {stage['config'].get('seed', '-')!r}")


def talk(path: str, c: Config) -> None:
    """Answer every typed line with the model's continuation of that line."""
    model, tokenizer, lineage = load_model(path, setup(c.device, c.threads))
    room = model.config.context - c.max_new - 1          # tokens of a question
    require(room > 0, f"--max-new {c.max_new}: must be at most {model.config.context - 2}")
    describe(path, model, lineage)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    print('  type a question, such as "Nora has 37 shells. Nora finds 48. How many shells?" (end: Ctrl-D)')
    with suppress(EOFError):
        for turn in count():
            question = tokenizer.encode(input("> ") + "\n")[-room:]      # its end, if it is too long
            out = sample(model, [[tokenizer.eos, *question]], 1, c.max_new, tokenizer.eos, tokenizer.pad,
                         generator(c.seed, "chat", turn), c.temperature)
            print(tokenizer.decode(out.completions()[0]).removesuffix(EOS))


def column(path: str, attempts: Attempts, p: int, derived: bool, width: int) -> list[tuple[str, str]]:
    """(line of at most `width` columns, its grade): a model's commonest answers to problem p. If it is one
    whose derivations can be checked, a right answer is `sound` or `luck`."""
    rows = range(p * attempts.n, (p + 1) * attempts.n)
    seen = Counter()
    for row in rows:
        grade = attempts.grades[row]
        if derived and grade == "right":
            grade = "sound" if attempts.sound[row] else "luck"
        seen[grade, attempts.texts[row]] += 1
    sound = sum(attempts.sound[row] for row in rows)
    right = sum(attempts.grades[row] == "right" for row in rows)
    answers = [("", f"{path}: {right} of {attempts.n} right, {sound} sound, {len(seen)} different")]
    for (grade, text), times in seen.most_common(3):
        answers.append((grade, f"{times:4d} × {grade:8s} {text!r}".replace("\\n", "⏎ ")))
    lines = []
    for grade, answer in answers:
        for line in textwrap.wrap(answer, width, subsequent_indent=" " * 16, break_on_hyphens=False):
            lines.append((line, grade))
    return lines


def coloured(line: str, grade: str) -> str:
    """On a terminal green for a sound or right answer, yellow for luck, red for others; else plain."""
    color = {"": 0, "sound": 32, "right": 32, "luck": 33}.get(grade, 31)
    return f"\033[{color}m{line}\033[0m" if sys.stdout.isatty() and color else line


def compare(c: Config, width: int = 110) -> None:
    """Print a few problems and, side by side, the commonest answers of each checkpoint."""
    device = setup(c.device, c.threads)
    problems = sum(problems_of(c).values(), [])
    attempts = []
    for path in c.checkpoints:
        model, tokenizer, _ = load_model(path, device)
        attempts.append(attempt(model, tokenizer, problems, c.n_samples, c.temperature, c.max_new,
                                generator(c.seed, "evaluation")))

    half = (width + 4) // len(c.checkpoints) - 4
    for i, p in enumerate(problems):
        title = f"{p['question']}   ({p.get('difficulty', 'all')}, answer {p['answer']})"
        print("", *textwrap.wrap(title, width), sep="\n")
        derived = bool(numbers_of(p["question"]))
        columns = [column(path, tried, i, derived, half) for path, tried in zip(c.checkpoints, attempts)]
        for lines in zip_longest(*columns, fillvalue=("", "")):
            print("    ".join(coloured(f"{line:{half}s}", grade) for line, grade in lines).rstrip())


def run(c: Config) -> None:
    check_fields(c)
    require(len(c.checkpoints) in (1, 2),
            f"{len(c.checkpoints)} checkpoints given: one to talk to, or two to show side by side")
    if len(c.checkpoints) == 1:
        talk(c.checkpoints[0], c)
    else:
        compare(c)


if __name__ == "__main__":
    main(run, Config)
