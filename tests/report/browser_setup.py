"""Sees to it that a browser is there: Debian's chromium, installed by apt where that is possible.

``python tests/report/browser_setup.py`` ends with 0 where the browser tests can run, else with 1
and what to install.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""Nothing but the page is asked for."""


def chromium() -> str | None:
    """The browser's path, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def main() -> int:
    """Install the browser if it is missing and this process may; say what it came to."""
    if chromium() is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"],
        ):
            if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
                break
    found = chromium()
    if found is None:
        print("No chromium: install it (Debian: apt-get install chromium) and run again.")
        return 1
    print(f"Browser: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
