"""How a comparison is run; none of it changes what is asked, so none of it is part of the plan.

The number of CPU threads may change the last digits of a result. It follows from the workers here
unless the plan fixes it (``--threads``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from streamline_bench.core.machine.environment import found_device, known_device
from streamline_bench.errors import RecipeError

STAGES: tuple[str, ...] = ("compress", "evaluate", "report")
"""Of a comparison, in order."""

JOB_KINDS: tuple[str, ...] = ("compress", "score", "text", "measure")
"""Kinds of jobs that may ask for different numbers of CPUs and GPUs; the noise floor is scoring."""

EXECUTORS: tuple[str, ...] = ("local", "ray", "slurm")
"""Where jobs can run."""


@dataclass(frozen=True)
class Execution:
    """Where jobs run and how often they are tried.

    Attributes:
        executor: ``local`` (processes of this machine), ``ray`` (an existing cluster) or ``slurm``.
        workers: jobs at a time, on this machine or in Slurm's queue; None: one per group of GPUs,
            or one; of Slurm, no limit.
        gpus: ids of the GPUs that local jobs share out; a cluster shares out its own.
        gpus_per_job: GPUs of one job; None: one of ``gpus``, or what the machine has where none are
            named. Several GPUs train or score in as many processes; vLLM splits a model over them.
            A text is always read on one.
        gpus_by_kind: the same for single kinds of jobs (see :data:`JOB_KINDS`). A plan has one
            device, so that either every job has a GPU or none has.
        cpus_per_job: CPUs that a job asks a cluster for.
        cpus_by_kind: the same for single kinds of jobs.
        ray_address: of the cluster; ``auto`` for the one this machine belongs to.
        slurm: options of ``sbatch``, such as ``partition``.
        retries: how often a job is started again after its process or machine was lost. A job
            that ended with an error of its own is not tried again.
        timeout: seconds after which a job is stopped, None for no limit.
        trunk: score variants that share lower layers in one walk.
        placement: of a model's weights while it is compressed, as for ``compress``; its result is
            the same.
    """

    executor: str = "local"
    workers: int | None = None
    gpus: tuple[str, ...] = field(default=())
    gpus_per_job: int | None = None
    gpus_by_kind: Mapping[str, int] = field(default_factory=dict)
    cpus_per_job: int = 1
    cpus_by_kind: Mapping[str, int] = field(default_factory=dict)
    ray_address: str = "auto"
    slurm: Mapping[str, str] = field(default_factory=dict)
    retries: int = 2
    timeout: float | None = None
    trunk: bool = True
    placement: str = "auto"

    def __post_init__(self) -> None:
        """Refuse an unknown executor, and impossible numbers of CPUs or GPUs (RecipeError)."""
        if self.executor not in EXECUTORS:
            raise RecipeError(f"Unknown executor '{self.executor}'; known: {', '.join(EXECUTORS)}.")
        fewest = min((self.cpus_per_job, *self.cpus_by_kind.values()))
        if fewest < 1:
            raise RecipeError(f"--cpus-per-job gives a job {fewest} CPUs; give at least 1.")
        for option, by_kind in (("cpus", self.cpus_by_kind), ("gpus", self.gpus_by_kind)):
            if unknown := by_kind.keys() - set(JOB_KINDS):
                raise RecipeError(
                    f"--{option}-per-job names the unknown kind of job '{min(unknown)}'; known: "
                    f"{', '.join(JOB_KINDS)}."
                )
        twice = {gpu for gpu in self.gpus if self.gpus.count(gpu) > 1}
        if twice:
            raise RecipeError(f"--gpus names GPU {min(twice)} twice; name each GPU once.")
        self._check_gpus()

    def _check_gpus(self) -> None:
        asked = {kind: self.gpus_of(kind) for kind in JOB_KINDS}
        most = max(asked, key=lambda kind: asked[kind])
        without = min(asked, key=lambda kind: asked[kind])
        if self.gpus and not asked[most]:
            raise RecipeError("--gpus names GPUs and --gpus-per-job 0 uses none; leave one out.")
        if asked[without] < 1 <= asked[most]:
            raise RecipeError(
                f"--gpus-per-job gives {most} jobs {asked[most]} GPUs and {without} jobs none; all "
                "jobs of a comparison compute on the same kind of device."
            )
        if self.gpus_by_kind.get("text", 1) > 1:
            raise RecipeError("--gpus-per-job: a text is read on one GPU; give text=1.")
        if self.executor == "local" and asked[most] > len(self.gpus):
            raise RecipeError(
                f"--gpus-per-job is {asked[most]} for {most} jobs and --gpus names "
                f"{len(self.gpus)} GPUs; name as many GPUs."
            )

    def check_threads(self, threads: int | None) -> None:
        """Refuse more threads than a job asks the cluster CPUs for: they crowd (RecipeError)."""
        short = [kind for kind in JOB_KINDS if self.cpus_of(kind) < (threads or 0)]
        if self.executor != "local" and short:
            raise RecipeError(
                f"A {short[0]} job would run {threads} threads (--threads) on the "
                f"{self.cpus_of(short[0])} CPUs that it asks the cluster for; give "
                f"--cpus-per-job {threads}, or fewer threads."
            )

    def check_measured(self, throughput: str) -> None:
        """Refuse several GPUs for a speed measurement that uses one (RecipeError)."""
        if throughput == "hf" and self.gpus_by_kind.get("measure", 1) > 1:
            raise RecipeError(
                "--gpus-per-job: --throughput hf measures on one GPU; give measure=1, or measure "
                "with vllm."
            )

    def check_device(self, device: str) -> None:
        """Refuse a torch device that is none, that jobs could not have, or would share unasked.

        What this machine has is known; a cluster's machines may have others (RecipeError).
        """
        if self.uses_gpus and device != "cuda":
            raise RecipeError(
                f"--device is {device}, and each job gets a GPU of its own; give --device cuda, or "
                "leave --gpus out."
            )
        if device.startswith("cuda") and self.device == "cpu":
            raise RecipeError(f"--device is {device} and jobs get no GPU; give --gpus-per-job 1.")
        if device == "cuda" and not self.gpus and self.executor == "local" and self.job_slots > 1:
            raise RecipeError(
                f"{self.job_slots} jobs at a time would share one GPU; name a GPU for each "
                "(--gpus 0,1), give --workers 1, or say which one they share (--device cuda:0)."
            )
        if self.executor != "local":
            known_device(device)
            return
        try:
            found_device(device)
        except RecipeError as error:
            named = f"--gpus names {', '.join(self.gpus)}, and " if self.gpus else ""
            raise RecipeError(f"{named}{error}") from None

    @property
    def device(self) -> str | None:
        """The torch device where the request leaves it open; None: what this machine has."""
        if self.uses_gpus:
            return "cuda"
        # Of a cluster, this machine's GPU says nothing.
        return "cpu" if self.executor != "local" or self.gpus_per_job == 0 else None

    def cpus_of(self, kind: str) -> int:
        """CPUs that a job of this kind asks a cluster for."""
        return self.cpus_by_kind.get(kind, self.cpus_per_job)

    def gpus_of(self, kind: str) -> int:
        """GPUs of a job of this kind, 0 for none."""
        common = int(bool(self.gpus)) if self.gpus_per_job is None else self.gpus_per_job
        return self.gpus_by_kind.get(kind, min(common, 1) if kind == "text" else common)

    @property
    def uses_gpus(self) -> bool:
        """Whether jobs get GPUs of their own."""
        return self.gpus_of("compress") > 0

    @property
    def job_slots(self) -> int:
        """Local jobs that run at the same time, at most."""
        if not self.gpus:
            return self.workers or 1
        room = len(self.gpus) // min(map(self.gpus_of, JOB_KINDS))
        return min(self.workers or room, room)

    @property
    def threads_per_job(self) -> int:
        """CPU threads of a local job where neither plan nor environment says otherwise."""
        return max(1, (os.cpu_count() or 1) // self.job_slots)

    @property
    def threads_alone(self) -> int:
        """CPU threads of a job that runs alone, where the plan does not say."""
        if self.executor != "local":
            return self.cpus_of("measure")
        given = os.environ.get("OMP_NUM_THREADS", "")
        return int(given) if given.isdigit() and int(given) else os.cpu_count() or 1
