"""Samples tables made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from streamline_bench.stability.samples import RunInfo, Samples


def row(run: str, task: str, document: int, scores: Sequence[float], gold: int) -> dict[str, Any]:
    """One question whose choices have these log-likelihoods."""
    chosen = int(np.argmax(scores))
    return {
        "run": run, "task": task, "task_version": "1", "output_type": "multiple_choice",
        "filter": "none", "doc_id": document, "doc_hash": f"{task}{document}", "prompt_hash": "p",
        "target_hash": str(gold), "request_hash": f"{task}{document}", "prompt": "q",
        "choices": [f"choice {index}" for index in range(len(scores))],
        "loglikelihoods": [float(score) for score in scores],
        "lengths": [8] * len(scores), "byte_lengths": [8] * len(scores),
        "prediction": chosen, "gold": gold, "target": str(gold), "correct": chosen == gold,
        "verdict_metric": "acc", "metrics": {"acc": float(chosen == gold)},
    }  # fmt: skip


@pytest.fixture(scope="session")
def questions() -> Callable[..., Samples]:
    """Make a run: ``questions("run", {"task": (scores [n, k], gold [n], clusters or None)})``."""

    def make(run: str, tasks: dict[str, tuple[Any, Any, Any]], **info: Any) -> Samples:
        rows = [
            {**row(run, task, document, scores, int(right)),
             "cluster": None if clusters is None else str(clusters[document])}
            for task, (all_scores, gold, clusters) in tasks.items()
            for document, (scores, right) in enumerate(zip(all_scores, gold, strict=True))
        ]  # fmt: skip
        versions = dict.fromkeys(tasks, "1")
        about = RunInfo(run=run, engine="by hand", source=run, task_versions=versions, **info)
        return Samples.from_rows(rows, about)

    return make


@pytest.fixture(scope="session")
def pair(questions: Callable[..., Samples]) -> Callable[..., tuple[Samples, Samples]]:
    """Make a dense and a pruned run that answer the same questions, with some noise between them.

    ``pair({"task": (n, documents per cluster or None)}, noise=1.0)``
    """

    def make(
        tasks: dict[str, tuple[int, int | None]], *, noise: float = 1.0, seed: int = 0, **info: Any
    ) -> tuple[Samples, Samples]:
        source = np.random.default_rng(seed)
        first, second = {}, {}
        for task, (n, size) in tasks.items():
            gold = source.integers(4, size=n)
            scores = source.normal(-20, 2, size=(n, 4))
            scores[np.arange(n), gold] += 2
            moved = scores + noise * source.normal(0, 1, size=(n, 4))
            clusters = None
            if size is not None:
                clusters = [f"passages:{index // size}" for index in range(n)]
                # Questions of one passage fail together.
                shift = np.repeat(source.normal(0, noise, size=-(-n // size)), size)[:n]
                moved[np.arange(n), gold] += shift
            first[task], second[task] = (scores, gold, clusters), (moved, gold, clusters)
        return questions("dense", first, **info), questions("pruned", second, **info)

    return make
