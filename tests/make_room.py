"""Removes a tox environment that has done its work, in CI and where the disk is short.

``python tests/make_room.py ENV_DIR`` runs last in each environment. What the environment made
(its ``tmp`` and ``log``) stays; tox builds the rest again when it is asked to.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

__all__ = ["ENOUGH", "main"]

ENOUGH = 10 * 2**30
"""Bytes: what the largest environment (vllm) and its installation take, twice over."""

KEPT = ("tmp", "log")


def main(folder: Path) -> None:
    """Remove the packages of the environment in ``folder``, if they stand in the way."""
    free = shutil.disk_usage(folder).free
    if not os.environ.get("CI") or free >= ENOUGH:
        return
    # First of all tox's own note that the environment is whole.
    for path in sorted(folder.iterdir(), key=lambda path: path.name != ".tox-info.json"):
        if path.name in KEPT:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    print(f"{free / 2**30:.1f} GiB of disk were left: removed {folder}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
