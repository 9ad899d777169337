"""Which data set a task takes its documents from, as lm-eval's results tell."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_bench.report.data.schema import TaskData
from streamline_bench.stability.samples import RunInfo

__all__ = ["is_hub_id", "task_data"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LOADERS = ("arrow", "csv", "json", "parquet", "text")
"""Loaders of local files; lm-eval writes their names where a data set's id would stand."""


def task_data(info: RunInfo) -> dict[str, TaskData]:
    """Return task -> its data; empty for engines whose results do not say."""
    source = Path(info.source)
    if source.suffix != ".json" or not source.is_file():
        return {}
    try:
        configs = json.loads(source.read_text(encoding="utf-8")).get("configs") or {}
    except (OSError, ValueError, AttributeError):
        # The samples' reader has read this file; another process took it away since.
        return {}
    return {
        str(task): _data(config, info.n_shot.get(task))
        for task, config in configs.items()
        if isinstance(config, Mapping)
    }


def _data(config: Mapping[str, Any], shots: Any) -> TaskData:
    name = str(config.get("dataset_path") or "")
    split = config.get("test_split") or config.get("validation_split")
    subset = config.get("dataset_name")
    return TaskData(
        dataset=name if is_hub_id(name) else None,
        subset=str(subset) if subset else None,
        split=str(split) if split else None,
        shots=shots if isinstance(shots, int) else None,
    )


def is_hub_id(name: str) -> bool:
    """Whether a name can be a data set of the Hugging Face Hub: ``name`` or ``owner/name``."""
    return bool(_HUB_ID.fullmatch(name)) and name not in _LOADERS and ".." not in name
