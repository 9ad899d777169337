"""Which jobs are run together in one walk through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_bench.errors import StreamlineBenchError
from streamline_bench.runs.execution.executor import Unit
from streamline_bench.runs.jobs.graph import Job
from streamline_bench.runs.jobs.harness_command import model_of
from streamline_bench.runs.planning.plan import digest

if TYPE_CHECKING:
    pass

__all__ = ["Grouping", "groups_of", "together_payload", "unit_of"]


def unit_of(jobs: Sequence[Job]) -> Unit:
    """Return the process that does these jobs; the same jobs give the same name."""
    if len(jobs) == 1:
        return Unit(jobs[0].name, tuple(jobs))
    name = digest([[job.name, job.key] for job in jobs])[:8]
    return Unit(f"score-together-{name}", tuple(jobs))


@dataclass(frozen=True)
class Grouping:
    """Which jobs are done in one process, and why the others are done alone (by name)."""

    groups: list[list[Job]]
    alone: dict[str, str] = field(default_factory=dict)


def groups_of(run: Path, jobs: Sequence[Job], *, one_process: bool) -> Grouping:
    """Return which of these jobs are worth doing in one process.

    Args:
        one_process: there is only one worker, for which loading the harness once for all is worth
            it even where nothing is shared.
    """
    if one_process or len(jobs) < 2:
        return Grouping([list(jobs)])
    from streamline_bench.core.checkpoint.folder import resolve_pretrained
    from streamline_bench.harness.trunk.legs import solo_reason, walks_of
    from streamline_bench.harness.trunk.stack import read_stack

    stacks, alone = {}, {}
    for job in jobs:
        model = model_of(run, job.payload)
        try:
            folder = resolve_pretrained(model["pretrained"], model["revision"])
            stacks[job.name] = read_stack(
                folder,
                dtype=model["dtype"],
                trust_remote_code=job.payload["trust_remote_code"],
                progress=False,
            )
        except StreamlineBenchError as error:
            alone[job.name] = f"its layers cannot be told apart: {error}"
    by_name = {job.name: job for job in jobs}
    groups = [[by_name[name] for name in names] for names in walks_of(stacks)]
    for group in groups:
        if len(group) == 1:
            name = group[0].name
            alone[name] = solo_reason(name, jobs[0].name, stacks).replace(
                f"'{jobs[0].name}'", f"'{jobs[0].labels[0]}'"
            )
    return Grouping([*groups, *([job] for job in jobs if job.name not in stacks)], alone)


def together_payload(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return what the process needs to know; all rows are asked the same."""
    return {
        "rows": [
            {"name": job.name, "key": job.key, "label": job.labels[0], "payload": job.payload}
            for job in jobs
        ]
    }
