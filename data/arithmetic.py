"""Arithmetic word problems with several correct solutions each: the skill that RL must improve.

    Nora has 37 shells. Nora finds 48. Nora loses 20. How many shells?   <- question (prompt adds a newline)
    37+48=85                                                             <- one of four solution styles
    85-20=65
    #### 65                                                              <- the one exact form of an answer

Easy problems have 1-2 operations, hard ones 3-4. Every problem belongs to exactly one split, computed from a
hash of its canonical form, so that no list has to be kept and anyone can check any problem:
`split_of(canonical(...))`. The verifier `grade` is both the reward of rl.py and the scorer of evaluate.py.
"""
import random
import re
from functools import cache
from zlib import crc32

from data.tokenizer import EOS, Tokenizer

NAMES = ("Nora Tom Ann Ben Lena Omar Mia Sam Ivy Max Eva Leo Zoe Jack Ruth Paul Lily Hugo Rosa Dan Ella Finn "
         "Kate Adam Sara Noah Jane Karl Amy Luis Vera Mark Nina Otto Tess Rob Ida Ian Dora Hans").split()
ITEMS = "shells coins cards books pens stones apples stamps nuts beads".split()
GAINS = "finds buys gets wins".split()
LOSSES = "loses sells gives drops".split()
SMALLEST, TOPS = 2, (20, 50, 99)     # numbers in a question: from 2 to an upper end that each question draws
                                     # anew, so that success does not come all at once in pretraining
LARGEST = 199           # no intermediate result of any solution style is larger (nor smaller than 0)
DIFFICULTY = {"easy": (1, 2), "hard": (3, 4)}          # number of operations
STYLES = ("equations", "words", "regrouped", "tens")   # plus "bare" (the answer alone), in pretraining only

Operations = list[tuple[str, int]]   # of a problem: a sign and a number each
Step = tuple[int, str, int, int]     # a, sign, b, result


def canonical(start: int, operations: Operations) -> str:
    """The problem without its wording and order: gains sorted, then losses sorted, e.g. '37+48-20'.
    Addition commutes, so 'has 37, finds 48' and 'has 48, finds 37' are one problem and land in one split."""
    gains = sorted([start] + [n for sign, n in operations if sign == "+"])
    losses = sorted(n for sign, n in operations if sign == "-")
    return "+".join(map(str, gains)) + "".join(f"-{n}" for n in losses)


@cache
def split_of(canonical_problem: str) -> str:
    """'pretrain' 70 %, 'train' 20 % (SFT and RL), 'val' 5 %, 'test' 5 %: by hash, the same for every seed."""
    bucket = crc32(canonical_problem.encode()) % 20
    return "val" if bucket == 0 else "test" if bucket == 1 else "train" if bucket < 6 else "pretrain"


def facts(text: str) -> list[str]:
    """Canonical form of every single sum or difference that a text spells out ('37+48', '85 minus 20')."""
    text = text.replace(" plus ", "+").replace(" minus ", "-")
    return [canonical(int(a), [(sign, int(b))])
            for a, sign, b in re.findall(r"([0-9]+)([+-])(?=([0-9]+))", text)]


def chain(start: int, operations: Operations) -> list[Step]:
    """The steps from left to right."""
    steps = []
    for sign, n in operations:
        result = start + n if sign == "+" else start - n
        steps.append((start, sign, n, result))
        start = result
    return steps


def solve(start: int, operations: Operations) -> dict[str, str]:
    """Style -> complete solution, final line '#### answer' included. No two are the same text."""
    steps = chain(start, operations)
    answer = steps[-1][3]
    # regrouped: add up all gains (largest first), then all losses, then one subtraction
    gains = sorted([start] + [n for sign, n in operations if sign == "+"], reverse=True)
    losses = sorted((n for sign, n in operations if sign == "-"), reverse=True)

    def total(numbers: list[int]) -> list[str]:
        sums = chain(numbers[0], [("+", n) for n in numbers[1:]])
        lines = [f"{a}+{b}={c}" for a, _, b, c in sums]
        return lines or [str(numbers[0])]
    regrouped = ["plus: " + " ".join(total(gains))]
    if losses:
        regrouped += ["minus: " + " ".join(total(losses)), f"{sum(gains)}-{sum(losses)}={answer}"]

    def by_tens(a: int, sign: str, b: int, c: int) -> str:   # '37+48: 77, 85' adds 40, then 8
        middle = a + b // 10 * 10 if sign == "+" else a - b // 10 * 10
        return f"{a}{sign}{b}: {c}" if b < 10 or b % 10 == 0 else f"{a}{sign}{b}: {middle}, {c}"
    word = {"+": "plus", "-": "minus"}
    bodies = {
        "equations": "\n".join(f"{a}{sign}{b}={c}" for a, sign, b, c in steps),
        "words": " ".join(f"{a} {word[sign]} {b} is {c}." for a, sign, b, c in steps),
        "regrouped": "\n".join(regrouped),
        "tens": "\n".join(by_tens(*step) for step in steps),
    }
    return {style: f"{body}\n#### {answer}" for style, body in bodies.items()}


def style_of(completion: str) -> str:
    """Which of STYLES (or 'bare', 'other') a completion is written in: the inverse of `solve`."""
    first = completion.split("\n")[0]
    number = r"[0-9]+"
    patterns = {"bare": rf"#### {number}", "equations": rf"{number}[+-]{number}={number}",
                "words": rf"{number} (plus|minus) {number} is .*", "regrouped": r"plus: .*",
                "tens": rf"{number}[+-]{number}: .*"}
    for style, pattern in patterns.items():
        if re.fullmatch(pattern, first):
            return style
    return "other"


# ---- the verifier ----------------------------------------------------------------------------------------
ANSWER = r"-?(?:0|[1-9][0-9]*)"      # the form of an answer (ASCII digits only)
ANSWER_IS = "an integer such as 12 or -3"


def grade(completion: str, answer: str, finished: bool = True) -> str:
    """'right', 'wrong' or 'unparsed' for the text before the first EOS.

    Parsed means: it ends in exactly one line '#### N', N having the form ANSWER, and '####' occurs nowhere
    else. Answers are compared as text: no eval, no int() of a model's text, no tolerance. A completion cut
    off before its EOS counts only if the line is complete, that is, ended by a newline."""
    if EOS in completion:
        completion = completion.split(EOS)[0]
        finished = True
    match = re.fullmatch(rf"(?:[\s\S]*\n)?#### ({ANSWER})(\n?)", completion)
    if not match or completion.count("####") != 1:
        return "unparsed"
    if not finished and match[2] == "":
        return "unparsed"
    return "right" if match[1] == answer else "wrong"


def read_answer(tokenizer: Tokenizer, ids: list[int], finished: bool, answer: str) -> tuple[str, str]:
    """(text, grade) of sampled ids. EOS spelled out in ordinary bytes ends nothing: that is no answer."""
    text = tokenizer.decode(ids[:-1] if finished else ids)
    if EOS in text:
        return text, "unparsed"
    return text, grade(text, answer, finished)


# ---- random problems and documents ------------------------------------------------------------------------
def draw_problem(rng: random.Random, difficulty: str, split: str) -> dict:
    """One random problem of a split: {"question", "answer", "solutions": {style: text}, "difficulty",
    "split", "canonical"}. No pretrain or train problem begins with a val or test problem, and none of its
    solutions spells one out as a step."""
    while True:
        top = rng.choice(TOPS)
        start = rng.randint(SMALLEST, top)
        operations = [(rng.choice("+-"), rng.randint(SMALLEST, top))
                      for _ in range(rng.choice(DIFFICULTY[difficulty]))]
        results = [step[3] for step in chain(start, operations)]
        gained = start + sum(n for sign, n in operations if sign == "+")
        if min(results) < 0 or gained > LARGEST:
            continue
        key = canonical(start, operations)
        if split_of(key) != split:
            continue
        solutions = solve(start, operations)
        told = [canonical(start, operations[:n]) for n in range(1, len(operations))]
        told += [fact for text in solutions.values() for fact in facts(text)]
        tells_held_out = any(split_of(problem) in ("val", "test") for problem in told)
        if split in ("pretrain", "train") and tells_held_out:
            continue
        name, item = rng.choice(NAMES), rng.choice(ITEMS)
        sentences = [f"{name} {rng.choice(GAINS if sign == '+' else LOSSES)} {n}." for sign, n in operations]
        question = f"{name} has {start} {item}. {' '.join(sentences)} How many {item}?"
        return {"question": question, "answer": str(results[-1]), "solutions": solutions,
                "difficulty": difficulty, "split": split, "canonical": key}


def draw_document(rng: random.Random, hard_fraction: float, split: str = "pretrain") -> list[str]:
    """A pretraining document: one to four question-and-solution texts in a row, all in one style, so that
    few-shot prompts are in the training distribution. The caller appends EOS to each text."""
    style = rng.choices(STYLES + ("bare",), weights=(25, 25, 15, 20, 15))[0]
    n = rng.choices((1, 2, 3, 4), weights=(70, 10, 10, 10))[0]
    texts = []
    for _ in range(n):
        problem = draw_problem(rng, "hard" if rng.random() < hard_fraction else "easy", split)
        solution = f"#### {problem['answer']}" if style == "bare" else problem["solutions"][style]
        texts.append(f"{problem['question']}\n{solution}")
    return texts
