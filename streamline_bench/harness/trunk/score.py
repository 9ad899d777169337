"""From a request to the outputs of all its labels."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamline_bench.core.machine.ranks import launched
from streamline_bench.errors import (
    ArchitectureError,
    EvaluationError,
    OutputError,
    StreamlineBenchError,
    library_errors,
)
from streamline_bench.harness import bridge
from streamline_bench.harness.model_creation import share_log
from streamline_bench.harness.trunk.assembly import assemble, load_model
from streamline_bench.harness.trunk.evaluation import (
    Catalogue,
    Evaluation,
    is_done,
    left_out_of,
    request_digest,
)
from streamline_bench.harness.trunk.journal import Journal
from streamline_bench.harness.trunk.request import LabelOutcome, TrunkOutcome, TrunkRequest
from streamline_bench.harness.trunk.stack import Stack, read_stack, solo_reason, walks_of
from streamline_bench.harness.trunk.walk import Walk
from streamline_bench.modeling import register

logger = logging.getLogger(__name__)


def score_together(
    request: TrunkRequest,
    *,
    progress: bool = True,
    on_label: Callable[[str, LabelOutcome], None] = lambda label, outcome: None,
) -> TrunkOutcome:
    """Evaluate all checkpoints of a request; layers that models have in common run once.

    Models are grouped by content (:mod:`.stack`). Those that share nothing are evaluated one after
    the other, and the outcome says why. A label that fails leaves the others alone. Labels whose
    output is there already are not evaluated again, so that an interrupted call can be repeated.

    Args:
        on_label: called with every label as soon as it has its outcome.

    Raises:
        EvaluationError: a task is not known, options contradict each other, or several processes
            were started.
        OutputError: an output exists that is not this request's, or one cannot be written.
    """
    processes = launched().count
    if processes != 1:
        raise EvaluationError(
            f"Models are scored together in one process, and {processes} were started; do not use "
            "accelerate launch or torchrun."
        )
    share_log()
    bridge.register()
    register()
    return _Scoring(request, progress=progress, on_label=on_label).run()


class _Scoring:
    """One call: what is known about each label so far."""

    def __init__(
        self,
        request: TrunkRequest,
        *,
        progress: bool,
        on_label: Callable[[str, LabelOutcome], None],
    ) -> None:
        self._request = request
        self._on_label = on_label
        self._progress = progress
        self._labels: dict[str, LabelOutcome] = {}
        self._alone: dict[str, str] = {}
        self._stacks: dict[str, Stack] = {}
        self._walks: list[tuple[str, ...]] = []
        self._per_model: set[str] = set()
        self._seconds: dict[str, float] = {}
        self._catalogue = Catalogue()

    def run(self) -> TrunkOutcome:
        """Evaluate what is missing."""
        with self._timed("read"):
            for label in self._request.checkpoints:
                self._look_at(label)
        for labels in walks_of(self._stacks):
            if len(labels) > 1 or self._was_begun(labels[0]):
                self._walk(labels)
            else:
                self._alone[labels[0]] = solo_reason(labels[0], self._request.dense, self._stacks)
        for label in [each for each in self._request.checkpoints if each in self._alone]:
            self._evaluate_alone(label)
        return TrunkOutcome(
            labels={label: self._labels[label] for label in self._request.checkpoints},
            walks=tuple(self._walks),
            per_model=tuple(sorted(self._per_model)),
            seconds={stage: round(value, 3) for stage, value in self._seconds.items()},
        )

    def _look_at(self, label: str) -> None:
        try:
            if is_done(self._request, label):
                left_out = left_out_of(self._request.outputs[label])
                self._settle(label, LabelOutcome(status="ok", reused=True, left_out=left_out))
                return
            self._stacks[label] = read_stack(
                self._request.checkpoints[label],
                dtype=self._request.dtype,
                trust_remote_code=bool(self._request.model_args.get("trust_remote_code")),
                progress=self._progress,
            )
        except ArchitectureError as error:
            self._alone[label] = f"its layers cannot be compared: {error}"
        except OutputError:
            raise
        except StreamlineBenchError as error:
            self._fail(label, error)

    def _walk(self, labels: list[str]) -> None:
        journals = self._open_journals(labels)
        try:
            self._walk_with(labels, journals)
        finally:
            for journal in journals.values():
                journal.write()

    def _walk_with(self, labels: list[str], journals: dict[str, Journal]) -> None:
        with self._timed("load") as load:
            party = assemble(
                self._request, labels, self._stacks, journals=journals, progress=self._progress
            )
        self._alone.update(party.alone)
        for label, error in party.failed.items():
            self._fail(label, error)
        if party.walk is None:
            return
        company = tuple(party.models) if len(party.models) > 1 else ()
        if company:
            self._walks.append(company)
            logger.info("Scored together: %s.", ", ".join(company))
        evaluation = Evaluation(self._request, self._catalogue)
        for label in [each for each in self._request.checkpoints if each in party.models]:
            expected = LabelOutcome(
                status="ok",
                company=company,
                shared_layers=party.shared_layers[label],
                seconds=load() / len(party.models),
            )
            self._evaluate(evaluation, label, party.models[label], expected, party.walk)
            if label in journals:
                journals.pop(label).discard()
        self._per_model.update(party.walk.per_model)

    def _open_journals(self, labels: list[str]) -> dict[str, Journal]:
        paths = {label: self._journal_path(label) for label in labels}
        return {label: Journal(path) for label, path in paths.items() if path is not None}

    def _journal_path(self, label: str) -> Path | None:
        """Where the label's answers are kept, named by everything that decides them."""
        if self._request.journal is None:
            return None
        named = f"{label}\0{request_digest(self._request, label)}"
        return self._request.journal / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.jsonl"

    def _was_begun(self, label: str) -> bool:
        path = self._journal_path(label)
        return path is not None and path.exists()

    def _evaluate_alone(self, label: str) -> None:
        logger.info("'%s' is scored by itself: %s.", label, self._alone[label].rstrip("."))
        try:
            with self._timed("load") as load:
                model = load_model(self._request, label)
        except StreamlineBenchError as error:
            self._fail(label, error)
            return
        expected = LabelOutcome(status="ok", reason=self._alone[label], seconds=load())
        self._evaluate(Evaluation(self._request, self._catalogue), label, model, expected)

    def _evaluate(
        self,
        evaluation: Evaluation,
        label: str,
        model: Any,
        expected: LabelOutcome,
        walk: Walk | None = None,
    ) -> None:
        """Evaluate a label.

        Args:
            expected: its outcome if it does not fail; ``seconds`` are those of its loading.
        """
        walked = walk.seconds if walk is not None else 0.0
        try:
            with self._timed("evaluate") as own, library_errors():
                left_out = evaluation.run(label, model)
        except (OutputError, EvaluationError):
            raise  # of the request, not of this model
        except StreamlineBenchError as error:
            self._fail(label, error)
            return
        seconds = expected.seconds + own()
        if walk is not None:
            # The first one to be asked walks for all.
            seconds += walk.seconds / walk.count - (walk.seconds - walked)
        layers = self._stacks[label].layers if label in self._stacks else 0
        known = {"layers": layers, "seconds": round(seconds, 3), "left_out": left_out}
        self._settle(label, expected.model_copy(update=known))

    def _fail(self, label: str, error: StreamlineBenchError) -> None:
        logger.error("'%s' cannot be scored: %s", label, error)
        self._settle(label, LabelOutcome(status="failed", reason=str(error)))

    def _settle(self, label: str, outcome: LabelOutcome) -> None:
        self._labels[label] = outcome
        self._on_label(label, outcome)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[Callable[[], float]]:
        """Add the block's time to a stage; yield what tells the time since it began, or took."""
        begin = time.perf_counter()
        spent: list[float] = []
        try:
            yield lambda: spent[0] if spent else time.perf_counter() - begin
        finally:
            spent.append(time.perf_counter() - begin)
            self._seconds[stage] = self._seconds.get(stage, 0.0) + spent[0]
