"""PPL inference that scores the choices of a question together.

OpenCompass's PPLInferencer asks for all questions with the first label, then for all with the
second, and so on: a question's text is computed once per label. Here all prompts are collected
first and scored question by question, so that our models compute what they share (the question,
the examples before it) once. Predictions files are the same.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from opencompass.openicl.icl_inferencer import PPLInferencer
from tqdm import tqdm

logger = logging.getLogger(__name__)


class SharedPrefixPPLInferencer(PPLInferencer):  # type: ignore[misc]
    """PPLInferencer for our models; with any other, or normalised scores, it is the stock one.

    The stock inferencer runs twice: once with a model that only notes what it is asked, and, when
    all of that has been scored, once with a model that answers from these scores.
    """

    model: Any
    is_main_process: bool

    def inference(self, retriever: Any, *arguments: Any, **options: Any) -> list[Any]:
        """Write the predictions, as the stock inferencer does, and return them."""
        if not hasattr(self.model, "engine") or options.get("normalizing_str") is not None:
            return super().inference(retriever, *arguments, **options)  # type: ignore[no-any-return]
        model, writes = self.model, self.is_main_process
        script = _Script(model)
        retriever = _RetrievedOnce(retriever)
        try:
            self.model, self.is_main_process = script, False
            super().inference(retriever, *arguments, **options)
            script.score(self.batch_size or 1, progress=writes)
            self.is_main_process = writes
            return super().inference(retriever, *arguments, **options)  # type: ignore[no-any-return]
        finally:
            self.model, self.is_main_process = model, writes


class _Script:
    """Stands in for a model: notes prompts first, repeats their scores afterwards."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._prompts: dict[str, Any] = {}
        self._lengths: dict[str, Any] = {}
        self._scores: dict[str, float] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_token_len_from_template(self, templates: Any, mode: str = "ppl") -> Any:
        key = f"{mode} {_key(templates)}"
        if key not in self._lengths:
            self._lengths[key] = self._model.get_token_len_from_template(templates, mode=mode)
        return self._lengths[key]

    def get_ppl_from_template(
        self, templates: Sequence[Any], mask_length: None = None
    ) -> npt.NDArray[np.float64]:
        prompts = self._model.parse_template(templates, mode="ppl")
        keys = [_key(prompt) for prompt in prompts]
        if self._scores is None:
            self._prompts.update(zip(keys, prompts, strict=True))
            return np.zeros(len(prompts))
        return np.array([self._scores[key] for key in keys])

    def score(self, batch_size: int, *, progress: bool) -> None:
        """Score what was noted; prompts that begin alike stand side by side."""
        keys = sorted(self._prompts)
        self._scores = {}
        starts = range(0, len(keys), batch_size)
        for start in tqdm(starts, desc="PPL", disable=not progress):
            batch = keys[start : start + batch_size]
            found = self._model.get_ppl([self._prompts[key] for key in batch])
            self._scores.update(zip(batch, map(float, found), strict=True))


class _RetrievedOnce:
    """A retriever whose search is done once; the inferencer shortens the lists it gets."""

    def __init__(self, retriever: Any) -> None:
        self._retriever = retriever
        self._found: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._retriever, name)

    def retrieve(self) -> Any:
        if self._found is None:
            self._found = self._retriever.retrieve()
        return copy.deepcopy(self._found)


def _key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
