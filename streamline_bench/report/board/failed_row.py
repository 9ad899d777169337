"""A row that has no result: what it was to be, and why it failed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_bench.core.checkpoint.manifest import Manifest, read_manifest
from streamline_bench.errors import CheckpointError
from streamline_bench.report.data.schema import Provenance, Row

__all__ = ["failed_row"]


def failed_row(
    label: str,
    reason: str | None,
    recipe: Mapping[str, Any] | None,
    checkpoint: Path | None,
    seconds: Mapping[str, float],
) -> Row:
    """Return a row without numbers; the size is told where a checkpoint was made before."""
    manifest = _manifest(checkpoint)
    asked = dict(recipe or (manifest.recipe if manifest else {}))
    return Row(
        label=label,
        is_dense=False,
        failed=reason or "no evaluation",
        title=str(asked.get("title") or ""),
        method=asked.get("method"),
        replacement=(asked.get("replacement") or {}).get("kind"),
        cost=asked.get("cost"),
        layers=manifest.layers_after if manifest else None,
        layers_before=manifest.layers_before if manifest else None,
        parameters=manifest.parameters_after if manifest else None,
        parameters_before=manifest.parameters_before if manifest else None,
        sparsity_requested=manifest.sparsity_requested if manifest else asked.get("sparsity"),
        sparsity_reached=manifest.sparsity_reached if manifest else None,
        seconds={**(manifest.seconds if manifest else {}), **seconds},
        accuracy_macro=None,
        accuracy_micro=None,
        macro=None,
        micro=None,
        tasks=[],
        provenance=Provenance(
            results_file=None,
            model=None,
            engine=None,
            source=manifest.source.name if manifest else None,
            recipe=asked or None,
        ),
    )


def _manifest(checkpoint: Path | None) -> Manifest | None:
    if checkpoint is None:
        return None
    try:
        return read_manifest(checkpoint)
    except CheckpointError:
        # A damaged checkpoint may be the very reason of the failure, which the row tells.
        return None
