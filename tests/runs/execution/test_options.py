"""What jobs ask a cluster for."""

from __future__ import annotations

from typing import Any

import pytest

from streamline_bench.errors import RecipeError
from streamline_bench.runs.execution.options import JOB_KINDS, Execution
from streamline_bench.runs.jobs.kinds import CompressJob, MeasureJob, TextJob
from streamline_bench.runs.jobs.score import ScoreJob


def test_every_kind_of_job_may_ask_for_its_own() -> None:
    kinds = (CompressJob, ScoreJob, TextJob, MeasureJob)
    assert tuple(each.model_fields["kind"].default for each in kinds) == JOB_KINDS
    execution = Execution(executor="ray", cpus_per_job=8, cpus_by_kind={"compress": 2})
    assert {kind: execution.cpus_of(kind) for kind in JOB_KINDS} == {
        "compress": 2, "score": 8, "text": 8, "measure": 8
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cpus_per_job": 0}, "0 CPUs; give at least 1"),
        ({"cpus_by_kind": {"text": 0}}, "0 CPUs; give at least 1"),
        ({"cpus_by_kind": {"noise": 2}}, "'noise'; known: compress, "),
    ],
)
def test_cpus_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        Execution(executor="ray", **options)


def test_more_threads_than_cpus_are_refused_on_a_cluster() -> None:
    execution = Execution(executor="ray", cpus_per_job=4, cpus_by_kind={"text": 2})
    execution.check_threads(2)
    execution.check_threads(None)
    with pytest.raises(RecipeError, match=r"^A text job would run 3 threads .* give --cpus-per"):
        execution.check_threads(3)
    Execution().check_threads(64)  # of a machine's own processors, the user decides
