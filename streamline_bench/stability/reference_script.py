"""What the script published with the paper does differently with OpenCompass' predictions.

Its arithmetic is :data:`streamline_bench.stability.metrics.Mode` ``reference_script``. Its verdicts
are here: a prediction is right if it equals the gold without any conversion, so that an answer
``0`` to a gold ``"0"`` counts as wrong for both models, and the models agree on it.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from streamline_bench.stability.align import AlignedPairs
from streamline_bench.stability.settings import Settings

__all__ = ["with_script_verdicts"]


def with_script_verdicts(pairs: AlignedPairs, settings: Settings) -> AlignedPairs:
    """The pairs with the script's verdicts, where its mode is asked for and they are recorded."""
    if settings.mode != "reference_script" or settings.verdict != "correct":
        return pairs
    return replace(pairs, dense=_strict(pairs.dense), pruned=_strict(pairs.pruned))


def _strict(frame: pd.DataFrame) -> pd.DataFrame:
    same = [metrics.get("same_value") for metrics in frame["metrics"]]
    known = pd.Series(same, index=frame.index, dtype="Float64").astype("boolean")
    metric = frame["verdict_metric"].mask(known.notna().to_numpy(), "same value")
    strict: pd.DataFrame = frame.assign(
        correct=known.fillna(frame["correct"]), verdict_metric=metric
    )
    return strict
