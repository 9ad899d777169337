"""Which layers go: one scan per compression, then one block or several from its matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.scan.scan import scan
from streamline_bench.core.scan.similarity import Block, LastState, Metric, Similarity
from streamline_bench.core.surgery.layers import block_keep
from streamline_bench.errors import SparsityError
from streamline_bench.methods.base import Compression

__all__ = ["SIMILARITY_FILE", "block_at", "merge_adjacent", "non_overlapping", "scan_once"]

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
