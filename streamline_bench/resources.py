"""Finds ``baselines/``, ``tasks/`` and ``reports/`` in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from streamline_bench.errors import InstallationError

__all__ = ["resource"]

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
