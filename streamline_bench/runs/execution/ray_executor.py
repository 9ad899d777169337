"""Jobs on an existing Ray cluster.

Every machine of the cluster must see the run folder, the model and the task files under the same
paths and have this package installed; a job writes into the run folder, so that Ray moves
no data. A job asks for CPUs and GPUs; Ray chooses the machine and sets ``CUDA_VISIBLE_DEVICES``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from streamline_bench.errors import ClusterError, MissingDependencyError, first_line, library_errors
from streamline_bench.runs.execution.options import JOB_KINDS, Execution
from streamline_bench.runs.execution.processes import (
    Ended,
    environment_of,
    run_job_here,
    time_limit,
)
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job

_POLL = 0.1


class RayExecutor:
    """Hands jobs to a cluster, which queues what it has no room for.

    Attributes:
        execution: address, resources of a job, time limit.
    """

    def __init__(self, execution: Execution) -> None:
        """Connect to the cluster, unless this process is connected already.

        Raises MissingDependencyError without Ray, and ClusterError if there is no cluster at that
        address, or no machine of it is large enough.
        """
        self.execution = execution
        try:
            import ray
        except ImportError:
            raise MissingDependencyError(
                "--executor ray needs Ray, which is not installed; run: "
                "pip install 'streamline-bench[ray]'"
            ) from None
        self._ray: Any = ray
        self._names: dict[Any, str] = {}
        self._connected_here = not self._ray.is_initialized()
        if self._connected_here:
            with library_errors(
                f"There is no Ray cluster at '{execution.ray_address}'",
                "start one with 'ray start --head', or give --ray-address",
                ClusterError,
            ):
                self._ray.init(
                    address=execution.ray_address, log_to_driver=False, logging_level="ERROR"
                )
        try:
            self._check_resources()
        except ClusterError:
            self.stop()
            raise

    def has_room(self, kind: str) -> bool:
        """Ray keeps its own queue."""
        return True

    def at_once(self, kind: str) -> int:
        """As many as the machines have CPUs and GPUs for, were nothing else to run on them."""
        wanted = self._wanted(kind)
        rooms = (min(int(node.get(k, 0) // v) for k, v in wanted.items()) for node in self._nodes())
        return max(1, sum(rooms))

    def submit(self, run: RunPaths, job: Job) -> None:
        """Queue the job."""
        execution = self.execution
        kind = job.parts[0].kind
        cpus = execution.cpus_of(kind)
        remote = self._ray.remote(run_job_here).options(
            name=job.name,
            num_cpus=cpus,
            num_gpus=execution.gpus_of(kind),
            max_retries=0,  # attempts are counted, and limited, by the scheduler
        )
        environment = environment_of(job, cpus)
        here = str(Path.cwd())
        limit = time_limit(job, execution.timeout)
        reference = remote.remote(str(run.root), job.name, environment, limit, here)
        self._names[reference] = job.name

    def ended(self, timeout: float) -> list[Ended]:
        if not self._names:
            time.sleep(min(timeout, _POLL))
            return []
        ready, _ = self._ray.wait(list(self._names), num_returns=1, timeout=timeout)
        return [self._outcome(reference, self._names.pop(reference)) for reference in ready]

    def stop(self) -> None:
        """Cancel what is queued or runs, and leave the cluster as it was found."""
        for reference in self._names:
            # force kills the worker, whose job then loses its leash.
            self._ray.cancel(reference, force=True)
        self._names.clear()
        if self._connected_here:
            self._ray.shutdown()

    def _outcome(self, reference: Any, name: str) -> Ended:
        try:
            code, reason = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            return Ended(name, 1, f"Its worker could not start it: {first_line(error.cause)}")
        except self._ray.exceptions.RayError as error:
            # The worker's process or its machine is gone.
            return Ended(name, None, f"Its worker was lost ({first_line(error)}).")
        return Ended(name, code, reason)

    def _nodes(self) -> list[dict[str, float]]:
        """What each machine has, by name."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _wanted(self, kind: str) -> dict[str, int]:
        """What a job of this kind asks for, by name."""
        gpus = self.execution.gpus_of(kind)
        return {"CPU": self.execution.cpus_of(kind), **({"GPU": gpus} if gpus else {})}

    def _check_resources(self) -> None:
        """Refuse what no machine can ever satisfy, and to leave GPUs idle unasked."""
        nodes = self._nodes()
        gpus = sum(node.get("GPU", 0) for node in nodes)
        if gpus and self.execution.gpus_per_job is None and not self.execution.gpus_by_kind:
            raise ClusterError(
                f"The Ray cluster has {gpus:g} GPUs, and without --gpus-per-job jobs would compute "
                "on its CPUs; give --gpus-per-job 1 to use them, or 0 to leave them out."
            )
        for kind in JOB_KINDS:
            wanted = self._wanted(kind)
            if any(all(node.get(k, 0) >= v for k, v in wanted.items()) for node in nodes):
                continue
            asked = ", ".join(f"{value} {name}" for name, value in wanted.items())
            raise ClusterError(
                f"No machine of the Ray cluster has {asked}, which a {kind} job asks for; lower "
                "--cpus-per-job or --gpus-per-job."
            )
