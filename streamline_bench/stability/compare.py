"""Compare two runs: ``compare(load_samples("dense"), load_samples("pruned"))``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from streamline_bench.errors import SamplesError
from streamline_bench.stability.align import AlignedPairs, align
from streamline_bench.stability.comparison import Comparison
from streamline_bench.stability.overall import macro, micro
from streamline_bench.stability.recorded_quantity import with_recorded_quantity
from streamline_bench.stability.reference_script import with_script_verdicts
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.task_comparison import ComparedTask, compare_task

__all__ = ["compare"]


def compare(
    dense: Samples,
    pruned: Samples,
    *,
    tasks: Sequence[str] | None = None,
    common_only: bool = False,
    settings: Settings | None = None,
) -> Comparison:
    """Compare the pruned run with the dense one, per task and over tasks.

    Tasks without verdicts (perplexities) are listed in ``not_compared`` with the reason. A task
    with several filters has a result for each; the summaries over tasks use its first.

    Raises:
        ComparisonError: the runs were not asked the same (see :func:`align`).
        SamplesError: no task has verdicts, or only some documents of a task have one.
        NumericsError: a spread is not finite.
    """
    settings = settings or Settings()
    pairs = align(dense, pruned, tasks=tasks, common_only=common_only)
    settings = with_recorded_quantity(settings, pairs.dense)
    pairs = with_script_verdicts(pairs, settings)
    compared: list[ComparedTask] = []
    skipped: dict[str, str] = {**dense.info.missing, **pruned.info.missing}
    keys = pairs.dense[["task", "filter"]].drop_duplicates().itertuples(index=False, name=None)
    first_filter = dict(dense.frame.drop_duplicates("task")[["task", "filter"]].to_numpy().tolist())
    for task, filter_name in keys:
        rows = ((pairs.dense["task"] == task) & (pairs.dense["filter"] == filter_name)).to_numpy()
        reason = _no_verdict(pairs, rows, str(task), settings.verdict)
        if reason:
            skipped[str(task)] = reason
        else:
            compared.append(compare_task(pairs.dense[rows], pairs.pruned[rows], settings))
    if not compared:
        raise SamplesError(
            f"No task of '{dense.info.run}' has right or wrong answers by '{settings.verdict}'; "
            "add a task with acc or exact_match."
        )
    main = [item for item in compared if item.result.filter == first_filter[item.result.task]]
    return Comparison(
        dense_run=dense.info.run,
        pruned_run=pruned.info.run,
        mode=settings.mode,
        ddof=settings.spread_ddof,
        quantity=settings.spread_quantity,
        confidence=settings.confidence,
        draws=settings.draws,
        seed=settings.seed,
        tasks=tuple(item.result for item in compared),
        macro=macro(main, settings),
        micro=micro(main, settings),
        not_compared=skipped,
    )


def _no_verdict(
    pairs: AlignedPairs, rows: npt.NDArray[np.bool_], task: str, verdict: str
) -> str | None:
    for frame, info in ((pairs.dense, pairs.dense_info), (pairs.pruned, pairs.pruned_info)):
        missing = frame.loc[rows, verdict].isna()
        if missing.all():
            return f"no right or wrong answers by '{verdict}'"
        if missing.any():
            document = frame.loc[rows].loc[missing, "doc_id"].iloc[0]
            raise SamplesError(
                f"Run '{info.run}' has no verdict on document {document} of task '{task}', but on "
                "others; evaluate again."
            )
    return None
