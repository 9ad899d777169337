"""Where OpenCompass is not installed, our classes say how to install it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from streamline_bench import opencompass
from streamline_bench.errors import MissingDependencyError
from streamline_bench.opencompass import OPENCOMPASS_INSTALL


def test_sentence_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opencompass, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="--no-deps opencompass=="):
        opencompass.StreamlineModel  # noqa: B018
    with pytest.raises(AttributeError):
        opencompass.StreamlineModl  # noqa: B018


def test_the_extra_and_the_tested_versions_name_the_same_packages(repository: Path) -> None:
    """The command that is printed installs the extra, tox the versions."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["opencompass"]
    lines = (repository / "constraints" / "opencompass.txt").read_text().splitlines()
    pinned = [line.partition("==")[0] for line in lines if line and not line.startswith("#")]
    assert _normal(extra) == _normal(pinned)
    assert "streamline-bench[opencompass]" in OPENCOMPASS_INSTALL
    without = OPENCOMPASS_INSTALL.partition("&& ")[2].removeprefix("pip ")
    assert without in (repository / "tox.ini").read_text(encoding="utf-8")


def _normal(names: list[str]) -> list[str]:
    return sorted(re.sub(r"[-_.]+", "-", name).lower() for name in names)
