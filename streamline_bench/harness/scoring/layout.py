"""How one set of requests is laid out; models that accept the same layout share the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamline_bench.harness.scoring.packing import PackedRow, Query, build_rows, make_batches

__all__ = ["Layout", "Layouts"]


@dataclass(frozen=True)
class Layout:
    """What a model decides about the rows and batches it is given.

    Attributes:
        share_up_to: inputs longer than this share a row with equal inputs only.
        pair_cost: cost of comparing two tokens, relative to computing one.
        batch_positions: positions per batch that the LM head is computed on.
    """

    share_up_to: int
    pair_cost: float
    batch_positions: int


class Layouts:
    """The rows and batches of one set of queries, made once per layout.

    Args:
        batch_tokens: padded tokens per batch, and at most so many in a branching row.
    """

    def __init__(self, queries: Sequence[Query], *, batch_tokens: int) -> None:
        self._queries = queries
        self._batch_tokens = batch_tokens
        self._rows: dict[Layout, list[PackedRow]] = {}
        self._batches: dict[Layout, list[list[PackedRow]]] = {}

    def rows(self, layout: Layout) -> list[PackedRow]:
        """Return the rows of a layout; see :func:`.packing.build_rows`."""
        if layout not in self._rows:
            self._rows[layout] = build_rows(
                self._queries,
                share_up_to=layout.share_up_to,
                row_tokens=self._batch_tokens,
                pair_cost=layout.pair_cost,
            )
        return self._rows[layout]

    def batches(self, layout: Layout) -> list[list[PackedRow]]:
        """Return the batches of a layout; see :func:`.packing.make_batches`."""
        if layout not in self._batches:
            self._batches[layout] = list(
                make_batches(
                    self.rows(layout),
                    batch_tokens=self._batch_tokens,
                    batch_positions=layout.batch_positions,
                )
            )
        return self._batches[layout]
