"""Finds what comes along: ``baselines/``, ``tasks/``, ``reports/`` and the bundled model."""

from __future__ import annotations

from pathlib import Path

from streamline_bench.errors import InstallationError

BUNDLED = "bundled"
"""Names the bundled model wherever a model is asked for."""

_PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """Return the folder ``baselines``, ``tasks`` or ``reports``.

    A wheel carries them as ``streamline_bench/_data/<name>``; in a checkout they lie beside the
    package.

    Raises:
        InstallationError: the installation is incomplete.
    """
    for folder in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise InstallationError(
        f"The data folder '{name}' of streamline-bench is missing; reinstall the package."
    )


def is_bundled(name: object) -> bool:
    """Whether a model's name stands for the bundled one; a folder of that name comes first."""
    return str(name) == BUNDLED and not Path(BUNDLED).is_dir()


def bundled_model() -> Path:
    """Return the folder of the bundled model (safetensors, config, tokenizer, calibration text)."""
    return _PACKAGE / "demo" / "model"
