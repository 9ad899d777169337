"""A run folder with quick jobs: compressing a tiny model by dropping layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.runs.plan import Plan
from streamline_bench.runs.request import Request, make_request


@pytest.fixture
def make(tiny_llama: Path) -> Callable[..., Request]:
    """Return a function that makes a request for the tiny model; keywords change it."""

    def make_it(**changes: Any) -> Request:
        return make_request(
            {
                "model": str(tiny_llama),
                "recipes": ["dense", "first_layers", "last_layers"],
                "tasks": ["streamline_demo_pairs"],
                "set": {"n_layers": 2},
                "device": "cpu",
                **changes,
            }
        )

    return make_it


@pytest.fixture
def plan(make: Callable[..., Request]) -> Plan:
    """The plan of that request."""
    from streamline_bench.runs.resolve import resolve_plan

    return resolve_plan(make())
