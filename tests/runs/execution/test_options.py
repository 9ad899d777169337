"""What jobs ask a cluster for."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from streamline_bench.errors import RecipeError
from streamline_bench.runs.execution.options import JOB_KINDS, Execution, parse_cpus
from streamline_bench.runs.jobs.graph import JobKind


def test_every_kind_of_job_may_ask_for_its_own() -> None:
    assert get_args(JobKind) == JOB_KINDS
    cpus, by_kind = parse_cpus("8, compress=2")
    execution = Execution(executor="ray", cpus_per_job=cpus, cpus_by_kind=by_kind)
    assert {kind: execution.cpus_of(kind) for kind in JOB_KINDS} == {
        "compress": 2, "score": 8, "text": 8, "measure": 8
    }  # fmt: skip
    assert parse_cpus("3") == (3, {})
    assert parse_cpus("measure=16") == (1, {"measure": 16})


@pytest.mark.parametrize("text", ["", "x", "2,", "=2", "compress=", "compress=two", "-1", "1.5"])
def test_what_is_no_number_of_cpus(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is neither a number nor such as '8,compress=2'\.$"):
        parse_cpus(text)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cpus_per_job": 0}, "0 CPUs; give at least 1"),
        ({"cpus_by_kind": {"text": 0}}, "0 CPUs; give at least 1"),
        ({"cpus_by_kind": {"noise": 2}}, "'noise', which is no kind of job; known: compress, "),
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
