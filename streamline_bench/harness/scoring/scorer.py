"""Scores token sequences: the same loglikelihoods as the stock harness, with less computed.

Contexts shared by several requests are encoded once (:mod:`.packing`), the LM head runs on the
positions that predict a continuation only (:mod:`.forward`), and the softmax is taken in float32
over these. Each short cut is checked against the model itself first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from tqdm import tqdm

from streamline_bench.core.architecture import ANY_LENGTHS, RopeGroups
from streamline_bench.core.forward import fetched
from streamline_bench.errors import NumericsError
from streamline_bench.harness.scoring.forward import (
    BatchTensors,
    Forward,
    attention_window,
    head_objection,
    packing_objection,
    queries_of,
    synthetic_row,
    target_logprobs,
    tensors_of,
)
from streamline_bench.harness.scoring.packing import (
    Layout,
    Layouts,
    PackedRow,
    Query,
    build_rows,
    part_of,
)

logger = logging.getLogger(__name__)

Answer = tuple[float, bool]
"""Summed log-probability of a continuation; whether greedy decoding would produce it."""

Reading = Callable[[], list[tuple[int, Answer]]]
"""Waits for a batch: ``(query.index, answer)`` in the order of its queries."""

Result = TypeVar("Result")

_TRIED = 8
"""Queries of a row behind a prefix that a model is tried with."""

LOGITS_PER_BATCH = 2**26
"""At most this many logits at once (256 MB in float32), or those of one row."""


class TokenScorer:
    """Scores queries with one model.

    Args:
        forward: runs the model; its head has passed :func:`.forward.head_objection`.
        vocabulary: number of logits per position.
        hidden_size: width of the model; decides when a longer row costs more than it saves.
        window: attention window in tokens, beyond which rows do not branch; None if there is none.
        softmax_dtype: dtype of the softmax.
        groups: lengths that change each other's rotary frequencies: never together.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        vocabulary: int,
        hidden_size: int,
        window: int | None,
        softmax_dtype: torch.dtype = torch.float32,
        groups: RopeGroups = ANY_LENGTHS,
    ) -> None:
        self.groups = groups
        self._forward = forward
        self._vocabulary = vocabulary
        self._softmax_dtype = softmax_dtype
        # One pair costs 4 d operations in attention, one token 24 d^2 in the matrices of a layer;
        # masked attention runs at about a third of the matrices' speed.
        self._pair_cost = 1 / (2 * hidden_size)
        self._memory = HalvingBatches()
        self._share_up_to = self._initial_share(window)
        self._verified = 0
        self._prefixes = True
        self._verified_prefix = 0

    def _initial_share(self, window: int | None) -> int:
        objection = packing_objection(self._forward, synthetic_row(self._vocabulary))
        if objection:
            logger.info(
                "Choices are scored one by one. In one row behind their context, %s.", objection
            )
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
            batch_tokens: padded tokens per forward pass; halved when memory runs out.
            on_answer: called with every answer as soon as it is there.

        Raises:
            NumericsError: a loglikelihood is NaN.
        """
        answers: list[Answer | None] = [None] * len(queries)
        layouts = Layouts(queries, batch_tokens=batch_tokens)
        with tqdm(
            total=len(queries), disable=not progress, desc="Running loglikelihood requests"
        ) as bar:
            batches = layouts.batches(self.settle(layouts))
            for readings in one_ahead(partial(self._asked, batch) for batch in batches):
                for index, answer in (each for read in readings for each in read()):
                    answers[index] = answer
                    on_answer(index, answer)
                    bar.update(1)
        return [answer for answer in answers if answer is not None]

    def _asked(self, batch: list[PackedRow]) -> list[Reading]:
        return self._memory.run(batch, lambda rows: [self.ask(tensors_of(rows), queries_of(rows))])

    def settle(self, layouts: Layouts) -> Layout:
        """Return the layout that this model gives its own logits with, checking it if need be."""
        behind = [row for row in layouts.rows(self._layout) if row.prefix]
        if behind:
            self._verify_prefix(max(behind, key=lambda row: row.depth))
        branching = [r for r in layouts.rows(self._layout) if not (r.is_chain or r.prefix)]
        if branching:
            self._verify(max(branching, key=lambda row: row.depth))
        return self._layout

    @property
    def _layout(self) -> Layout:
        positions = max(1, LOGITS_PER_BATCH // self._vocabulary)
        return Layout(self._share_up_to, self._pair_cost, positions, self.groups, self._prefixes)

    def _verify_prefix(self, row: PackedRow) -> None:
        if row.depth <= self._verified_prefix:
            return
        count = _TRIED
        while not (tried := part_of(row, slice(count))).prefix:
            count *= 2  # those were equal
        objection = packing_objection(self._forward, tried)
        if objection is None:
            self._verified_prefix = row.depth
            return
        self._prefixes = False
        logger.info("Rows behind a long prefix have a mask. Without one, %s.", objection)

    def _verify(self, row: PackedRow) -> None:
        depth = row.depth
        if depth <= self._verified:
            return
        objection = packing_objection(self._forward, row)
        if objection is None:
            self._verified = depth
            return
        logger.info(
            "Choices of more than %d tokens are scored one by one. In one row, %s.",
            self._verified,
            objection,
        )
        self._share_up_to = self._verified

    def ask(self, tensors: BatchTensors, queries: Sequence[Query]) -> Reading:
        """Queue one batch on the device; what is returned waits for its answers.

        Until then only these are held there, so that another batch may be queued meanwhile. They
        raise :class:`NumericsError` where a loglikelihood is NaN.

        Args:
            queries: those of the batch, as :func:`.forward.queries_of` lists them.
        """
        logits = self._forward.wanted_logits(tensors)
        scores, greedy = target_logprobs(logits, tensors, self._softmax_dtype)
        return partial(_answers, fetched(scores), fetched(greedy), tensors.owner, queries)


def _answers(
    scores: Callable[[], torch.Tensor],
    greedy: Callable[[], torch.Tensor],
    owner: torch.Tensor,
    queries: Sequence[Query],
) -> list[tuple[int, Answer]]:
    sums = np.zeros(len(queries))
    np.add.at(sums, owner.numpy(), scores().double().numpy())
    all_greedy = np.ones(len(queries), dtype=np.bool_)
    np.logical_and.at(all_greedy, owner.numpy(), greedy().numpy())
    _refuse_nan(sums, queries)
    return [
        (query.index, (float(total), bool(best)))
        for query, total, best in zip(queries, sums, all_greedy, strict=True)
    ]


def one_ahead(starts: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Yield what each call started, once the next one is started as well.

    While a device computes a batch, the host so prepares and queues the next one. What ends a
    start, an error or the user, is raised behind what was started before it.
    """
    waiting: list[Result] = []
    for start in starts:
        try:
            waiting.append(start())
        except BaseException:
            yield from waiting
            raise
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def scorer_of(
    forward: Forward,
    config: Any,
    otherwise: str,
    *,
    softmax_dtype: torch.dtype = torch.float32,
    groups: RopeGroups,
) -> TokenScorer | None:
    """Return what scores tokens with a model; None if its LM head needs all positions.

    Args:
        config: of the language model.
        otherwise: what happens with None, for the log.
    """
    objection = head_objection(forward, config.vocab_size)
    if objection:
        logger.info("%s: with chosen positions only, %s.", otherwise, objection)
        return None
    return TokenScorer(
        forward,
        vocabulary=config.vocab_size,
        hidden_size=config.hidden_size,
        window=attention_window(config),
        softmax_dtype=softmax_dtype,
        groups=groups,
    )


class HalvingBatches:
    """Answers batches. When memory runs out, the batch size is halved, and stays so."""

    def __init__(self) -> None:
        self._limit: int | None = None

    def run(
        self, batch: list[PackedRow], answer: Callable[[list[PackedRow]], list[Result]]
    ) -> list[Result]:
        """Return the results of ``answer(batch)``, or those of its halves together."""
        size = len(batch) * max(len(row) for row in batch)
        if self._limit is not None and size > self._limit and _can_split(batch):
            return [each for half in _split(batch) for each in self.run(half, answer)]
        try:
            return answer(batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or not _can_split(batch):
                raise
            self._limit = size // 2
            logger.info(
                "Memory ran out at %d tokens per batch; half of that is used from now on.", size
            )
        return [each for half in _split(batch) for each in self.run(half, answer)]


def _can_split(batch: list[PackedRow]) -> bool:
    return len(batch) > 1 or not batch[0].is_chain


def _split(batch: list[PackedRow]) -> list[list[PackedRow]]:
    if len(batch) > 1:
        middle = len(batch) // 2
        return [batch[:middle], batch[middle:]]
    queries = [query for query, _ in batch[0].scored]
    if batch[0].prefix:
        middle = len(queries) // 2
        return [[part_of(batch[0], which)] for which in (slice(middle), slice(middle, None))]
    rows = build_rows(queries, share_up_to=0, row_tokens=0, pair_cost=0.0)
    return [[row] for row in rows]


def _refuse_nan(sums: npt.NDArray[np.float64], queries: Sequence[Query]) -> None:
    bad = np.isnan(sums)
    if bad.any():
        query = queries[int(bad.argmax())]
        raise NumericsError(
            f"The loglikelihood of request {query.index} ({len(query.inputs)} tokens) is NaN: "
            "the weights hold NaN, or the model overflows in this dtype; "
            "check the checkpoint or pass dtype=float32."
        )


CPU_TOKENS = 1024
"""Tokens per pass on a CPU: beyond this nothing is gained, and short of it little is lost."""

CPU_QUERIES = 4
"""Of the longest, for which such a pass has room: choices behind a long context share a row."""

MEMORY_SHARE = 0.5


def scoring_tokens(
    batch_size: int | str, longest: int, device: torch.device, max_batch_size: int
) -> int:
    """Return the padded tokens per scoring pass.

    A number N stands for the memory of N of the longest requests, but never less than a CPU
    handles well; ``auto`` starts large on an accelerator and is halved when memory runs out.
    """
    if str(batch_size).startswith("auto"):
        room = CPU_QUERIES if device.type == "cpu" else max_batch_size
        return max(CPU_TOKENS, room * longest)
    return max(CPU_TOKENS, int(batch_size) * longest)


def generation_batch(
    config: Any, dtype: torch.dtype, max_length: int, max_batch_size: int, device: torch.device
) -> int:
    """Return how many sequences of ``max_length`` fit into half of the free memory, at least one.

    By arithmetic: the key-value cache, and the hidden states of a prefill.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    per_token = cache_bytes_per_token(config, dtype) + 16 * config.hidden_size * dtype.itemsize
    fitting = int(free * MEMORY_SHARE / (per_token * max_length))
    return max(1, min(max_batch_size, fitting))


def cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the key-value cache of one token in bytes, all layers."""
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * key_value_heads * head_size * dtype.itemsize)
