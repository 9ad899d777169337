"""From one score per layer to the layers that go: what all one-shot rankings share."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.core.scan.scan import scan
from streamline_bench.core.scan.similarity import Block, LastState, Metric, Similarity
from streamline_bench.core.surgery.layers import block_keep
from streamline_bench.errors import NumericsError, SparsityError
from streamline_bench.methods.base import Compression

__all__ = [
    "SIMILARITY_FILE",
    "ProtectedEnds",
    "block_at",
    "merge_adjacent",
    "non_overlapping",
    "proportional_ends",
    "record",
    "scan_once",
    "select_lowest",
]

log = logging.getLogger(__name__)


def proportional_ends(depth: int) -> tuple[int, int]:
    """Return how many layers at either end stay: 4 and 2 of 32 or more, in proportion below."""
    return min(4, math.ceil(depth / 8)), min(2, math.ceil(depth / 16))


class ProtectedEnds(Frozen):
    """Parameters of methods that leave the ends of the model alone.

    Attributes:
        protect_first: the first so many layers are never removed.
        protect_last: the last so many layers are never removed.

    None is in proportion to the depth, see :func:`proportional_ends`, and gives way, the last
    layers first, where more layers are to go than that leaves.
    """

    protect_first: int | None = Field(0, ge=0)
    protect_last: int | None = Field(0, ge=0)

    def candidates(self, num_layers: int, n: int) -> range:
        """Return the layers that may be removed, and log which may not.

        Raises:
            SparsityError: they are fewer than the ``n`` that are to go.
        """
        first, last = self._ends(num_layers, n)
        allowed = range(first, num_layers - last)
        if len(allowed) < n:
            raise SparsityError(
                f"{n} of {num_layers} layers are to be removed, and with protect_first={first} and "
                f"protect_last={last} only {len(allowed)} may be; protect fewer layers or remove "
                "fewer."
            )
        if first or last:
            log.info(
                "protected: the first %d and the last %d of %d layers", first, last, num_layers
            )
        if len(allowed) == n:
            log.warning(
                "All %d layers that may be removed are to go, so that nothing is left to choose; "
                "protect fewer layers or remove fewer.",
                n,
            )
        return allowed

    @staticmethod
    def protected(candidates: range, num_layers: int) -> dict[str, int]:
        """Return what a manifest tells of the ends: how many layers of each were protected."""
        return {"first": candidates.start, "last": num_layers - candidates.stop}

    def _ends(self, num_layers: int, n: int) -> tuple[int, int]:
        first, last = proportional_ends(num_layers)
        spare = max(0, num_layers - n)
        first = min(first, spare) if self.protect_first is None else self.protect_first
        last = min(last, max(0, spare - first)) if self.protect_last is None else self.protect_last
        return first, last


def select_lowest(scores: Mapping[int, float], n: int) -> list[int]:
    """Return the ``n`` layers of lowest score, lowest first; of equals the shallower first.

    Raises:
        NumericsError: a score is NaN or infinite; the layer is named.
        SparsityError: there are fewer than ``n`` layers.
    """
    for layer, score in scores.items():
        if not math.isfinite(score):
            raise NumericsError(
                f"The score of layer {layer} is {score}; check the weights, or try another dtype."
            )
    if n > len(scores):
        raise SparsityError(f"Cannot remove {n} of {len(scores)} scored layers; remove fewer.")
    return sorted(scores, key=lambda layer: (scores[layer], layer))[:n]


def record(scores: Mapping[int, float], removed: list[int], what: str) -> dict[str, Any]:
    """Return what a manifest tells of a ranking: the scores, and the order of removal."""
    return {
        "score": what,
        "order": list(removed),
        "scores": {str(layer): float(score) for layer, score in scores.items()},
    }


SIMILARITY_FILE = "similarity.json"


def scan_once(work: Compression, tokens: CalibrationTokens, last_state: LastState) -> Similarity:
    """Scan, or take up the scan that an interrupted attempt of the same recipe left behind."""
    path = work.work / SIMILARITY_FILE
    if path.exists():
        return Similarity.load(path)
    similarity = scan(work.model, tokens, last_state=last_state, progress=work.progress)
    similarity.save(path)
    return similarity


def block_at(similarity: Similarity, start: int, n: int, metric: Metric) -> Block:
    """Return the block of ``n`` layers that the user asked for, with its score.

    Raises:
        SparsityError: it leaves the model.
    """
    block_keep(similarity.num_layers, start, n)
    return Block(start, n, float(similarity.scores(n, metric)[start]), metric)


def non_overlapping(similarity: Similarity, n: int, count: int, metric: Metric) -> list[Block]:
    """Return ``count`` blocks of ``n`` layers, taken greedily best first, ordered by place.

    Layer 0 is never part of one (ReplaceMe, arXiv 2505.02819: distances begin at ``h_1``).

    Raises:
        SparsityError: fewer blocks fit beside those that were taken.
    """
    scores = similarity.scores(n, metric)
    costs: Any = -scores if metric == "cosine" else scores
    taken: list[Block] = []
    for start in 1 + np.argsort(costs[1:], kind="stable"):
        if len(taken) < count and all(start + n <= b.start or start >= b.stop for b in taken):
            taken.append(Block(int(start), n, float(scores[start]), metric))
    if len(taken) < count:
        raise SparsityError(
            f"Only {len(taken)} blocks of {n} layers without layer 0 fit into "
            f"{similarity.num_layers} layers beside each other, and {count} were asked for; take "
            "fewer blocks or remove fewer layers."
        )
    return sorted(taken, key=lambda block: block.start)


def merge_adjacent(blocks: list[Block], similarity: Similarity) -> list[Block]:
    """Return the blocks with neighbours joined into one; scores are those of the joined ends."""
    merged: list[Block] = []
    for block in blocks:
        if merged and merged[-1].stop == block.start:
            joined = merged.pop()
            block = block_at(similarity, joined.start, joined.n + block.n, block.metric)
        merged.append(block)
    return merged
