"""General text: a small world with exact ground truth, in seven kinds of documents with a benchmark each.

The benchmarks follow the manner of well-known ones (see KINDS): "general capability" is several skills.
Whatever a benchmark asks is held out by construction: `held_out(key)` is a hash, and a training document that
would state a held-out key is not drawn.
"""
import random
from collections.abc import Callable
from functools import partial
from zlib import crc32

from checkpoint import require
from data.arithmetic import NAMES

SURNAMES = ("Bell Cole Dean Ford Gray Hill Irons Kent Lake Moss Nash Park Reed Snow Todd Vale West York Zane "
            "Abbot Birch Croft Drake Ellis Frost").split()
ATTRIBUTES = {   # attribute -> (values, wordings that end in the value, so that each can be asked)
    "city": (("Paris Rome Oslo Cairo Lima Delhi Tokyo Quito Bern Prague Dublin Athens Sofia Riga "
              "Seoul Accra").split(),
             ("{} lives in", "The home of {} is in", "{} has a house in", "You can visit {} in")),
    "job": (("baker nurse pilot farmer singer tailor judge painter miner sailor barber teacher "
             "dentist florist").split(),
            ("{} works as a", "The job of {} is that of a", "{} earns money as a", "{} wants to stay a")),
    "pet": ("dog cat parrot rabbit turtle hamster goat pony snake lizard duck goose".split(),
            ("{} has a", "The pet of {} is a", "At home {} keeps a", "{} often plays with a")),
    "food": ("rice soup bread fish cake beans pasta cheese salad plums honey corn stew pie".split(),
             ("{} likes", "The best food for {} is", "{} always orders", "For dinner {} makes")),
}
OBJECTS = "key cup ball coin ring lamp hat pen rope doll".split()
PLACES = "box bag drawer basket chest bucket jar cupboard".split()
NEEDS = {"cold": "puts on a coat", "hungry": "eats some bread", "thirsty": "drinks some water",
         "tired": "goes to bed", "bored": "reads a book", "dirty": "takes a bath", "lost": "looks at a map",
         "sick": "calls a doctor", "hot": "opens a window", "sad": "phones a friend"}
FILLERS = ("They walk to the park.", "It is a long day.", "The sun goes down.", "The bus is late.",
           "They talk a little.", "A bird sings in the tree.")
SPOTS = "lake hill bridge church river forest tower mill".split()
# from small to large: the fixed order that training pairs reveal
SIZES = ("fly bee frog mouse rat hen cat fox lamb dog wolf pig goat deer seal lion bear horse camel bull "
         "moose rhino hippo whale").split()
NOUNS = "boy girl dog farmer teacher bird king doctor horse sailor".split()
VERBS = "runs sings waits smiles sleeps jumps listens falls".split()
LINKS = "near behind with beside".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
COLORS = "red blue green black white pink gold gray".split()

Question = tuple[str, str, list[str]]    # the context, how it goes on, and how it does not


def held_out(key: str, share: int = 10) -> bool:
    """True for one key in `share`; such keys appear in benchmarks only."""
    return crc32(("benchmark " + key).encode()) % share == 0


def population(seed: int, size: int = 240) -> dict[str, dict[str, str]]:
    """Person -> attribute -> value. The same seed gives the same people."""
    rng = random.Random(f"{seed} population")
    names = rng.sample([f"{first} {last}" for first in NAMES for last in SURNAMES], size)
    return {name: {attribute: rng.choice(values) for attribute, (values, _) in ATTRIBUTES.items()}
            for name in names}


def asked_wording(person: str, attribute: str) -> int:
    """The wording of this fact that only the benchmark uses."""
    return crc32(f"{person} {attribute}".encode()) % len(ATTRIBUTES[attribute][1])


def biography(rng: random.Random, people: dict) -> str:
    """Two to four facts about one person, never in the wording that the benchmark asks."""
    person = rng.choice(list(people))
    sentences = []
    for attribute in rng.sample(list(ATTRIBUTES), rng.randint(2, 4)):
        wordings = list(ATTRIBUTES[attribute][1])
        del wordings[asked_wording(person, attribute)]
        sentences.append(f"{rng.choice(wordings).format(person)} {people[person][attribute]}.")
    return " ".join(sentences)


def ask_recall(rng: random.Random, people: dict) -> Question:
    """A fact in a wording never used for that person, and other values of the attribute."""
    person, attribute = rng.choice(list(people)), rng.choice(list(ATTRIBUTES))
    values, wordings = ATTRIBUTES[attribute]
    right = people[person][attribute]
    context = wordings[asked_wording(person, attribute)].format(person)
    return context, right, [value for value in values if value != right]


def tracking(rng: random.Random, asked: bool = True) -> Question:
    """Moves, and where one object is after them. Wrong are places of the same story, where it has enough."""
    objects, people = rng.sample(OBJECTS, 3), rng.sample(NAMES, 2)
    where = {thing: rng.choice(PLACES) for thing in objects}
    sentences = [f"The {thing} is in the {place}." for thing, place in where.items()]
    mentioned = list(where.values())
    for _ in range(rng.randint(1, 4)):
        thing, place = rng.choice(objects), rng.choice(PLACES)
        moves = f"puts the {thing} in the {place}" if place != where[thing] else f"looks at the {thing}"
        sentences.append(f"{rng.choice(people)} {moves}.")
        where[thing] = place
        mentioned.append(place)
    if held_out(" ".join(sentences)) != asked:
        return tracking(rng, asked)

    *told, (thing, right) = rng.sample(list(where.items()), 1 if asked else 3)
    sentences += [f"Now the {other} is in the {place}." for other, place in told]
    wrong = [place for place in dict.fromkeys(mentioned + PLACES) if place != right]
    return " ".join(sentences) + f" Now the {thing} is in the", right, wrong[:3]


def ending(rng: random.Random, asked: bool = True) -> Question:
    """People's needs, and what they do. Wrong are the two other needs of the story, and one from outside."""
    pairs = list(zip(rng.sample(NAMES, 3), rng.sample(list(NEEDS), 3)))
    sentences = [f"{name} is {need}." for name, need in pairs]
    sentences.insert(rng.randint(1, 3), rng.choice(FILLERS))
    if held_out(" ".join(sentences)) != asked:
        return ending(rng, asked)

    rng.shuffle(pairs)
    told = rng.randint(0, 1) if asked else 2             # endings before the last one
    sentences += [f"So {name} {NEEDS[need]}." for name, need in pairs[:told]]
    name, need = pairs.pop(told)
    others = [other for _, other in pairs]
    if asked:
        others.append(rng.choice([other for other in NEEDS if other not in (need, *others)]))
    return " ".join(sentences) + f" So {name}", NEEDS[need], [NEEDS[other] for other in others]


def sequence(rng: random.Random, asked: bool = True) -> Question:
    """A list without its last element, that element, and words that could wrongly follow."""
    kind = rng.choice(("count", "days", "months", "pattern", "repeat"))
    others = COLORS
    if kind == "count":
        step = rng.choice((-1, 1)) * rng.randint(1, 9)
        start = rng.randint(10, 99) + (45 if step < 0 else 0)
        key = f"{start} {step}"
        elements = [str(start + step * i) for i in range(6)]
        others = [str(start + step * 5 + d) for d in (-10, -2, -1, 1, 2, 10)]
    elif kind in ("days", "months"):
        others = DAYS if kind == "days" else MONTHS
        start, step = rng.randrange(len(others)), rng.choice((1, 2, -1))
        key = f"{start} {step}"
        elements = [others[(start + step * i) % len(others)] for i in range(5)]
    elif kind == "pattern":    # two or three colours in turn: a b a b a, or a b c a b c a
        unit = rng.sample(COLORS, rng.randint(2, 3))
        key = min(unit[i:] + unit[:i] for i in range(len(unit)))         # a b a b a holds b a b a: one key
        elements = [unit[i % len(unit)] for i in range(rng.randint(5, 8))]
    else:                      # a list, told twice in this order
        key = rng.sample(COLORS, rng.randint(3, 5))
        elements = key + ["again"] + key
    if held_out(f"{kind} {key}") != asked:
        return sequence(rng, asked)
    *before, last = elements
    return " ".join(before), last, sorted(set(others) - {last})


def agreement(rng: random.Random, asked: bool = True) -> Question:
    """'The boys near the king', its verb in the right number, and in the wrong number."""
    noun, other, link, verb = map(rng.choice, (NOUNS, NOUNS, LINKS, VERBS))
    plural, other_plural = rng.random() < .5, rng.random() < .5
    misleading = plural != other_plural                      # the nearer noun: the only case that is asked
    if noun == other or asked and not misleading or held_out(f"{noun} {other} {verb} {plural}") != asked:
        return agreement(rng, asked)
    subject = f"The {noun}{'s' * plural} {link} the {other}{'s' * other_plural}"
    right, wrong = (verb[:-1], verb) if plural else (verb, verb[:-1])
    return subject, right, [wrong]


def comparison(rng: random.Random, asked: bool = True) -> Question:
    """'A bee is', what is true of a bee in the fixed order of SIZES, and its contrary."""
    i, j = sorted(rng.sample(range(len(SIZES)), 2))
    # neighbours are never asked: no other pair would tell which of them is bigger
    if (j - i > 1 and held_out(f"order {i} {j}", share=2)) != asked:
        return comparison(rng, asked)
    if rng.random() < .5:
        return f"A {SIZES[i]} is", f"smaller than a {SIZES[j]}", [f"bigger than a {SIZES[j]}"]
    return f"A {SIZES[j]} is", f"bigger than a {SIZES[i]}", [f"smaller than a {SIZES[i]}"]


def dialogue(rng: random.Random, asked: bool = True) -> Question:
    """Everything but the last word, and the last word."""
    (a, b), (x, y), (p, q) = rng.sample(NAMES, 2), rng.sample(SIZES, 2), rng.sample(SPOTS, 2)
    lines = [f"{a}: I saw a {x} by the {p}.", f"{b}: I saw a {y} by the {q}."]
    rng.shuffle(lines)
    if held_out(" ".join(lines)) != asked:
        return dialogue(rng, asked)
    if rng.random() < .5:
        lines += [f"{a}: What was by the {p}?", f"{b}: A"]
        return " ".join(lines), x, []
    lines += [f"{b}: Where was the {x}?", f"{a}: By the"]
    return " ".join(lines), p, []


def one(ask: Callable, rng: random.Random) -> str:
    """A document that states what `ask` could ask, were its key held out."""
    return "{} {}.".format(*ask(rng, False))


def several(ask: Callable, rng: random.Random) -> str:
    return " ".join(one(ask, rng) for _ in range(rng.randint(2, 4)))


order = partial(several, comparison)
# kind -> (share of general documents, how to write one, how to ask); recall alone needs the population
KINDS = {"recall": (30, biography, ask_recall),                              # as ARC
         "tracking": (20, partial(one, tracking), tracking),                 # as bAbI
         "ending": (14, partial(one, ending), ending),                       # as HellaSwag
         "sequence": (12, partial(one, sequence), sequence),                 # as OpenBookQA
         "agreement": (10, partial(several, agreement), agreement),          # as BLiMP
         "order": (6, order, comparison),                                    # as PIQA
         "dialogue": (14, partial(one, dialogue), dialogue)}                 # as LAMBADA


def draw_document(rng: random.Random, people: dict) -> tuple[str, str]:
    """(kind, text) of one general document."""
    kind = rng.choices(list(KINDS), weights=[share for share, _, _ in KINDS.values()])[0]
    write = KINDS[kind][1]
    return kind, write(rng, people) if kind == "recall" else write(rng)


def item(task: str, rng: random.Random, context: str, right: str, wrong: list[str]) -> dict:
    """An item with up to four choices, in random order; `chance` is the accuracy of guessing. Without a wrong
    choice the exact word counts, which is one of the two that the context names."""
    if not wrong:
        return {"task": task, "context": context, "choices": [f" {right}"], "answer": 0, "chance": 0.5}
    words = [*rng.sample(wrong, min(3, len(wrong))), right]
    rng.shuffle(words)
    return {"task": task, "context": context, "choices": [f" {word}." for word in words],
            "answer": words.index(right), "chance": 1 / len(words)}


def draw_benchmark(rng: random.Random, people: dict, per_task: int) -> list[dict]:
    """`per_task` different items of every task. UserError if there are fewer."""
    items = []
    for task, (_, _, ask) in KINDS.items():
        found = {}
        for _ in range(100 * per_task):
            if len(found) < per_task:
                context, right, wrong = ask(rng, people) if task == "recall" else ask(rng)
                found.setdefault((context, right), item(task, rng, context, right, wrong))
        require(len(found) == per_task, f"--benchmark-items {per_task}: {task} has only {len(found)}")
        items += found.values()
    return items
