"""The reference report in ``reports/demo``: makes a fresh run, and puts it there when told to.

``python tests/report/reference.py RUN`` makes (or continues) the run of the plan ``reference`` in
the folder RUN. With ``--update`` its report replaces the committed one, with paths of this machine
taken out, and a picture of it ``reports/demo-report.png``. ``--publish FOLDER`` runs nothing: it
puts the report of any finished run into FOLDER in the same way.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["main", "portable"]

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DEMO = REPOSITORY / "reports" / "demo"
PICTURE = REPOSITORY / "reports" / "demo-report.png"


def main(arguments: list[str] | None = None) -> int:
    """Run the plan; with ``--update`` refresh the committed files."""
    parser = argparse.ArgumentParser(prog="python tests/report/reference.py")
    parser.add_argument("run", type=Path)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--publish", type=Path, metavar="FOLDER")
    given = parser.parse_args(arguments)
    if given.publish:
        _publish(given.run, given.publish)
        return 0
    command = ["compare", "--plan", "reference", "--workers", "2", "--output", str(given.run)]
    done = subprocess.run([sys.executable, "-m", "streamline_bench", *command], check=False)
    if done.returncode:
        return done.returncode
    if given.update:
        _update(given.run)
    return 0


def _publish(run: Path, folder: Path) -> None:
    from streamline_bench.report.views.write import read_leaderboard, write_report

    write_report(portable(read_leaderboard(run / "leaderboard.json"), run), folder)


def _update(run: Path) -> None:
    from streamline_bench.report.data.schema import json_schema

    _publish(run, DEMO)
    (REPOSITORY / "reports" / "leaderboard.schema.json").write_text(
        json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8"
    )
    _picture(DEMO / "leaderboard.html")


def portable(value: Any, run: Path) -> Any:
    """The same data with paths relative to the checkout, and the run folder called ``run``."""
    if isinstance(value, dict):
        return {key: portable(part, run) for key, part in value.items()}
    if isinstance(value, list):
        return [portable(part, run) for part in value]
    if not isinstance(value, str):
        return value
    for folder in {str(run.absolute()), str(run.resolve())}:
        value = value.replace(folder, "run")
    return re.sub(rf"{re.escape(str(REPOSITORY))}/?", "", value)


def _picture(page: Path) -> None:
    from browser_setup import FLAGS, chromium
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        shown = browser.new_page(viewport={"width": 1280, "height": 1500}, reduced_motion="reduce")
        shown.goto(page.as_uri())
        shown.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
