"""Names next to the points of a picture: none covers another, a point or a line.

Points whose marks cover each other are named by one label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

_LETTER = 6.4
"""Width of a label's letter in the picture's units, a little generous."""
_COVERED = 6.0
"""Marks whose centres are at most this far apart, across and up, cover each other."""
_RINGS = (26, 42, 60, 80, 104, 132, 164, 200)
"""Distances from a point at which its name may stand, at the end of a line."""


class Box(NamedTuple):
    """A part of the picture, in its units; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether a point lies in both."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def holds(self, other: Box) -> bool:
        """Whether all of the other lies in this one."""
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom


class Place(NamedTuple):
    """A point of the picture with its name and the number of its row.

    ``always``: it is named by itself, wherever it is.
    """

    row: int
    name: str
    x: float
    y: float
    always: bool = False


class Label(NamedTuple):
    """What is written, and the rows that it names."""

    rows: tuple[int, ...]
    svg: Markup


def labels(places: Sequence[Place], taken: Sequence[Box], frame: Box) -> list[Label]:
    """Write a name next to each point if there is room; the first points come first.

    Args:
        taken: what is drawn already.
        frame: where names may stand.
    """
    occupied, found = list(taken), []
    for together in _covering(places):
        rings = _RINGS if together[0].always else _RINGS[:4] if len(together) > 1 else ()
        if (svg := _written(together, rings, occupied, frame)) is not None:
            found.append(Label(tuple(place.row for place in together), svg))
    return found


def _covering(places: Sequence[Place]) -> list[list[Place]]:
    """The points in their order, each with those whose marks it covers."""
    found: list[list[Place]] = []
    for place in places:
        near = [
            group
            for group in found
            if abs(group[0].x - place.x) <= _COVERED and abs(group[0].y - place.y) <= _COVERED
        ]
        if near and not place.always:
            near[0].append(place)
        else:
            found.append([place])
    return found


def _written(
    together: Sequence[Place], rings: Sequence[int], occupied: list[Box], frame: Box
) -> Markup | None:
    """The label at the first free spot, which is occupied then; None without one."""
    name = _names([place.name for place in together])
    width = _LETTER * len(name)
    x, y = together[0].x, together[0].y
    for left, middle, anchor, line in [*_near(x, y, width), *_far(x, y, width, rings)]:
        box = Box(left, middle - 7, left + width, middle + 7)
        if frame.holds(box) and not any(box.overlaps(other) for other in occupied):
            occupied.append(box)
            at = left + {"": 0.0, "mid": width / 2, "end": width}[anchor]
            return Markup('{}<text class="{} label" x="{:.1f}" y="{:.1f}">{}</text>').format(
                Markup(line), anchor, at, middle + 4, name
            )
    return None


def _names(names: Sequence[str], most: int = 60) -> str:
    """One name, shortened if need be; of several, as many as fit into ``most`` letters."""
    first, *others = (name if len(name) <= 28 else f"{name[:27]}\u2026" for name in names)
    text = first
    for number, name in enumerate(others):
        if len(text) + len(name) > most:
            return f"{text} and {len(others) - number} more"
        text += f", {name}"
    return text


_Spot = tuple[float, float, str, str]
"""Left end and middle of a name, its anchor, and the line that leads to it."""


def _near(x: float, y: float, width: float) -> list[_Spot]:
    return [
        (x + 9, y, "", ""),
        (x - 9 - width, y, "end", ""),
        (x - width / 2, y - 15, "mid", ""),
        (x - width / 2, y + 15, "mid", ""),
        (x + 8, y - 12, "", ""),
        (x - 8 - width, y - 12, "end", ""),
    ]


def _far(x: float, y: float, width: float, rings: Sequence[int]) -> list[_Spot]:
    found = []
    for ring in rings:
        for across, down in ((0.7, -0.7), (-0.7, -0.7), (0.7, 0.7), (-0.7, 0.7), (0, -1), (0, 1)):
            end, middle = x + across * ring, y + down * ring
            left = end + 3 if across > 0 else end - 3 - width if across < 0 else end - width / 2
            anchor = "" if across > 0 else "end" if across < 0 else "mid"
            touch = middle if across else middle - 8 * down
            line = f'<path class="leader" d="M{x:.1f} {y:.1f}L{end:.1f} {touch:.1f}"/>'
            found.append((left, middle, anchor, line))
    return found
