"""Every answer of the language is right by an independent reading of the text.

The brute-force readers below know no generator: each takes a story and a prompt and returns the
answer that the text implies.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable

import pytest
from bundled_model.language import Split, draw
from bundled_model.skills import BUILDERS
from bundled_model.vocabulary import ANIMALS, FRUITS, NUMBERS, OBJECTS, PEOPLE, SCALES

Reader = Callable[[str, str], str]


def _match(pattern: str, text: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, text)
    assert found is not None, (pattern, text)
    return found.groups()


def _color(story: str, person: str, thing: str) -> str:
    (color,) = re.findall(rf"\bthe {thing} of {person} is (\w+)\.", story)
    return str(color)


def attributes(story: str, prompt: str) -> str:
    thing, person = _match(r"what color is the (\w+) of (\w+)\?", prompt)
    return _color(story, person, thing)


def same(story: str, prompt: str) -> str:
    pattern = r"is the (\w+) of (\w+) the same color as the (\w+) of (\w+)\?"
    first, owner, second, other = _match(pattern, prompt)
    return "yes" if _color(story, owner, first) == _color(story, other, second) else "no"


def verify(story: str, prompt: str) -> str:
    thing, person, color = _match(r"is the (\w+) of (\w+) (\w+)\?", prompt)
    return "yes" if _color(story, person, thing) == color else "no"


def numbers(story: str, prompt: str) -> str:
    word, first, second = _match(r"what is (more|fewer), (\w+) or (\w+)\?", prompt)
    assert first in story
    assert second in story
    return (max if word == "more" else min)(first, second, key=NUMBERS.index)


def pairs(story: str, prompt: str) -> str:
    (person,) = _match(r"(\w+)\?", prompt)
    (word,) = re.findall(rf"\b{person} (\w+)", story)
    return str(word)


def recall(story: str, prompt: str) -> str:
    (person,) = _match(r"list the things of (\w+):", prompt)
    (owned,) = re.findall(rf"\b{person} has ([^.]*)\.", story)
    return str(owned)


def _coins(story: str) -> dict[str, int]:
    told = re.findall(r"(\w+) has (\w+) coins\.", story)
    return {person: NUMBERS.index(number) for person, number in told}


def compare(story: str, prompt: str) -> str:
    word, first, second = _match(r"who has (more|fewer) coins, (\w+) or (\w+)\?", prompt)
    coins = _coins(story)
    first_wins = (coins[first] > coins[second]) == (word == "more")
    return f"{first if first_wins else second} has {word} coins"


def counting(story: str, prompt: str) -> str:
    (many,) = _match(r"how many (\w+)\?", prompt)
    singular = {plural: one for one, plural in FRUITS.items()}[many]
    return NUMBERS[re.findall(r"\w+", story.split(":")[1]).count(singular)]


def _positions(story: str) -> tuple[dict[str, int], dict[str, tuple[int, str]]]:
    """Rank of every person, found by trying all orders, and what each word of the scale means."""
    meaning: dict[str, tuple[int, str]] = {}
    for more, most, less, least in SCALES:
        meaning |= {more: (1, "than"), less: (-1, "than"), most: (1, "end"), least: (-1, "end")}
    facts = re.findall(r"(\w+) is (\w+) than (\w+)\.", story)
    people = sorted({name for a, _, b in facts for name in (a, b)})
    fitting = []
    for ranks in itertools.permutations(range(len(people))):
        rank = dict(zip(people, ranks, strict=True))
        if all((rank[a] - rank[b]) * meaning[word][0] > 0 for a, word, b in facts):
            fitting.append(rank)
    assert len(fitting) == 1, story
    return fitting[0], meaning


def order(story: str, prompt: str) -> str:
    (word,) = _match(r"who is the (\w+)\?", prompt)
    rank, meaning = _positions(story)
    return max(rank, key=lambda person: rank[person] * meaning[word][0])


def transitive(story: str, prompt: str) -> str:
    first, word, second = _match(r"is (\w+) (\w+) than (\w+)\?", prompt)
    rank, meaning = _positions(story)
    return "yes" if (rank[first] - rank[second]) * meaning[word][0] > 0 else "no"


def arithmetic(story: str, prompt: str) -> str:
    (person,) = _match(r"how many coins does (\w+) have\?", prompt)
    total = _coins(story)[person]
    for verb, number in re.findall(rf"\b{person} (gets|loses) (\w+) coins\.", story):
        total += NUMBERS.index(number) * (1 if verb == "gets" else -1)
    return NUMBERS[total]


def whereabouts(story: str, prompt: str) -> str:
    """Replays the story sentence by sentence with one record per person and per thing."""
    asked = _match(r"where is (?:the )?(\w+)\?", prompt)[0]
    place: dict[str, str] = {}
    carried: dict[str, set[str]] = {}
    for sentence in re.findall(r"[^.]+\.", story):
        person, verb, rest = sentence.strip(" .").split(" ", 2)
        what = rest.rsplit(" ", 1)[-1]
        load = carried.setdefault(person, set())
        if verb == "went":
            place[person] = what
            place.update(dict.fromkeys(load, what))
        elif verb == "took":
            load.add(what)
            place[what] = place[person]
        else:
            assert verb == "dropped", sentence
            load.remove(what)
    return f"in the {place[asked]}"


READERS: dict[str, Reader] = {
    "arithmetic": arithmetic,
    "attributes": attributes,
    "carry": whereabouts,
    "compare": compare,
    "counting": counting,
    "location": whereabouts,
    "numbers": numbers,
    "order": order,
    "pairs": pairs,
    "places": whereabouts,
    "recall": recall,
    "same": same,
    "transitive": transitive,
    "verify": verify,
}


def agreement(story: str, choices: tuple[str, ...]) -> str:
    """The choice whose verb fits the number of the first noun."""
    plurals = {many for forms in (OBJECTS, ANIMALS, PEOPLE) for many in forms.values()}
    many = story.split()[1] in plurals
    plural_verbs = {"is": False, "are": True, "has": False, "have": True}
    fitting = []
    for choice in choices:
        verb = choice.split()[0]
        if plural_verbs.get(verb, not verb.endswith("s")) == many:
            fitting.append(choice)
    (right,) = fitting
    return right


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("skill", READERS)
def test_answers_agree_with_an_independent_reading(skill: str, split: Split) -> None:
    rng = random.Random(3)
    for document in (draw(BUILDERS[skill], rng, split) for _ in range(40)):
        for question in document.questions:
            assert READERS[skill](document.story, question.prompt) == question.answer, document.text


@pytest.mark.parametrize("split", ["train", "eval"])
def test_verbs_agree_with_the_first_noun(split: Split) -> None:
    rng = random.Random(4)
    for document in (draw(BUILDERS["agreement"], rng, split) for _ in range(100)):
        (question,) = document.questions
        assert agreement(document.story, question.choices) == question.answer, document.text


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_story_ends_with_one_of_its_own_things(split: Split) -> None:
    rng = random.Random(5)
    for document in (draw(BUILDERS["story"], rng, split) for _ in range(100)):
        (question,) = document.questions
        told = [choice for choice in question.choices if choice in document.story]
        assert question.answer in told, document.text
        # two choices were told; the other two cross their colors and things
        assert len(told) == 2, document.text
