"""Skills about running text: agreement, whereabouts, carried things, endings of stories.

Each builder draws one :class:`~bundled_model.language.Document`. Stories for ``eval``
are drawn at the long end of the range of lengths that ``train`` covers.
"""

from __future__ import annotations

import random

from bundled_model.language import Document, Question, Split, choose
from bundled_model.vocabulary import (
    ADJECTIVES,
    ANIMALS,
    COLORS,
    NAMES,
    OBJECTS,
    PEOPLE,
    PLACES,
    VERBS,
)


def _noun(rng: random.Random, nouns: dict[str, str], plural: bool) -> str:
    one, many = rng.choice([pair for pair in nouns.items() if pair[0] != pair[1]])
    return f"the {many if plural else one}"


def agreement(rng: random.Random, split: Split) -> Document:
    """Agree with the head noun across attractors of the other number."""
    plural = rng.random() < 0.5
    alive = rng.random() < 0.5
    kinds = rng.choice([ANIMALS, PEOPLE]) if alive else OBJECTS
    story = _noun(rng, kinds, plural)
    for _ in range(rng.randint(1, 3)):
        link = rng.choice(["near", "behind", "with"])
        other = plural if split == "train" and rng.random() < 0.4 else not plural
        story += f" {link} {_noun(rng, rng.choice([ANIMALS, PEOPLE, OBJECTS]), other)}"
    if rng.random() < 0.4:
        story += f" that {rng.choice(NAMES)} likes"
    tail = rng.choice(["state", "place", "own"] + ["act"] * 3 * alive)
    if tail == "act":
        one, many = rng.choice(list(VERBS.items()))
        rest = f"in the {rng.choice(PLACES)}"
    elif tail == "own":
        one, many, rest = "has", "have", f"a {rng.choice(COLORS)} {rng.choice(list(OBJECTS))}"
    else:
        one, many = "is", "are"
        rest = rng.choice(ADJECTIVES) if tail == "state" else f"in the {rng.choice(PLACES)}"
    return Document(
        "agreement", story, (Question("", (f"{one} {rest}", f"{many} {rest}"), int(plural)),)
    )


def _where(rng: random.Random, prompt: str, right: str, visited: list[str]) -> Question:
    others = list(dict.fromkeys([*reversed(visited), *rng.sample(PLACES, len(PLACES))]))
    wrong = [f"in the {place}" for place in others if place != right][:3]
    return choose(rng, prompt, f"in the {right}", wrong)


def places(rng: random.Random, split: Split) -> Document:
    """Say where people are who moved once: the first step towards ``location``."""
    people = rng.sample(NAMES, rng.randint(2, 5))
    at = {person: rng.choice(PLACES) for person in people}
    told = " ".join(f"{person} went to the {place}." for person, place in at.items())
    asked = [*rng.sample(people, len(people)), rng.choice(people)]
    questions = [
        _where(rng, f"where is {person}?", at[person], list(at.values())) for person in asked
    ]
    return Document("places", told, tuple(questions))


def location(rng: random.Random, split: Split) -> Document:
    """Say where a person is: the last of that person's moves among those of others."""
    people = rng.sample(NAMES, rng.randint(2, 3 if split == "train" else 4))
    places = rng.sample(PLACES, 5)
    more = rng.randint(1, 5) if split == "train" else 4
    moves = people + [rng.choice(people) for _ in range(more)]
    rng.shuffle(moves)
    at: dict[str, str] = {}
    told = []
    for person in moves:
        at[person] = rng.choice([place for place in places if place != at.get(person)])
        told.append(f"{person} went to the {at[person]}.")
    questions = [_where(rng, f"where is {person}?", at[person], list(at.values())) for person in at]
    rng.shuffle(questions)
    return Document("location", " ".join(told), tuple(questions[: 1 if split == "eval" else 4]))


class _World:
    """People who walk, take and drop things; ``told`` is what a reader is told."""

    def __init__(self, rng: random.Random, people: list[str], things: list[str]) -> None:
        self.rng = rng
        self.at: dict[str, str] = {}
        self.holder: dict[str, str | None] = dict.fromkeys(things)
        self.lies: dict[str, str] = {}
        self.told: list[str] = []
        self.visited: list[str] = []
        self.places = rng.sample(PLACES, 5)
        for person in people:
            self.move(person)

    def move(self, person: str) -> None:
        place = self.rng.choice([place for place in self.places if place != self.at.get(person)])
        self.at[person] = place
        self.visited.append(place)
        self.told.append(f"{person} went to the {place}.")

    def take(self, person: str, thing: str) -> None:
        self.holder[thing] = person
        self.told.append(f"{person} took the {thing}.")

    def drop(self, thing: str) -> None:
        person = self.holder[thing]
        if person is not None:
            self.holder[thing] = None
            self.lies[thing] = self.at[person]
            self.told.append(f"{person} dropped the {thing}.")

    def place_of(self, thing: str) -> str:
        person = self.holder[thing]
        return self.lies[thing] if person is None else self.at[person]


def carry(rng: random.Random, split: Split) -> Document:
    """Say where a thing is: who took it, where they went, whether they dropped it before."""
    people = rng.sample(NAMES, 2 if split == "train" and rng.random() < 0.5 else 3)
    things = rng.sample(list(OBJECTS), rng.randint(1, 2) if split == "train" else 2)
    world = _World(rng, people, things)
    holders = dict(zip(things, rng.sample(people, len(things)), strict=True))
    for thing, person in holders.items():
        world.take(person, thing)
    for _ in range(rng.randint(1, 4) if split == "train" else rng.randint(3, 4)):
        event = rng.random()
        held = [thing for thing in things if world.holder[thing]]
        if event < 0.3 and held:
            world.drop(rng.choice(held))
        else:
            world.move(rng.choice(people))
    asked = [(f"where is the {thing}?", world.place_of(thing)) for thing in things]
    if split == "train":
        asked += [(f"where is {person}?", world.at[person]) for person in people[:2]]
    rng.shuffle(asked)
    questions = [_where(rng, prompt, place, world.visited) for prompt, place in asked]
    kept = questions[: 1 if split == "eval" else 4]
    return Document("carry", " ".join(world.told), tuple(kept))


def _four(rng: random.Random, colors: list[str], things: list[str], gold: int) -> Question:
    """The four crossings of two colors and two things; ``gold`` pairs the first or the second."""
    crossings = [f"a {color} {thing}" for color in colors for thing in things]
    right = f"a {colors[gold]} {things[gold]}"
    return choose(rng, "", right, [crossing for crossing in crossings if crossing != right])


def _gift(rng: random.Random) -> tuple[str, Question]:
    first, second, giver = rng.sample(NAMES, 3)
    colors, things = rng.sample(COLORS, 2), rng.sample(list(OBJECTS), 2)
    gold = rng.randrange(2)
    told = (
        f"{first} wanted a {colors[0]} {things[0]}, but {second} wanted a {colors[1]} {things[1]}. "
        f"{giver} went to the market to find a gift. "
        f"{giver} likes {(first, second)[gold]}, and gave {(first, second)[gold]}"
    )
    return told, _four(rng, colors, things, gold)


def _lost(rng: random.Random) -> tuple[str, Question]:
    first, second = rng.sample(NAMES, 2)
    colors, things, places = (
        rng.sample(COLORS, 2),
        rng.sample(list(OBJECTS), 2),
        rng.sample(PLACES, 3),
    )
    gold = rng.randrange(2)
    told = (
        f"{first} lost a {colors[0]} {things[0]} in the {places[0]}. "
        f"{second} lost a {colors[1]} {things[1]} in the {places[1]}. "
        f"{first} looked in the {places[2]}, but it was not there. "
        f"then {rng.choice([first, second])} looked in the {places[gold]} and found"
    )
    return told, _four(rng, colors, things, gold)


def _bring(rng: random.Random) -> tuple[str, Question]:
    first, second = rng.sample(NAMES, 2)
    colors, things, places = (
        rng.sample(COLORS, 2),
        rng.sample(list(OBJECTS), 2),
        rng.sample(PLACES, 2),
    )
    gold = rng.randrange(2)
    told = (
        f"{first} bought a {colors[0]} {things[0]} and went to the {places[0]}. "
        f"{second} bought a {colors[1]} {things[1]} and went to the {places[1]}. "
        f"at last {(first, second)[gold]} went home from the {places[gold]} with"
    )
    return told, _four(rng, colors, things, gold)


def story(rng: random.Random, split: Split) -> Document:
    """End a story with what an earlier sentence said of the person or the place."""
    told, question = rng.choice([_gift, _lost, _bring])(rng)
    return Document("story", told, (question,))
