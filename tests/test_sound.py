"""Soundness: a right answer whose derivation is true, step by step, by a truth table written by hand."""
import random
import re

import pytest

from data import arithmetic
from data.arithmetic import draw_problem, numbers_of, sound, teach
from data.teacher import WORDINGS

# 15 + 5 - 8 + 20 - 3 = 29
QUESTION = "Nora has 15 nuts. Nora finds 5. Nora loses 8. Nora wins 20. Nora gives 3. How many nuts?"
PROBLEM = {"question": QUESTION, "answer": "29"}
TWO = {"question": "Tom has 30 pens. Tom sells 7. How many pens?", "answer": "23"}


@pytest.mark.parametrize("text", [
    "15+5=20\n20-8=12\n12+20=32\n32-3=29",
    "15 plus 5 is 20. 20 minus 8 is 12. 12 plus 20 is 32. 32 minus 3 is 29.",
    "15+5: 20\n20-8: 12\n12+20: 32\n32-3: 29",
    "plus: 20+15=35 35+5=40\nminus: 8+3=11\n40-11=29",
    "First 15+5=20. Then 20-8=12, which with 20 makes 32: 12+20=32. Last, 32-3=29.",
    pytest.param("20+15=35\n35-3=32\n32+5=37\n37-8=29", id="another order"),
    pytest.param("8+3=11\n20+5=25\n25+15=40\n40-11=29", id="losses first"),
    pytest.param("20-8=12\n15-3=12\n12+12=24\n24+5=29", id="equal results of two steps"),
    pytest.param("From 15 go up 5 to 20, go down 8 to 12, go up 20 to 32, go down 3 to 29.", id="prose")])
def test_sound_derivations(text):
    """Any native or taught style, any valid order, equations inside foreign sentences."""
    assert sound(PROBLEM, f"{text}\n#### 29")


@pytest.mark.parametrize("text", [
    pytest.param("#### 29", id="bare"),
    pytest.param("29\n#### 29", id="bare with a number"),
    pytest.param("15+5=20\n20-8=12\n12+20=32\n32-3=29\n#### 28", id="wrong answer"),
    pytest.param("15+5=20\n20-8=12\n12+20=32\n32-3=29\n#### 29\nso 29", id="trailing text"),
    pytest.param("15+5=21\n21-8=12\n12+20=32\n32-3=29\n#### 29", id="two wrong steps, a right answer"),
    pytest.param("15+5=20\n20-8=13\n13+20=32\n32-3=29\n#### 29", id="two wrong steps in the middle"),
    pytest.param("15+5=20\n20-8=12\n12+20=32\n32-3=28\n#### 29", id="the last step is wrong"),
    pytest.param("15+5=20\n20+20=40\n40-8=32\n32-3=29\n15+5=20\n#### 29", id="a step twice"),
    pytest.param("15+5=20\n20-8=12\n12+5=17\n17+12=29\n#### 29", id="a number twice"),
    pytest.param("15+5=20\n20+20=40\n40-11=29\n#### 29", id="a result from nowhere"),
    pytest.param("15+20=35\n35-3=32\n32-3=29\n#### 29", id="one left out, one twice"),
    pytest.param("15+5=20\n20-8=12\n12+20=32\n#### 29", id="not led to the end"),
    pytest.param("15+14=29\n#### 29", id="an invented number"),
    pytest.param("15+8=23\n23+5=28\n28+1=29\n#### 29", id="a loss as a gain"),
    pytest.param("15+5=20\n20-8=12\n12+20=32\n32-3=29\nThat is 31.\n#### 29", id="a number beside the steps"),
    pytest.param("plus: 20+15=35 35+5=40\nminus: 3+8=12\n40-11=29\n#### 29", id="a wrong sum of losses"),
    pytest.param("15+5: 21, 20\n20-8: 12\n12+20: 32\n32-3: 29\n#### 29", id="a wrong middle"),
    pytest.param("From 15 go up 5 to 21, go down 8 to 12, go up 20 to 32, go down 3 to 29.\n#### 29",
                 id="prose"),
    pytest.param("Go up 5 to 20, go down 8 to 12, go up 20 to 32, go down 3 to 29.\n#### 29", id="no start")])
def test_unsound_derivations(text):
    assert not sound(PROBLEM, text)


@pytest.mark.parametrize("text", [
    "1+15+5=20", "20-15+5=20", "5*15+5=20", "-15+5=20", "15+5=20=5", "15+5=20.5", "15+5=20\uff15",
    "015+05=020",
    "15*5=20\n15+5=20", "15 + 5 = 5\n15+5=20", "15  plus 5 is 5. 15+5=20", "5+5+5+5=20\n15+5=20",
    "go up 5 to 20. 15", "15+5=20\n#### 20\n15+5=20", "#### 20<|endoftext|>15+5=20\n####",
    "15+5=20\n15 minus 20 equals 5."])
def test_what_only_looks_like_a_derivation(text):
    """Steps inside longer expressions, false statements beside a true step, a start that comes too late."""
    problem = {"question": "Nora has 15 nuts. Nora finds 5. How many nuts?", "answer": "20"}
    assert not sound(problem, f"{text}\n#### 20")


def test_prose_may_start_at_any_gain():
    problem = {"question": "Nora has 15 nuts. Nora finds 5. Nora loses 8. How many nuts?", "answer": "12"}
    assert sound(problem, "At 5, 15 on top is 20, 8 off is 12.\n#### 12")
    assert not sound(problem, "At 8, 15 on top is 23, 5 on top is 28.\n#### 12")


@pytest.mark.parametrize("text, expected", [
    ("plus: 30\nminus: 7\n30-7=23", True), ("plus: 30\nminus: 8\n30-7=23", False),
    ("plus: 31\nminus: 7\n30-7=23", False), ("plus: 7\nminus: 7\n30-7=23", False),
    ("30-7: 23", True), ("30-7=23\n30-7=23", False), ("7 less than 30: 23.", True),
    ("30 less than 7: 23.", False)])
def test_headings_and_signs(text, expected):
    """A heading 'plus:' or 'minus:' with one number states that number, with its sign."""
    assert sound(TWO, f"{text}\n#### 23") == expected


def test_problems_of_other_kinds_have_no_derivation():
    assert not sound({"question": "What is 2+3?", "answer": "5"}, "2+3=5\n#### 5")


def test_a_task_with_words_as_answers_has_no_derivation(monkeypatch):
    """README's other task: 'odd' is no number (int() of it ended a run once)."""
    monkeypatch.setattr(arithmetic, "ANSWER", "[A-Za-z]+")
    problem = {"question": "Nora has 3 shells. Nora finds 4. Odd or even?", "answer": "odd"}
    assert arithmetic.grade("3+4=7\n#### odd", "odd") == "right"
    assert not sound(problem, "3+4=7\n#### odd")


def test_all_solutions_are_sound_and_one_wrong_digit_is_not():
    """300 problems, four native styles and 24 taught ones; then every number of every derivation off by 1 or
    10. What stays sound must be a middle ('12+19: 21, 31' adds 9 first, as true as adding 10 first)."""
    rng = random.Random(0)
    for _ in range(300):
        problem = draw_problem(rng, rng.choice(("easy", "hard")), "train")
        numbers = numbers_of(problem["question"])
        assert sum(numbers) == int(problem["answer"])
        taught = [teach(numbers, wording) for wordings in WORDINGS.values() for wording in wordings]
        for text in (*problem["solutions"].values(), *taught):
            assert sound(problem, text), text
            body, _, answer = text.rpartition("####")
            for match in re.finditer("[0-9]+", body):
                changed = int(match[0]) + rng.choice((1, -1, 10))
                other = f"{body[:match.start()]}{abs(changed)}{body[match.end():]}####{answer}"
                middle = re.match(r"\d+[+-]\d+: \d+, ", body[body.rfind("\n", 0, match.start()) + 1:])
                assert not sound(problem, other) or middle, other


@pytest.mark.parametrize("setting", list(WORDINGS))
def test_a_teacher_has_eight_wordings(setting):
    """Eight different solutions of every problem, none in a native style."""
    texts = {teach([15, 5, -8], wording) for wording in WORDINGS[setting]}
    assert len(texts) == len(WORDINGS[setting]) >= 8
