"""Several models answer the same requests; layers they have in common run once per batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from streamline_bench.errors import ComparisonError, NumericsError
from streamline_bench.harness.scoring.forward import queries_of, tensors_of
from streamline_bench.harness.scoring.packing import Layout, Layouts, PackedRow, Query
from streamline_bench.harness.scoring.scorer import (
    Answer,
    HalvingBatches,
    Reading,
    TokenScorer,
    one_ahead,
)
from streamline_bench.harness.trunk.journal import Journal, name_of
from streamline_bench.harness.trunk.partial import States, partial_pass
from streamline_bench.harness.trunk.stack import Stack, legs_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Walker:
    """One model of a walk: a causal LM, what scores with it, and its steps."""

    model: Any
    scorer: TokenScorer
    stack: Stack


class Walk:
    """Answers of several models.

    Args:
        walkers: label -> model, in walking order (see :func:`.stack.walks_of`).
        journals: label -> file that its answers go to as they come, and that those of an earlier,
            interrupted walk are taken from.

    Attributes:
        failed: label -> why it has no answers.
        per_model: kinds of requests that models answered by themselves.
        seconds: wall-clock time spent walking.
    """

    def __init__(
        self,
        walkers: Mapping[str, Walker],
        *,
        journals: Mapping[str, Journal] | None = None,
        progress: bool = True,
    ) -> None:
        self.failed: dict[str, str] = {}
        self.per_model: list[str] = []
        self.seconds = 0.0
        self._journals = journals or {}
        self._walkers = dict(walkers)
        self._progress = progress
        self._memory = HalvingBatches()
        self._kept: dict[str, tuple[list[Any], Mapping[str, list[Any]]]] = {}

    def answers(
        self,
        label: str,
        kind: str,
        requests: Sequence[Any],
        ask_all: Callable[[Sequence[Any]], Mapping[str, list[Any]]],
    ) -> list[Any]:
        """Return one model's answers; the first time, all models are asked.

        Raises:
            ComparisonError: these are not the requests that all models were asked.
            NumericsError: the model's answers are NaN.
        """
        asked = [request.args for request in requests]
        if kind not in self._kept:
            self._kept[kind] = (asked, ask_all(requests))
        known, answers = self._kept[kind]
        if known != asked:
            raise ComparisonError(
                f"'{label}' was given other {kind} requests ({len(asked)}) than the models scored "
                f"together with it ({len(known)}); evaluate it by itself."
            )
        if label in self.failed:
            raise NumericsError(self.failed[label])
        return answers[label]

    @property
    def count(self) -> int:
        """Number of models that walk."""
        return len(self._walkers)

    def note_per_model(self, kind: str) -> None:
        """Remember, and say once, that requests of a kind are not answered together."""
        if kind not in self.per_model:
            self.per_model.append(kind)
            logger.info("%s requests run for every model by itself.", kind)

    def score(self, queries: Sequence[Query], *, batch_tokens: int) -> dict[str, list[Answer]]:
        """Return every model's answers in the order of ``query.index`` (0 .. n - 1).

        Args:
            batch_tokens: see :meth:`TokenScorer.score`.

        Raises:
            OutputError: a journal cannot be written.
        """
        began = time.monotonic()
        try:
            return self._score(queries, batch_tokens)
        finally:
            self.seconds += time.monotonic() - began
            for journal in self._journals.values():
                journal.write()

    def _score(self, queries: Sequence[Query], batch_tokens: int) -> dict[str, list[Answer]]:
        found: dict[str, dict[int, Answer]] = {label: {} for label in self._walkers}
        layouts = Layouts(queries, batch_tokens=batch_tokens)
        count = len(self._walkers)
        with tqdm(
            total=len(queries) * count,
            desc=f"Running loglikelihood requests of {count} models",
            disable=not self._progress,
        ) as bar:
            for layout, labels in self._settled(layouts).items():
                asked = name_of(queries, layout, batch_tokens)
                for label in labels:
                    if label in self._journals:
                        found[label] = self._journals[label].known(asked)
                    bar.update(len(found[label]))
                batches = layouts.batches(layout)
                asks = (partial(self._ask, each, labels, found, bar) for each in batches)
                for readings in one_ahead(asks):
                    for label, answers in self._read(readings).items():
                        found[label].update(answers)
                        if label in self._journals:
                            self._journals[label].add(asked, answers.items())
        return {
            label: [answers[index] for index in sorted(answers)]
            for label, answers in found.items()
            if label not in self.failed
        }

    def _ask(
        self,
        batch: list[PackedRow],
        labels: Sequence[str],
        found: Mapping[str, Mapping[int, Answer]],
        bar: tqdm[Any],
    ) -> list[tuple[str, Reading]]:
        """Put one batch to the models that have not given all its answers before.

        Args:
            bar: moves with every model.
        """
        indices = {query.index for query in queries_of(batch)}
        missing = [label for label in labels if not indices <= found[label].keys()]
        if not missing:
            return []
        before = bar.n
        readings = self._memory.run(batch, self._leg_by_leg(missing, bar))
        # Models that were asked when memory ran out were asked again, in halves.
        bar.update(before + len(indices) * len({label for label, _ in readings}) - bar.n)
        return readings

    def _read(self, readings: Sequence[tuple[str, Reading]]) -> dict[str, dict[int, Answer]]:
        """Wait for the answers to one batch; a model whose answers are NaN gives no more."""
        answers: dict[str, dict[int, Answer]] = {label: {} for label, _ in readings}
        for label, read in readings:
            if label not in self.failed:
                try:
                    answers[label].update(read())
                except NumericsError as error:
                    self.failed[label] = str(error)
        return answers

    def _settled(self, layouts: Layouts) -> dict[Layout, list[str]]:
        """Part the models by how they want requests laid out; nearly always they agree."""
        agreeing: dict[Layout, list[str]] = {}
        for label, walker in self._walkers.items():
            if label not in self.failed:
                agreeing.setdefault(walker.scorer.settle(layouts), []).append(label)
        if len(agreeing) > 1:
            parts = " | ".join(", ".join(labels) for labels in agreeing.values())
            logger.info(
                "These models need batches of their own, where they share no layers: %s.", parts
            )
        return agreeing

    def _leg_by_leg(
        self, labels: Sequence[str], bar: tqdm[Any]
    ) -> Callable[[list[PackedRow]], list[tuple[str, Reading]]]:
        def ask(batch: list[PackedRow]) -> list[tuple[str, Reading]]:
            tensors, queries = tensors_of(batch), queries_of(batch)
            stacks = {k: self._walkers[k].stack for k in labels if k not in self.failed}
            states: States = {}
            readings: list[tuple[str, Reading]] = []
            for leg in legs_of(list(stacks), stacks):
                for boundary in [b for b in states if b > leg.start]:
                    del states[boundary]
                walker = self._walkers[leg.label]
                with partial_pass(
                    walker.model, walker.stack.steps, start=leg.start, states=states, keep=leg.keep
                ):
                    readings.append((leg.label, walker.scorer.ask(tensors, queries)))
                bar.update(len(queries))
            return readings

        return ask
