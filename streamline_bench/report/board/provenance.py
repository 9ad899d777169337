"""What a checkpoint says about itself: manifest, similarity matrix, training curves."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamline_bench.core.checkpoint.manifest import Manifest, read_manifest
from streamline_bench.errors import SamplesError
from streamline_bench.report.data.removed_layers import block_start
from streamline_bench.report.data.schema import CurvePoint, Provenance, ScanResult
from streamline_bench.stability.samples import RunInfo

__all__ = ["CheckpointFacts", "provenance", "read_checkpoint"]

_DECIMALS = 5


@dataclass(frozen=True)
class CheckpointFacts:
    """The artefacts of a checkpoint; all empty for a model that was not made here."""

    manifest: Manifest | None = None
    scan: ScanResult | None = None
    curve: list[CurvePoint] = field(default_factory=list)
    recovery_curve: list[CurvePoint] = field(default_factory=list)
    curve_notes: list[str] = field(default_factory=list)


def read_checkpoint(folder: Path | None) -> CheckpointFacts:
    """Read ``streamline.json``, ``similarity.json`` and the training curves, where present.

    ``training_curve.jsonl`` is the replacement's training, ``recovery_curve.jsonl`` the recovery's.

    Raises:
        CheckpointError: the manifest is damaged.
        CalibrationError: the similarity file is damaged.
        SamplesError: the folder is missing, or a training curve is damaged.
    """
    if folder is None:
        return CheckpointFacts()
    if not folder.is_dir():
        raise SamplesError(f"The checkpoint '{folder}' is missing; make the run again.")
    manifest = read_manifest(folder)
    curve, lost = _curve(folder / "training_curve.jsonl")
    recovery, lost_again = _curve(folder / "recovery_curve.jsonl")
    notes = [
        f"{training}: {len(steps)} losses are no finite numbers, the first at step {steps[0]}"
        for training, steps in (("replacement", lost), ("recovery", lost_again))
        if steps
    ]
    return CheckpointFacts(manifest, _scan(folder, manifest), curve, recovery, notes)


def _scan(folder: Path, manifest: Manifest | None) -> ScanResult | None:
    path = folder / "similarity.json"
    if not path.is_file():
        return None
    from streamline_bench.core.scan.similarity import Similarity

    similarity = Similarity.load(path)
    removed = sorted((manifest.chosen if manifest else {}).get("removed_layers") or ())
    return ScanResult(
        cosine=[[round(float(value), _DECIMALS) for value in row] for row in similarity.cosine],
        num_tokens=similarity.num_tokens,
        start=block_start(removed),
        n=len(removed) or None,
        removed=removed,
    )


def _curve(path: Path) -> tuple[list[CurvePoint], list[int]]:
    """The losses of a training, and the step of each that is no finite number."""
    points: list[CurvePoint] = []
    lost: list[int] = []
    if not path.is_file():
        return points, lost
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            losses = {name: row.get(name) for name in ("train_loss", "val_loss")}
            for name, loss in losses.items():
                if loss is not None and not math.isfinite(loss):
                    losses[name] = None
                    lost.append(row["step"])
            points.append(CurvePoint(step=row["step"], **losses))
        except (ValueError, KeyError, TypeError):
            raise SamplesError(f"{path}, line {number}: not a row of a training curve.") from None
    return points, lost


def provenance(
    info: RunInfo, manifest: Manifest | None, recipe: dict[str, Any] | None
) -> Provenance:
    """Collect what leads back from a row's numbers to weights, tokens and versions."""
    ours = info.config.get("streamline") or {}
    weights = ours.get("weights_sha256")
    common: dict[str, Any] = {
        "results_file": Path(info.source).name,
        "date": _iso(info.timestamp),
        "model": info.model,
        "engine": f"{info.engine} {info.engine_version or ''}".strip(),
        "model_args": info.config.get("model_args"),
        "weights_sha256": str(weights) if weights else None,
        "recipe": recipe,
    }
    if manifest is None:
        return Provenance(**common, versions=info.versions)
    return Provenance(
        **common,
        source=manifest.source.name,
        source_revision=manifest.source.revision,
        source_weights_sha256=manifest.source.weights_sha256,
        chosen=manifest.chosen,
        calibration=manifest.calibration,
        training=manifest.training,
        seed=manifest.seed,
        versions={**manifest.versions, **info.versions},
    )


def _iso(timestamp: str | None) -> str | None:
    """``2026-01-02T03-04-05.6`` (a file name's) -> ``2026-01-02T03:04:05``; else None."""
    found = re.match(r"(\d{4}-\d\d-\d\dT)(\d\d)-(\d\d)-(\d\d)", timestamp or "")
    return f"{found[1]}{found[2]}:{found[3]}:{found[4]}" if found else None
