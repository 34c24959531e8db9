"""A teacher's wordings: solutions in sentences that no text of pretraining contains.

The dial of foreignness, from the pretraining's own styles (`native`, in arithmetic.py) to prose:

    wrapped    15+5=20 as in pretraining, inside foreign sentences
    spoken     both numbers and the result of every step, said in foreign words
    prose      one number and the result of every step; the number before it must be remembered

Eight wordings each. A wording has an opening, a gain and a loss (a step from {a} by {b} to {c}), what stands
between steps, and a closing; the line '#### 20' follows.
"""
from typing import NamedTuple


class Wording(NamedTuple):
    opening: str
    gain: str
    loss: str
    between: str = ", "
    closing: str = "."


def wrapped(opening: str, between: str, closing: str) -> Wording:
    return Wording(opening, "{a}+{b}={c}", "{a}-{b}={c}", between, closing)


WORDINGS = {
    "wrapped": (
        wrapped("Now ", ". Now ", "."),
        wrapped("We see ", ", and ", "."),
        wrapped("Look: ", " and so ", "."),
        wrapped("At first ", ", at last ", "."),
        wrapped("So ", ", so ", ", the end."),
        wrapped("You get ", " and you get ", "."),
        wrapped("Here ", ", there ", "."),
        wrapped("The day is ", ". The day is ", "."),
    ),
    "spoken": (
        Wording("", "{a} and {b} make {c}", "{a} less {b} make {c}"),
        Wording("", "{c} is {a} and {b} on top", "{c} is {a} and {b} out"),
        Wording("So ", "{a} goes up {b} to {c}", "{a} goes down {b} to {c}"),
        Wording("", "{b} more than {a}: {c}", "{b} less than {a}: {c}"),
        Wording("", "put {b} to {a}, see {c}", "take {b} from {a}, see {c}", "; "),
        Wording("At ", "{a} up {b} is at {c}", "{a} down {b} is at {c}", ", at "),
        Wording("", "with {a} and {b}, {c}", "with {a} but not {b}, {c}", "; "),
        Wording("", "in {c} are {a} and {b}", "in {c} is {a}, not {b}", "; "),
    ),
    "prose": (
        Wording("From {a} ", "go up {b} to {c}", "go down {b} to {c}"),
        Wording("In the box {a}, ", "put in {b}: {c} in it", "take out {b}: {c} in it"),
        Wording("At {a}, ", "{b} on top is {c}", "{b} off is {c}"),
        Wording("You see {a}; ", "get {b}, you see {c}", "drop {b}, you see {c}", "; "),
        Wording("Open at {a}. ", "Up by {b}, so {c}", "Down by {b}, so {c}", ". "),
        Wording("It is {a}, ", "then {b} more, it is {c}", "then {b} less, it is {c}"),
        Wording("On {a} ", "comes {b}, here {c}", "go {b}, here {c}", ", on that "),
        Wording("Have {a}: ", "{b} come, have {c}", "{b} go, have {c}", ", "),
    ),
}
