"""Attention in a row of queries behind one long prefix, without a mask over the whole row.

Flat in the row lie the prefix and, behind it, subtrees that hang at its end: a token sees the
prefix and its ancestors in its own subtree. So the prefix attends to itself causally; all others
attend to the whole prefix, which needs no mask; and each subtree, padded to the longest, attends to
itself. The last two are joined by the sums under their softmaxes (Hydragen, arXiv:2402.05099). No
pair of tokens of different subtrees is computed, and no mask of the row's length squared is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from streamline_bench.core.forward import sent
from streamline_bench.harness.scoring.packing import PackedRow

NAME = "streamline_prefix"
"""Under which transformers knows this attention."""

_SCORES_AT_ONCE = 2**24
"""Of subtrees: scores of all heads that are held at a time."""


@dataclass(frozen=True)
class PrefixTree:
    """Where the tokens of a row lie that has a prefix.

    Attributes:
        prefix: tokens in front, which all others see.
        groups: subtrees of like sizes, each group padded to its longest one: places in the row,
            ``[subtrees, longest]`` int64, 0 where padded; and ends of the same shape: in a subtree
            token ``i`` may look at ``j`` if ``j <= i < ends[j]``, padding at itself alone.
        back: ``[own]`` int64: where each token behind the prefix lies in all groups laid flat.
    """

    prefix: int
    groups: Sequence[tuple[Tensor, Tensor]]
    back: Tensor

    @classmethod
    def of(cls, row: PackedRow) -> PrefixTree:
        """Return the tree of a row, on the CPU."""
        prefix, ends, starts = row.prefix, row.ends(), row.subtrees()
        sizes = np.diff([*starts, len(row)])
        alike = np.frexp(sizes)[1]  # by powers of two
        groups, places = [], []
        for kind in np.unique(alike):
            first, size = starts[alike == kind, None], sizes[alike == kind, None]
            token = np.arange(size.max())
            inside = token < size
            nodes = np.where(inside, first + token, 0)
            groups.append((nodes, np.where(inside, ends[nodes] - first, token + 1)))
            places.append(np.where(inside, nodes, -1).reshape(-1))
        flat = np.concatenate(places)
        back = np.argsort(flat, kind="stable")[(flat < 0).sum() :]
        pairs = [(torch.from_numpy(nodes), torch.from_numpy(own)) for nodes, own in groups]
        return cls(prefix, pairs, torch.from_numpy(back))

    def on(self, device: torch.device) -> PrefixTree:
        """Return it on a device."""
        pairs = [(sent(nodes, device), sent(ends, device)) for nodes, ends in self.groups]
        return PrefixTree(self.prefix, pairs, sent(self.back, device))


_tree: ContextVar[PrefixTree] = ContextVar("tree")


@contextmanager
def behind_prefix(model: nn.Module, tree: PrefixTree) -> Iterator[None]:
    """Let the layers of a model attend in this way to the one row that it is called with.

    Raises:
        NotImplementedError: they do not take the attention that the config names, or another one
            than transformers' ``sdpa``.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    configs = {id(found): found for each in model.modules() if (found := _config(each))}
    kinds = {str(config._attn_implementation) for config in configs.values()}
    if kinds != {"sdpa"}:
        raise NotImplementedError(f"its attention is computed by {', '.join(sorted(kinds))}")
    token = _tree.set(tree)
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for config in configs.values():
            config._attn_implementation = "sdpa"
        _tree.reset(token)


def _config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation") else None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' ``sdpa`` does, which knows no other options either.

    Args:
        query: ``[1, heads, size, width]``; key, value: the same of fewer heads.

    Returns:
        ``[1, size, heads, width]``, and no weights.
    """
    if attention_mask is not None:
        raise NotImplementedError("its attention has a mask")
    tree = _tree.get()
    several = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(several, dim=1) for each in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    (first, rest), (before, _), (there, _) = (
        each.tensor_split([tree.prefix], dim=2) for each in (query, key, value)
    )
    head = scaled_dot_product_attention(first, before, there, is_causal=True, scale=scale)
    seen, seen_sum = _whole(rest, before, there, scale)
    own, own_sum = _subtrees(query[0], key[0], value[0], tree, scale)
    total = torch.logaddexp(seen_sum, own_sum)
    tail = seen * (seen_sum - total).exp().unsqueeze(-1)
    tail = (tail + own * (own_sum - total).exp().unsqueeze(-1)).to(head.dtype)
    return torch.cat([head, tail], dim=2).transpose(1, 2).contiguous(), None


def _whole(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to all keys; return it in float32, and the logarithm of the sum under the softmax."""
    kernels = torch.ops.aten
    if query.device.type == "cuda" and query.dtype == torch.float32:
        found = kernels._scaled_dot_product_efficient_attention(
            query, key, value, None, True, scale=scale
        )
    elif query.device.type == "cuda":
        found = kernels._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    else:
        found = kernels._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    return found[0].float(), found[1][..., : query.shape[2]].float()


def _subtrees(
    query: Tensor, key: Tensor, value: Tensor, tree: PrefixTree, scale: float
) -> tuple[Tensor, Tensor]:
    """Let each subtree attend to itself, in float32.

    Args:
        query, key, value: ``[heads, size, width]``.

    Returns:
        ``[1, heads, own, width]`` and ``[1, heads, own]``, as :func:`_whole`.
    """
    outputs, sums = [], []
    for nodes, ends in tree.groups:
        step = max(1, _SCORES_AT_ONCE // (len(query) * nodes.shape[1] ** 2))
        for at, until in zip(torch.split(nodes, step), torch.split(ends, step), strict=True):
            output, total = _masked(query[:, at], key[:, at], value[:, at], until, scale)
            outputs.append(output.flatten(1, 2))
            sums.append(total.flatten(1, 2))
    output, total = torch.cat(outputs, dim=1), torch.cat(sums, dim=1)
    return output[:, tree.back].float().unsqueeze(0), total[:, tree.back].unsqueeze(0)


def _masked(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend within subtrees ``[heads, subtrees, longest, width]``; also the sums' logarithms."""
    scores = (query @ key.transpose(-1, -2)).float() * scale
    token = torch.arange(ends.shape[1], device=ends.device)
    hidden = (token[:, None] >= ends[:, None, :]) | (token > token[:, None])
    scores.masked_fill_(hidden, float("-inf"))
    total = scores.logsumexp(dim=-1)
    shares = (scores - total.unsqueeze(-1)).exp()
    return shares.to(value.dtype) @ value, total
