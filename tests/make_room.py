"""Removes a tox environment that has done its work, where that was asked for and disk is short.

``python tests/make_room.py ENV_DIR`` runs last in each environment. It does something only if
``STREAMLINE_BENCH_MAKE_ROOM`` is set, to the GiB below which the disk is short. What the
environment made (its ``tmp`` and ``log``) stays; tox builds the rest again when it is asked to.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

KEPT = ("tmp", "log")


def main(folder: Path) -> None:
    """Remove the packages of the environment in ``folder``, if they stand in the way."""
    wanted = float(os.environ.get("STREAMLINE_BENCH_MAKE_ROOM") or 0)
    free = shutil.disk_usage(folder).free / 2**30
    if free >= wanted:
        return
    # First of all tox's own note that the environment is whole.
    for path in sorted(folder.iterdir(), key=lambda path: path.name != ".tox-info.json"):
        if path.name in KEPT:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    print(f"{free:.1f} GiB of disk were left: removed {folder}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
