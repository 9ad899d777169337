"""Where OpenCompass is not installed, our classes say how to install it."""

from __future__ import annotations

import pytest

from streamline_bench import opencompass
from streamline_bench.errors import MissingDependencyError
from streamline_bench.opencompass import availability


def test_sentence_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="--no-deps opencompass=="):
        opencompass.StreamlineModel  # noqa: B018
    with pytest.raises(AttributeError):
        opencompass.StreamlineModl  # noqa: B018
