"""General text: a small world with exact ground truth, in seven kinds of documents with a benchmark each.

The benchmarks follow the manner of well-known ones, so that "general capability" is several skills:

    recall     a fixed population's facts, in a wording never used for that person   (ARC)         chance 1/4
    tracking   where an object is after several moves                                (bAbI)        chance 1/4
    ending     which ending fits a person's need in a story about several people     (HellaSwag)   chance 1/4
    sequence   the next element of a list                                            (OpenBookQA)  chance 1/4
    agreement  verb number across an attractor noun                                  (BLiMP)       chance 1/2
    order      which of two animals is bigger, for pairs never compared in training  (PIQA)        chance 1/2
    dialogue   the exact last word, one of two that the context names                (LAMBADA)     chance 1/2

Whatever a benchmark asks is held out by construction: `held_out(key)` is a hash, and a training document that
would state a held-out key is not drawn. A document ends where it ends; prepare.py appends EOS.
"""
import random
from zlib import crc32

from checkpoint import require
from data.arithmetic import NAMES

SURNAMES = ("Bell Cole Dean Ford Gray Hill Irons Kent Lake Moss Nash Park Reed Snow Todd Vale West York Zane "
            "Abbot Birch Croft Drake Ellis Frost").split()
ATTRIBUTES = {   # attribute -> (values, wordings; all end in the value, so that each can be asked)
    "city": (("Paris Rome Oslo Cairo Lima Delhi Tokyo Quito Bern Prague Dublin Athens Sofia Riga "
              "Seoul Accra").split(),
             ("{n} lives in {x}.", "The home of {n} is in {x}.", "{n} has a house in {x}.",
              "You can visit {n} in {x}.")),
    "job": (("baker nurse pilot farmer singer tailor judge painter miner sailor barber teacher "
             "dentist florist").split(),
            ("{n} works as a {x}.", "The job of {n} is that of a {x}.", "{n} earns money as a {x}.",
             "{n} wants to stay a {x}.")),
    "pet": ("dog cat parrot rabbit turtle hamster goat pony snake lizard duck goose".split(),
            ("{n} has a {x}.", "The pet of {n} is a {x}.", "At home {n} keeps a {x}.",
             "{n} often plays with a {x}.")),
    "food": ("rice soup bread fish cake beans pasta cheese salad plums honey corn stew pie".split(),
             ("{n} likes {x}.", "The best food for {n} is {x}.", "{n} always orders {x}.",
              "For dinner {n} makes {x}.")),
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
NOUNS = {"boy": "boys", "girl": "girls", "dog": "dogs", "farmer": "farmers", "teacher": "teachers",
         "bird": "birds", "king": "kings", "doctor": "doctors", "horse": "horses", "sailor": "sailors"}
VERBS = {"runs": "run", "sings": "sing", "waits": "wait", "smiles": "smile", "sleeps": "sleep",
         "jumps": "jump", "listens": "listen", "falls": "fall"}
LINKS = "near behind with beside".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
COLORS = "red blue green black white pink gold gray".split()


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
        sentences.append(rng.choice(wordings).format(n=person, x=people[person][attribute]))
    return " ".join(sentences)


def ask_recall(rng: random.Random, people: dict) -> dict:
    person, attribute = rng.choice(list(people)), rng.choice(list(ATTRIBUTES))
    values, wordings = ATTRIBUTES[attribute]
    right = people[person][attribute]
    context = wordings[asked_wording(person, attribute)].format(n=person, x="\0").split(" \0")[0]
    return item("recall", rng, context, f" {right}.", [f" {x}." for x in values if x != right], 4)


def moving_story(rng: random.Random, asked: bool) -> tuple[list[str], list[str], dict[str, str]]:
    """Sentences, the places mentioned, and where each object ends up."""
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
        return moving_story(rng, asked)
    return sentences, mentioned, where


def tracking(rng: random.Random) -> str:
    sentences, _, where = moving_story(rng, False)
    final = [f"Now the {thing} is in the {place}." for thing, place in rng.sample(list(where.items()), 3)]
    return " ".join(sentences + final)


def ask_tracking(rng: random.Random) -> dict:
    """Wrong choices are places of the same story, where it has enough of them."""
    sentences, mentioned, where = moving_story(rng, True)
    thing = rng.choice(list(where))
    wrong = [f" {place}." for place in dict.fromkeys(mentioned + PLACES) if place != where[thing]]
    context = " ".join(sentences) + f" Now the {thing} is in the"
    return item("tracking", rng, context, f" {where[thing]}.", wrong[:3], 4)


def need_story(rng: random.Random, asked: bool) -> tuple[list[str], list[tuple[str, str]]]:
    """Opening sentences and (person, need) pairs in the order in which the endings tell them."""
    pairs = list(zip(rng.sample(NAMES, 3), rng.sample(list(NEEDS), 3)))
    opening = [f"{name} is {need}." for name, need in pairs]
    opening.insert(rng.randint(1, 3), rng.choice(FILLERS))
    if held_out(" ".join(opening)) != asked:
        return need_story(rng, asked)
    rng.shuffle(pairs)
    return opening, pairs


def ending(rng: random.Random) -> str:
    opening, pairs = need_story(rng, False)
    return " ".join(opening + [f"So {name} {NEEDS[need]}." for name, need in pairs])


def ask_ending(rng: random.Random) -> dict:
    opening, pairs = need_story(rng, True)
    told = rng.randint(0, 1)   # endings already told before the asked one
    context = opening + [f"So {name} {NEEDS[need]}." for name, need in pairs[:told]]
    name, need = pairs[told]
    # wrong are the two other needs of the story, and one from outside
    others = [n for _, n in pairs if n != need]
    others.append(rng.choice([n for n in NEEDS if n != need and n not in others]))
    wrong = [f" {NEEDS[n]}." for n in others]
    return item("ending", rng, " ".join(context + [f"So {name}"]), f" {NEEDS[need]}.", wrong, 4)


def list_of_things(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """Key (which decides whether it is held out), the elements, and words that could wrongly follow."""
    kind = rng.choice(("count", "days", "months", "pattern", "repeat"))
    if kind == "count":
        step = rng.choice((-1, 1)) * rng.randint(1, 9)
        start = rng.randint(10, 99) + (45 if step < 0 else 0)
        elements = [str(start + step * i) for i in range(6)]
        near = {int(elements[-1]) + d for d in (-10, -2, -1, 1, 2, 10)}
        return f"count {start} {step}", elements, sorted(str(n) for n in near)
    if kind in ("days", "months"):
        names = DAYS if kind == "days" else MONTHS
        start, step = rng.randrange(len(names)), rng.choice((1, 2, -1))
        elements = [names[(start + step * i) % len(names)] for i in range(5)]
        return f"{kind} {start} {step}", elements, sorted(set(names) - {elements[-1]})
    if kind == "pattern":      # two or three colours in turn: a b a b a, or a b c a b c a
        unit = rng.sample(COLORS, rng.randint(2, 3))
        elements = [unit[i % len(unit)] for i in range(rng.randint(5, 8))]
        rotations = [unit[i:] + unit[:i] for i in range(len(unit))]      # a b a b a holds b a b a: one key
        return f"pattern {min(rotations)}", elements, sorted(set(COLORS) - {elements[-1]})
    unit = rng.sample(COLORS, rng.randint(3, 5))                         # a list, told twice in this order
    elements = unit + ["again"] + unit
    return f"repeat {unit}", elements, sorted(set(COLORS) - {elements[-1]})


def sequence(rng: random.Random) -> str:
    key, elements, _ = list_of_things(rng)
    return sequence(rng) if held_out(key) else " ".join(elements) + "."


def ask_sequence(rng: random.Random) -> dict:
    key, elements, others = list_of_things(rng)
    if not held_out(key):
        return ask_sequence(rng)
    wrong = [f" {other}." for other in others]
    return item("sequence", rng, " ".join(elements[:-1]), f" {elements[-1]}.", wrong, 4)


def clause(rng: random.Random, asked: bool) -> tuple[str, str, str]:
    """'The boys near the tree', its verb in the right number, the verb in the wrong number."""
    noun, other, link, verb = map(rng.choice, (list(NOUNS), list(NOUNS), LINKS, list(VERBS)))
    plural, other_plural = rng.random() < .5, rng.random() < .5
    misleading = plural != other_plural                      # the nearer noun: the only case that is asked
    if noun == other or asked and not misleading or held_out(f"{noun} {other} {verb} {plural}") != asked:
        return clause(rng, asked)
    first = NOUNS[noun] if plural else noun
    second = NOUNS[other] if other_plural else other
    forms = (VERBS[verb], verb) if plural else (verb, VERBS[verb])
    return f"The {first} {link} the {second}", *forms


def agreement(rng: random.Random) -> str:
    return " ".join("{} {}.".format(*clause(rng, False)) for _ in range(rng.randint(2, 4)))


def ask_agreement(rng: random.Random) -> dict:
    subject, right, wrong = clause(rng, True)
    return item("agreement", rng, subject, f" {right}.", [f" {wrong}."], 2)


def compared(rng: random.Random, asked: bool) -> tuple[str, str, str]:
    """(animal, 'bigger' or 'smaller', animal), true in the fixed order of SIZES."""
    while True:
        i, j = sorted(rng.sample(range(len(SIZES)), 2))
        # neighbours are never asked: no other pair would tell which of them is bigger
        if (j - i > 1 and held_out(f"order {i} {j}", share=2)) == asked:
            return (SIZES[i], "smaller", SIZES[j]) if rng.random() < .5 else (SIZES[j], "bigger", SIZES[i])


def order(rng: random.Random) -> str:
    return " ".join("A {} is {} than a {}.".format(*compared(rng, False)) for _ in range(rng.randint(2, 4)))


def ask_order(rng: random.Random) -> dict:
    a, relation, b = compared(rng, True)
    wrong = {"bigger": "smaller", "smaller": "bigger"}[relation]
    return item("order", rng, f"A {a} is", f" {relation} than a {b}.", [f" {wrong} than a {b}."], 2)


def conversation(rng: random.Random, asked: bool) -> tuple[str, str]:
    """Everything but the last word, and the last word."""
    (a, b), (x, y), (p, q) = rng.sample(NAMES, 2), rng.sample(SIZES, 2), rng.sample(SPOTS, 2)
    lines = [f"{a}: I saw a {x} by the {p}.", f"{b}: I saw a {y} by the {q}."]
    rng.shuffle(lines)
    if held_out(" ".join(lines)) != asked:
        return conversation(rng, asked)
    if rng.random() < .5:
        lines += [f"{a}: What was by the {p}?", f"{b}: A"]
        return " ".join(lines), x
    lines += [f"{b}: Where was the {x}?", f"{a}: By the"]
    return " ".join(lines), p


def dialogue(rng: random.Random) -> str:
    return "{} {}.".format(*conversation(rng, False))


def ask_dialogue(rng: random.Random) -> dict:
    context, word = conversation(rng, True)
    return {"task": "dialogue", "context": context, "choices": [f" {word}"], "answer": 0, "chance": 0.5}


def item(task: str, rng: random.Random, context: str, right: str, wrong: list[str], n_choices: int) -> dict:
    """A multiple-choice item; `chance` is the accuracy of guessing. The order of the choices is random."""
    choices = rng.sample(wrong, n_choices - 1) + [right]
    rng.shuffle(choices)
    return {"task": task, "context": context, "choices": choices, "answer": choices.index(right),
            "chance": 1 / n_choices}


# kind -> (share of general documents, how to write one, how to ask); recall alone needs the population
KINDS = {"recall": (30, biography, ask_recall), "tracking": (20, tracking, ask_tracking),
         "ending": (14, ending, ask_ending), "sequence": (12, sequence, ask_sequence),
         "agreement": (10, agreement, ask_agreement), "order": (6, order, ask_order),
         "dialogue": (14, dialogue, ask_dialogue)}


def draw_document(rng: random.Random, people: dict) -> tuple[str, str]:
    """(kind, text) of one general document."""
    kind = rng.choices(list(KINDS), weights=[share for share, _, _ in KINDS.values()])[0]
    write = KINDS[kind][1]
    return kind, write(rng, people) if kind == "recall" else write(rng)


def draw_benchmark(rng: random.Random, people: dict, per_task: int) -> list[dict]:
    """`per_task` different items of every task. UserError if there are fewer."""
    items = []
    for task, (_, _, ask) in KINDS.items():
        found = {}
        for _ in range(100 * per_task):
            if len(found) < per_task:
                one = ask(rng, people) if task == "recall" else ask(rng)
                found.setdefault((one["context"], one["choices"][one["answer"]]), one)
        require(len(found) == per_task, f"--benchmark-items {per_task}: {task} has only {len(found)}")
        items += found.values()
    return items
