"""Jobs in the queue of a Slurm cluster, which submitit hands them to.

Every node must see the run folder, the model and the task files under the same paths and have this
package installed; a job writes into the run folder. Slurm chooses the node and its GPUs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

from streamline_bench.errors import ClusterError, MissingDependencyError, first_line
from streamline_bench.runs.execution.options import Execution
from streamline_bench.runs.execution.processes import (
    Ended,
    environment_of,
    run_job_here,
    time_limit,
)
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job

_POLL = 0.5
_MARGIN = 5  # minutes beyond a job's own limit, in which it says why it ended


class SlurmExecutor:
    """Submits jobs; what Slurm has no room for waits in its queue.

    Attributes:
        execution: resources of a job, options of ``sbatch``, time limit.
    """

    cluster: ClassVar[str] = "slurm"
    """What submitit submits to; its ``local`` runs the same jobs as processes of this machine."""

    def __init__(self, execution: Execution) -> None:
        """Look for Slurm.

        Raises MissingDependencyError without submitit, and ClusterError without Slurm.
        """
        self.execution = execution
        try:
            import submitit
        except ImportError:
            raise MissingDependencyError(
                "--executor slurm needs submitit, which is not installed; run: "
                "pip install 'streamline-bench[slurm]'"
            ) from None
        self._submitit: Any = submitit
        self._jobs: dict[str, Any] = {}
        if self.cluster == "slurm" and submitit.SlurmExecutor.affinity() < 0:
            raise ClusterError(
                "There is no Slurm here (sbatch and srun are not found); run the command on a "
                "login node, or give another --executor."
            )

    def has_room(self, kind: str) -> bool:
        """Slurm keeps its own queue; ``workers`` limits how many of these jobs are in it."""
        return self.execution.workers is None or len(self._jobs) < self.execution.workers

    def at_once(self, kind: str) -> int:
        """``workers``; without a limit, what the nodes have room for is not known."""
        return self.execution.workers or 1

    def submit(self, run: RunPaths, job: Job) -> None:
        """Queue the job (ClusterError: Slurm does not take it)."""
        execution, kind = self.execution, job.parts[0].kind
        cpus, limit = execution.cpus_of(kind), time_limit(job, execution.timeout)
        asked: dict[str, Any] = {
            "name": job.name,
            "nodes": 1,
            "tasks_per_node": 1,
            "cpus_per_task": cpus,
            **({"gpus_per_node": gpus} if (gpus := execution.gpus_of(kind)) else {}),
            "slurm_additional_parameters": dict(execution.slurm),
        }
        if limit is not None:
            asked["timeout_min"] = int(limit // 60) + 1 + _MARGIN
        executor = self._submitit.AutoExecutor(run.job(job.name) / "slurm", cluster=self.cluster)
        try:
            executor.update_parameters(**asked)
            self._jobs[job.name] = executor.submit(
                run_job_here,
                str(run.root),
                job.name,
                environment_of(job, cpus),
                limit,
                str(Path.cwd()),
            )
        except Exception as error:
            raise ClusterError(
                f"Slurm does not take the job {job.name} ({first_line(error)}); check --slurm and "
                "the resources per job."
            ) from None

    def ended(self, timeout: float) -> list[Ended]:
        until = time.monotonic() + timeout
        while True:
            done = [name for name, job in self._jobs.items() if job.done()]
            if done or time.monotonic() >= until:
                return [self._outcome(name, self._jobs.pop(name)) for name in done]
            time.sleep(_POLL)

    def stop(self) -> None:
        """Cancel what is queued or runs."""
        for job in self._jobs.values():
            job.cancel(check=False)
        self._jobs.clear()

    def _outcome(self, name: str, job: Any) -> Ended:
        """A job whose node or time was lost is tried again; its own end is final."""
        try:
            code, reason = job.result()
        except self._submitit.core.utils.FailedJobError:
            return Ended(name, 1, f"Its worker could not start it; see jobs/{name}/slurm.")
        except self._submitit.core.utils.UncompletedJobError:
            return Ended(name, None, f"Slurm ended it ({job.state}); see jobs/{name}/slurm.")
        return Ended(name, code, reason)
