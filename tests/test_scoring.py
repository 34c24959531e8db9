"""Grades, pass@k, intervals, comparisons, general measures and problem files."""
import itertools
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import evaluate
import merge
import ranks
import report
import rl
import sft
from checkpoint import UserError, generator
from data.arithmetic import grade, read_answer
from data.problems import load_problems, prompt_ids, training_problems
from data.tokenizer import EOS
from evaluate import (
    Attempts,
    bits_per_byte,
    bootstrap_means,
    compare,
    entropy,
    guess_level,
    interval,
    measure_benchmarks,
    measure_problems,
    pass_at_k,
    pick,
    result_path,
    score_rows,
)
from model import sample

# ---- the verifier -------------------------------------------------------------------------------------

RIGHT = ["#### 12", "#### 12\n", "37+48=85\n85-73=12\n#### 12", "words\n\n#### 12\n", f"#### 12{EOS}",
         f"#### 12\n{EOS}#### 13"]
WRONG = ["#### 13", "#### 120", "#### 1", "#### -12", "#### 0", "#### " + "9" * 5000, "a\n#### 2\n"]
QUESTION = "Nora has 10 shells. Nora finds 2. How many shells?"
UNPARSED = {
    "bare": "12", "empty": "", "newline": "\n", "two answers": "#### 12\n#### 12",
    "right, then wrong": "#### 12\n#### 13", "wrong, then right": "#### 13\n#### 12",
    "two in a line": "#### 12 #### 12", "leading zero": "#### 012", "plus": "#### +12", "point": "#### 12.0",
    "int() takes 1_2": "#### 1_2", "full-width": "#### １２", "Arabic": "#### ١٢", "superscript": "#### 1²",
    "mixed": "#### 1２", "exponent": "#### 12e0", "hex": "#### 0xc", "space before": " #### 12",
    "space after": "#### 12 ", "two spaces": "####  12", "no space": "####12", "tab": "####\t12",
    "in a sentence": "the answer is #### 12", "unit": "#### 12 shells", "full stop": "#### 12.",
    "sum": "#### 6+6", "comma": "#### 1,2", "text after": "#### 12\nor so", "two newlines": "#### 12\n\n",
    "carriage return": "#### 12\r\n", "five": "##### 12", "three": "### 12", "two minus": "#### --12",
    "minus": "#### -", "nothing": "#### ", "answer after EOS": f"{EOS}#### 12",
    "answer after EOS and text": f"x{EOS}\n#### 12", "vertical tab": "a\v#### 12",
    "line separator": "a\u2028#### 12", "power": "#### 9**9**9", "null": "#### 12\0",
    "the prompt": QUESTION, "the prompt and a number": f"{QUESTION}\n12",
    "the prompt between answers": f"{QUESTION}\n#### 12\n{QUESTION}\n#### 13",
    "all numbers": "\n".join(f"#### {i}" for i in range(100)),
    "all numbers up to the answer": "".join(f"#### {i}\n" for i in range(13)),
    "all numbers in a line": "#### " + " ".join(map(str, range(100))),
    "another after all": "#### 12\nNo: #### 13", "or": "#### 12 or 13", "the mark alone": "####",
}


@pytest.mark.parametrize("completion", RIGHT)
def test_right_answers(completion):
    """The form once is right, with or without the final newline, after any working; EOS ends the text."""
    assert grade(completion, "12") == "right"


@pytest.mark.parametrize("completion", WRONG, ids=lambda text: text[:12])
def test_wrong_answers(completion):
    """Another number in the one exact form is 'wrong'; 5,000 digits raise nothing."""
    assert grade(completion, "12") == "wrong"


@pytest.mark.parametrize("completion", UNPARSED.values(), ids=UNPARSED)
def test_unparsed_answers(completion):
    """Whatever is not exactly the form is 'unparsed', counted apart from wrong numbers. So neither repeating
    the prompt nor listing 0..99 nor giving the answer and then another earns anything."""
    assert grade(completion, "12") == "unparsed"


@pytest.mark.parametrize("gold", ["-3", "0", "100278", "9" * 30])
def test_any_integer_can_be_the_answer(gold):
    """Negative, zero and long answers are compared exactly, as text; neighbours in float64 differ."""
    assert grade(f"#### {gold}", gold) == "right"
    for other in (int(gold) + 1, -int(gold) - 1):
        assert grade(f"#### {other}", gold) == "wrong"


def test_cut_off_answers():
    """A completion cut off before EOS counts only if its answer line is complete."""
    assert grade("#### 12", "12", finished=False) == "unparsed"
    assert grade("#### 12\n", "12", finished=False) == "right"
    assert grade("#### 12\nmore", "12", finished=False) == "unparsed"


def test_eos_spelled_out_is_not_eos(byte_tokenizer):
    """The EOS token ends the text; its name written in plain bytes does not, and is part of no answer."""
    def read(ids, finished):
        return read_answer(byte_tokenizer, ids, finished, "12")[1]
    ids, name = byte_tokenizer.encode("#### 12"), byte_tokenizer.encode(EOS)
    assert len(name) == len(EOS) and read(ids + [byte_tokenizer.eos], True) == "right"
    assert read(ids + name, False) == read(ids + name + [byte_tokenizer.eos], True) == "unparsed"
    assert read(ids + [byte_tokenizer.pad, byte_tokenizer.eos], True) == "unparsed"


def test_grading_long_text_takes_no_time():
    """The pattern cannot be made slow; a text of 200,000 characters is read in a fraction of a second."""
    for text in ("\n" * 200_000, "\n#### 1" * 28_000, "#### " + "1" * 200_000 + "x", "####" * 50_000):
        assert grade(text, "12") == "unparsed"


# ---- pass@k -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, c, k, expected", [
    (4, 1, 2, .5), (32, 1, 8, .25), (10, 3, 5, 11 / 12), (32, 0, 32, 0), (64, 1, 32, .5), (100, 3, 1, .03),
    (8, 8, 1, 1), (8, 5, 4, 1), (10_000, 1, 1, 1e-4),
    (10_000, 10, 5_000, 1 - math.comb(9_990, 5_000) / math.comb(10_000, 5_000))])
def test_pass_at_k_values(n, c, k, expected):
    """The values are those worked out beforehand, and 1 if fewer than k samples are wrong. There is no
    overflow and no cancellation where binomials have thousands of digits."""
    assert pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-11)


def test_pass_at_k_is_the_enumeration():
    """The value is the share of all k-subsets of n samples that hold a right one, for every n <= 8, c, k."""
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))          # the first c samples are right
            expected = sum(min(subset) < c for subset in subsets) / len(subsets)
            assert abs(pass_at_k(n, c, k) - expected) < 1e-12


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 4, 5), (4, 0, 0), (4, 5, 2), (4, -1, 2), (0, 0, 1)])
def test_pass_at_k_errors(n, c, k):
    """Asking for k > n is an error even where all samples are right; so are impossible counts."""
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_enough_samples_by_default():
    """There are at least 2 k samples for pass@k."""
    c = evaluate.Config(("x.pt",))
    assert c.n_samples >= 2 * max(c.k) and max(c.k) == 32


def test_standard_error_of_pass_at_32():
    """The error at 200 problems is .035, .032, .030 for n = 32, 64, 128 and .029 at best (beta(.3, 4))."""
    rng = np.random.default_rng(0)
    rates = rng.beta(.3, 4, 20_000)
    values = [[pass_at_k(n, c, 32) for c in rng.binomial(n, rates).tolist()] for n in (32, 64, 128)]
    errors = np.std([*values, 1 - (1 - rates) ** 32], axis=1) / 200 ** .5
    assert np.allclose(errors, [.035, .032, .030, .029], atol=.001)
    assert (np.diff(errors) < 0).all()


def test_right_attempts_are_counted():
    """The count is the number of right attempts per problem, as an integer; nothing is a little right."""
    a = Attempts(3, [""] * 6, ["right", "wrong", "unparsed", "right", "right", "right"], [], 0)
    counts = a.per_problem([grade == "right" for grade in a.grades])
    assert counts == [1, 3] and {type(n) for n in counts} == {int}


# ---- bootstrap ----------------------------------------------------------------------------------------

def test_bootstrap_is_over_problems():
    """Replicates are means of problems drawn with replacement, all columns (k) from one draw."""
    values = np.outer([1, 0, 0, 0, 0], [1, 10])
    means = bootstrap_means(values, 0)
    assert means.shape[0] >= 2_000 and means.shape[1:] == (2,)
    assert np.allclose(means[:, 1], 10 * means[:, 0])                    # the same problems for every k
    counts = np.round(means[:, 0] * 5).astype(int)
    assert np.allclose(means[:, 0] * 5, counts)
    assert counts.max() >= 3                                             # with replacement
    expected = [math.comb(5, i) * .2 ** i * .8 ** (5 - i) for i in range(4)]     # binomial(5, 1/5)
    assert np.allclose(np.bincount(counts)[:4] / len(counts), expected, atol=.04)


def test_bootstrap_is_paired():
    """One seed draws the same problems for two models, whatever numpy's global state; another seed others."""
    a, b = np.random.default_rng(0).random((2, 40))
    means = bootstrap_means(a, 3)
    np.random.seed(7)
    assert np.allclose(means - bootstrap_means(b, 3), bootstrap_means(a - b, 3))
    assert not np.allclose(means, bootstrap_means(a, 4))


def test_interval_is_the_middle_95_percent():
    """The interval leaves 2.5 % of the replicates out on either side."""
    low, high = interval(np.random.default_rng(0).permutation(10_001) / 10_000)
    assert abs(low - .025) < 1e-9 and abs(high - .975) < 1e-9


def test_coverage():
    """Of 300 intervals for the mean of 40 exponential values 90 to 97 % hold the truth."""
    rng = np.random.default_rng(1)
    intervals = [interval(bootstrap_means(rng.exponential(1., 40), seed, 400)) for seed in range(300)]
    hits = sum(low < 1 < high for low, high in intervals)
    assert .90 <= hits / 300 <= .97


def result(right, hits=None):
    """A measured model with four samples per problem, of which these are right."""
    counts = {"samples": 4, "right_per_problem": right, "sound_per_problem": [0] * len(right)}
    r = {"config": {"k": [1, 2]}, "problems": {"easy": counts}}
    if hits:
        r["benchmarks"] = {task: {"hits": h} for task, h in hits.items()}
    return r


@pytest.mark.parametrize("a, b, k, expected, tolerance", [
    pytest.param([1, 2, 3, 4] * 10, [0, 1, 2, 3] * 10, 1, (.25, .25, .25), 1e-12, id="one more at each"),
    pytest.param([1, 2, 3, 4] * 10, [1, 2, 3, 4] * 10, 2, (0, 0, 0), 0, id="the same"),
    pytest.param([1, 1], [0, 4], 1, (-.25, -.75, .25), 1e-12, id="first minus second"),
    pytest.param([0, 4], [1, 1], 1, (.25, -.25, .75), 1e-12, id="second minus first"),
    pytest.param([1, 1], [0, 4], 2, (0, -.5, .5), 0, id="pass@2"),
    pytest.param([4, 0] * 50, [0, 4] * 50, 1, (0, -.196, .196), .03, id="width")])
def test_compare_is_paired(a, b, k, expected, tolerance):
    """First minus second, problem by problem. One more right sample at each of very different problems is
    certain: an interval without width. The pass@2 of 4 samples with 1 right is .5, with 0 right 0, with 4
    right 1. Gaps of ±1 at 100 problems have a standard error of .1, and the interval ±1.96 times that."""
    mean, *ends = compare(result(a), result(b), 0)[f"easy pass@{k}"]
    assert abs(mean - expected[0]) < 1e-12
    assert ends == pytest.approx(expected[1:], rel=0, abs=tolerance)


@pytest.mark.parametrize("x, y, expected", [
    ([1, 1, 0, 0], [0, 0], .25), ([1, 0, 0, 0], [1, 1], .625), ([1] * 50, [0] * 50, .5)])
def test_the_general_mean_is_compared_item_by_item(x, y, expected):
    """Each task has the same weight. Items were once drawn within each task here, and from all tasks in the
    report: of a gain at every item of one of two tasks, an interval without width, and one of ±1.96·.5/√N.
    Now both take the same values of the items, equal to the hits if all tasks have as many."""
    a = result([1], hits={"x": x, "y": y})
    b = result([1], hits={"x": [0] * len(x), "y": [0] * len(y)})
    mean, low, high = compare(a, b, 0)["general mean"]
    assert mean == pytest.approx(expected)
    each = report.values(a, "general") / 100
    assert each.mean() == pytest.approx(expected)
    if len(x) == len(y):
        assert each.tolist() == x + y
        assert (high - low) / 2 == pytest.approx(1.96 * .5 / 10, rel=.1)


CHANGES = [{}, {"temperature": 1.0}, {"seed": 1}, {"n_samples": 32}, {"n_problems": 9}, {"k": (1,)},
           {"problem_file": "my.jsonl"}, {"data": "d"}, {"reference": "r.pt"}, {"benchmarks": False},
           {"max_new": 9}, {"split": "test"}, {"shots": 2}, {"shots": 2, "seed": 1}]


def test_every_configuration_has_a_file_of_its_own():
    """An evaluation at another temperature, seed, ... once replaced the one before. With the defaults the
    name is the plain one; how and beside which other checkpoint it is computed does not count."""
    names = [result_path("runs/a/3.8M.pt", evaluate.Config(("x.pt",), **changes)) for changes in CHANGES]
    assert len(set(names)) == len(names)
    assert names[0] == Path("runs/a/3.8M.val.0shot.json") and names[-3].name == "3.8M.test.0shot.json"
    other = evaluate.Config(("x.pt", "y.pt"), decode_rows=1, device="cpu", threads=3)
    assert result_path("runs/a/3.8M.pt", other) == names[0]


@pytest.mark.parametrize("k, expected", [(1, 5 / 8), (2, (3 * 15 + 7) / 64)])
def test_the_guess_level(k, expected):
    """Known answers are 5, 5, 5, 7: one guess hits a 5 with 3/4 and a 7 with 1/4, two with 15/16 and 7/16; a
    problem with another answer is never hit."""
    known = [{"answer": "5"}] * 3 + [{"answer": "7"}]
    assert guess_level(known, known, k) == pytest.approx(expected)
    assert guess_level([{"answer": "6"}], known, k) == 0


def test_sound_answers_are_counted_apart(gpt, answer_tokenizer, monkeypatch):
    """Of four samples three are right: one derived, one bare, one by two mistakes that cancel out."""
    problem = {"question": "Tom has 3 pens. Tom gets 4. Tom loses 2. How many pens?", "answer": "5"}
    texts = ["3+4=7\n7-2=5\n#### 5", "#### 5", "3+4=8\n8-2=5\n#### 5", "3+4=7\n7-2=4\n#### 4"]
    rows = [[*answer_tokenizer.encode(text), answer_tokenizer.eos] for text in texts]
    monkeypatch.setattr(ranks, "sample_together", lambda model, prompts, n, *_: mock.Mock(
        completions=lambda: rows[:n], finished=torch.ones(n, dtype=torch.bool)))
    gpt.config.context = 256
    c = evaluate.Config(("x.pt",), n_samples=4, k=(1, 2))
    r = measure_problems(gpt, answer_tokenizer, [problem], c, [], "test")
    assert r["right_per_problem"] == [3] and r["sound_per_problem"] == [1] and r["operations"] == [2]
    assert r["pass@1"]["mean"] == .75 and r["sound@1"]["mean"] == .25 and r["sound@2"]["mean"] == .5


# ---- a whole set of problems --------------------------------------------------------------------------

def test_measures_of_a_known_model(answering, answer_tokenizer):
    """A model right with .75·.6, wrong with .75·.4, unreadable with .25 is measured as such. The evaluation
    has a generator of its own, seeded by the config alone: measured twice, all is the same."""
    problems = [{"question": f"q{i}", "answer": "7"} for i in range(60)]
    c = evaluate.Config(("x.pt",), n_samples=20, k=(1, 4), temperature=1.0, max_new=8)
    r = measure_problems(answering(.4, .25), answer_tokenizer, problems, c, [], "test")
    share = .75 * .6
    mean = r["pass@1"]["mean"]
    assert mean == pytest.approx(share, abs=.04)
    assert r["pass@4"]["mean"] == pytest.approx(1 - (1 - share) ** 4, abs=.04)
    assert r["unparsed"] == pytest.approx(.25, abs=.04)
    assert r["truncated"] == 0 and r["greedy"] == 1
    assert sum(r["right_per_problem"]) / 1200 == pytest.approx(mean, abs=1e-9)
    low, high = r["pass@1"]["interval"]
    width = 2 * 1.96 * (share * (1 - share) / 1200) ** .5                # all problems are alike
    assert low < mean < high and .7 < (high - low) / width < 1.3
    expected = -sum(p * math.log(p) for p in (.25, .75 * .6, .75 * .4))
    assert expected - .2 < r["answer_entropy"] < expected                # 20 samples see a little less
    assert r["distinct_completions"] <= 3
    torch.manual_seed(3)
    assert measure_problems(answering(.4, .25), answer_tokenizer, problems, c, [], "test") == r


@pytest.mark.parametrize("share, expected", [(.75, 0.), (.5, .75 * math.log(1.5) + .25 * math.log(.5))])
def test_kl_of_two_known_models(bigram, answer_tokenizer, share, expected):
    """KL(model || reference), in this order, of a first token that is "7" with .75 or "8" with .25; the
    second is EOS under both and adds a token, but nothing to the sum. T = .6 is of the sampling alone."""
    newline, seven, eight = answer_tokenizer.encode("\n78")
    eos = {seven: {answer_tokenizer.eos: 1.}, eight: {answer_tokenizer.eos: 1.}}
    models = [bigram({newline: {seven: p, eight: 1 - p}, **eos}, answer_tokenizer.n_vocab)
              for p in (.75, share)]
    c = evaluate.Config(("x.pt",), temperature=.6, max_new=8)
    kl = evaluate.kl_divergence(*models, answer_tokenizer, [{"question": "q"}] * 3, c, [])
    assert abs(kl - expected / 2) < 1e-6


def test_kl_is_the_mean_over_all_tokens_of_the_answers(make_gpt, answer_tokenizer):
    """Prompts and answers of different lengths after a prefix: token by token, from rows without padding. The
    answers are those of the generator that the config seeds, at its temperature."""
    model, reference = (make_gpt(seed, vocab_size=320, n_vocab=answer_tokenizer.n_vocab) for seed in (0, 1))
    with torch.no_grad():
        model.head.weight[answer_tokenizer.eos] *= 8                     # so that some answers end early
    problems, prefix = [{"question": q} for q in ("a", "bcdef", "7", "88 8")], [3, 4]
    c = evaluate.Config(("x.pt",), temperature=1.5, max_new=12, seed=5)
    kl = evaluate.kl_divergence(model, reference, answer_tokenizer, problems, c, prefix)
    prompts = [prefix + prompt_ids(answer_tokenizer, p) for p in problems]
    answers = sample(model, prompts, 1, 12, answer_tokenizer.eos, answer_tokenizer.pad, generator(5, "kl"),
                     1.5)
    terms = []
    for prompt, answer in zip(prompts, answers.completions()):
        ids = torch.tensor([prompt + answer])
        p, q = (m(ids)[0, len(prompt) - 1:-1].softmax(-1) for m in (model, reference))
        terms += (p * (p / q).log()).sum(-1).tolist()
    assert len({len(x) for x in answers.completions()}) > 1
    assert abs(kl - sum(terms) / len(terms)) < 1e-4


@pytest.mark.parametrize("values, expected", [
    (["a"] * 5, 0.), (["a", "b"], math.log(2)), (list("abcd"), math.log(4)),
    (["7"] * 3 + ["8"], math.log(4) - .75 * math.log(3))])
def test_entropy_of_answers(values, expected):
    """The entropy is -sum p log p of the observed values, in nats."""
    assert abs(entropy(values) - expected) < 1e-12


# ---- general capabilities -----------------------------------------------------------------------------

@pytest.mark.parametrize("scores, choices, expected", [
    ([-4, -6], ["aa", "bbbb"], (0, 1)),                          # -2 and -1.5 per character
    ([-4, -6], [" aa", " bbbb"], (0, 1)),
    ([-2, -3], [" a", " bb"], (0, 1)),                           # -2 and -1.5; with the space -1 and -1
    ([-3.2, -3], [" ab c", " abc"], (1, 0)),                     # an inner space is a character
    ([-2.2, -2.9], ["éé", "abc"], (0, 1)),                       # -1.1 and -.97; by bytes the first has -.55
    ([-3, -1, -1], ["aa", "bb", "cc"], (1, 1)),                  # of equal scores the first
    ([-2, -4], ["a", "bb"], (0, 0))], ids=str)
def test_pick_by_sum_and_per_character(scores, choices, expected):
    """acc takes the largest score, acc_norm the largest per character without the leading space."""
    assert pick(scores, choices) == expected


@pytest.mark.parametrize("tokens", [1, 20, 10_000])
def test_scores_equal_single_rows(gpt, logprobs_of, tokens):
    """The score is the log-likelihood of the continuation given the context, whatever else is computed."""
    contexts = [[1], [2, 3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [1]]
    continuations = [[20, 0, 21], [22], [0, 0, 0, 0, 0], [23, 24], [25]]
    sums, _ = score_rows(gpt, contexts, continuations, 0, tokens)
    for s, context, continuation in zip(sums, contexts, continuations):
        with torch.inference_mode():
            assert abs(s - float(logprobs_of(gpt, context, continuation).sum())) < 1e-4


def test_exact_match_needs_every_token(gpt):
    """LAMBADA-style: every target token is the argmax under teacher forcing, first and last too."""
    def continued(ids, n):
        for _ in range(n):
            ids = ids + [int(gpt(torch.tensor([ids]))[0, -1].argmax())]
        return ids
    good = continued([3, 4], 4)
    spoilt = [continued(good[:i] + [(good[i] + 1) % 61], 5 - i) for i in range(2, 6)]    # wrong at i alone
    continuations = [ids[2:] for ids in (good, good[:3], *spoilt)]
    _, exact = score_rows(gpt, [[3, 4]] * 6, continuations, 0)
    assert exact == [True, True, False, False, False, False]


def choice(task, choices, answer, chance=.5, context="q"):
    return {"task": task, "context": context, "choices": choices, "answer": answer, "chance": chance}


def test_benchmark_accuracy_by_the_number_of_choices(bigram, byte_tokenizer):
    """Accuracy is acc_norm where there are three or more choices; acc where there are two, which differ in a
    letter or two (BLiMP); exact match where there is one. 'aaaa' has .3 in four letters, 'b' .6 in one. Its
    standard error is sqrt(p(1-p)/(n-1)), with a single item 0, not NaN. The chance level is the items'."""
    a, b, c, q = b"abcq"
    model = bigram({q: {a: .3, b: .6, c: .1}, a: {a: 1.}, b: {b: .01, c: .99}}, byte_tokenizer.n_vocab)
    items = [choice("many", ["aaaa", "b", "cx"], 0), choice("many", ["aa", "bb", "cx"], 1),
             choice("two", ["aaaa", "b"], 0), choice("two", ["a", "b"], 1), choice("two", ["a", "bc"], 1),
             choice("one", ["bc"], 0), choice("one", ["b"], 0), choice("one", ["a"], 0),
             choice("single", ["a", "b", "c", "d"], 1, chance=.25)]
    expected = {         # hits; acc, acc_norm, standard error, chance
        "many": ([1, 0], (0, .5, .5, .5)),
        "two": ([0, 1, 1], (2 / 3, 1, 1 / 3, .5)),
        "one": ([1, 1, 0], (2 / 3, 2 / 3, 1 / 3, .5)),
        "single": ([1], (1, 1, 0, .25))}
    r = measure_benchmarks(model, byte_tokenizer, items)
    assert r.keys() == expected.keys()
    for task, (hits, numbers) in expected.items():
        assert r[task]["hits"] == hits
        assert r[task]["items"] == len(hits)
        assert r[task]["accuracy"] == pytest.approx(sum(hits) / len(hits))
        assert [r[task][k] for k in ("acc", "acc_norm", "stderr", "chance")] == pytest.approx(numbers)


def test_a_context_follows_eos(bigram, byte_tokenizer):
    """In pretraining every text follows the EOS of another: the choices of an empty context continue EOS."""
    a, b = ord("a"), ord("b")
    model = bigram({byte_tokenizer.eos: {a: .1, b: .9}}, byte_tokenizer.n_vocab)
    r = measure_benchmarks(model, byte_tokenizer, [choice("x", ["a", "b"], i, context="") for i in (0, 1)])
    assert r["x"]["hits"] == [0, 1]


def test_a_prompt_is_eos_question_newline(byte_tokenizer):
    """The question stands after EOS as in pretraining, encoded as plain text: no second EOS."""
    ids = prompt_ids(byte_tokenizer, {"question": f"a{EOS}?"})
    assert ids == [byte_tokenizer.eos, *f"a{EOS}?\n".encode()]


def test_bits_per_byte_by_hand(make_gpt, byte_tokenizer, answer_tokenizer, logprobs_of):
    """It is -log-likelihood/(bytes·ln 2); a context's first token is context only; EOS has no bytes."""
    for tokenizer, merged in ((byte_tokenizer, 1), (answer_tokenizer, 4)):
        model = make_gpt(vocab_size=320, n_vocab=tokenizer.n_vocab, context=16)
        shard = np.random.default_rng(0).integers(97, 123, 55).astype(np.uint16)     # 3 contexts and a rest
        shard[[3, 16, 30]] = tokenizer.eos                                           # 16 opens a context
        shard[[5, 20, 40]] = tokenizer.encode("####")[0]
        n_bytes = np.ones(48)
        n_bytes[[0, 3, 16, 30, 32]] = 0
        n_bytes[[5, 20, 40]] = merged
        blocks = shard[:48].reshape(3, 16).tolist()
        nats = [-logprobs_of(model, ids[:1], ids[1:]).sum().item() for ids in blocks]
        for n in (1, 3):
            expected = sum(nats[:n]) / (n_bytes[:16 * n].sum() * math.log(2))
            assert bits_per_byte(model, tokenizer, shard, blocks=n) == pytest.approx(expected, abs=1e-5)
        assert bits_per_byte(model, tokenizer, shard) == pytest.approx(expected, abs=1e-5)


def test_bits_per_byte_of_a_uniform_model(bigram, byte_tokenizer):
    """A uniform guess among 258 tokens, one byte each, costs log2(258) = 8.011 bits per byte."""
    model = bigram({}, byte_tokenizer.n_vocab, context=8)
    shard = np.arange(64).astype(np.uint16)
    assert abs(bits_per_byte(model, byte_tokenizer, shard) - math.log2(258)) < 1e-4


def test_bits_per_byte_needs_one_context(gpt, byte_tokenizer):
    """A shard shorter than one context is an error that says so, not a division by zero."""
    with pytest.raises(UserError, match="63 tokens"):
        bits_per_byte(gpt, byte_tokenizer, np.zeros(63, dtype=np.uint16))


# ---- problem files ------------------------------------------------------------------------------------

GOOD = {"question": "1+1?", "answer": "2", "solutions": ["1+1=2\n#### 2"], "difficulty": "easy"}


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return path


@pytest.mark.parametrize("line, fault", [
    (b"{", "JSON"), (b"[1]", "JSON"), (b"\xff{}", "JSON|UTF-8"), (b"9" * 5000, "JSON"), (b"null", "JSON"),
    (b"[" * 100_000, "JSON"),
    ({"answer": "2"}, "'question'"), ({"question": ""}, "'question'"), ({"question": 5}, "'question'"),
    ({"answer": 2}, "'answer'"), ({"answer": " "}, "'answer'"), ({"answer": "2.0"}, "2.0"),
    ({"answer": "02"}, "02"), ({"answer": "２"}, "answer"), ({"answer": "2\n"}, "answer"),
    ({"solutions": None}, "'solutions'"), ({"solutions": []}, "'solutions'"),
    ({"solutions": "2"}, "'solutions'"),
    ({"solutions": ["#### 2", 5]}, "'solutions'"), ({"solutions": ["#### 2", "#### 3"]}, "#### 2"),
    ({"solutions": ["1+1=2"]}, "#### 2")], ids=lambda x: str(x)[:30])
def test_problem_errors_name_file_and_line(tmp_path, line, fault):
    """Problem files: a fault is one UserError with the file, the number of the line and the reason."""
    if isinstance(line, dict) and line != {"answer": "2"}:               # that one lacks its question
        line = GOOD | line
    path = write(tmp_path / "some.jsonl", GOOD, b"", GOOD, line, GOOD)
    with pytest.raises(UserError, match=fault) as error:
        load_problems(path, solutions=True)
    assert f"{path}, line 4:" in str(error.value) and "\n" not in str(error.value)


def test_problems_are_read_in_order(tmp_path):
    """Problem files: all of the difficulty, in order, blank lines skipped; none is an error with the file."""
    problems = [GOOD | {"question": str(i), "difficulty": d} for i, d in enumerate(("easy", "hard", "easy"))]
    path = write(tmp_path / "p.jsonl", problems[0], b"", *problems[1:], b"")
    assert load_problems(path) == problems
    assert [p["question"] for p in load_problems(path, "easy", solutions=True)] == ["0", "2"]
    assert [p["question"] for p in load_problems(path, "hard")] == ["1"]
    with pytest.raises(UserError, match="p.jsonl"):
        load_problems(path, "medium")


def test_problems_need_no_solutions_for_rl(tmp_path):
    """Problem files: RL and evaluation read question and answer alone, non-ASCII text included."""
    path = write(tmp_path / "p.jsonl", {"question": "¿Cuánto es 1−2?", "answer": "-1"})
    assert load_problems(path) == [{"question": "¿Cuánto es 1−2?", "answer": "-1"}]


@pytest.mark.parametrize("n_train, chosen", [(0, "0234"), (1, "0"), (3, "023"), (9, "0234")])
def test_training_takes_the_first_problems(gpt, byte_tokenizer, tmp_path, n_train, chosen):
    """--n-train N: the first N problems of the difficulty in the order of the file; 0: all there are. Their
    splits are those of training, or they have none (a user's own)."""
    problems = [GOOD | {"question": str(i), "difficulty": "hard" if i == 1 else "easy"} for i in range(5)]
    problems[2]["split"] = "train"
    problems[3]["split"] = "pretrain"
    for name in ("train", "train-wrapped"):
        write(tmp_path / f"{name}.jsonl", *problems)
    write(tmp_path / "val.jsonl", GOOD | {"split": "val"})
    for script in (rl, sft, merge):
        c = script.Config(data=str(tmp_path), max_new=9, n_train=n_train)
        found, _, _ = training_problems(c, gpt, byte_tokenizer, solutions=script is not rl)
        assert "".join(p["question"] for p in found) == chosen


def test_problems_without_a_teacher_say_so(gpt, byte_tokenizer, tmp_path):
    """Other problems than the generated ones have no foreign solutions: the line names the option to use."""
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(UserError, match="train-wrapped.jsonl: no such problem file; .*--teacher native"):
        training_problems(sft.Config(data=str(tmp_path)), gpt, byte_tokenizer, solutions=True)


def test_attempts_are_graded_against_their_own_problem(answering, answer_tokenizer):
    """Row p·n + i is attempt i at problem p, greedy at temperature 0, and truncated ones are counted."""
    problems = [{"question": "a", "answer": a} for a in "7887"]
    model = answering(wrong=.2)
    tried = evaluate.attempt(model, answer_tokenizer, problems, 2, 0.0, 8, generator(0, "test"))
    assert tried.grades == ["right", "right", "wrong", "wrong", "wrong", "wrong", "right", "right"]
    assert tried.texts == ["#### 7"] * 8 and tried.truncated == 0
    cut = evaluate.attempt(model, answer_tokenizer, problems, 2, 0.0, 3, generator(0, "test"))
    assert cut.truncated == 8 and cut.grades == ["unparsed"] * 8


def test_too_long_prompts_are_explained(answering, answer_tokenizer):
    """Limits: a prompt that leaves no room in the context is an error that names the options to change."""
    with pytest.raises(UserError, match="--shots.*--max-new|--max-new.*--shots"):
        evaluate.attempt(answering(), answer_tokenizer, [{"question": "a b " * 30, "answer": "7"}], 2, 1.0, 8,
                         generator(0, "test"))
