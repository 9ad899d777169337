"""Names in a picture: each point has one at most, points that cover each other share one."""

from __future__ import annotations

from itertools import combinations
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from streamline_bench.report.figures.labels import Box, Label, Place, labels

FRAME = Box(0, 0, 1000, 400)


def written(label: Label) -> tuple[str, tuple[float, float, float, float]]:
    """The words, and the room they take: 6.4 by 14 for a letter, around the anchor."""
    text = ElementTree.fromstring(f"<g>{label.svg}</g>").find("text")
    assert text is not None and text.text
    width, at, middle = 6.4 * len(text.text), float(text.get("x", "")), float(text.get("y", "")) - 4
    anchor = (text.get("class") or "").split()[0]
    left = at - {"label": 0, "mid": width / 2, "end": width}[anchor]
    return text.text, (left, middle - 7, left + width, middle + 7)


def test_points_that_cover_each_other_are_named_by_one_label() -> None:
    places = [Place(0, "alone", 500, 100), *(Place(n, f"row_{n}", 200 + n, 300) for n in (1, 2, 3))]
    found = labels(places, [], FRAME)
    assert [(label.rows, written(label)[0]) for label in found] == [
        ((0,), "alone"), ((1, 2, 3), "row_1, row_2, row_3"),
    ]  # fmt: skip
    many = [Place(n, f"a_long_name_{n:02}", 500, 200) for n in range(9)]
    (label,) = labels(many, [], FRAME)
    assert label.rows == tuple(range(9))
    words = written(label)[0]
    named = words.count("a_long_name_")
    assert words.endswith(f" and {9 - named} more") and 2 <= named < 9


def test_what_must_have_a_name_has_one_by_itself() -> None:
    crowd = [Place(n, f"crowd_{n}", 300 + 12 * (n % 9), 150 + 12 * (n // 9)) for n in range(60)]
    marks = [Box(place.x - 6, place.y - 6, place.x + 6, place.y + 6) for place in crowd]
    best = [Place(60 + n, f"best_{n}", 340, 180, always=True) for n in range(3)]
    found = [label.rows for label in labels([*best, *crowd], marks, FRAME)]
    assert {60, 61, 62} <= {names[0] for names in found}
    assert not any({60, 61, 62} & set(names[1:]) for names in found)


@given(st.lists(st.tuples(st.integers(10, 990), st.integers(20, 380)), min_size=1, max_size=30))
def test_no_name_covers_another_or_leaves_the_frame(spots: list[tuple[int, int]]) -> None:
    places = [Place(n, f"point_{n}", x, y, n < 2) for n, (x, y) in enumerate(spots)]
    found = labels(places, [], FRAME)
    named = [index for label in found for index in label.rows]
    assert len(named) == len(set(named))
    boxes = [written(label)[1] for label in found]
    for box in boxes:
        assert box[0] >= -0.1 and box[2] <= 1000.1 and box[1] >= 0 and box[3] <= 400
    for one, two in combinations(boxes, 2):
        apart = min(one[2], two[2]) - max(one[0], two[0]), min(one[3], two[3]) - max(one[1], two[1])
        assert min(apart) < 0.2  # rounded to a tenth
