"""Rows that share lower layers, scored by one process that runs those layers once.

The result of a row is the same as scored alone, and named by the same key: what was finished in
one way is kept in the other.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_bench.errors import OutputError, StreamlineBenchError
from streamline_bench.runs.folder import job_folder
from streamline_bench.runs.jobs.harness_command import model_of, reader_command
from streamline_bench.runs.jobs.marker import write_done, write_failed
from streamline_bench.runs.jobs.score_job import check_scores, without_empty_tasks
from streamline_bench.runs.jobs.worker import Product
from streamline_bench.runs.planning.plan import Evaluation

if TYPE_CHECKING:
    from streamline_bench.harness.trunk import LabelOutcome

__all__ = ["forget_answers", "score_rows_together"]

_WAITING = ".scored"
"""Below ``jobs``: a finished row, for the moment until it is moved to its place."""

_ANSWERS = ".answers"
"""Below ``jobs``: what unfinished rows have answered, for the attempt after an interruption."""


def score_rows_together(run: Path, name: str, payload: Mapping[str, Any]) -> Product:
    """Score the rows and mark each as done or failed.

    Raises:
        StreamlineBenchError: the walk cannot be made at all; rows without a mark are then scored
            alone.
    """
    from streamline_bench.harness.trunk import TrunkRequest, score_together

    rows = {row["label"]: row for row in payload["rows"]}
    outputs = {
        # A key in the name: an output of other options is never taken for this one's.
        label: job_folder(run, _WAITING) / f"{label}-{row['key'][:16]}"
        for label, row in rows.items()
    }
    _forget_others(outputs)
    request = TrunkRequest.model_validate(_request(run, rows, outputs))

    def publish(label: str, result: LabelOutcome) -> None:
        row = rows[label]
        if result.status == "failed":
            reason = result.reason or "It could not be scored."
            write_failed(run, row["name"], key=row["key"], reason=" ".join(reason.split()))
        else:
            _publish(run, row, outputs[label], result)

    outcome = score_together(request, progress=False, on_label=publish)
    return Product([], facts={"walks": outcome.walks, "seconds": outcome.seconds})


def forget_answers(run: Path) -> None:
    """Remove what walks keep for another attempt, once every row has its result."""
    for name in (_WAITING, _ANSWERS):
        shutil.rmtree(job_folder(run, name), ignore_errors=True)


def _forget_others(outputs: Mapping[str, Path]) -> None:
    """Remove outputs that these rows left with other options, or another version, long ago."""
    for label, output in outputs.items():
        for path in output.parent.glob(f"{glob.escape(label)}-*"):
            if path.name.rpartition("-")[0] == label and path != output:
                shutil.rmtree(path, ignore_errors=True)


def _request(run: Path, rows: Mapping[str, Any], outputs: Mapping[str, Path]) -> dict[str, Any]:
    from streamline_bench.core.checkpoint.folder import resolve_pretrained

    models = {label: model_of(run, row["payload"]) for label, row in rows.items()}
    first = next(iter(rows.values()))["payload"]
    evaluation = Evaluation.model_validate(first["evaluation"])
    size = evaluation.batch_size
    return {
        "checkpoints": {
            label: resolve_pretrained(model["pretrained"], model["revision"])
            for label, model in models.items()
        },
        "outputs": outputs,
        "journal": job_folder(run, _ANSWERS),
        "tasks": evaluation.tasks,
        "include_path": evaluation.include_path,
        "limit": evaluation.limit,
        "num_fewshot": evaluation.num_fewshot,
        "batch_size": int(size) if size.isdigit() else size,
        "device": first["device"],
        "dtype": evaluation.dtype,
        "apply_chat_template": evaluation.apply_chat_template,
        "model_args": {"trust_remote_code": True} if first["trust_remote_code"] else {},
    }


def _publish(run: Path, row: Mapping[str, Any], made: Path, result: LabelOutcome) -> None:
    """Check one row's scores, move them to their place and say that they are there."""
    payload = row["payload"]
    target = run / payload["output"]
    try:
        check_scores(made)
    except StreamlineBenchError as error:
        # Left here, they would be taken for this row's result again, and fail again.
        shutil.rmtree(made, ignore_errors=True)
        write_failed(run, row["name"], key=row["key"], reason=" ".join(str(error).split()))
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)  # not vouched for by a marker, or this row would not be here
        made.rename(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror}).") from None
    write_done(
        run,
        row["name"],
        key=row["key"],
        seconds=result.seconds,
        products=[payload["output"]],
        command=reader_command(
            run, without_empty_tasks(payload)[0] if result.left_out else payload
        ),
        facts={
            "together": list(result.company),
            "alone": result.reason,
            "not_compared": result.left_out,
        },
    )
