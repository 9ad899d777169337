"""A cluster of several nodes; one of them is lost in the middle."""

from __future__ import annotations

import contextlib
import json
import shutil
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
from streamline_bench.runs.planning.request import Request, RowRequest
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


@pytest.mark.parametrize(("given", "refused"), [(None, True), (0, False), (1, False)])
def test_gpus_of_the_cluster_are_not_left_idle_unasked(
    monkeypatch: pytest.MonkeyPatch, given: int | None, refused: bool
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
        if refused
        else contextlib.nullcontext()
    )
    with expected:
        RayExecutor(execution)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_node_lost_while_rows_are_scored_together_changes_no_number(
    cluster: Any,
    make: Callable[..., Request],
    tasks: Path,
    tmp_path: Path,
    leaderboards: Any,
) -> None:
    ray_run, local_run = tmp_path / "ray", tmp_path / "local"
    request = make(
        recipes=[
            "first_layers",
            "last_layers",
            RowRequest(recipe="last_layers", label="last_one", overrides={"n_layers": 1}),
        ],
        tasks=["words"],
        include_path=str(tasks),
        noise_floor=True,
        threads=1,
        limit=4,
    )
    compare_request(request, local_run, until="compress", progress=False)
    shutil.copytree(local_run, ray_run)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(2)]

    def lose_the_walk() -> None:
        while not (walking := [p for p in _jobs_of(ray_run) if "together" in p.cmdline()[-1]]):
            time.sleep(0.02)
        above = {parent.pid for parent in walking[0].parents()}
        (node,) = (n for n in nodes if n.all_processes["raylet"][0].process.pid in above)
        while not list(ray_run.glob("jobs/score-together-*/attempts.json")):
            time.sleep(0.02)
        walking[0].suspend()  # or it might be through before its machine is gone
        cluster.remove_node(node, allow_graceful=False)
        with contextlib.suppress(psutil.NoSuchProcess):
            walking[0].resume()  # to notice that it is alone

    thread = threading.Thread(target=lose_the_walk)
    thread.start()
    execution = Execution(executor="ray", ray_address=cluster.address)
    result = compare_request(request, ray_run, execution=execution, progress=False)
    thread.join()
    assert (result.exit_code, dict(result.failures)) == (0, {})
    attempts = _attempts(ray_run)
    assert [n for name, n in attempts.items() if name.startswith("score-together-")] == [2]
    assert attempts["score-first_layers"] in (1, 2)  # it may have been on that node, too
    assert "its first layer differs" in result.alone["first_layers"]
    assert _jobs_of(ray_run) == []
    assert compare_request(request, local_run, progress=False).exit_code == 0
    boards = [leaderboards.facts(run) for run in (ray_run, local_run)]
    for board in boards:  # the copied checkpoints were made in the other folder
        board["commands"] = [line for line in board["commands"] if " compress " not in line]
    assert list(leaderboards.differences(*boards)) == []
    shared = {row["label"]: set(row["scored_with"]) for row in boards[0]["rows"]}
    walk = {"dense", "last_layers", "last_one"}
    assert shared == {"first_layers": set(), **dict.fromkeys(walk, walk)}
    assert boards[0]["noise"]["repeats"] == ["batch size 4"]


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
