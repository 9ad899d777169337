"""Fixtures of the command-line tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Return a function that runs ``streamline-bench`` in this process."""

    def run(*arguments: object) -> Ended:
        from streamline_bench.cli.main import main

        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        shown = capfd.readouterr()
        return Ended(int(exit_info.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Calibration text of 2,000 known words in 100 documents."""
    folder = tmp_path_factory.mktemp("text")
    lines = [" ".join(f"w{(i * 7 + j * 13) % 96}" for j in range(20)) for i in range(100)]
    path = folder / "text.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return str(path)
