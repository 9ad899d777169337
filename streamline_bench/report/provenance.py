"""What a checkpoint, an evaluation and a recipe say about themselves.

Of a checkpoint: manifest, similarity matrix, training curves. Of an evaluation: where the documents
of its tasks come from. Of a recipe: its published numbers, with what its row reached.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from streamline_bench.core.checkpoint.folder import Manifest, read_manifest
from streamline_bench.errors import SamplesError
from streamline_bench.report.gains import recipe_parts
from streamline_bench.report.row import (
    ComputedBy,
    CurvePoint,
    Provenance,
    Published,
    Row,
    ScanResult,
)
from streamline_bench.report.scores import TaskData
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.samples import RunInfo

_DECIMALS = 5
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LOADERS = ("arrow", "csv", "json", "parquet", "text")
"""Loaders of local files; lm-eval writes their names where a data set's id would stand."""


def read_checkpoint(folder: Path | None) -> tuple[Manifest | None, dict[str, Any]]:
    """Read ``streamline.json``, ``similarity.json`` and the training curves, where present.

    ``training_curve.jsonl`` is the replacement's training, ``recovery_curve.jsonl`` the recovery's.

    Returns:
        The manifest, and the fields of a :class:`Row` that the others fill. Nothing without folder,
        for a model that was not made here.

    Raises:
        CheckpointError: the manifest is damaged.
        CalibrationError: the similarity file is damaged.
        SamplesError: the folder is missing, or a training curve is damaged.
    """
    if folder is None:
        return None, {}
    if not folder.is_dir():
        raise SamplesError(f"The checkpoint '{folder}' is missing; make the run again.")
    manifest = read_manifest(folder)
    curve, lost = _curve(folder / "training_curve.jsonl")
    recovery, lost_again = _curve(folder / "recovery_curve.jsonl")
    notes = [
        f"{training}: {len(steps)} losses are not finite, the first at step {steps[0]}"
        for training, steps in (("replacement", lost), ("recovery", lost_again))
        if steps
    ]
    scan = _scan(folder, manifest)
    return manifest, {
        "scan": scan, "curve": curve, "recovery_curve": recovery, "curve_notes": notes
    }  # fmt: skip


def _scan(folder: Path, manifest: Manifest | None) -> ScanResult | None:
    path = folder / "similarity.json"
    if not path.is_file():
        return None
    from streamline_bench.core.similarity import Similarity

    similarity = Similarity.load(path)
    removed = sorted((manifest.chosen if manifest else {}).get("removed_layers") or ())
    return ScanResult(
        cosine=[[round(float(value), _DECIMALS) for value in row] for row in similarity.cosine],
        num_tokens=similarity.num_tokens,
        start=removed[0] if removed and removed[-1] - removed[0] < len(removed) else None,
        n=len(removed) or None,
        removed=removed,
    )


class _TrainingStep(BaseModel):
    """One line of a training curve; it has more fields than a report shows."""

    model_config = ConfigDict(strict=True)

    step: int
    train_loss: float | None = None
    val_loss: float | None = None


def _curve(path: Path) -> tuple[list[CurvePoint], list[int]]:
    """The losses of a training, and the step of each loss that is not finite."""
    points: list[CurvePoint] = []
    lost: list[int] = []
    if not path.is_file():
        return points, lost
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = _TrainingStep.model_validate_json(line)
        except ValidationError:
            raise SamplesError(f"{path}, line {number}: not a row of a training curve.") from None
        losses = row.train_loss, row.val_loss
        finite = [loss if loss is not None and math.isfinite(loss) else None for loss in losses]
        lost += [
            row.step
            for loss, kept in zip(losses, finite, strict=True)
            if loss is not None and kept is None
        ]
        points.append(CurvePoint(step=row.step, train_loss=finite[0], val_loss=finite[1]))
    return points, lost


def provenance(
    info: RunInfo, manifest: Manifest | None, recipe: dict[str, Any] | None
) -> Provenance:
    """Collect what leads back from a row's numbers to weights, tokens and versions."""
    ours = info.config.get("streamline") or {}
    weights = ours.get("weights_sha256")
    made: dict[str, Any] = {}
    if manifest is not None:
        made = {
            "source": manifest.source.name,
            "source_revision": manifest.source.revision,
            "source_weights_sha256": manifest.source.weights_sha256,
            **{n: getattr(manifest, n) for n in ("chosen", "calibration", "training", "seed")},
        }
    return Provenance(
        results_file=Path(info.source).name,
        date=_iso(info.timestamp),
        machine=info.machine,
        model=info.model,
        engine=f"{info.engine} {info.engine_version or ''}".strip(),
        computed_by=computed_by(info),
        model_args=info.config.get("model_args"),
        weights_sha256=str(weights) if weights else None,
        recipe=recipe,
        versions={**(manifest.versions if manifest else {}), **info.versions},
        **made,
    )


def computed_by(info: RunInfo) -> ComputedBy:
    """What computed the answers: one name, or one for each task where they differ."""
    names = dict.fromkeys(info.computed_by.values())
    return next(iter(names)) if len(names) == 1 else dict(info.computed_by) or None


def _iso(timestamp: str | None) -> str | None:
    """``2026-01-02T03-04-05.6`` (a file name's) -> ``2026-01-02T03:04:05``; else None."""
    found = re.match(r"(\d{4}-\d\d-\d\dT)(\d\d)-(\d\d)-(\d\d)", timestamp or "")
    return f"{found[1]}{found[2]}:{found[3]}:{found[4]}" if found else None


def task_data(info: RunInfo, task: str) -> TaskData | None:
    """Where the documents of a task come from; None for engines that do not say."""
    found, shots = info.data.get(task), info.n_shot.get(task)
    if found is None:
        return None
    name = found.get("dataset", "")
    return TaskData(
        dataset=name if is_hub_id(name) else None,
        subset=found.get("subset"),
        split=found.get("split"),
        shots=shots if isinstance(shots, int) else None,
    )


def is_hub_id(name: str) -> bool:
    """Whether a name can be a data set of the Hugging Face Hub: ``name`` or ``owner/name``."""
    return bool(_HUB_ID.fullmatch(name)) and name not in _LOADERS and ".." not in name


def published_numbers(
    recipe: Mapping[str, Any],
    accuracies: Mapping[str, Estimate],
    *,
    stability: Estimate | None = None,
    retention: Estimate | None = None,
) -> list[Published]:
    """Return the recipe's ``published`` section; a metric finds the task or group of its name.

    ``PIQA`` finds ``piqa`` and ``local_piqa``, ``MMLU`` the group ``mmlu``; ``stability`` and
    ``retained average`` are the row's own, over its tasks; ``average of 13`` finds nothing, because
    its tasks differ. A number that is not in percent is compared with none of ours. A number of
    another selection, patch or healing than the row's is left out.

    Args:
        recipe: with ``published``, a list of mappings (see
            :class:`~streamline_bench.core.recipe.schema.PublishedResult`).
        accuracies: name of a task or group -> the row's accuracy, what is preferred first.
        stability, retention: of the row, over its tasks.

    Raises:
        SamplesError: an entry is not a published number.
    """
    named: dict[str, str] = {}
    for name in accuracies:
        named.setdefault(benchmark(name), name)
    own = {"stability": stability, "retainedaverage": retention}
    try:
        entries = [
            Published.model_validate({**entry, "task": None, "ours": None})
            for entry in recipe.get("published") or ()
        ]
    except (ValidationError, TypeError) as error:
        raise SamplesError(
            f"The recipe '{recipe.get('name')}' has a published number that cannot be read "
            f"({' '.join(str(error).split())}); it needs model, metric, value and source."
        ) from None
    found = []
    for entry in entries:
        if not _of_these_parts(recipe, entry):
            continue
        key = benchmark(entry.metric)
        task = named.get(key) if entry.unit == "%" else None
        ours = accuracies[task] if task is not None else own.get(key)
        found.append(entry.model_copy(update={"task": task, "ours": ours}))
    return found


def _of_these_parts(recipe: Mapping[str, Any], entry: Published) -> bool:
    """Whether a number was published of the parts that a row's recipe has, after all changes."""
    changed = recipe.get("overridden") or {}
    if not changed and entry.selection is None:
        return True
    own = copy.deepcopy(dict(recipe))
    laid = {key: value for key, (value, _) in changed.items()}
    if entry.selection is not None:
        laid["parameters.selection"] = entry.selection
    for key, value in laid.items():
        *sections, last = key.split(".")
        section = own
        for each in sections:
            section[each] = section = section.get(each) or {}
        if value is None:
            section.pop(last, None)
        else:
            section[last] = value
    return recipe_parts(own) == recipe_parts(recipe)


def is_model(row: Row, name: str) -> bool:
    """Whether a name in a paper's table is that of the row's dense model (Llama-2-7B).

    A row that was not made here is the model itself.
    """
    source = row.provenance.source or row.provenance.model or ""
    return bool(source) and _bare(source) == _bare(name)


def _bare(name: str) -> str:
    """Letters and digits of a model's name, without what hubs add to it."""
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").split("/")[-1].lower()).removesuffix("hf")


_PREFIXES = ("local_", "streamline_")
"""Of this project's own tasks (``tasks/lm_eval``)."""

_ALIASES = {
    "arcc": "arcchallenge",
    "arce": "arceasy",
    "chiddev": "chid",
    "csqa": "commonsenseqa",
    "hesw": "hellaswag",
    "obqa": "openbookqa",
    "raceh": "racehigh",
    "racem": "racemiddle",
    "winogrand": "winogrande",
}
"""Letters and digits of a name in tables of papers -> those of the name in the harnesses."""


def benchmark(name: str) -> str:
    """Return the benchmark that a task, a group or a metric names, in letters and digits.

    ``ARC-e``, ``arc_easy`` and ``local_arc_easy`` are one; CoQA and CommonsenseQA are two, though
    tables made with OpenCompass call the second by the first's name.
    """
    bare = name.strip().lower()
    prefix = next((prefix for prefix in _PREFIXES if bare.startswith(prefix)), "")
    letters = re.sub(r"[^a-z0-9]", "", bare[len(prefix) :])
    return _ALIASES.get(letters, letters)
