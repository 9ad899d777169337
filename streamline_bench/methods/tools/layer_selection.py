"""Which layers are removed: from one score per layer, or blocks from the similarity of one scan."""

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
    layers first, where more layers have to be removed than that leaves.
    """

    protect_first: int | None = Field(0, ge=0)
    protect_last: int | None = Field(0, ge=0)

    def candidates(self, num_layers: int, n: int) -> range:
        """Return the layers that may be removed, and log which may not.

        Raises:
            SparsityError: they are fewer than the ``n`` to remove.
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
                "All %d layers that may be removed are removed, so that there is no choice; "
                "protect fewer layers or remove fewer.",
                n,
            )
        return allowed

    @staticmethod
    def protected(candidates: range, num_layers: int) -> dict[str, int]:
        """Return for the manifest how many layers at each end were protected."""
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


SIMILARITY_FILE = "similarity.json"


def scan_once(work: Compression, tokens: CalibrationTokens, last_state: LastState) -> Similarity:
    """Scan, or take up the scan that an interrupted attempt of the same recipe left behind."""
    path = work.work / SIMILARITY_FILE
    if path.exists():
        return Similarity.load(path)
    similarity = scan(work.model, tokens, last_state=last_state, progress=work.progress)
    similarity.save(path)
    return similarity


def scan_artefact(work: Compression) -> dict[str, str]:
    """Return the file of the scan, to be written beside the weights; empty without a scan."""
    path = work.work / SIMILARITY_FILE
    return {SIMILARITY_FILE: path.read_text(encoding="utf-8")} if path.exists() else {}


class BlockSearch(Frozen):
    """Parameters of methods that replace one block of layers.

    Attributes:
        metric: how blocks are ranked: mean cosine of all tokens, or the angular distance of the
            last token.
        last_state: the state after the last layer, ``raw`` or after the final norm (as
            implementations that read ``output_hidden_states`` take it).
        start: take the block that starts at this layer instead of searching for it.
        allow_first_layer: let the block contain layer 0. No paper's rule forbids it, and on large
            models it never happens; on small ones it ruins the model.
    """

    metric: Metric = "cosine"
    last_state: LastState = "raw"
    start: int | None = Field(None, ge=0)
    allow_first_layer: bool = False

    def choose(self, similarity: Similarity, n: int) -> Block:
        """Return the block of ``n`` layers.

        Raises:
            SparsityError: it leaves the model.
        """
        if self.start is None:
            allow = self.allow_first_layer
            block = similarity.best_block(n, metric=self.metric, allow_first_layer=allow)
        else:
            block = block_at(similarity, self.start, n, self.metric)
        log.info("block: layers %d to %d", block.start, block.stop - 1)
        return block


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
        SparsityError: fewer blocks fit into the model.
    """
    scores = similarity.scores(n, metric)
    costs: Any = -scores if metric == "cosine" else scores
    taken: list[Block] = []
    for start in 1 + np.argsort(costs[1:], kind="stable"):
        if len(taken) < count and all(start + n <= b.start or start >= b.stop for b in taken):
            taken.append(Block(int(start), n, float(scores[start]), metric))
    if len(taken) < count:
        raise SparsityError(
            f"Only {len(taken)} separate blocks of {n} layers without layer 0 fit into "
            f"{similarity.num_layers} layers, and {count} were asked for; take fewer blocks or "
            "remove fewer layers."
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
