"""Loads the models of a walk, equal weights once, and checks that they can walk together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamline_bench.errors import (
    CheckpointError,
    ResourceError,
    StreamlineBenchError,
    library_errors,
)
from streamline_bench.harness.lm import StreamlineLM, TokenRequest, window_sums
from streamline_bench.harness.scoring.scorer import Answer, TokenScorer
from streamline_bench.harness.trunk.evaluation import model_arguments
from streamline_bench.harness.trunk.journal import Journal
from streamline_bench.harness.trunk.request import TrunkRequest
from streamline_bench.harness.trunk.stack import Stack, legs_of
from streamline_bench.harness.trunk.walk import Walk, Walker
from streamline_bench.harness.trunk.weights import WeightPool, agree

logger = logging.getLogger(__name__)


class TrunkLM(StreamlineLM):
    """A model whose loglikelihoods come from a walk, once it has joined one.

    The first model of a walk to be asked puts the requests to all of them; the others answer from
    what was kept. Generation is every model's own.
    """

    _walk: Walk | None = None
    _label: str = ""
    _encoded: list[TokenRequest] | None = None

    def join(self, walk: Walk, label: str) -> None:
        """Answer loglikelihoods from ``walk`` from now on."""
        self._walk, self._label = walk, label

    @property
    def scorer(self) -> TokenScorer | None:
        """What scores tokens with this model; None if it scores as the stock class does."""
        return self._token_scorer()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Answer]:
        """Return (log-probability, is greedy) of every continuation."""
        if self._walk is None:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self.refuse_searched(requests)
        return self._walk.answers(
            self._label, "loglikelihood", requests, lambda asked: self._ask_all(asked, disable_tqdm)
        )

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of every text."""
        if self._walk is None:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return self._walk.answers(
            self._label, "loglikelihood_rolling", requests, self._ask_all_rolling
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return generated texts, as the stock class does."""
        if self._walk is not None:
            self._walk.note_per_model("generate_until")
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[TokenRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        if self._encoded is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        self._encoded = list(requests)
        return []

    def _ask_all(self, requests: Any, disable_tqdm: bool) -> dict[str, list[Answer]]:
        self._encoded = []
        try:
            # It encodes them, and hands them to the method above.
            super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return self._scored(self._encoded)
        finally:
            self._encoded = None

    def _ask_all_rolling(self, requests: Any) -> dict[str, list[float]]:
        windows, owners = self._rolling_windows(requests)
        return {
            label: window_sums(answers, owners, len(requests))
            for label, answers in self._scored(windows).items()
        }

    def _scored(self, requests: Sequence[TokenRequest]) -> dict[str, list[Answer]]:
        assert self._walk is not None
        queries = self._queries(requests)
        if not queries:
            return self._walk.score([], batch_tokens=1)
        return self._walk.score(queries, batch_tokens=self._batch_tokens(queries))


@dataclass
class Assembly:
    """Models that are ready to walk.

    Attributes:
        models: by label, in walking order; each has joined ``walk`` if there is one.
        walk: None if fewer than two models are left.
        shared_layers: label -> decoder layers that others run for it.
        alone: label -> why it must be evaluated by itself.
        failed: label -> why it cannot be evaluated.
    """

    models: dict[str, TrunkLM] = field(default_factory=dict)
    walk: Walk | None = None
    shared_layers: dict[str, int] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)
    failed: dict[str, StreamlineBenchError] = field(default_factory=dict)


def load_model(request: TrunkRequest, label: str) -> TrunkLM:
    """Load a label's model as a separate run of the harness does.

    Raises:
        ResourceError: memory ran out.
        StreamlineBenchError: it cannot be loaded.
    """
    options = {
        "batch_size": str(request.batch_size),
        "max_batch_size": request.max_batch_size,
        "device": request.device,
    }
    with library_errors(f"{request.checkpoints[label]} cannot be loaded", kind=CheckpointError):
        return TrunkLM.create_from_arg_obj(model_arguments(request, label), options)


def assemble(
    request: TrunkRequest,
    labels: Sequence[str],
    stacks: Mapping[str, Stack],
    *,
    journals: Mapping[str, Journal] | None = None,
    progress: bool = True,
) -> Assembly:
    """Load models and let them walk together as far as they can.

    Args:
        labels: in walking order; a single one continues a walk whose other rows are finished.
        journals: see :class:`Walk`.
    """
    assembly = Assembly()
    loaded = _load_all(request, labels, assembly)
    assembly.models = {label: loaded[label] for label in labels if label in loaded}
    _drop_strangers(assembly, stacks)
    if len(assembly.models) < min(2, len(labels)):
        for label in assembly.models:
            assembly.alone[label] = "no other model can be scored with it"
        assembly.models = {}
        return assembly
    order = list(assembly.models)
    walkers = {}
    for label, model in assembly.models.items():
        scorer = model.scorer
        assert scorer is not None
        walkers[label] = Walker(model.model, scorer, stacks[label])
    assembly.walk = Walk(walkers, journals=journals, progress=progress)
    for leg in legs_of(order, stacks):
        assembly.models[leg.label].join(assembly.walk, leg.label)
        assembly.shared_layers[leg.label] = stacks[leg.label].layers_below(leg.start)
    return assembly


def _load_all(
    request: TrunkRequest, labels: Sequence[str], assembly: Assembly
) -> dict[str, TrunkLM]:
    loaded: dict[str, TrunkLM] = {}
    pool = WeightPool()
    for label in [each for each in request.checkpoints if each in labels]:
        try:
            model = load_model(request, label)
        except ResourceError:
            assembly.alone[label] = "the memory does not hold it together with the others"
            continue
        except StreamlineBenchError as error:
            assembly.failed[label] = error
            continue
        shared = pool.share(model.model)
        logger.info("'%s' holds %.1f MB of weights with others.", label, shared / 1e6)
        if model.scorer is None:
            assembly.alone[label] = "its LM head cannot run on chosen positions only"
            continue
        loaded[label] = model
    return loaded


def _drop_strangers(assembly: Assembly, stacks: Mapping[str, Stack]) -> None:
    """Leave out models whose shared layers differ after loading, although their files agree."""
    kept: list[str] = []
    for label in list(assembly.models):
        if kept:
            start = legs_of([kept[-1], label], stacks)[1].start
            before, model = assembly.models[kept[-1]].model, assembly.models[label].model
            if not agree(before, model, stacks[label], start):
                assembly.alone[label] = "its first layers differ after loading"
                del assembly.models[label]
                continue
        kept.append(label)
