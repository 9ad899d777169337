"""A cluster of several nodes; one of them is lost in the middle."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from streamline_bench.errors import ClusterError, MissingDependencyError
from streamline_bench.runs.execution.options import Execution
from streamline_bench.runs.execution.ray_executor import RayExecutor
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.run import compare_request

pytest.importorskip("ray", reason="Ray is not installed (pip install 'streamline-bench[ray]')")

MEMORY = 80 * 1024 * 1024


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster on this machine whose head runs no jobs; tests add nodes to it."""
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False},
    )
    yield made
    made.shutdown()


def _attempts(run: Path) -> dict[str, int]:
    found = run.glob("jobs/*/attempts.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def _jobs_of(run: Path) -> list[psutil.Process]:
    mark = ["streamline_bench.runs.jobs.worker", str(run)]
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if all(word in (process.info["cmdline"] or []) for word in mark)
    ]


@pytest.mark.filterwarnings("ignore")
def test_resources_that_no_node_has_are_refused(
    cluster: Any, make: Callable[..., Request], tmp_path: Path
) -> None:
    execution = Execution(executor="ray", ray_address=cluster.address, cpus_per_job=64)
    with pytest.raises(ClusterError, match="64 CPU, which a compress job asks for"):
        compare_request(make(), tmp_path / "run", execution=execution, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("given", "at_once"), [(None, 0), (0, 16), (1, 4), (3, 1)])
def test_gpus_of_the_cluster_are_not_left_idle_unasked(
    monkeypatch: pytest.MonkeyPatch, given: int | None, at_once: int
) -> None:
    import ray

    table = [
        {"Alive": True, "Resources": {"CPU": 8.0}},
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 4.0}},
    ]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: table)
    execution = Execution(executor="ray", gpus_per_job=given)
    expected = (
        pytest.raises(ClusterError, match=r"4 GPUs.*--gpus-per-job 1")
        if not at_once
        else contextlib.nullcontext()
    )
    with expected:
        assert RayExecutor(execution).at_once("score") == at_once


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_lost_node_costs_one_job(
    cluster: Any, make: Callable[..., Request], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(2)]
    lost: list[str] = []

    def lose_a_node() -> None:
        # A job has started on each node by now; the second node goes, as in a power cut.
        while len(_attempts(run)) < 2:
            time.sleep(0.02)
        lost.extend(_attempts(run))
        cluster.remove_node(nodes[1], allow_graceful=False)

    thread = threading.Thread(target=lose_a_node)
    thread.start()
    result = compare_request(
        make(recipes=["first_layers", "last_layers", "random_layers"]),
        run,
        execution=Execution(executor="ray", ray_address=cluster.address),
        until="compress",
        progress=False,
    )
    thread.join()
    assert result.exit_code == 0
    assert set(result.jobs.values()) == {"done"}
    assert sorted(_attempts(run).values()) == [1, 1, 2]
    assert {name for name, number in _attempts(run).items() if number == 2} <= set(lost)
    for label in ("first_layers", "last_layers", "random_layers"):
        assert (run / label / "checkpoint" / "streamline.json").is_file()
    assert _jobs_of(run) == []


def test_no_cluster_at_the_address(
    make: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refuse(**_: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", refuse)
    execution = Execution(executor="ray", ray_address="127.0.0.1:1")
    with pytest.raises(ClusterError, match=r"no Ray cluster at '127\.0\.0\.1:1' \(nobody there\)"):
        compare_request(make(), tmp_path / "run", execution=execution, progress=False)


def test_without_ray_the_line_to_install_it_is_given(
    make: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'streamline-bench\[ray\]'"):
        compare_request(
            make(), tmp_path / "run", execution=Execution(executor="ray"), progress=False
        )
