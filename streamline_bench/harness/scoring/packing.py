"""Lays requests out so that no token is computed twice: rows of prefix trees, batches of rows.

Requests that begin with the same tokens (the choices of one question, the examples shown before
every question) share these tokens as the trunk of a tree. A row is such a tree laid flat: each
node is one token with its depth as position and its ancestors as the only tokens it may look at.
A request without relatives gives a row that is a plain chain, which needs no mask.

Nothing here knows a model; only lists of token ids go in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from streamline_bench.core.architecture import ANY_LENGTHS, RopeGroups

IntArray = npt.NDArray[np.int64]

PREFIX_FROM = 256
"""Tokens of a prefix from which on it is worth attention of its own."""

SUBTREE_FROM = 8
"""Queries that share fewer tokens behind such a prefix are in subtrees of their own."""

SUBTREE_TO = 1024
"""Most tokens of such a subtree."""


@dataclass(frozen=True)
class Query:
    """One request, cut to the model's length.

    Attributes:
        index: where its answer goes.
        inputs: token ids the model reads, ``[length]``.
        targets: token ids to score; the last ``len(targets)`` input positions predict them.
    """

    index: int
    inputs: Sequence[int]
    targets: Sequence[int]


@dataclass
class PackedRow:
    """A tree of token sequences laid flat.

    Attributes:
        tokens: ``[size]`` token ids, parents before children.
        positions: ``[size]`` depth of each node: its ``position_ids``.
        branches: ``(first node, parent node or -1)`` of every run of consecutive nodes.
        scored: for each query, the nodes whose logits predict its targets.
        shared: for each query, the tokens below which it hangs; of the first 0.
        prefix: nodes in front that all others attend to without a mask; 0: the row has a mask.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[tuple[int, int]] = field(default_factory=list)
    scored: list[tuple[Query, IntArray]] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    prefix: int = 0
    _path: IntArray = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def depth(self) -> int:
        """Tokens of the longest sequence in the tree."""
        return max(self.positions) + 1

    @property
    def positions_scored(self) -> int:
        """Positions that the LM head is computed on."""
        return sum(len(nodes) for _, nodes in self.scored)

    @property
    def is_chain(self) -> bool:
        """No branch: the usual causal mask and positions are right."""
        return len(self.branches) == 1

    def add(self, query: Query, shared: int) -> None:
        """Hang a query below the first ``shared`` tokens of the query added before it."""
        start = len(self.tokens)
        new = len(query.inputs) - shared
        if new:
            parent = int(self._path[shared - 1]) if shared else -1
            self.tokens.extend(query.inputs[shared:])
            self.positions.extend(range(shared, len(query.inputs)))
            if start == 0 or parent != start - 1:
                self.branches.append((start, parent))
        self._path = np.concatenate([self._path[:shared], np.arange(start, start + new)])
        self.shared.append(shared)
        self.scored.append((query, self._path[len(query.inputs) - len(query.targets) :]))

    def ends(self) -> IntArray:
        """Return ``[size]``: the node behind the last descendant of each node.

        Nodes lie with their descendants directly behind them, so that node ``i`` may look at node
        ``j`` if ``j <= i < ends[j]``.
        """
        size = len(self)
        ends = np.full(size, size, dtype=np.int64)
        for start, parent in self.branches[1:]:
            open_until_here = ends[parent + 1 : start]
            np.minimum(open_until_here, start, out=open_until_here)
        return ends

    def subtrees(self) -> IntArray:
        """Return the first node of each subtree that hangs at the end of the prefix."""
        hung = (start for start, parent in self.branches[1:] if parent == self.prefix - 1)
        return np.unique([self.prefix, *hung])


def build_rows(
    queries: Sequence[Query],
    *,
    share_up_to: int,
    row_tokens: int,
    pair_cost: float,
    group_of: Callable[[int], int] = lambda length: 0,
    prefix_scored: int = 0,
) -> list[PackedRow]:
    """Group queries into rows.

    A query joins the row of its nearest relative where the shared tokens it saves cost more than
    the attention it adds: every token of a row is compared with every other one, related or not.
    A row stops to grow where the cost of a token in it, shared tokens included, is lowest.
    Neighbours that so came about behind one long prefix are joined, if they need no mask.

    Args:
        share_up_to: inputs longer than this share a row with equal inputs only (0: all do).
        row_tokens: no branching row grows beyond this many tokens.
        pair_cost: cost of comparing two tokens, relative to computing one token.
        group_of: length -> number that the members of a row share (:class:`.RopeGroups`).
        prefix_scored: scored positions of a row without a mask; 0: there are no such rows.
    """

    def may_share(first: int, second: int) -> bool:
        return max(first, second) <= share_up_to and group_of(first) == group_of(second)

    keys = [np.asarray(query.inputs, dtype=">u4") for query in queries]
    order = sorted(range(len(queries)), key=lambda i: (keys[i].tobytes(), i))
    rows: list[PackedRow] = []
    before = -1
    for current in order:
        length = len(keys[current])
        shared = _common_prefix(keys[before], keys[current]) if rows else 0
        new = length - shared
        joins = bool(rows) and (
            (new == 0 and len(keys[before]) == length)
            or (
                may_share(len(keys[before]), length)
                and _worth_joining(len(rows[-1]), shared, new, row_tokens, pair_cost)
            )
        )
        if not joins:
            rows.append(PackedRow())
            shared = 0
        rows[-1].add(queries[current], shared)
        before = current
    return _behind_prefixes(rows, may_share, row_tokens, prefix_scored) if prefix_scored else rows


def _behind_prefixes(
    rows: Sequence[PackedRow],
    may_share: Callable[[int, int], bool],
    row_tokens: int,
    prefix_scored: int,
) -> list[PackedRow]:
    """Join neighbours behind one long prefix as far as the budgets of a row allow."""
    found = list(rows[:1])
    for row in rows[1:]:
        joined = None
        if (
            may_share(found[-1].depth, row.depth)
            and found[-1].positions_scored + row.positions_scored <= prefix_scored
        ):
            joined = _joined(found[-1], row)
        if joined is None or len(joined) > row_tokens:
            found.append(row)
        else:
            found[-1] = joined
    return found


def _joined(first: PackedRow, second: PackedRow) -> PackedRow | None:
    last, following = first.scored[-1][0].inputs, second.scored[0][0].inputs
    if last[:PREFIX_FROM] != following[:PREFIX_FROM]:
        return None
    between = _common_prefix(np.asarray(last), np.asarray(following))
    shared = [*first.shared, between, *second.shared[1:]]
    prefix = min(shared[1:])
    if prefix < PREFIX_FROM:
        return None
    row = _behind_prefix([query for query, _ in (*first.scored, *second.scored)], shared, prefix)
    return row if np.diff([*row.subtrees(), len(row)]).max() <= SUBTREE_TO else None


def _behind_prefix(queries: Sequence[Query], shared: Sequence[int], prefix: int) -> PackedRow:
    """Lay queries out behind a prefix.

    Args:
        queries: in the order of their tokens.
        shared: tokens that each shares with the one before it, at least the prefix; the first is
            not read.
    """
    row = PackedRow(prefix=prefix)
    row.add(queries[0], 0)
    for query, known in zip(queries[1:], shared[1:], strict=True):
        row.add(query, known if known >= prefix + SUBTREE_FROM else prefix)
    if row.is_chain:
        row.prefix = 0
    return row


def part_of(row: PackedRow, which: slice) -> PackedRow:
    """Return a row with some queries of another, behind the same prefix."""
    queries = [query for query, _ in row.scored[which]]
    return _behind_prefix(queries, row.shared[which], row.prefix)


def _worth_joining(size: int, shared: int, new: int, row_tokens: int, pair_cost: float) -> bool:
    """Whether ``new`` tokens behind the first ``shared`` ones belong into a row of ``size``.

    With ``c`` the pair cost, ``s`` the shared tokens and ``u`` those that are not, the row's cost
    per own token, ``(s + u + c (s + u)^2) / u``, is lowest at ``c u^2 = s + c s^2``. Beyond that
    another row is better, which pays for the shared tokens once more and then takes others, too.
    A single query of more tokens than the row has is better apart at ``2 c u new = s + c s^2``.
    """
    if shared == 0 or size + new > row_tokens:
        return False
    own = size - shared
    return own * (new + max(own, new)) * pair_cost < shared + shared**2 * pair_cost


def _common_prefix(first: npt.NDArray[np.generic], second: npt.NDArray[np.generic]) -> int:
    size = min(len(first), len(second))
    differs = first[:size] != second[:size]
    return int(differs.argmax()) if differs.any() else size


def make_batches(
    rows: Sequence[PackedRow],
    *,
    batch_tokens: int,
    batch_positions: int,
    group_of: Callable[[int], int] = lambda length: 0,
) -> Iterator[list[PackedRow]]:
    """Yield batches of like rows, longest first, each within both budgets (at least one row).

    A row without a mask behind a long prefix is a batch by itself.

    Args:
        batch_tokens: padded tokens per batch, ``rows x longest row``.
        batch_positions: positions per batch that the LM head is computed on.
        group_of: length -> number that the rows of a batch share (:class:`.RopeGroups`).
    """
    yield from ([row] for row in sorted(rows, key=len, reverse=True) if row.prefix)
    for chain in (False, True):
        of_kind = (row for row in rows if row.is_chain == chain and not row.prefix)
        alike = sorted(of_kind, key=lambda row: (group_of(row.depth), len(row)), reverse=True)
        batch: list[PackedRow] = []
        scored = 0
        for row in alike:
            here = row.positions_scored
            full = batch and (
                (len(batch) + 1) * len(batch[0]) > batch_tokens
                or scored + here > batch_positions
                or group_of(row.depth) != group_of(batch[0].depth)
            )
            if full:
                yield batch
                batch, scored = [], 0
            batch.append(row)
            scored += here
        if batch:
            yield batch


@dataclass(frozen=True)
class Layout:
    """What a model decides about the rows and batches it is given; equal ones share the work.

    Attributes:
        share_up_to: inputs longer than this share a row with equal inputs only.
        pair_cost: cost of comparing two tokens, relative to computing one.
        batch_positions: positions per batch that the LM head is computed on.
        groups: lengths that must not share a row or a batch.
        prefixes: rows behind a long prefix need no mask.
    """

    share_up_to: int
    pair_cost: float
    batch_positions: int
    groups: RopeGroups = ANY_LENGTHS
    prefixes: bool = False


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
        """Return the rows of a layout; see :func:`build_rows`."""
        if layout not in self._rows:
            self._rows[layout] = build_rows(
                self._queries,
                share_up_to=layout.share_up_to,
                row_tokens=self._batch_tokens,
                pair_cost=layout.pair_cost,
                group_of=layout.groups,
                prefix_scored=layout.batch_positions if layout.prefixes else 0,
            )
        return self._rows[layout]

    def batches(self, layout: Layout) -> list[list[PackedRow]]:
        """Return the batches of a layout; see :func:`make_batches`."""
        if layout not in self._batches:
            self._batches[layout] = list(
                make_batches(
                    self.rows(layout),
                    batch_tokens=self._batch_tokens,
                    batch_positions=layout.batch_positions,
                    group_of=layout.groups,
                )
            )
        return self._batches[layout]
