"""The answers of a row to read: right in the dense run and wrong now."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from streamline_bench.report.scores import Flip
from streamline_bench.stability.align import AlignedPairs

_PROMPT_CHARACTERS = 900
_TEXT_CHARACTERS = 400


def worst_flips(pairs: AlignedPairs, verdict: str, limit: int = 8) -> list[Flip]:
    """Return at most ``limit`` answers that were right in the dense run and are wrong now.

    Choices come first, by how far the share of the right choice fell; then generated answers in
    the order of the documents, at least two of them where there are any. Of a task with several
    filters only the first one counts, so that no document is listed twice.
    """
    right = pairs.dense[verdict].fillna(False).to_numpy(dtype=np.bool_)
    wrong = (~pairs.pruned[verdict].fillna(True)).to_numpy(dtype=np.bool_)
    first = pairs.dense["task"].map(pairs.first_filters)
    index = np.flatnonzero(right & wrong & (pairs.dense["filter"] == first).to_numpy(np.bool_))
    drops = _drops(pairs, index)
    sure = sorted(
        (place for place, drop in drops.items() if drop is not None),
        key=lambda place: -(drops[place] or 0.0),
    )
    others = [place for place, drop in drops.items() if drop is None]
    kept = min(len(others), max(2, limit - len(sure)))
    places = [*sure[: limit - kept], *others[:kept]]
    before, after = (frame.iloc[places].itertuples() for frame in (pairs.dense, pairs.pruned))
    return [
        _flip(dense, pruned, drops[place])
        for place, dense, pruned in zip(places, before, after, strict=True)
    ]


def _drops(pairs: AlignedPairs, index: npt.NDArray[np.intp]) -> dict[int, float | None]:
    """Row -> by how much the share of the right choice fell; None where there are no choices."""
    columns = [
        frame[name].to_numpy()[index]
        for frame, name in (
            (pairs.dense, "gold"),
            (pairs.dense, "loglikelihoods"),
            (pairs.pruned, "loglikelihoods"),
        )
    ]
    drops: dict[int, float | None] = {}
    for place, value, dense, pruned in zip(index.tolist(), *columns, strict=True):
        gold, before, after = _index(value), _shares(dense), _shares(pruned)
        drops[place] = None
        if gold is not None and before is not None and after is not None:
            drops[place] = round(before[gold] - after[gold], 4)
    return drops


def _flip(dense: Any, pruned: Any, drop: float | None) -> Flip:
    """From one row of either table, as named tuples."""
    before, after = _shares(dense.loglikelihoods), _shares(pruned.loglikelihoods)
    choices = dense.choices
    has_choices = isinstance(choices, list) and len(choices) > 1
    return Flip(
        task=dense.task,
        doc_id=int(dense.doc_id),
        prompt=_end(dense.prompt),
        choices=[_start(choice) for choice in choices] if has_choices else None,
        gold=_index(dense.gold),
        target=_start(dense.target),
        dense_choice=_index(dense.prediction),
        pruned_choice=_index(pruned.prediction),
        dense_shares=before if has_choices else None,
        pruned_shares=after if has_choices else None,
        dense_text=_text(dense.text),
        pruned_text=_text(pruned.text),
        drop=drop,
    )


def _index(value: Any) -> int | None:
    return None if pd.isna(value) else int(value)


def _text(value: Any) -> str | None:
    return _start(value) if isinstance(value, str) else None


def _shares(loglikelihoods: Any) -> list[float] | None:
    if not isinstance(loglikelihoods, list) or len(loglikelihoods) < 2:
        return None
    values = np.exp(np.array(loglikelihoods) - max(loglikelihoods))
    return [round(float(value), 4) for value in values / values.sum()]


def _start(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]} […]"


def _end(text: str) -> str:
    """The end of a prompt is the question; few-shot examples come before it."""
    return text if len(text) <= _PROMPT_CHARACTERS else f"[…] {text[-_PROMPT_CHARACTERS:]}"
