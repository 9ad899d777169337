"""Scores token sequences: the same loglikelihoods as the stock harness, with less computed.

Contexts shared by several requests are encoded once (:mod:`.packing`), the LM head runs on the
positions that predict a continuation only (:mod:`.forward`), and the softmax is taken in float32
over these. Each short cut is checked against the model itself first (:mod:`.checks`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils.memory import should_reduce_batch_size
from tqdm import tqdm

from streamline_bench.errors import NumericsError
from streamline_bench.harness.checks import packing_objection, synthetic_row
from streamline_bench.harness.forward import Forward, target_logprobs, tensors_of
from streamline_bench.harness.packing import PackedRow, Query, build_rows, make_batches

__all__ = ["Answer", "TokenScorer"]

logger = logging.getLogger(__name__)

Answer = tuple[float, bool]
"""Summed log-probability of a continuation; whether greedy decoding would produce it."""

LOGITS_PER_BATCH = 2**26
"""At most this many logits at once (256 MB in float32), or those of one row."""


class TokenScorer:
    """Scores queries with one model.

    Args:
        forward: runs the model; its head has passed :func:`.checks.head_objection`.
        vocabulary: number of logits per position.
        hidden_size: width of the model; decides when a longer row costs more than it saves.
        window: attention window in tokens, beyond which rows do not branch; None if there is none.
        softmax_dtype: dtype of the softmax.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        vocabulary: int,
        hidden_size: int,
        window: int | None,
        softmax_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._forward = forward
        self._vocabulary = vocabulary
        self._softmax_dtype = softmax_dtype
        # One pair costs 4 d operations in attention, one token 24 d^2 in the matrices of a layer;
        # masked attention runs at about a third of the matrices' speed.
        self._pair_cost = 1 / (2 * hidden_size)
        self._row_limit: int | None = None
        self._share_up_to = self._initial_share(window)
        self._verified = 0

    @property
    def packs(self) -> bool:
        """Whether requests with a common beginning share a row."""
        return self._share_up_to > 0

    def _initial_share(self, window: int | None) -> int:
        objection = packing_objection(self._forward, synthetic_row(self._vocabulary))
        if objection:
            logger.info("Choices are scored one by one: packed behind one context, %s.", objection)
            return 0
        return window if window is not None else 2**31

    def score(
        self,
        queries: Sequence[Query],
        *,
        batch_tokens: int,
        on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
        progress: bool = True,
    ) -> list[Answer]:
        """Return the answers in the order of ``query.index`` (0 .. n - 1).

        Args:
            batch_tokens: padded tokens per forward pass; halved for good where memory runs out.
            on_answer: called with every answer as soon as it is there.

        Raises:
            NumericsError: a loglikelihood is NaN.
        """
        answers: list[Answer | None] = [None] * len(queries)
        with tqdm(
            total=len(queries), disable=not progress, desc="Running loglikelihood requests"
        ) as bar:
            for batch in self._batches(queries, batch_tokens):
                for index, answer in self._run(batch):
                    answers[index] = answer
                    on_answer(index, answer)
                    bar.update(1)
        return [answer for answer in answers if answer is not None]

    def _batches(self, queries: Sequence[Query], batch_tokens: int) -> list[list[PackedRow]]:
        rows = self._rows(queries, batch_tokens)
        branching = [row for row in rows if not row.is_chain]
        if branching and not self._verify(max(branching, key=_depth)):
            rows = self._rows(queries, batch_tokens)
        positions = max(1, LOGITS_PER_BATCH // self._vocabulary)
        return list(make_batches(rows, batch_tokens=batch_tokens, batch_positions=positions))

    def _rows(self, queries: Sequence[Query], batch_tokens: int) -> list[PackedRow]:
        return build_rows(
            queries,
            share_up_to=self._share_up_to,
            row_tokens=batch_tokens,
            pair_cost=self._pair_cost,
        )

    def _verify(self, row: PackedRow) -> bool:
        depth = _depth(row)
        if depth <= self._verified:
            return True
        objection = packing_objection(self._forward, row)
        if objection is None:
            self._verified = depth
            return True
        logger.info(
            "Choices of more than %d tokens are scored one by one: packed behind one context, %s.",
            self._verified,
            objection,
        )
        self._share_up_to = self._verified
        return False

    def _run(self, batch: list[PackedRow]) -> list[tuple[int, Answer]]:
        size = len(batch) * max(len(row) for row in batch)
        if self._row_limit is not None and size > self._row_limit and _can_split(batch):
            return [pair for half in _split(batch) for pair in self._run(half)]
        try:
            return self._answers(batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or not _can_split(batch):
                raise
            self._row_limit = size // 2
            logger.info("Out of memory at %d tokens; going on with half of that.", size)
        return [pair for half in _split(batch) for pair in self._run(half)]

    def _answers(self, batch: list[PackedRow]) -> list[tuple[int, Answer]]:
        tensors = tensors_of(batch)
        logits = self._forward.wanted_logits(tensors)
        scores, greedy = target_logprobs(logits, tensors, self._softmax_dtype)
        queries = [query for row in batch for query, _ in row.scored]
        owner = tensors.owner.numpy()
        sums = np.zeros(len(queries))
        np.add.at(sums, owner, scores.double().numpy())
        all_greedy = np.ones(len(queries), dtype=np.bool_)
        np.logical_and.at(all_greedy, owner, greedy.numpy())
        _refuse_nan(sums, queries)
        return [
            (query.index, (float(total), bool(best)))
            for query, total, best in zip(queries, sums, all_greedy, strict=True)
        ]


def _depth(row: PackedRow) -> int:
    return max(row.positions) + 1


def _can_split(batch: list[PackedRow]) -> bool:
    return len(batch) > 1 or not batch[0].is_chain


def _split(batch: list[PackedRow]) -> list[list[PackedRow]]:
    if len(batch) > 1:
        middle = len(batch) // 2
        return [batch[:middle], batch[middle:]]
    queries = [query for query, _ in batch[0].scored]
    rows = build_rows(queries, share_up_to=0, row_tokens=0, pair_cost=0.0)
    return [[row] for row in rows]


def _refuse_nan(sums: npt.NDArray[np.float64], queries: list[Query]) -> None:
    bad = np.isnan(sums)
    if bad.any():
        query = queries[int(bad.argmax())]
        raise NumericsError(
            f"The loglikelihood of request {query.index} ({len(query.inputs)} tokens) is NaN: "
            "the weights hold NaN, or the model overflows in this dtype; "
            "check the checkpoint or pass dtype=float32."
        )
