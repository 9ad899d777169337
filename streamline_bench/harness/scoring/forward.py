"""One forward pass over packed rows, with the LM head on the wanted positions only.

Numbers, not names, decide which short cuts give the model's own logits. When a model is first used,
two are tried: the LM head on chosen positions, and branching rows. One that changes the logits is
switched off and the reason is logged. Branching rows are checked again, on real rows, whenever one
is longer than all before, because a window of attention may only show beyond a certain length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from streamline_bench.core.forward import sent
from streamline_bench.errors import (
    ResourceError,
    StreamlineBenchError,
    first_line,
    library_errors,
)
from streamline_bench.harness.scoring.packing import PackedRow, Query
from streamline_bench.harness.scoring.prefix_attention import PrefixTree, behind_prefix

CHUNK_ELEMENTS_CPU = 2**19
"""Logits per softmax call on a CPU: what stays in its cache."""
CHUNK_ELEMENTS_DEVICE = 2**26

_WINDOW_KEYS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
_TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 8e-3}


class HeadError(Exception):
    """The LM head of this model cannot be run on chosen positions."""


@dataclass(frozen=True)
class BatchTensors:
    """A batch of rows as the model takes it.

    Attributes:
        ids: ``[rows, longest]`` int64, padded with zeros on the right.
        positions: ``[rows, longest]`` int64, or None where all rows are chains.
        ends: ``[rows, longest]`` int64, or None where all rows are chains: the token in row ``i``
            may look at ``j`` if ``j <= i < ends[j]``. A padding token is seen by itself alone.
        tree: of the only row, if it has a prefix that is attended to without a mask.
        wanted: ``[wanted]`` int64: flat indices into ``rows x longest``, ascending, unique.
        target_at: ``[targets]`` int64: index into ``wanted`` for each target, ascending.
        target_ids: ``[targets]`` int64.
        owner: ``[targets]`` int64: number of the query, in the order of ``queries_of``.
    """

    ids: torch.Tensor
    positions: torch.Tensor | None
    ends: torch.Tensor | None
    wanted: torch.Tensor
    target_at: torch.Tensor
    target_ids: torch.Tensor
    owner: torch.Tensor
    tree: PrefixTree | None = None


def queries_of(batch: Sequence[PackedRow]) -> list[Query]:
    """Return the queries of a batch, row by row, as ``row.scored`` lists them."""
    return [query for row in batch for query, _ in row.scored]


def tensors_of(batch: Sequence[PackedRow]) -> BatchTensors:
    """Stack rows on the CPU; queries are numbered as :func:`queries_of` lists them."""
    longest = max(len(row) for row in batch)
    chains = all(row.is_chain for row in batch)
    ids = np.zeros((len(batch), longest), dtype=np.int64)
    positions = np.zeros((len(batch), longest), dtype=np.int64)
    # A padding token that saw nothing would divide by zero; it sees itself, and nobody sees it.
    ends = np.tile(np.arange(1, longest + 1), (len(batch), 1))
    tree = PrefixTree.of(batch[0]) if batch[0].prefix else None
    for number, row in enumerate(batch):
        ids[number, : len(row)] = row.tokens
        positions[number, : len(row)] = row.positions
        if not chains and tree is None:
            ends[number, : len(row)] = row.ends()
    flat, tokens, owner = _targets(batch, longest)
    wanted, target_at = np.unique(flat, return_inverse=True)
    order = np.argsort(target_at, kind="stable")
    return BatchTensors(
        ids=torch.from_numpy(ids),
        positions=None if chains else torch.from_numpy(positions),
        ends=None if chains or tree else torch.from_numpy(ends),
        wanted=torch.from_numpy(wanted),
        target_at=torch.from_numpy(target_at[order]),
        target_ids=torch.from_numpy(tokens[order]),
        owner=torch.from_numpy(owner[order]),
        tree=tree,
    )


def _targets(batch: Sequence[PackedRow], longest: int) -> tuple[Any, Any, Any]:
    flat, tokens, owner = [], [], []
    query_number = 0
    for number, row in enumerate(batch):
        for query, nodes in row.scored:
            flat.append(nodes + number * longest)
            tokens.append(np.asarray(query.targets, dtype=np.int64))
            owner.append(np.full(len(nodes), query_number, dtype=np.int64))
            query_number += 1
    return np.concatenate(flat), np.concatenate(tokens), np.concatenate(owner)


class Forward:
    """Runs a causal LM on batches and returns logits of the wanted positions.

    The positions are selected in front of the LM head, inside the model's own forward, so that
    whatever the model does to its logits (soft-capping, scaling) happens as always.

    Args:
        model: gives the causal LM (looked up on every call: wrappers may change it).
        device: where inputs go.
        context: entered around every call (no_grad, autocast).
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        device: torch.device,
        context: Callable[[], Any],
    ) -> None:
        self._model = model
        self._device = device
        self._context = context

    def wanted_logits(self, batch: BatchTensors) -> torch.Tensor:
        """Return ``[wanted, vocabulary]`` logits in the model's dtype.

        Raises:
            HeadError: the model has no LM head module of the usual kind.
        """
        model = self._model()
        forget_lengths(model)
        attending = (
            nullcontext()
            if batch.tree is None
            else behind_prefix(model, batch.tree.on(self._device))
        )
        with self._context(), attending, _only(model, batch.ids.shape, batch.wanted):
            logits = model(**self._inputs(model, batch)).logits
        if logits.shape[:2] != (1, len(batch.wanted)):
            raise HeadError(f"its logits have the shape {tuple(logits.shape)}")
        return logits[0]  # type: ignore[no-any-return]

    def all_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Return ``[rows, length, vocabulary]`` logits of the plain call."""
        model = self._model()
        forget_lengths(model)
        with self._context():
            return model(ids.to(self._device)).logits  # type: ignore[no-any-return]

    def _inputs(self, model: nn.Module, batch: BatchTensors) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": sent(batch.ids, self._device), "use_cache": False}
        if batch.positions is not None:
            inputs["position_ids"] = sent(batch.positions, self._device)
        if batch.ends is not None:
            dtype = getattr(model, "dtype", torch.float32)
            inputs["attention_mask"] = attention_mask(sent(batch.ends, self._device), dtype)
        return inputs


def attention_mask(ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask that is added to attention scores, ``[rows, 1, longest, longest]``.

    Args:
        ends: ``[rows, longest]``; see :class:`BatchTensors`.
    """
    token = torch.arange(ends.shape[1], device=ends.device)
    hidden = token[:, None] >= ends[:, None, None, :]
    hidden |= token > token[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=ends.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)


def forget_lengths(model: nn.Module) -> None:
    """Give dynamic rotary frequencies back the values that they have before a longer sequence.

    transformers (``modeling_rope_utils.dynamic_rope_update``) keeps those of the longest sequence
    so far until one is shorter than the limit, so that a score would depend on what was asked
    before it, at any batch size.
    """
    ending = "max_seq_len_cached"
    for module in model.modules():
        state = vars(module)
        limit = state.get("original_max_seq_len")
        grown = [name for name in state if name.endswith(ending) and state[name] is not limit]
        for name in grown if limit is not None else ():
            prefix = name.removesuffix(ending)  # of a kind of layers, where each has its own
            first, now = (getattr(module, f"{prefix}{of}inv_freq") for of in ("original_", ""))
            module.register_buffer(f"{prefix}inv_freq", first.to(now.device), persistent=False)
            setattr(module, name, limit)


@contextmanager
def _only(model: nn.Module, shape: torch.Size, wanted: torch.Tensor) -> Iterator[None]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        raise HeadError("it names no output embeddings")

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args or args[0].dim() != 3 or args[0].shape[:2] != shape:
            raise HeadError("its output embeddings do not read [batch, sequence, hidden]")
        hidden = args[0].flatten(0, 1)
        return (hidden.index_select(0, sent(wanted, hidden.device)).unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def target_logprobs(
    logits: torch.Tensor, batch: BatchTensors, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of every target, and whether it is the most likely token.

    Args:
        logits: ``[wanted, vocabulary]``.
        dtype: of the softmax.

    Returns:
        ``[targets]`` log-probabilities in ``dtype`` and ``[targets]`` bool, both on the device.
    """
    limit = CHUNK_ELEMENTS_CPU if logits.device.type == "cpu" else CHUNK_ELEMENTS_DEVICE
    step = max(1, limit // logits.shape[-1])
    starts = torch.arange(0, len(logits) + step, step)
    ends = torch.searchsorted(batch.target_at, starts).tolist()
    at, ids = (sent(each, logits.device) for each in (batch.target_at, batch.target_ids))
    scores, greedy = [], []
    for number, chunk in enumerate(torch.split(logits, step)):
        here = slice(ends[number], ends[number + 1])
        logprobs = torch.log_softmax(chunk, dim=-1, dtype=dtype)
        rows = at[here] - number * step
        score = logprobs[rows, ids[here]]
        scores.append(score)
        greedy.append(_is_first_best(logprobs, rows, ids[here], score))
    return torch.cat(scores), torch.cat(greedy)


def _is_first_best(
    logprobs: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, score: torch.Tensor
) -> torch.Tensor:
    if logprobs.device.type != "cpu":  # which would be waited for to know how many are equal
        return logprobs.argmax(dim=-1)[rows] == ids
    # argmax costs several times what amax does on a CPU, and only decides between equals.
    best = score == logprobs.amax(dim=-1)[rows]
    candidates = best.nonzero().squeeze(-1)
    if len(candidates):
        best[candidates] = logprobs[rows[candidates]].argmax(dim=-1) == ids[candidates]
    return best


def attention_window(config: Any) -> int | None:
    """Return the smallest attention window a config names, in tokens, or None."""
    sizes = [getattr(config, key, None) for key in _WINDOW_KEYS]
    windows = [size for size in sizes if isinstance(size, int) and size > 0]
    return min(windows, default=None)


def synthetic_row(vocabulary: int) -> PackedRow:
    """Return a small tree: a trunk of six tokens, branches below it, one of them forking."""
    tokens = [(7919 * i + 13) % vocabulary for i in range(16)]
    trunk = tokens[:6]
    row = PackedRow()
    row.add(Query(0, [*trunk, *tokens[6:9]], tokens[:4]), 0)
    row.add(Query(1, [*trunk, *tokens[9:13]], tokens[:5]), 6)
    row.add(Query(2, [*trunk, *tokens[9:11], tokens[14]], tokens[:4]), 8)
    return row


def head_objection(forward: Forward, vocabulary: int) -> str | None:
    """Return why the LM head must not be run on chosen positions only, or None."""
    rows = []
    for query in (Query(0, [i % vocabulary for i in range(7)], [1, 2, 3]), Query(1, [5], [1])):
        row = PackedRow()
        row.add(query, 0)
        rows.append(row)
    batch = tensors_of(rows)
    plain = forward.all_logits(batch.ids)
    chosen, refusal = _tried(forward, batch)
    if chosen is None:
        return refusal
    if plain.shape[:2] != batch.ids.shape:
        return f"it gives logits of shape {tuple(plain.shape)} for ids {tuple(batch.ids.shape)}"
    return _difference(chosen, plain.flatten(0, 1)[batch.wanted.to(plain.device)])


def _tried(forward: Forward, batch: BatchTensors) -> tuple[torch.Tensor | None, str]:
    """The logits on chosen positions; None, and why, where the model does not give them.

    Raises:
        ResourceError: memory ran out, which says nothing about the model.
    """
    try:
        with library_errors("The model was tried"):
            return forward.wanted_logits(batch), ""
    except ResourceError:
        raise
    except StreamlineBenchError as error:
        return None, first_line(error.__cause__ or error)


def packing_objection(forward: Forward, row: PackedRow) -> str | None:
    """Return why a branching row gives other logits than its longest members alone, or None."""
    packed, refusal = _tried(forward, tensors_of([row]))
    if packed is None:
        what = "that" if row.prefix else "a mask and positions"
        return f"it refuses {what} ({refusal})"
    wanted = tensors_of([row]).wanted
    longest = sorted(row.scored, key=lambda pair: len(pair[0].inputs))[-2:]
    for query, nodes in longest:
        plain = forward.all_logits(torch.tensor([list(query.inputs)]))[0, -len(nodes) :]
        at = torch.searchsorted(wanted, torch.from_numpy(nodes)).to(packed.device)
        objection = _difference(packed[at], plain)
        if objection:
            return objection
    return None


def _difference(ours: torch.Tensor, plain: torch.Tensor) -> str | None:
    if not torch.isfinite(plain).all():
        return None  # Damaged weights are reported by whoever asked for the scores.
    tolerance = _TOLERANCE.get(plain.dtype, 5e-5)
    if plain.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        tolerance = max(tolerance, 5e-3)
    gap = (ours.float() - plain.float().to(ours.device)).abs()
    scale = max(1.0, float(plain.float().abs().max()))
    if float(gap.max()) <= tolerance * scale and float(gap.mean()) <= tolerance * scale / 4:
        return None
    return f"its logits change by up to {float(gap.max()):.2g}"
