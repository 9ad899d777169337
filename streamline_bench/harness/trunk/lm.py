"""``--model streamline`` as one of several that answer together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamline_bench.harness.lm import StreamlineLM, TokenRequest, window_sums
from streamline_bench.harness.scoring.scorer import Answer, TokenScorer
from streamline_bench.harness.trunk.walk import Walk


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
