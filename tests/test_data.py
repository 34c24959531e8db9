"""The data set: right answers, disjoint splits, and the same bytes from the same seed. The texts are read
back from the written files with parsers of this file's own, not with the code that wrote them."""
import functools
import hashlib
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import worlds

from checkpoint import UserError
from data import arithmetic, prepare, world
from data.problems import prompt_ids, solved_examples
from data.teacher import WORDINGS
from data.tokenizer import EOS, Tokenizer

# ---- reading back ------------------------------------------------------------------------------------------

SIGN = dict.fromkeys("finds buys gets wins".split(), 1) | dict.fromkeys("loses sells gives drops".split(), -1)
QUESTION = re.compile(r"([A-Z][a-z]+) has ([0-9]+) ([a-z]+)\.((?: \1 [a-z]+ [0-9]+\.)+) How many \3\?")
SPLITS = ("train", "val", "test")


def parse(question: str) -> list[int]:
    """'Nora has 37 shells. Nora finds 48. Nora loses 20. How many shells?' -> [37, 48, -20]"""
    match = QUESTION.fullmatch(question)
    assert match, question
    steps = re.findall(r" [A-Z][a-z]+ ([a-z]+) ([0-9]+)\.", match[4])
    return [int(match[2]), *(SIGN[verb] * int(n) for verb, n in steps)]


def canonical(question: str) -> tuple[int, ...]:
    """All numbers of the problem with their signs, sorted: its identity, whatever wording and order."""
    return tuple(sorted(parse(question)))


def spelled_out(text: str) -> set[tuple[int, ...]]:
    """Every one-operation problem in a text: '37+48', '85 - 20', '37 plus 48', '85 minus 20'."""
    text = re.sub(r" *(plus|\+) *", "+", re.sub(r" *(minus|-) *", "-", text))
    steps = re.findall(r"(?=\b(\d+)([+-])(\d+))", text)
    return {tuple(sorted((int(a), int(sign + b)))) for a, sign, b in steps}


def beginnings(question: str) -> set[tuple[int, ...]]:
    """The problems that a reader has solved on the way: after one step, two steps, ..., all but the last."""
    numbers = parse(question)
    return {tuple(sorted(numbers[:n])) for n in range(2, len(numbers))}


EQUATION = re.compile(r"(\d+)([+-])(\d+)(?:=|: (?:(\d+), )?)(\d+)")


def is_right(solution: str, answer: str) -> bool:
    """Every equation is true, every character belongs to one, and the last line is the answer."""
    body, _, last = solution.rpartition("\n")
    for word, sign in ("plus", "+"), ("minus", "-"):
        body = re.sub(rf"(\d+) {word} (\d+) is (\d+)\.", rf"\1{sign}\2=\3", body)
    rest = re.sub(r"(plus|minus): (\d+(\n|$))?", "", EQUATION.sub("", body))
    right = last == f"#### {answer}" and not rest.strip()
    for a, sign, b, middle, result in EQUATION.findall(body):
        change = int(sign + b)
        tens = int(a) + int(change / 10) * 10                            # after the tens of b
        right &= int(result) == int(a) + change and middle in ("", str(tens))
    return right


@pytest.mark.parametrize("reader, text, seen", [
    (spelled_out, ["37+48=85\n85-20=65"], {(37, 48), (-20, 85)}),
    (spelled_out, ["37 plus 48 is 85. 85 minus 20 is 65."], {(37, 48), (-20, 85)}),
    (spelled_out, ["1+2+3"], {(1, 2), (2, 3)}),
    (beginnings, ["Al has 9 pens. Al finds 5. Al sells 3. Al buys 2. How many pens?"], {(5, 9), (-3, 5, 9)}),
    (beginnings, ["Ann has 9 pens. Ann finds 5. How many pens?"], set()),
    *((is_right, [text, "3"], False) for text in (
        "1+2=4\n#### 3", "1+2=3\n#### 4", "1 plus 2 is 4.\n#### 3", "about 3\n#### 3", "plus: 5 7\n#### 3")),
    *((is_right, [text, "3"], True) for text in (
        "1+2=3\n#### 3", "plus: 2+1=3\n#### 3", "plus: 9\nminus: 4+2=6\n9-6=3\n#### 3", "#### 3")),
    (is_right, ["12+34: 43, 46\n#### 46", "46"], False), (is_right, ["12+34: 42, 46\n#### 46", "46"], True)])
def test_the_readers_read(reader, text, seen):
    """The instruments of the tests below, on text by hand: overlapping sums are found, false text is seen."""
    assert reader(*text) == seen


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(worlds.data() / "tokenizer.json")


@functools.cache
def manifest() -> dict:
    return json.loads((worlds.data() / "manifest.json").read_text())


@functools.cache
def texts(shard: str) -> list[str]:
    return worlds.texts(tokenizer(), worlds.data() / shard)


@functools.cache
def problems(split: str) -> list[dict]:
    return worlds.lines(worlds.data() / f"{split}.jsonl")


@functools.cache
def solved(name: str) -> list[list[str]]:
    """[question, solution] of every arithmetic text of a shard, or of every solution in a split's file."""
    if name.endswith(".bin"):
        return [text.split("\n", 1) for text in texts(name) if "How many" in text]
    return [[p["question"], solution] for p in problems(name) for solution in p["solutions"]]


def canonicals(name: str) -> set[tuple[int, ...]]:
    """The problems of a split's file or of a shard."""
    return {canonical(question) for question, _ in solved(name)}


@functools.cache
def benchmarks(task: str) -> list[dict]:
    return [item for item in worlds.lines(worlds.data() / "benchmarks.jsonl") if item["task"] == task]


def choices(item: dict) -> list[str]:
    """Without their leading space and full stop."""
    return [choice.strip(" .") for choice in item["choices"]]


def right(item: dict) -> str:
    return choices(item)[item["answer"]]


def statement(item: dict) -> str:
    """The context and the right choice."""
    return item["context"] + item["choices"][item["answer"]]


def make(out: Path, **options) -> dict:
    """The manifest of a tiny data set."""
    worlds.quietly(prepare.prepare, prepare.Config(out=str(out), **worlds.TINY_OPTIONS | options))
    return json.loads((out / "manifest.json").read_text())


TASKS = ("recall", "tracking", "ending", "sequence", "agreement", "order", "dialogue")

# ---- the same bytes ----------------------------------------------------------------------------------------

def test_the_same_seed_writes_the_same_bytes(tmp_path):
    """The same options write the same bytes: by the command line, with another hash seed."""
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in (worlds.TINY_OPTIONS | {"seed": 5}).items()]
    out = tmp_path / "again"
    other_hashes = worlds.environment(PYTHONHASHSEED="77")
    outcome = worlds.run_process("data/prepare.py", "--out", out, *argv, env=other_hashes)
    assert outcome.status == 0, outcome.errors
    assert worlds.snapshot(out) == worlds.snapshot(worlds.other_data())


def test_another_seed_writes_other_bytes(tmp_path):
    """--seed reaches every file: texts, problems and benchmarks all differ."""
    make(tmp_path / "d", seed=6)
    a, b = worlds.snapshot(tmp_path / "d"), worlds.snapshot(worlds.other_data())
    assert a.keys() == b.keys()
    assert not [name for name in a if a[name] == b[name]]


def test_the_manifest_is_true():
    """The manifest has the options and the sha256 of every file, and counts that can be recounted."""
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in worlds.data().iterdir()}
    del files["manifest.json"]
    assert manifest()["sha256"] == files
    assert {k: manifest()["config"][k] for k in worlds.DATA_OPTIONS} == worlds.DATA_OPTIONS
    assert (worlds.data() / "train.bin").stat().st_size == 2 * worlds.DATA_OPTIONS["tokens"]
    files = (*SPLITS, *(f"train-{setting}" for setting in WORDINGS))
    assert manifest()["problems"] == {f"{name}.jsonl": len(problems(name)) for name in files}
    assert manifest()["benchmarks"] == {task: len(benchmarks(task)) for task in TASKS}
    assert manifest()["n_vocab"] == tokenizer().n_vocab


@pytest.mark.parametrize("setting", list(WORDINGS))
def test_a_teacher_solves_the_training_problems(setting):
    """The same problems in the same order, each with eight sound solutions; and none of their wordings stands
    in a shard, digits and names aside."""
    taught = problems(f"train-{setting}")
    assert [p["question"] for p in taught] == [p["question"] for p in problems("train")]
    shown = solved("train.bin") + solved("val_arithmetic.bin")
    seen = "".join(re.sub("[0-9]+", "0", solution) for _, solution in shown)
    for problem in taught:
        assert len(set(problem["solutions"])) == 8
        for solution in problem["solutions"]:
            assert arithmetic.sound(problem, solution)
            assert re.sub("[0-9]+", "0", solution.split("\n")[0]) not in seen


def test_a_second_call_changes_nothing(capsys):
    """The folder is complete: it says so and leaves every byte alone."""
    before = worlds.snapshot(worlds.data())
    prepare.prepare(prepare.Config(out=str(worlds.data()), **worlds.DATA_OPTIONS))
    assert "complete" in capsys.readouterr().out
    assert worlds.snapshot(worlds.data()) == before


def test_an_interrupted_call_leaves_nothing(tmp_path):
    """The folder appears when it is whole; a crash half-way leaves nothing behind."""
    with (mock.patch.object(world, "draw_benchmark", side_effect=KeyboardInterrupt),
          pytest.raises(KeyboardInterrupt)):
        make(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_calls_at_once_destroys_nothing(tmp_path):
    """Both wrote into OUT.partial, which they deleted first: each other's work, or a folder of the user's.
    Now the one that ends second says so; the first one's data set stays, as readable as any folder."""
    out, mine = tmp_path / "d", tmp_path / "d.partial" / "thesis"
    mine.parent.mkdir()
    mine.write_text("mine")
    write_all, is_first = prepare.write_all, iter((True, False))

    def write(*args) -> dict:
        if next(is_first):
            make(out, seed=5)
        return write_all(*args)
    with mock.patch.object(prepare, "write_all", write), pytest.raises(UserError, match="another process"):
        make(out, seed=6)
    assert worlds.snapshot(out) == worlds.snapshot(worlds.other_data())
    assert out.stat().st_mode == mine.parent.stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"d", "d.partial"} and mine.exists()


# ---- held-out problems -------------------------------------------------------------------------------------

@pytest.mark.parametrize("a, b", [pair for pair in itertools.combinations(
    ("train", "val", "test", "train.bin", "val_arithmetic.bin"), 2) if pair != ("val", "val_arithmetic.bin")])
def test_problem_sets_are_disjoint(a, b):
    """No two sets share a problem, whatever order or wording; val and its shard alone may."""
    assert canonicals(a) and canonicals(b) and not canonicals(a) & canonicals(b)


def test_splits_are_disjoint_beyond_these_files():
    """1,500 fresh problems of each split share none. There are about 4,900 sums of one operation and as many
    differences: a leak would show in dozens of common problems."""
    rng = random.Random(3)
    drawn = {}
    for split in ("pretrain", *SPLITS):
        fresh = [arithmetic.draw_problem(rng, "easy", split)["question"] for _ in range(1_500)]
        drawn[split] = set(map(canonical, fresh))
    for a, b in itertools.combinations(drawn, 2):
        assert not drawn[a] & drawn[b], (a, b)


def test_no_solution_spells_out_a_held_out_problem():
    """A step '37+48=85' is the problem 37+48 solved; none of val or test is given away in training."""
    held_out = {c for c in canonicals("val") | canonicals("test") if len(c) == 2}
    assert len(held_out) > 30
    training = solved("train.bin") + solved("train")
    assert not [solution for _, solution in training if spelled_out(solution) & held_out]


def test_no_training_problem_begins_with_a_held_out_problem():
    """Whoever solves 9+5-3 step by step has solved 9+5. No problem of train.bin or train.jsonl begins with
    one of val, test or the validation shard, also of more steps (9+5-3+2 was drawn, 9+5-3 being in test)."""
    held_out = canonicals("val") | canonicals("test") | canonicals("val_arithmetic.bin")
    assert min(Counter(map(len, held_out))[n] for n in (2, 3, 4)) > 30
    training = {question for question, _ in solved("train.bin") + solved("train")}
    assert sum(len(beginnings(question)) > 1 for question in training) > 200
    assert not [question for question in training if beginnings(question) & held_out]


@pytest.mark.parametrize("split", ["pretrain", "train"])
def test_no_problem_of_any_size_begins_with_a_held_out_one(split):
    """All beginnings of 400 fresh hard problems are pretrain's or train's; drawn blindly, four in five."""
    rng = random.Random(4)
    owners = Counter()
    for _ in range(400):
        for numbers in beginnings(arithmetic.draw_problem(rng, "hard", split)["question"]):
            gains = "+".join(str(n) for n in numbers if n > 0)
            losses = "".join(str(n) for n in reversed(numbers) if n < 0)
            owners[arithmetic.split_of(gains + losses)] += 1
    assert owners.keys() == {"pretrain", "train"} and min(owners.values()) > 100


def test_general_text_spells_out_no_arithmetic():
    """The general documents hold no problem, and no sum that could give one away."""
    assert solved("val_general.bin") == []
    for shard in ("train.bin", "val_general.bin"):
        general = [text.replace(" -", " ") for text in texts(shard) if "How many" not in text]
        assert general and not [text for text in general if spelled_out(text)]   # counting '5 0 -5' is no sum


def test_general_validation_documents_are_not_in_training():
    val = set(texts("val_general.bin"))
    assert len(val) > 50 and val.isdisjoint(texts("train.bin"))


# ---- arithmetic --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", SPLITS)
def test_the_problems_of_a_file(split):
    """Easy has 1-2 operations, hard 3-4; operands are 2 to 99, results 0 to 199, the answer is the last. No
    problem stands in a file twice, as the interval over problems assumes; each has four solutions or more."""
    assert len(canonicals(split)) == len({p["id"] for p in problems(split)}) == len(problems(split))
    lengths = Counter()
    signs = Counter()
    for p in problems(split):
        numbers = parse(p["question"])
        results = list(itertools.accumulate(numbers))
        assert len(numbers) - 1 in {"easy": (1, 2), "hard": (3, 4)}[p["difficulty"]]
        assert all(2 <= abs(n) <= 99 for n in numbers)
        assert 0 <= min(results) and max(results) <= 199
        assert p["answer"] == str(results[-1]) and p["split"] == split
        assert len(set(p["solutions"])) == len(p["solutions"]) >= 4
        lengths[len(numbers)] += 1
        signs.update(n > 0 for n in numbers[1:])
    assert set(lengths) == {2, 3, 4, 5} and min(lengths.values()) > .05 * len(problems(split))
    assert min(signs.values()) > .25 * sum(signs.values())


def test_the_share_of_hard_problems_is_as_asked():
    """--hard-fraction .3: exactly in train.jsonl, about in train.bin (4 standard errors); else half."""
    assert Counter(p["difficulty"] for p in problems("train")) == {"easy": 280, "hard": 120}
    for split in ("val", "test"):
        assert Counter(p["difficulty"] for p in problems(split)) == {"easy": 100, "hard": 100}
    hard = [len(parse(question)) > 3 for question, _ in solved("train.bin")]
    assert sum(hard) / len(hard) == pytest.approx(.3, abs=4 * (.3 * .7 / len(hard)) ** .5)


@pytest.mark.parametrize("name, least", [
    ("train", 1_600), ("val", 800), ("test", 800), ("train.bin", 600), ("val_arithmetic.bin", 80)])
def test_every_solution_is_right(name, least):
    """Every equation is true and the last line is the answer recomputed, in problem files and shards. The
    parser above reads every question, and there are enough for the tests of held-out problems."""
    assert len(solved(name)) >= least
    for question, solution in solved(name):
        assert is_right(solution, str(sum(canonical(question)))), solution


def test_style_of_inverts_solve():
    """Evaluation counts the styles a model uses; every solution is recognized as the style of its writing."""
    rng = random.Random(0)
    for _ in range(300):
        p = arithmetic.draw_problem(rng, rng.choice(("easy", "hard")), "train")
        for style, text in p["solutions"].items():
            assert arithmetic.style_of(text) == style
    assert arithmetic.style_of("#### 12") == "bare"
    assert [arithmetic.style_of(text) for text in ("", "hello", "12", "37+48")] == ["other"] * 4


def test_styles_in_pretraining_and_in_problem_files():
    """Each style has a share of pretraining, or RL could never find it; bare answers are not in SFT."""
    styles = Counter(arithmetic.style_of(solution) for _, solution in solved("train.bin"))
    assert set(styles) == {*arithmetic.STYLES, "bare"} and .05 < styles["bare"] / styles.total() < .3
    assert min(styles.values()) > .08 * styles.total()
    assert not [s for split in SPLITS for _, s in solved(split) if s.startswith("####")]


def test_documents_with_several_questions_occur():
    """Few-shot prompts are in the training distribution. There are more questions than documents, and
    neighbours agree in style far more often than strangers would (about .22 of the .26 in arithmetic)."""
    documents = manifest()["shards"]["train.bin"]["arithmetic"]["documents"]
    assert len(solved("train.bin")) > 1.3 * documents
    style = [arithmetic.style_of(text.split("\n", 1)[1]) if "How many" in text else None
             for text in texts("train.bin")]
    followed = [a == b for a, b in zip(style, style[1:]) if a]
    assert sum(followed) / len(followed) > .25


def test_between_two_texts_there_is_eos_alone():
    """Between two texts of a document stands EOS and nothing else, as in the prompts of evaluate --shots."""
    ids = np.fromfile(worlds.data() / "train.bin", "<u2").tolist()
    after = Counter(tokenizer().decode([b]) for a, b in zip(ids, ids[1:]) if a == tokenizer().eos)
    assert after and not [token for token in after if token[:1].isspace() or token == EOS]


def test_a_few_shot_prompt_looks_like_pretraining():
    """The prompt of evaluate --shots is EOS, text, EOS, text, EOS, question: id for id as in a document of
    several questions, although prompt and solution are encoded apart. The examples share a style."""
    problem, styles = problems("val")[0], set()
    for seed in range(8):
        ids = solved_examples(tokenizer(), str(worlds.data()), 3, seed) + prompt_ids(tokenizer(), problem)
        assert ids[0] == tokenizer().eos and ids.count(tokenizer().eos) == 4
        *examples, question = tokenizer().decode(ids).split(EOS)[1:]
        assert question == problem["question"] + "\n"
        again = [[tokenizer().eos, *tokenizer().encode(text)] for text in (*examples, question)]
        assert ids == sum(again, [])
        (style,) = {arithmetic.style_of(text.split("\n", 1)[1]) for text in examples}
        styles.add(style)
    assert len(styles) > 1


# ---- mixture -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fraction", [.3, .6, 0., 1.])
def test_the_mixture_is_as_asked(fraction, tmp_path):
    """--math-fraction is a share of tokens, kept within one point."""
    make(tmp_path / "d", tokens=30_000, math_fraction=fraction)
    own = Tokenizer.load(tmp_path / "d" / "tokenizer.json")
    size = Counter()
    for text in worlds.texts(own, tmp_path / "d" / "train.bin"):
        size["How many" in text] += len(own.encode(text)) + 1
    assert size[True] / size.total() == pytest.approx(fraction, abs=.01)


def test_every_general_kind_has_its_share():
    """No kind of general text is missing from training; the manifest counts the documents drawn."""
    shares = manifest()["shards"]["train.bin"]
    total = sum(kind["tokens"] for kind in shares.values())
    assert shares.keys() == {*TASKS, "arithmetic"}
    assert all(kind["tokens"] > .02 * total for kind in shares.values())


# ---- benchmarks --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", TASKS)
def test_benchmarks_are_well_formed(task):
    """Every task has 200 different items or more, choices that differ, chance = the score of guessing, and a
    right answer about as often at every place: a fixed place scores chance (5 standard errors)."""
    items = benchmarks(task)
    assert len(items) >= 200
    assert len(set(map(statement, items))) == len(items)
    n = len(items[0]["choices"])
    for item in items:
        assert len(set(item["choices"])) == len(item["choices"]) == n
        assert item["chance"] == (1 / n if n > 1 else .5)    # dialogue: one of the two that the context names
        assert all(choice.startswith(" ") for choice in item["choices"])
    places, error = Counter(item["answer"] for item in items), (1 / n * (1 - 1 / n) / len(items)) ** .5
    assert all(abs(places[place] / len(items) - 1 / n) <= 5 * error for place in range(n))


@pytest.mark.parametrize("task", TASKS)
def test_benchmarks_are_held_out(task):
    """No statement that a benchmark asks for is in the training shard, nor in 2,000 further documents."""
    rng, people, write = random.Random(1), world.population(0), world.KINDS[task][1]
    more = [write(rng, people) if task == "recall" else write(rng) for _ in range(2_000)]
    train = "\n".join(texts("train.bin") + more)
    leaked = [said for said in map(statement, benchmarks(task)) if said in train]
    assert not leaked, (len(leaked), leaked[:3])


def fact(sentence: str) -> tuple[str, str, str] | None:
    """'You can visit Nora Bell in Rome.' -> ('Nora Bell', 'You can visit _ in', 'Rome')"""
    match = re.fullmatch(r"(.*?)([A-Z][a-z]+ [A-Z][a-z]+)( .*) (\w+)\.", sentence)
    return match and (match[2], f"{match[1]}_{match[3]}", match[4])


def test_recall_asks_what_training_tells_in_other_words():
    """Recall: the right choice is the population's value, as is all that training states; the asked wording
    does not occur in training for this person, others do. Wrong choices are values of the same attribute."""
    people = world.population(0)
    attribute_of = {value: attribute for facts in people.values() for attribute, value in facts.items()}
    told = defaultdict(set)                      # (person, attribute) -> wordings of training
    sentences = re.findall(r"[^.\s][^.]*\.", ". ".join(texts("train.bin")))
    for person, wording, value in filter(None, map(fact, sentences)):
        if person in people:
            assert people[person][attribute_of[value]] == value
            told[person, attribute_of[value]].add(wording)
    assert len(told) > 500
    assert len(set().union(*told.values())) == 16                        # each wording is known from someone

    answerable = 0
    for item in benchmarks("recall"):
        person, wording, value = fact(statement(item))
        (attribute,) = {attribute_of[choice] for choice in choices(item)}
        assert people[person][attribute] == value
        assert wording not in told[person, attribute]
        answerable += len(told[person, attribute]) > 0
    assert answerable > 40


def test_tracking_answers_by_replaying_the_story():
    """Tracking: moving the objects as told ends in the right choice. Often that is not the first place told,
    and the wrong choices are places of the story where it has enough: reading along is needed."""
    moved = named = 0
    for item in benchmarks("tracking"):
        told = re.findall(r"(?:The|puts the) (\w+) (?:is )?in the (\w+)\.", item["context"])
        assert len(told) + item["context"].count(" looks at the ") == item["context"].count(".")
        asked = re.search(r" Now the (\w+) is in the$", item["context"])[1]
        assert right(item) == dict(told)[asked]                          # the last place told
        mentioned = {place for _, place in told}
        assert len(mentioned.intersection(choices(item))) == min(4, len(mentioned))
        moved += right(item) != dict(reversed(told))[asked]
        named += mentioned.issuperset(choices(item))
    assert min(moved, named) > .25 * len(benchmarks("tracking"))


def test_ending_answers_follow_the_need():
    """Ending: training shows which action goes with which need; the right choice is this person's."""
    action = {}
    for text in texts("train.bin"):
        needs = dict(re.findall(r"(\w+) is (\w+)\.", text))
        for person, what in re.findall(r"So (\w+) ([^.]+)\.", text):
            assert action.setdefault(needs[person], what) == what
    assert len(action) == 10
    for item in benchmarks("ending"):
        person = re.search(r"So (\w+)$", item["context"])[1]
        need = dict(re.findall(r"(\w+) is (\w+)\.", item["context"]))[person]
        assert right(item) == action[need]
        assert set(choices(item)) <= set(action.values())


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November December").split()


def continuation(elements: list[str]) -> tuple[str, str]:
    """(rule, next element) by the simplest rule that fits: count on, go round the calendar, repeat."""
    if "again" in elements:
        return "again", elements[len(elements) - elements.index("again") - 1]
    for rule, names in {"count": [*map(str, range(-999, 1_000))], "days": DAYS, "months": MONTHS}.items():
        if set(elements) <= set(names):
            places = [names.index(element) for element in elements]
            (step,) = {(b - a) % len(names) for a, b in zip(places, places[1:])}
            return rule, names[(places[-1] + step) % len(names)]
    period = next(p for p in range(1, 4) if elements[p:] == elements[:-p])
    return "pattern", elements[-period]


def test_sequences_continue_by_the_simplest_rule():
    """Sequence: the rule read off the context gives the right choice, and each of five rules occurs."""
    rules = set()
    for item in benchmarks("sequence"):
        rule, element = continuation(item["context"].split())
        assert right(item) == element, item
        rules.add(rule)
    assert len(rules) == 5, rules


def test_agreement_follows_the_first_noun():
    """Agreement: the verb has its s with a singular subject; the nearer noun is of the other number."""
    for item in benchmarks("agreement"):
        noun, other = re.fullmatch(r"The (\w+) \w+ the (\w+)", item["context"]).groups()
        assert noun.endswith("s") != other.endswith("s")
        assert right(item).endswith("s") != noun.endswith("s")
        one, two = sorted(choices(item), key=len)
        assert two == one + "s"


def test_order_agrees_with_what_training_reveals():
    """Order: training compares some pairs, all in keeping with one order; its consequences (a > b > c) settle
    every benchmark pair in favour of the right choice. No benchmark pair is compared in training."""
    def pairs(text: str) -> list[tuple[str, str]]:
        found = re.findall(r"A (\w+) is (bigger|smaller) than a (\w+)\.", text)
        return [(a, b) if relation == "bigger" else (b, a) for a, relation, b in found]
    rng = random.Random(2)                               # 12 M tokens tell more than this shard does
    told = set(pairs("\n".join(texts("train.bin") + [world.order(rng) for _ in range(1_000)])))
    smaller = defaultdict(set)
    for large, small in told:
        smaller[large].add(small)

    @functools.cache
    def below(animal: str) -> set[str]:
        """All that must be smaller; a circle would have no end."""
        return smaller[animal].union(*map(below, smaller[animal]))
    for item in benchmarks("order"):
        ((large, small),) = pairs(statement(item))
        assert not {(large, small), (small, large)} & told and small in below(large)


def test_dialogue_answers_stand_in_the_context():
    """Dialogue: the thing seen at the place, or the place of the thing; the nearer word does not do."""
    kinds, nearer = Counter(), 0
    for item in benchmarks("dialogue"):
        seen = re.findall(r"(\w+): I saw a (\w+) by the (\w+)\.", item["context"])
        assert len(seen) == 2 and len(set(sum(seen, ()))) == 6               # everything differs
        pattern = r"(\w+): (?:What was by the (\w+)|Where was the (\w+))\? (\w+): (A|By the)$"
        asker, place, what, answerer, opening = re.search(pattern, item["context"]).groups()
        assert {asker, answerer} == {name for name, _, _ in seen}
        assert opening == ("A" if place else "By the")
        answers = [w if place else p for _, w, p in seen if place == p or what == w]
        assert answers == [right(item)]
        kinds[opening] += 1
        nearer += right(item) in seen[1]
    assert min(kinds.values()) > .3 * len(benchmarks("dialogue"))
    assert .35 < nearer / len(benchmarks("dialogue")) < .65


def test_a_document_is_not_repeated_often():
    """Among 150 k tokens hardly a long document occurs twice; 12 M tokens ask for rich texts."""
    long = [text for text in texts("train.bin") if len(text) > 60]
    assert len(set(long)) > .97 * len(long)
