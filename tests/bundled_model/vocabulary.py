"""The words of the demonstration language: plain data, one list per kind of thing.

Every word is one token. Text is lower case except for names; punctuation clings to the word
before it ("where is Tom? in the park.").
"""

from __future__ import annotations

NAMES: tuple[str, ...] = tuple(
    "Tom Anna Ben Mia Leo Eva Sam Ida Max Zoe Jim Amy Dan Liz Rob Sue "
    "Tim Kate Paul Rosa Hugo Nina Otto Vera Carl Lena Fred Ella Noah Ruth Ivan June".split()
)
COLORS: tuple[str, ...] = tuple("red blue green yellow black white brown pink gray purple".split())
PLACES: tuple[str, ...] = tuple(
    "kitchen garden school market park forest valley cellar harbor station library barn".split()
)
ADJECTIVES: tuple[str, ...] = tuple("old new clean dirty big small heavy light".split())
NUMBERS: tuple[str, ...] = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty".split()
)

# singular -> plural
OBJECTS: dict[str, str] = {
    one: one + "s"
    for one in "ball hat cup book key lamp chair coat bag boat drum kite ring bell doll pen".split()
} | {"box": "boxes", "knife": "knives"}
FRUITS: dict[str, str] = {
    word: word + "s" for word in "apple pear plum lemon melon banana nut fig".split()
}
ANIMALS: dict[str, str] = {
    word: word + "s" for word in "cat dog horse cow goat duck hen frog bird rabbit".split()
} | {"mouse": "mice", "sheep": "sheep"}
PEOPLE: dict[str, str] = {
    word: word + "s" for word in "baker farmer teacher doctor sailor singer driver painter".split()
}
# third person singular -> plural
VERBS: dict[str, str] = {
    word + "s": word for word in "sing run jump sleep play wait swim dance work eat".split()
}
# quality -> (comparative, superlative, opposite comparative, opposite superlative)
SCALES: tuple[tuple[str, str, str, str], ...] = (
    ("taller", "tallest", "shorter", "shortest"),
    ("older", "oldest", "younger", "youngest"),
    ("faster", "fastest", "slower", "slowest"),
    ("richer", "richest", "poorer", "poorest"),
)
PUNCTUATION: tuple[str, ...] = (".", ",", "?", ":")
_FUNCTION_WORDS = (
    "a the of in to and or but is are has have does than who what where how many more fewer "
    "color same as yes no coins basket there went took dropped gave gets loses list things near "
    "behind with that likes like wanted bought lost looked found it not at last home from then "
    "too market for gift find was again"
)

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL_TOKENS: tuple[str, ...] = (PAD, BOS, EOS, UNK)


def tokens() -> list[str]:
    """All tokens in id order: special tokens, punctuation, then words in order of first mention."""
    words: list[str] = [*_FUNCTION_WORDS.split(), *NAMES, *COLORS, *PLACES, *ADJECTIVES, *NUMBERS]
    for forms in (OBJECTS, FRUITS, ANIMALS, PEOPLE, VERBS):
        for one, many in forms.items():
            words += [one, many]
    for scale in SCALES:
        words += scale
    return list(dict.fromkeys([*SPECIAL_TOKENS, *PUNCTUATION, *words]))
