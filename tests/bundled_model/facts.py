"""Skills about stated facts: binding, equality, recall, comparison, counting, order, sums.

Each builder draws one :class:`~bundled_model.language.Document`. Stories for ``eval``
are drawn at the long end of the range of lengths that ``train`` covers.
"""

from __future__ import annotations

import random
from itertools import pairwise

from bundled_model.language import Document, Question, Split, choose, yes_no
from bundled_model.vocabulary import COLORS, FRUITS, NAMES, NUMBERS, OBJECTS, PLACES, SCALES

Possession = tuple[str, str, str]
"""(person, color, object)"""


def _size(rng: random.Random, split: Split, low: int, eval_low: int, high: int) -> int:
    """A size from the long end for evaluation; for training mostly small, up to ``high``."""
    if split == "eval":
        return rng.randint(eval_low, high)
    return min(rng.randint(low, high), rng.randint(low, high))


def _uniform(rng: random.Random, split: Split, low: int, eval_low: int, high: int) -> int:
    return rng.randint(low if split == "train" else eval_low, high)


def _some(
    rng: random.Random, split: Split, items: list[Question], most: int
) -> tuple[Question, ...]:
    """One question for evaluation, up to ``most`` for training."""
    rng.shuffle(items)
    return tuple(items[: 1 if split == "eval" else most])


def _possessions(rng: random.Random, count: int, colors: int) -> list[Possession]:
    """Distinct (person, object) pairs; both recur, so both are needed to find one."""
    people = rng.sample(NAMES, max(2, (count + 1) // 2))
    things = rng.sample(list(OBJECTS), max(2, (count + 1) // 2))
    palette = rng.sample(COLORS, colors)
    pairs = rng.sample([(person, thing) for person in people for thing in things], count)
    return [(person, rng.choice(palette), thing) for person, thing in pairs]


def _tell(possessions: list[Possession]) -> str:
    return " ".join(f"the {thing} of {person} is {color}." for person, color, thing in possessions)


def echo(rng: random.Random, split: Split) -> Document:
    """Repeat a list of unrelated words: not evaluated, it teaches to copy from the context."""
    words = [*NAMES, *COLORS, *OBJECTS, *NUMBERS, *FRUITS]
    said = " ".join(rng.choice(words) for _ in range(rng.randint(3, 16)))
    return Document("echo", f"list: {said}.", (Question("again:", (said,), 0),))


def pairs(rng: random.Random, split: Split) -> Document:
    """Look up words by name: binding in its densest form, which prepares the other skills."""
    people = rng.sample(NAMES, _uniform(rng, split, 2, 6, 8))
    words = rng.choice([COLORS, list(OBJECTS), PLACES, NUMBERS[1:11]])
    value = {person: rng.choice(words) for person in people}
    told = [f"{person} {word}" for person, word in value.items()]
    asked = [rng.choice(people) for _ in range(rng.randint(4, 10))]
    questions = []
    for person in asked if split == "train" else asked[:1]:
        others = dict.fromkeys([*value.values(), *words])
        choices = sorted([value[person], *[word for word in others if word != value[person]][:3]])
        questions.append(Question(f"{person}?", tuple(choices), choices.index(value[person])))
    return Document("pairs", f"list: {', '.join(told)}.", tuple(questions))


def attributes(rng: random.Random, split: Split) -> Document:
    """Bind a color to (owner, object) among distractors that share the owner or the object."""
    facts = _possessions(rng, _size(rng, split, 2, 7, 9), colors=6)
    seen = list(dict.fromkeys(color for _, color, _ in facts))
    others = seen + [color for color in COLORS if color not in seen]
    questions = []
    for person, color, thing in facts:
        wrong = [other for other in others if other != color][:3]
        questions.append(choose(rng, f"what color is the {thing} of {person}?", color, wrong))
    return Document("attributes", _tell(facts), _some(rng, split, questions, 5))


def verify(rng: random.Random, split: Split) -> Document:
    """Say whether something has the color that the question names: a binding and an equality."""
    facts = _possessions(rng, _size(rng, split, 2, 4, 6), colors=4)
    told = list(dict.fromkeys(color for _, color, _ in facts))
    questions = []
    for person, color, thing in facts:
        truth = len(told) == 1 or rng.random() < 0.5
        asked = color if truth else rng.choice([other for other in told if other != color])
        questions.append(yes_no(f"is the {thing} of {person} {asked}?", truth))
    return Document("verify", _tell(facts), _some(rng, split, questions, 5))


def same(rng: random.Random, split: Split) -> Document:
    """Say whether two objects share a color: two bindings and an equality."""
    facts = _possessions(rng, _size(rng, split, 2, 4, 6), colors=2)
    questions = []
    for truth in (True, False):
        pairs = [(a, b) for a in facts for b in facts if a != b and (a[1] == b[1]) == truth]
        for (owner, _, thing), (other, _, other_thing) in rng.sample(pairs, min(2, len(pairs))):
            prompt = f"is the {thing} of {owner} the same color as the {other_thing} of {other}?"
            questions.append(yes_no(prompt, truth))
    return Document("same", _tell(facts), _some(rng, split, questions, 4))


def _enumerate(items: list[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"


def recall(rng: random.Random, split: Split) -> Document:
    """List everything one person has, word for word: answered by generation."""
    people = rng.sample(NAMES, _size(rng, split, 2, 2, 3))
    things = rng.sample(list(OBJECTS), 3 * len(people))
    lists: dict[str, str] = {}
    for person in people:
        owned = [things.pop() for _ in range(_size(rng, split, 2, 2, 3))]
        lists[person] = _enumerate([f"a {rng.choice(COLORS)} {thing}" for thing in owned])
    story = " ".join(f"{person} has {owned}." for person, owned in lists.items())
    questions = [
        Question(f"list the things of {person}:", (owned,), 0) for person, owned in lists.items()
    ]
    return Document("recall", story, _some(rng, split, questions, 3))


def numbers(rng: random.Random, split: Split) -> Document:
    """Order number words, which comparing coins builds on."""
    drawn = [rng.sample(range(2, 13), 2) for _ in range(rng.randint(4, 8))]
    questions = []
    for pair in drawn:
        word, best = rng.choice([("more", max), ("fewer", min)])
        choices = tuple(NUMBERS[number] for number in pair)
        prompt = f"what is {word}, {choices[0]} or {choices[1]}?"
        questions.append(Question(prompt, choices, pair.index(best(pair))))
    told = ", ".join(NUMBERS[number] for pair in drawn for number in pair)
    asked = questions if split == "train" else questions[:1]
    return Document("numbers", f"list: {told}.", tuple(asked))


def compare(rng: random.Random, split: Split) -> Document:
    """Compare two numbers stated earlier among the numbers of others."""
    people = rng.sample(NAMES, _size(rng, split, 2, 3, 5))
    coins = dict(zip(people, rng.sample(range(2, 13), len(people)), strict=True))
    story = " ".join(f"{person} has {NUMBERS[count]} coins." for person, count in coins.items())
    questions = []
    for _ in range(4):
        pair = rng.sample(people, 2)
        word = rng.choice(["more", "fewer"])
        right = (max if word == "more" else min)(pair, key=coins.__getitem__)
        choices = tuple(f"{person} has {word} coins" for person in pair)
        prompt = f"who has {word} coins, {pair[0]} or {pair[1]}?"
        questions.append(Question(prompt, choices, pair.index(right)))
    return Document("compare", story, _some(rng, split, questions, 4))


def counting(rng: random.Random, split: Split) -> Document:
    """Count the items of one kind in a list of several kinds."""
    kinds = rng.sample(list(FRUITS), _size(rng, split, 2, 3, 3))
    counts = {kind: rng.randint(1, 5) for kind in kinds}
    items = [kind for kind, count in counts.items() for _ in range(count)]
    rng.shuffle(items)
    questions = []
    for kind, count in counts.items():
        near = sorted((n for n in range(1, 6) if n != count), key=lambda n: abs(n - count))[:3]
        wrong = [NUMBERS[n] for n in near]
        questions.append(choose(rng, f"how many {FRUITS[kind]}?", NUMBERS[count], wrong))
    return Document(
        "counting", f"in the basket there are: {', '.join(items)}.", _some(rng, split, questions, 4)
    )


def _ranking(rng: random.Random, count: int) -> tuple[list[str], str, tuple[str, str, str, str]]:
    """People from most to least, the shuffled facts that say so, and the words of the scale."""
    people = rng.sample(NAMES, count)
    scale = rng.choice(SCALES)
    facts = []
    for high, low in pairwise(people):
        facts.append(f"{high} is {scale[0]} than {low}.")
    rng.shuffle(facts)
    return people, " ".join(facts), scale


def order(rng: random.Random, split: Split) -> Document:
    """Find the extreme of a chain of comparisons told in any order."""
    people, story, (_, most, _, least) = _ranking(rng, _size(rng, split, 2, 4, 5))
    questions = [
        choose(rng, f"who is the {most}?", people[0], people[1:]),
        choose(rng, f"who is the {least}?", people[-1], people[:-1]),
    ]
    return Document("order", story, _some(rng, split, questions, 2))


def transitive(rng: random.Random, split: Split) -> Document:
    """Compare two people who are linked only through others."""
    people, story, (more, _, less, _) = _ranking(rng, _size(rng, split, 2, 4, 4))
    questions = []
    for _ in range(4):
        high, low = sorted(rng.sample(range(len(people)), 2))
        if split == "eval":
            high, low = rng.choice([(0, 2), (1, 3), (0, 3)])
        pair = [people[high], people[low]]
        rng.shuffle(pair)
        word = rng.choice([more, less])
        truth = (pair[0] == people[high]) == (word == more)
        questions.append(yes_no(f"is {pair[0]} {word} than {pair[1]}?", truth))
    return Document("transitive", story, _some(rng, split, questions, 4))


def arithmetic(rng: random.Random, split: Split) -> Document:
    """Keep accounts: an opening number, then a gain or a loss, among the accounts of others."""
    people = rng.sample(NAMES, _size(rng, split, 1, 2, 3))
    start = {person: rng.randint(2, 9) for person in people}
    change = {person: rng.choice([-3, -2, 2, 3]) for person in people}
    change = {person: max(delta, 1 - start[person]) for person, delta in change.items()}
    told = [f"{person} has {NUMBERS[count]} coins." for person, count in start.items()]
    later = rng.sample(people, len(people))
    for person in later:
        delta = change[person]
        if delta:
            told.append(f"{person} {'gets' if delta > 0 else 'loses'} {NUMBERS[abs(delta)]} coins.")
    questions = []
    for person in people:
        total = start[person] + change[person]
        near = [n for n in (start[person], total - 1, total + 1, total + 2) if n != total]
        wrong = [NUMBERS[n] for n in dict.fromkeys(near) if n >= 0][:3]
        prompt = f"how many coins does {person} have?"
        questions.append(choose(rng, prompt, NUMBERS[total], wrong))
    return Document("arithmetic", " ".join(told), _some(rng, split, questions, 3))
