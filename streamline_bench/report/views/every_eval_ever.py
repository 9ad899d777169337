"""Records of Every Eval Ever (arXiv 2606.14516), schema 0.3.0: one for each row and task.

::

    <folder>/data/<board>/<developer>/<model>/<uuid>.json            scores, model, harness
    <folder>/data/<board>/<developer>/<model>/<uuid>_samples.jsonl   one line per answer and metric

That is the layout of its data store. ``every_eval_ever validate 'data/*/*/*/*.json*'``, called in
``<folder>``, checks it (the package needs Python 3.12). The same rows give the same names.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from streamline_bench.core.files import atomic_write_text
from streamline_bench.errors import OutputError
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.provenance import is_hub_id
from streamline_bench.report.row import Row
from streamline_bench.report.views.answer_records import (
    SCHEMA_VERSION,
    Fields,
    Scored,
    answer_lines,
    result_id,
    scored,
    texts,
)
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.samples import Samples

AnswersOf = Callable[[str], Samples | None]
"""Label -> the answers of that row; None where only the board is left."""

_PERPLEXITIES = {"word_perplexity": 1.0, "byte_perplexity": 1.0, "perplexity": 1.0,
                 "bits_per_byte": 0.0}  # fmt: skip
"""Metric -> its least value."""

_CANONICAL = {"acc": "accuracy", "accuracy": "accuracy", "exact_match": "exact-match",
              "em": "exact-match", "f1": "f1", "perplexity": "perplexity"}  # fmt: skip
"""Names that the schema's registry of metrics has, for those that harnesses use."""

_HARNESSES = {"lm-eval": ("lm_eval", "lm-evaluation-harness")}
"""Engine of a row -> the schema's name of the library, and what its own metrics begin with."""

_RESERVED = {"", "data", "unknown", "con", "prn", "aux", "nul"}


def write_records(
    board: Leaderboard, folder: Path, organization: str, answers: AnswersOf | None = None
) -> int:
    """Write the record of every task of every row with a result; return their number.

    Args:
        folder: made if missing; records of the same rows and tasks are replaced.
        organization: who provides the results, and the developer of what was compressed here.
        answers: of a row by its label. None: records say how all documents together came out,
            and are marked as documentation instead of an evaluation run.

    Raises:
        OutputError: the folder cannot be written, or the organization has no letter or digit.
    """
    names = _Names(board, organization)
    written = 0
    for row in board.rows:
        if row.failed is not None:
            continue
        samples = answers(row.label) if answers else None
        for task in dict.fromkeys([*(each.task for each in scored(row)), *row.other_metrics]):
            record, lines = _record(board, row, task, names, samples)
            if record["evaluation_results"]:
                _write(Path(folder), names.path(row, task), record, lines)
                written += 1
    return written


class _Names:
    """What rows are called: ids of models, and paths made of them."""

    def __init__(self, board: Leaderboard, organization: str) -> None:
        self.organization = organization
        self.developer = _slug(organization)
        if self.developer.lower() in _RESERVED:
            raise OutputError(
                f"Records cannot be filed under the organization '{organization}'; give a name "
                "with letters or digits, other than 'data' and 'unknown'."
            )
        self.collection = f"streamline-bench-{_slug(board.title) or 'board'}"
        self._ids: dict[str, str] = {}
        for row in board.rows:
            made, count = self._made(row), 2
            unique = made
            while unique in self._ids.values():
                unique, count = f"{made}-{count}", count + 1
            self._ids[row.label] = unique

    def model(self, label: str) -> str:
        """``developer/model`` of a row."""
        return self._ids[label]

    def path(self, row: Row, task: str) -> str:
        """Of a record, without its ending; the same for the same board, model and task."""
        parts = (self.collection, self.model(row.label), task)
        key = hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).digest()
        return f"data/{parts[0]}/{parts[1]}/{uuid.UUID(bytes=key[:16], version=4)}"

    def _made(self, row: Row) -> str:
        origin = row.provenance
        if row.is_dense or row.made_elsewhere:
            return _model_id(str((row.made_elsewhere or {}).get("name") or origin.model or ""))
        base = _model_id(origin.source or "").split("/")[1]
        return f"{self.developer}/{base}-{_slug(row.label) or 'row'}"


def _model_id(name: str) -> str:
    """The id of a model on the Hub; ``local/<folder>`` for any other."""
    if "/" in name and is_hub_id(name):
        return name
    return f"local/{_slug(name.rstrip('/').split('/')[-1]) or 'model'}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name)[:100].strip("-. ")


def _record(
    board: Leaderboard, row: Row, task: str, names: _Names, samples: Samples | None
) -> tuple[Fields, list[str]]:
    """The record of one task, and the lines of its answers."""
    now, model = str(int(time.time())), names.model(row.label)
    found = row.provenance
    identity = {"evaluation_id": f"{task}/{model}/{now}", "model_id": model}
    scores = [score for score in scored(row) if score.task == task]
    results = [_result(board, row, score) for score in scores]
    known = {score.metric for score in scores}
    for metric, value in row.other_metrics.get(task, {}).items():
        lower = _lower_is_better(metric, task, samples)
        if metric not in known and lower is not None and math.isfinite(value):
            results.append(_aggregate(row, task, metric, value, lower))
    lines = [line for score in scores for line in answer_lines(score, samples, identity)]
    record: Fields = {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": identity["evaluation_id"],
        "retrieved_timestamp": now,
        "source_metadata": {
            "source_name": board.title,
            "source_type": "documentation" if samples is None else "evaluation_run",
            "source_organization_name": names.organization,
            "evaluator_relationship": _relationship(row),
        },
        "eval_library": _library(board, row),
        "model_info": _model_info(row, task, model),
        "evaluation_results": results,
    }
    if found.date is not None:
        record["evaluation_timestamp"] = found.date
    if lines:
        record["detailed_evaluation_results"] = {
            "format": "jsonl",
            "file_path": f"{names.path(row, task)}_samples.jsonl",
            "hash_algorithm": "sha256",
            "checksum": hashlib.sha256("".join(lines).encode()).hexdigest(),
            "total_rows": len(lines),
        }
    return record, lines


def _relationship(row: Row) -> str:
    """Who evaluates a model that was compressed here has made it."""
    return "third_party" if row.is_dense or row.made_elsewhere else "first_party"


def _library(board: Leaderboard, row: Row) -> Fields:
    engine, _, version = (row.provenance.engine or "unknown").partition(" ")
    ours = board.versions.get("streamline-bench")
    details = {"streamline-bench": ours} if ours else {}
    name = _HARNESSES.get(engine, (engine, engine))[0]
    return {"name": name, "version": version or "unknown", "additional_details": details}


def _model_info(row: Row, task: str, model: str) -> Fields:
    found = row.provenance
    by = found.computed_by.get(task) if isinstance(found.computed_by, dict) else found.computed_by
    recipe = found.recipe or {}
    hub = not model.startswith("local/") and _relationship(row) == "third_party"
    facts = {
        "row": row.label,
        "base_model": _model_id(found.source) if found.source else None,
        "base_model_revision": found.source_revision,
        "base_model_weights_sha256": found.source_weights_sha256,
        "compression": row.title or row.method,
        "recipe": recipe.get("name"),
        "method": row.method,
        "replacement": row.replacement,
        "seed": found.seed,
        "layers": row.layers,
        "layers_before": row.layers_before,
        "parameters": row.parameters,
        "parameters_before": row.parameters_before,
        "share_of_parameters_removed": row.sparsity_reached,
        "bytes": row.bytes,
        "weights_sha256": found.weights_sha256,
        "same_weights_as": ", ".join(twin.label for twin in row.same_weights) or None,
        "machine": found.machine,
    }
    info: Fields = {
        "name": row.label if _relationship(row) == "first_party" else model,
        "id": model,
        "developer": model.split("/")[0],
        "additional_details": {
            "deployment_type": "self_deployed",
            "model_availability": "open_weights" if hub else "unknown",
            **texts(facts),
        },
    }
    if by:
        version = found.versions.get(by.lower())
        info["inference_engine"] = {"name": by, **({"version": version} if version else {})}
    return info


def _result(board: Leaderboard, row: Row, score: Scored) -> Fields:
    details = {"compared_with": row.reference or board.dense, "filter": score.filter}
    return {
        "evaluation_result_id": result_id(score.metric, score.filter),
        "evaluation_name": score.name,
        "source_data": _source(row, score.task, score.n),
        "metric_config": _metric(
            row, score.metric, lower=score.lower_is_better, least=score.least, most=score.most
        ),
        "score_details": {
            "score": score.value.value,
            "uncertainty": _uncertainty(score.value, score.n, board.method.confidence),
            **({"details": details | _compared(score)} if score.comparison else {}),
        },
        **_asked(row, score.task),
    }


def _aggregate(row: Row, task: str, metric: str, value: float, lower: bool) -> Fields:
    """A number over all documents, as the harness gives it."""
    least = _PERPLEXITIES.get(metric)
    most = None if least is None else math.inf
    return {
        "evaluation_result_id": metric,
        "evaluation_name": task,
        "source_data": _source(row, task, None),
        "metric_config": _metric(row, metric, lower=lower, least=least, most=most),
        "score_details": {"score": value},
        **_asked(row, task),
    }


def _lower_is_better(metric: str, task: str, samples: Samples | None) -> bool | None:
    """None where neither the metric's meaning nor the task says it."""
    if metric in _PERPLEXITIES:
        return True
    says = samples.info.higher_is_better.get(task, {}).get(metric) if samples else None
    return None if says is None else not says


def _metric(
    row: Row, metric: str, *, lower: bool, least: float | None, most: float | None
) -> Fields:
    engine = (row.provenance.engine or "").split(" ")[0]
    prefix = _HARNESSES.get(engine, (engine, engine or "streamline-bench"))[1]
    found: Fields = {
        "metric_id": _CANONICAL.get(metric, f"{prefix}.{metric}"),
        "metric_name": metric,
        "lower_is_better": lower,
    }
    if least is None or most is None:
        return found
    ends = {"min_score": least, "max_score": "Infinity" if math.isinf(most) else most}
    return found | {"score_type": "continuous", **ends}


def _source(row: Row, task: str, n: int | None) -> Fields:
    data = next((score.data for score in row.tasks if score.task == task and score.data), None)
    if data is None or data.dataset is None:
        return {"dataset_name": task, "source_type": "other"}
    found: Fields = {"dataset_name": task, "source_type": "hf_dataset", "hf_repo": data.dataset}
    if data.split:
        found["hf_split"] = data.split
    if n is not None:
        found["samples_number"] = n
    return found | ({"additional_details": {"subset": data.subset}} if data.subset else {})


def _asked(row: Row, task: str) -> Fields:
    """How the questions were put, where the board says it."""
    score = next((score for score in row.tasks if score.task == task), None)
    if score is None:
        return {}
    facts = texts({"num_fewshot": score.shots, "output_type": score.output_type})
    return {"generation_config": {"additional_details": facts}}


def _uncertainty(estimate: Estimate, n: int, confidence: float) -> Fields:
    found: Fields = {"num_samples": n}
    if estimate.standard_error is not None:
        found["standard_error"] = {"value": estimate.standard_error, "method": "analytic"}
    if estimate.low is not None and estimate.high is not None:
        ends = {"lower": estimate.low, "upper": estimate.high, "confidence_level": confidence}
        found["confidence_interval"] = ends | texts({"method": estimate.method})
    return found


def _compared(score: Scored) -> dict[str, str]:
    """What became of the dense model's score; shares, not percent."""
    found = score.comparison
    if found is None:
        return {}
    facts: Fields = {"p_holm": found.p_holm, "decision": found.decision}
    for name in ("difference", "ratio", "stability", "retention", "agreement"):
        estimate = getattr(found, name, None)
        if isinstance(estimate, Estimate):
            facts |= {name: estimate.value, f"{name}_low": estimate.low,
                      f"{name}_high": estimate.high}  # fmt: skip
    return texts(facts)


def _write(folder: Path, path: str, record: Fields, lines: Iterable[str]) -> None:
    """The answers first, so that a record never points at a file that is not there."""
    target = folder / f"{path}.json"
    answers = folder / f"{path}_samples.jsonl"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if text := "".join(lines):
            atomic_write_text(answers, text)
        atomic_write_text(target, json.dumps(record, indent=1, allow_nan=False) + "\n")
        if not text:
            answers.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"The records cannot be written to '{folder}' ({error.strerror or error}); give a "
            "folder that can be."
        ) from None
