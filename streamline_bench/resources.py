"""Finds ``baselines/``, ``tasks/`` and ``reports/`` in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

__all__ = ["resource"]

_PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """Return the folder ``baselines``, ``tasks`` or ``reports``.

    A wheel carries them as ``streamline_bench/_data/<name>``; in a checkout they lie beside the
    package.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for folder in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"The data folder '{name}' of streamline-bench is missing; reinstall the package."
    )
