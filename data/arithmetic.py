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
from collections import Counter
from functools import cache
from itertools import accumulate
from typing import NamedTuple
from zlib import crc32

from data.teacher import WORDINGS, Wording
from data.tokenizer import EOS, Tokenizer

NAMES = ("Nora Tom Ann Ben Lena Omar Mia Sam Ivy Max Eva Leo Zoe Jack Ruth Paul Lily Hugo Rosa Dan Ella Finn "
         "Kate Adam Sara Noah Jane Karl Amy Luis Vera Mark Nina Otto Tess Rob Ida Ian Dora Hans").split()
ITEMS = "shells coins cards books pens stones apples stamps nuts beads".split()
GAINS = "finds buys gets wins".split()
LOSSES = "loses sells gives drops".split()
SMALLEST = 2            # numbers in a question: from 2 to an upper end that each question draws anew,
TOPS = (20, 50, 99)     # so that success does not come all at once in pretraining
LARGEST = 199           # no intermediate result of any solution style is larger (nor smaller than 0)
DIFFICULTY = {"easy": (1, 2), "hard": (3, 4)}          # number of operations
STYLES = {"equations": "N[+-]N=N", "words": "N (plus|minus) N is .*", "regrouped": "plus: .*",
          "tens": "N[+-]N: .*", "bare": "#### N"}      # their first lines; bare is in pretraining only


def canonical(numbers: list[int]) -> str:
    """The problem [37, 48, -20] without wording and order: gains sorted, then losses sorted: '37+48-20'.
    Addition commutes, so 'has 37, finds 48' and 'has 48, finds 37' are one problem and land in one split."""
    ordered = sorted(numbers, key=lambda n: (n < 0, abs(n)))
    return "".join(f"{n:+d}" for n in ordered).removeprefix("+")


@cache
def split_of(canonical_problem: str) -> str:
    """'pretrain' 70 %, 'train' 20 % (SFT and RL), 'val' 5 %, 'test' 5 %: by hash, the same for every seed."""
    bucket = crc32(canonical_problem.encode()) % 20
    return "val" if bucket == 0 else "test" if bucket == 1 else "train" if bucket < 6 else "pretrain"


def facts(text: str) -> list[str]:
    """Canonical form of every single sum or difference that a text spells out ('37+48', '85 minus 20')."""
    text = text.replace(" plus ", "+").replace(" minus ", "-")
    return [canonical([int(a), int(b)]) for a, b in re.findall(r"([0-9]+)(?=([+-][0-9]+))", text)]


def chain(numbers: list[int]) -> list[tuple[int, int, int]]:
    """The steps from left to right: a number, what is added to it, the result."""
    results = list(accumulate(numbers))
    return list(zip(results, numbers[1:], results[1:]))


def equations(numbers: list[int], between: str) -> str:
    return between.join(f"{a}{n:+d}={result}" for a, n, result in chain(numbers))


def solve(numbers: list[int]) -> dict[str, str]:
    """Style -> complete solution, final line '#### answer' included. No two are the same text."""
    answer = sum(numbers)
    # regrouped: add up all gains (largest first), then all losses, then one subtraction
    gains = sorted((n for n in numbers if n > 0), reverse=True)
    losses = sorted((-n for n in numbers if n < 0), reverse=True)
    regrouped = f"plus: {equations(gains, ' ') or gains[0]}"
    if losses:
        regrouped += f"\nminus: {equations(losses, ' ') or losses[0]}"
        regrouped += f"\n{sum(gains)}-{sum(losses)}={answer}"

    words = []
    tens = []
    for a, n, result in chain(numbers):
        words.append(f"{a} {'plus' if n > 0 else 'minus'} {abs(n)} is {result}.")
        middle = a + int(n / 10) * 10            # '37+48: 77, 85' adds 40, then 8
        tens.append(f"{a}{n:+d}: {result}" if middle in (a, result) else f"{a}{n:+d}: {middle}, {result}")
    bodies = {"equations": equations(numbers, "\n"), "words": " ".join(words), "regrouped": regrouped,
              "tens": "\n".join(tens)}
    return {style: f"{body}\n#### {answer}" for style, body in bodies.items()}


def teach(numbers: list[int], wording: Wording) -> str:
    """The solution in a teacher's wording, steps from left to right."""
    steps = []
    for a, n, c in chain(numbers):
        step = wording.gain if n > 0 else wording.loss
        steps.append(step.format(a=a, b=abs(n), c=c))
    opening = wording.opening.format(a=numbers[0])
    body = wording.between.join(steps)
    return f"{opening}{body}{wording.closing}\n#### {sum(numbers)}"


def style_of(completion: str) -> str:
    """Which of STYLES (or 'other') a completion is written in: the inverse of `solve`."""
    first = completion.split("\n")[0]
    for style, pattern in STYLES.items():
        if re.fullmatch(pattern.replace("N", "[0-9]+"), first):
            return style
    return "other"


def style_shares(completions: list[str]) -> dict[str, float]:
    """Style -> the share of completions that are written in it."""
    counts = Counter(map(style_of, completions))
    return {style: n / len(completions) for style, n in sorted(counts.items())}


# ---- the verifier ----------------------------------------------------------------------------------------
ANSWER = r"-?(?:0|[1-9][0-9]*)"      # the form of an answer (ASCII digits only)
ANSWER_IS = "an integer such as 12 or -3"


def grade(completion: str, answer: str, finished: bool = True) -> str:
    """'right', 'wrong' or 'unparsed' for the text before the first EOS.

    Parsed means: it ends in exactly one line '#### N', N having the form ANSWER, and '####' occurs nowhere
    else. Answers are compared as text: no eval, no int() of a model's text, no tolerance. A completion cut
    off before its EOS counts only if the line is complete, that is, ended by a newline."""
    text, eos, _ = completion.partition(EOS)
    end = r"\n?" if finished or eos else r"\n"
    match = re.fullmatch(rf"(?:[\s\S]*\n)?#### ({ANSWER}){end}", text)
    if not match or text.count("####") != 1:
        return "unparsed"
    return "right" if match[1] == answer else "wrong"


def read_answer(tokenizer: Tokenizer, ids: list[int], finished: bool, answer: str) -> tuple[str, str]:
    """(text, grade) of sampled ids. EOS spelled out in ordinary bytes ends nothing: that is no answer."""
    text = tokenizer.decode(ids[:-1] if finished else ids)
    return text, "unparsed" if EOS in text else grade(text, answer, finished)


# ---- soundness -------------------------------------------------------------------------------------------
# the forms of a step from {a} by {b} to {c} in the native styles; by tens it may name a middle {m}
NATIVE = {
    "{a}+{b}={c}": 1,
    "{a}-{b}={c}": -1,
    "{a} plus {b} is {c}": 1,
    "{a} minus {b} is {c}": -1,
    "{a}+{b}: {m}, {c}": 1,
    "{a}-{b}: {m}, {c}": -1,
    "{a}+{b}: {c}": 1,
    "{a}-{b}: {c}": -1,
}


class Step(NamedTuple):
    a: int | None       # None: it goes on from the result before
    b: int              # with its sign
    c: int
    middle: int | None

    def is_true(self, before: int | None) -> bool:
        """a + b = c, and the middle is reached by the tens of b alone, or by its ones alone."""
        a = before if self.a is None else self.a
        if a is None or a + self.b != self.c:
            return False
        tens = int(self.b / 10) * 10
        return self.middle in (None, a + tens, self.c - tens)


@cache
def step_forms() -> list[tuple[re.Pattern, int]]:
    """(pattern with groups a, b, c, m; sign) of every form of a step, native ones and a teacher's."""
    forms = dict(NATIVE)
    for wordings in WORDINGS.values():
        for wording in wordings:
            forms |= {wording.gain: 1, wording.loss: -1}
    number = r"(?P<\1>0|[1-9][0-9]*)"
    before = r"(?<![\w+=*/.-])"          # no part of something longer: 1+15+5=20, 15+5=20.5
    after = r"(?![\w+=*/-]|\.\w)"
    patterns = []
    for form, sign in forms.items():
        pattern = re.sub(r"\\{(.)\\}", number, re.escape(form))
        patterns.append((re.compile(before + pattern + after), sign))
    return patterns


def read_steps(text: str) -> tuple[list[Step], list[str]]:
    """(steps of a text in their order, the texts before, between and after them). Where two forms fit, the
    one that begins first and is longest counts."""
    found = []
    for pattern, sign in step_forms():
        for match in pattern.finditer(text):
            found.append((match.start(), -match.end(), sign, match))
    found.sort(key=lambda x: x[:2])

    steps = []
    outside = []
    end = 0
    for start, minus_stop, sign, match in found:
        if start >= end:
            groups = {name: int(digits) for name, digits in match.groupdict().items()}
            steps.append(Step(groups.get("a"), sign * groups["b"], groups["c"], groups.get("m")))
            outside.append(text[end:start])
            end = -minus_stop
    return steps, [*outside, text[end:]]


def numbers_of(question: str) -> list[int]:
    """The signed numbers of a question of ours, [37, 48, -20]; none of another question."""
    signs = dict.fromkeys(["has", *GAINS], 1) | dict.fromkeys(LOSSES, -1)
    numbers = []
    for verb, n in re.findall(r" (\w+) ([0-9]+)", question):
        if verb not in signs:
            return []
        numbers.append(signs[verb] * int(n))
    return numbers


def leads(terms: list[int], steps: list[Step], before: int | None, answer: int) -> bool:
    """Whether the steps, in this order, make the answer of the signed terms: each takes two terms away and
    puts its result in their place. Losses may be added up too: 12 and 8 lost are 20 lost."""
    if not steps:
        return terms == [answer]
    step, *rest = steps
    if not step.is_true(before):
        return False
    a = step.c - step.b
    ways = [(a, step.b, step.c)]
    if step.b > 0:
        ways.append((-a, -step.b, -step.c))
    for x, y, result in ways:
        left = Counter(terms)
        left.subtract((x, y))
        possible = min(left.values()) >= 0
        if possible and leads([*left.elements(), result], rest, step.c, answer):
            return True
    return False


def sound(problem: dict, text: str) -> bool:
    """Whether an answer is right *and* derived: every step of the text is true, takes numbers of the question
    (each once, with its sign) or earlier results, and the last one makes the answer; no other number is
    mentioned. In any style and any valid order. False for a bare answer, and for problems of other kinds."""
    terms = numbers_of(problem["question"])
    if not terms or str(sum(terms)) != problem["answer"] or grade(text, problem["answer"]) != "right":
        return False
    text = text.partition(EOS)[0].rpartition("####")[0]
    for sign, n in re.findall("(plus|minus): ([0-9]+)(?![0-9+])", text):  # regrouped, with nothing to add up
        if (int(n) if sign == "plus" else -int(n)) not in terms:
            return False
    steps, outside = read_steps(text)
    if any(re.search("[0-9] *([-+*/=]|plus|minus)|([-+*/=]|plus|minus) *[0-9]", part) for part in outside):
        return False                             # a statement that is no step
    known = {str(abs(n)) for n in terms} | {str(step.c) for step in steps}
    mentioned = [re.findall("[0-9]+", part) for part in outside]
    if not steps or not known.issuperset(sum(mentioned, [])):
        return False
    start = int(mentioned[0][-1]) if mentioned[0] else None              # "from 15 ..."
    return leads(terms, steps, start, sum(terms))


# ---- random problems and documents ------------------------------------------------------------------------
def draw_problem(rng: random.Random, difficulty: str, split: str) -> dict:
    """One random problem of a split: {"question", "answer", "solutions": {style: text}, "difficulty",
    "split", "canonical"}. No pretrain or train problem begins with a val or test problem, and none of its
    solutions spells one out as a step."""
    while True:
        top = rng.choice(TOPS)
        numbers = [rng.randint(SMALLEST, top)]
        for _ in range(rng.choice(DIFFICULTY[difficulty])):
            numbers.append(rng.choice((1, -1)) * rng.randint(SMALLEST, top))
        gained = sum(n for n in numbers if n > 0)
        key = canonical(numbers)
        if min(accumulate(numbers)) < 0 or gained > LARGEST or split_of(key) != split:
            continue
        solutions = solve(numbers)
        told = [canonical(numbers[:n]) for n in range(2, len(numbers))]
        told += facts("\n".join(solutions.values()))
        tells_held_out = any(split_of(problem) in ("val", "test") for problem in told)
        if split in ("pretrain", "train") and tells_held_out:
            continue
        name = rng.choice(NAMES)
        item = rng.choice(ITEMS)
        sentences = [f"{name} {rng.choice(GAINS if n > 0 else LOSSES)} {abs(n)}." for n in numbers[1:]]
        question = f"{name} has {numbers[0]} {item}. {' '.join(sentences)} How many {item}?"
        return {"question": question, "answer": str(sum(numbers)), "solutions": solutions,
                "difficulty": difficulty, "split": split, "canonical": key}


def draw_document(rng: random.Random, hard_fraction: float, split: str = "pretrain") -> list[str]:
    """A pretraining document: one to four question-and-solution texts in a row, all in one style, so that
    few-shot prompts are in the training distribution. The caller appends EOS to each text."""
    style = rng.choices(list(STYLES), weights=(25, 25, 15, 20, 15))[0]
    n = rng.choices(range(1, 5), weights=(70, 10, 10, 10))[0]
    texts = []
    for _ in range(n):
        difficulty = "hard" if rng.random() < hard_fraction else "easy"
        problem = draw_problem(rng, difficulty, split)
        solution = f"#### {problem['answer']}" if style == "bare" else problem["solutions"][style]
        texts.append(f"{problem['question']}\n{solution}")
    return texts
