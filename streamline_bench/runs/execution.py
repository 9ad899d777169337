"""How a comparison is run; none of it changes a result, so none of it is part of the plan."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from streamline_bench.errors import RecipeError

__all__ = ["EXECUTORS", "Execution"]

EXECUTORS: tuple[str, ...] = ("local", "ray")


@dataclass(frozen=True)
class Execution:
    """Where jobs run and how often they are tried.

    Attributes:
        executor: ``local`` (processes of this machine) or ``ray`` (an existing cluster).
        workers: local jobs at a time; None: one per group of GPUs, or one.
        gpus: ids of the GPUs that local jobs share out; a Ray cluster shares out its own.
        gpus_per_job: GPUs of one job; None: one of ``gpus``, or none where there are none.
        cpus_per_job: CPUs that a job asks a ray cluster for.
        ray_address: of the cluster; ``auto`` for the one this machine belongs to.
        retries: how often a job is started again after its process or machine was lost. A job
            that ended with an error of its own is not tried again.
        timeout: seconds after which a job is stopped, None for no limit.
        trunk: score variants that share lower layers in one walk.
    """

    executor: str = "local"
    workers: int | None = None
    gpus: tuple[str, ...] = field(default=())
    gpus_per_job: int | None = None
    cpus_per_job: int = 1
    ray_address: str = "auto"
    retries: int = 2
    timeout: float | None = None
    trunk: bool = True

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            RecipeError: an unknown executor, or more GPUs per job than there are.
        """
        if self.executor not in EXECUTORS:
            raise RecipeError(f"Unknown executor '{self.executor}'; known: {', '.join(EXECUTORS)}.")
        if self.executor == "local" and self.gpus_of_a_job > len(self.gpus):
            raise RecipeError(
                f"A job asks for {self.gpus_of_a_job} GPUs and --gpus names {len(self.gpus)}."
            )

    @property
    def gpus_of_a_job(self) -> int:
        """GPUs of one job, 0 for none."""
        return int(bool(self.gpus)) if self.gpus_per_job is None else self.gpus_per_job

    @property
    def job_slots(self) -> int:
        """Local jobs that run at the same time."""
        groups = len(self.gpus) // self.gpus_of_a_job if self.gpus and self.gpus_of_a_job else None
        return min(self.workers or groups or 1, groups or 10_000)

    @property
    def threads_per_job(self) -> int:
        """CPU threads of a local job where neither plan nor environment says otherwise."""
        return max(1, (os.cpu_count() or 1) // self.job_slots)
