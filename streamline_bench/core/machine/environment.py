"""This installation and the machine it runs on: data folders, devices, versions, the cache."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import cast

from streamline_bench.errors import InstallationError, RecipeError
from streamline_bench.version import __version__

BUNDLED = "bundled"
"""Names the bundled model wherever a model is asked for."""

_PACKAGE = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "lm_eval")
_CGROUP = Path("/sys/fs/cgroup")
_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of CPUs, of Intel, AMD and Arm."""
_KNOWN = ("cpu", "cuda", "mps", "xpu")


def known_device(name: str) -> str:
    """Return a device as torch writes it, wherever it may be.

    Raises:
        RecipeError: models do not run on a device of this name.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in _KNOWN:
        raise RecipeError(
            f"'{name}' is not a device to compute on; give cpu, cuda, cuda:N or auto as --device."
        )
    return "cpu" if device.type == "cpu" else str(device)


def found_device(name: str) -> str:
    """Return a device of this machine as torch writes it; ``auto`` is cuda where there is one.

    Nothing is put on it: a process that only plans must not hold a part of a GPU.

    Raises:
        RecipeError: the name is not a device, or this machine does not have it.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(known_device(name))
    if device.type == "cpu":
        return "cpu"
    count = getattr(torch, device.type).device_count()
    if (device.index or 0) >= count:
        kind = f"{device.type} device{'s' * (count > 1)}"
        raise RecipeError(
            f"--device is {name} and this process sees {count or 'no'} {kind}; give another one, "
            "or auto."
        )
    return str(device)


def free_memory(device: str) -> int:
    """Return how many bytes are free on a device; for the CPU, also within the container's limit.

    Args:
        device: as torch writes it.
    """
    import psutil
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        rows = (_CGROUP / "memory.stat").read_text().split("\n")
    except (OSError, ValueError):  # no such files, or "max": no limit
        return free
    cached = sum(int(row.split()[1]) for row in rows if row.startswith("inactive_file "))
    return max(min(free, limit - used + cached), 0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return cast("Callable[[int], int]", ctypes.CDLL(None).malloc_trim)
    except (AttributeError, OSError, TypeError):
        return None  # of the GNU C library alone


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 itself; others take several times as long as in float32.

    Known on Linux; elsewhere it is taken for granted.
    """
    try:
        words = _CPUINFO.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return True
    return not _BFLOAT16.isdisjoint(words)


def give_back_freed() -> None:
    """Let the system have the memory back that this process freed and its allocator keeps."""
    if (trim := _trim()) is not None:
        trim(0)


def package_versions() -> dict[str, str]:
    """Return the versions of this package, Python and the packages that decide a result."""
    return {"streamline-bench": __version__, "python": platform.python_version(), **_versions()}


@functools.cache
def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}


def user_cache() -> Path:
    """Return the user's cache of streamline-bench (not created)."""
    named = os.environ.get("STREAMLINE_BENCH_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "streamline-bench"


def a_few(names: Sequence[str], most: int = 6) -> str:
    """Return the first names as a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(value: object, *, keep: str = "") -> str:
    """Return the text with every character that is neither printable nor in ``keep`` as U+FFFD."""
    return "".join(c if c.isprintable() or c in keep else "\ufffd" for c in str(value))


def resource(name: str) -> Path:
    """Return the folder ``baselines``, ``tasks`` or ``reports``.

    A wheel carries them as ``streamline_bench/_data/<name>``; in a checkout they lie next to
    the package, and ``_data/tasks`` is a link, so that the entry point of the tasks leads there.

    Raises:
        InstallationError: the installation is incomplete.
    """
    for folder in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder.resolve() if folder.is_symlink() else folder
    raise InstallationError(
        f"The data folder '{name}' of streamline-bench is missing; reinstall the package."
    )


def is_bundled(name: object) -> bool:
    """Whether a model's name stands for the bundled one; a folder of that name comes first."""
    return str(name) == BUNDLED and not Path(BUNDLED).is_dir()


def bundled_model() -> Path:
    """Return the folder of the bundled model (safetensors, config, tokenizer, calibration text)."""
    return _PACKAGE / "demo" / "model"
