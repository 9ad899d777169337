"""Which quantity a run's samples allow: engines record different things about a choice."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from streamline_bench.errors import SamplesError
from streamline_bench.stability.metrics import Quantity
from streamline_bench.stability.settings import Settings

__all__ = ["with_recorded_quantity"]


def with_recorded_quantity(settings: Settings, frame: pd.DataFrame) -> Settings:
    """Settings whose quantity is chosen: the given one, or else what the rows record.

    That is ``mean_token_nll`` where the engine gives it (OpenCompass' PPL, which the paper's
    numbers were made from), ``nll_per_byte`` where the scored text is known (lm-eval), and ``nll``
    where only the log-likelihood is (OpenCompass' LL).

    Args:
        frame: rows of the dense run that are to be compared.

    Raises:
        SamplesError: its tasks record different things, so that one must be chosen.
    """
    if settings.quantity is not None:
        return settings
    found: dict[Quantity, str] = {}
    rows = frame.drop_duplicates("task")
    for task, choices, mean, sizes in zip(
        rows["task"], rows["choices"], rows["mean_nll"], rows["byte_lengths"], strict=True
    ):
        if isinstance(choices, list) and len(choices) > 1:
            found.setdefault(_recorded(mean, sizes), str(task))
    if len(found) > 1:
        named = ", ".join(f"{quantity} of '{task}'" for quantity, task in found.items())
        raise SamplesError(
            f"The tasks record different quantities ({named}), whose stability must not be "
            "averaged; compare them apart (--task)."
        )
    return replace(settings, quantity=next(iter(found), None))


def _recorded(mean: object, sizes: object) -> Quantity:
    if isinstance(mean, list):
        return "mean_token_nll"
    return "nll_per_byte" if isinstance(sizes, list) else "nll"
