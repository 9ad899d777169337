"""What a patch adds to a selection: rows that differ in what stands in for the removed layers.

Each is held against the row of the same selection, size, healing and model without a patch, or the
row of the same weights that is shown for it. Two rows of one selection removed the same layers,
unless a patch takes room of its own; if they did not (another text was looked at), they are not
compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from streamline_bench.core.recipe.schema import MethodParts, Recipe
from streamline_bench.errors import RecipeError
from streamline_bench.methods.base import parts_of
from streamline_bench.report.places import Between, Folded, Gain
from streamline_bench.report.row import Row
from streamline_bench.report.standing import Entry, adjusted, between
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.intervals import mean_per_unit
from streamline_bench.stability.texts import MeasuredDivergence

NO_PATCH = "none"


@dataclass(frozen=True)
class _Part:
    """A row, or rows over seeds and calibrations as one, which have no ``text`` of their own."""

    label: str
    row: Row
    entry: Entry | None
    token_kl: Estimate | None
    text: MeasuredDivergence | None


def gains(
    rows: Sequence[Row], entries: Sequence[Entry], folded: Sequence[Folded], settings: Settings
) -> list[Gain]:
    """Return what every patch adds, by healing, selection and size.

    Args:
        rows: of the board.
        entries: those with verdicts, from :func:`~streamline_bench.report.standing.standing`.
        folded: rows over seeds and calibrations.
    """
    parts = _parts(rows, entries, folded)
    plain = {key: part for part in parts for key in _twin_keys(part.row)}
    plain |= {_key(part.row): part for part in parts if part.row.parts and not _patched(part.row)}
    pairs = [
        (part, plain[_key(part.row)])
        for part in parts
        if _patched(part.row) and _key(part.row) in plain
    ]
    pairs = [(part, without) for part, without in pairs if _same_layers(part.row, without.row)]
    tests = adjusted(
        [
            between(part.entry, without.entry, settings)
            for part, without in pairs
            if part.entry is not None and without.entry is not None
        ],
        settings,
    )
    by_names = {(test.first, test.second): test for test in tests}
    found = [_gain(part, without, by_names, settings) for part, without in pairs]
    return sorted(found, key=_place)


def _parts(rows: Sequence[Row], entries: Sequence[Entry], folded: Sequence[Folded]) -> list[_Part]:
    """Return what is compared: entries with verdicts, else rows that a text was measured with."""
    kl = {fold.label: fold.token_kl for fold in folded}
    found = [
        _Part(
            entry.label, entry.row, entry, kl.get(entry.label) or _token_kl(entry.row),
            None if entry.label in kl else _text(entry.row),
        )
        for entry in entries
    ]  # fmt: skip
    if not found:
        found = [
            _Part(row.label, row, None, _token_kl(row), _text(row))
            for row in rows
            if _token_kl(row)
        ]
    return found


def _token_kl(row: Row) -> Estimate | None:
    return row.divergence.kl if row.divergence else None


def _text(row: Row) -> MeasuredDivergence | None:
    found = row.divergence
    return found if isinstance(found, MeasuredDivergence) and found.by_document else None


def _kl_change(one: _Part, two: _Part, settings: Settings) -> Estimate | None:
    """The mean KL per token of one less that of the other, over the documents that both read."""
    if one.text is None or two.text is None:
        return None
    tokens, first = np.array(one.text.by_document).T
    others, second = np.array(two.text.by_document).T
    if one.text.window != two.text.window or not np.array_equal(tokens, others):
        return None
    return mean_per_unit(first - second, tokens, settings.confidence)


def _patched(row: Row) -> bool:
    return row.parts is not None and row.parts.patch != NO_PATCH


def _size(recipe: Mapping[str, Any] | None) -> str:
    recipe = recipe or {}
    if layers := recipe.get("n_layers"):
        return f"{layers} layers"
    share = recipe.get("sparsity")
    return f"{100 * share:g} %" if isinstance(share, float) else "the method's own"


def _key(row: Row) -> tuple[str | None, ...]:
    assert row.parts is not None
    return row.reference, row.parts.selection, row.parts.healing, _size(row.provenance.recipe)


def _twin_keys(row: Row) -> Iterator[tuple[str | None, ...]]:
    """The keys of rows without a patch that are shown with this one: other ways to its layers."""
    for twin in row.same_weights:
        parts = recipe_parts(twin.recipe or {})
        if parts is not None and parts.patch == NO_PATCH:
            yield row.reference, parts.selection, parts.healing, _size(twin.recipe)


def recipe_parts(recipe: Mapping[str, Any]) -> MethodParts | None:
    """Return a recipe in its parts; None of a recipe that this version does not know."""
    with suppress(ValidationError, RecipeError):
        return parts_of(Recipe.model_validate(recipe))
    return None


def _same_layers(one: Row, two: Row) -> bool:
    removed = [set(row.provenance.chosen.get("removed_layers") or ()) for row in (one, two)]
    return len(removed[0]) != len(removed[1]) or removed[0] == removed[1]


def _gain(
    part: _Part, without: _Part, tests: Mapping[tuple[str, str], Between], settings: Settings
) -> Gain:
    assert part.row.parts is not None
    return Gain(
        entry=part.label,
        without=without.label,
        parts=part.row.parts,
        size=_size(part.row.provenance.recipe),
        test=tests.get((part.label, without.label)),
        token_kl=part.token_kl,
        token_kl_without=without.token_kl,
        token_kl_change=_kl_change(part, without, settings),
    )


def _place(gain: Gain) -> tuple[str, ...]:
    parts = gain.parts
    return parts.healing, parts.selection, gain.size, parts.patch, gain.entry
