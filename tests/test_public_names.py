"""What ``import streamline_bench`` promises, and what it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import streamline_bench

HEAVY = ("torch", "transformers", "numpy", "pandas", "pydantic", "lm_eval")


def test_the_names_of_the_front_door() -> None:
    assert set(streamline_bench.__all__) == {
        "CompareResult", "Recipe", "__version__", "compare", "compress", "compress_cached",
        "list_recipes", "load_recipe", "results",
    }  # fmt: skip
    assert set(streamline_bench.__all__) <= set(dir(streamline_bench))


@pytest.mark.parametrize("name", sorted(set(streamline_bench.__all__) - {"__version__"}))
def test_each_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(streamline_bench, name)
    assert found.__name__ == name
    assert inspect.getdoc(found)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        streamline_bench.prune  # noqa: B018


def test_the_import_costs_nothing() -> None:
    code = f"import streamline_bench, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
