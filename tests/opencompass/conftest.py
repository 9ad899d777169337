"""OpenCompass itself, for the tests that need it."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import pytest


@pytest.fixture(scope="session")
def opencompass() -> Any:
    """The package; the test is skipped where it is not installed (constraints/opencompass.txt)."""
    if find_spec("opencompass") is None or find_spec("mmengine") is None:
        pytest.skip("OpenCompass is not installed (tox -e opencompass installs it)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Its own, and those of what it imports.
        import opencompass
        import opencompass.datasets
        import opencompass.models
    return opencompass
