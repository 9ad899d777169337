"""Selections by patches: what every patch adds, one table per healing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamline_bench.report import text
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.places import Gain


@dataclass(frozen=True)
class Pivot:
    """One table.

    Attributes:
        healing: how all its rows are trained.
        patches: the columns.
        lines: selection, size, label of the row without a patch, and the gains of each column.
    """

    healing: str
    patches: Sequence[str]
    lines: Sequence[tuple[str, str, str, Sequence[Sequence[Gain]]]]

    @property
    def name(self) -> str:
        """What the table is of."""
        if self.healing != "none":
            return f"healed by {self.healing}"
        return "without training the whole model"


def pivots(board: Leaderboard) -> list[Pivot]:
    """Arrange the gains of a board; empty where no two rows share a selection."""
    return [
        _pivot(healing, [gain for gain in board.gains if gain.parts.healing == healing])
        for healing in dict.fromkeys(gain.parts.healing for gain in board.gains)
    ]


def _pivot(healing: str, gains: Sequence[Gain]) -> Pivot:
    patches = sorted({gain.parts.patch for gain in gains})
    places = dict.fromkeys((gain.parts.selection, gain.size, gain.without) for gain in gains)
    return Pivot(
        healing,
        patches,
        [
            (
                *place,
                [
                    [
                        gain
                        for gain in gains
                        if (gain.parts.selection, gain.size, gain.without) == place
                        and gain.parts.patch == patch
                    ]
                    for patch in patches
                ],
            )
            for place in places
        ],
    )


def gain_text(gain: Gain) -> str:
    """The changes of accuracy in points and of token KL with their intervals."""
    change = text.with_interval(gain.test.difference, signed=True) if gain.test else ""
    kl = ""
    if gain.token_kl and gain.token_kl_without:
        numbers = (gain.token_kl_without, gain.token_kl)
        kl = "KL " + " to ".join(text.decimal(found.value) for found in numbers)
        if gain.token_kl_change and gain.token_kl_change.low is not None:
            change_of_kl = text.decimal(gain.token_kl_change.value, signed=True)
            kl += f" ({change_of_kl} {text.nats(gain.token_kl_change, signed=True)})"
    return ", ".join(filter(None, (change, kl)))


def table(pivot: Pivot) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of a table, as plain text."""
    head = ["selection", "size", *pivot.patches]
    lines = [
        [selection, size, *("; ".join(map(gain_text, cell)) or text.MISSING for cell in cells)]
        for selection, size, _, cells in pivot.lines
    ]
    return head, lines


def note(board: Leaderboard) -> str:
    """What the numbers of the tables mean."""
    found = []
    if any(gain.test for gain in board.gains):
        found.append(
            "Change of accuracy in points, against the same selection without a patch on the same "
            f"documents: mean over tasks, with {board.level} interval."
        )
    if any(gain.token_kl and gain.token_kl_without for gain in board.gains):
        found.append("KL: per token to the dense model, in nats, without and with the patch.")
    if any(gain.token_kl_change and gain.token_kl_change.low is not None for gain in board.gains):
        found.append(
            f"Its change with {board.level} interval, paired by document of the text (Student)."
        )
    return " ".join(found)
