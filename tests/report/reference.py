"""The committed reports: ``reports/demo`` with every view, the other boards small.

``python tests/report/reference.py RUN`` makes (or continues) the run of the plan ``reference`` in
the folder RUN. With ``--update`` its report replaces ``reports/demo``, without paths of this
machine and with numbers of six digits.
``--publish FOLDER`` runs nothing: it puts the board of any finished run into FOLDER, as
``leaderboard.md`` and a ``leaderboard.json`` without flips, matrices, curves and the comparisons of
single tasks. Pages stay out of the repository, but for the demo's. ``--picture FILE`` takes a
picture of the top of its page; of a board of several sizes, of its head and the curves of accuracy
and token KL (else stability) against parameters.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamline_bench.report.leaderboard import Leaderboard

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DEMO = REPOSITORY / "reports" / "demo"


def main(arguments: list[str] | None = None) -> int:
    """Run the plan; with ``--update`` refresh the committed files."""
    parser = argparse.ArgumentParser(prog="python tests/report/reference.py")
    parser.add_argument("run", type=Path)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--publish", type=Path, metavar="FOLDER")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="with --publish")
    given = parser.parse_args(arguments)
    if given.publish:
        _publish(given.run, given.publish)
        if given.picture:
            _picture(given.run / "leaderboard.html", given.picture)
        return 0
    code = _run(given.run) if given.update else _run_quickly(given.run)
    if code == 0 and given.update:
        _update(given.run)
    return code


def _run(run: Path, *options: str) -> int:
    command = ["compare", "--plan", "reference", "--workers", "2", "--output", str(run), *options]
    asked = [sys.executable, "-m", "streamline_bench", *command]
    return subprocess.run(asked, check=False).returncode


def _run_quickly(run: Path) -> int:
    """Speed is compared with nothing: one block is enough, and imports may be done before."""
    sys.path.append(str(REPOSITORY / "tests"))
    from warm_python import waiting

    with waiting() as forks, forks.used():
        return _run(run, "--workload", "blocks=1")


def _publish(run: Path, folder: Path) -> None:
    from streamline_bench.report.leaderboard import Leaderboard, read_leaderboard
    from streamline_bench.report.views.markdown import to_markdown

    board = read_leaderboard(run / "leaderboard.json")
    board = Leaderboard.model_validate(portable(board.model_dump(mode="json"), run))
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("leaderboard.*"):
        old.unlink()
    (folder / "leaderboard.md").write_text(to_markdown(board), encoding="utf-8")
    (folder / "leaderboard.json").write_text(_compact(small(board)), encoding="utf-8")


def small(board: Leaderboard) -> Leaderboard:
    """The board without what only its page shows, and without comparisons of single tasks."""
    rows = [
        row.model_copy(
            update={"worst_flips": [], "scan": None, "curve": [], "recovery_curve": [],
                    "tasks": [task.model_copy(update={"comparison": None}) for task in row.tasks]}
        )
        for row in board.rows
    ]  # fmt: skip
    return board.model_copy(update={"rows": rows})


def _compact(board: Leaderboard) -> str:
    payload = board.model_dump(mode="json", exclude_defaults=True)
    payload |= {"kind": board.kind, "schema_version": board.schema_version}
    return json.dumps(payload, separators=(",", ":"), ensure_ascii=False) + "\n"


def _update(run: Path) -> None:
    from streamline_bench.report.build import write_report
    from streamline_bench.report.leaderboard import Leaderboard, json_schema, read_leaderboard

    board = read_leaderboard(run / "leaderboard.json").model_dump(mode="json")
    write_report(Leaderboard.model_validate(portable(board, run)), DEMO)
    (REPOSITORY / "reports" / "leaderboard.schema.json").write_text(
        json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8"
    )


def portable(value: Any, run: Path) -> Any:
    """The same data with six digits, paths relative to the checkout, the run folder as ``run``."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: portable(part, run) for key, part in value.items()}
    if isinstance(value, list):
        return [portable(part, run) for part in value]
    if not isinstance(value, str):
        return value
    for folder in {str(run.absolute()), str(run.resolve())}:
        value = value.replace(folder, "run")
    return re.sub(rf"{re.escape(str(REPOSITORY))}/?", "", value)


_CURVES = """
.skip, nav, .facts-line, footer, .save, figcaption, main > :not(#sizes), h2,
#sizes > :not(.figures), .figures > :not(.shown) { display: none !important; }
main { padding-bottom: 16px !important; }
.lede { max-width: none !important; margin-bottom: 16px !important; }
"""
"""What a picture of curves leaves out of the page."""

_UP = ("accuracy", "token-KL", "stability")
"""Curves that a picture may hold; the first two that there are."""


def _picture(page: Path, file: Path) -> None:
    from browser_setup import FLAGS, chromium
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        shown = browser.new_page(viewport={"width": 1280, "height": 1500}, reduced_motion="reduce")
        shown.goto(page.absolute().as_uri())
        curves = only_curves(shown)
        if curves:
            shown.set_viewport_size({"width": 1280, "height": 100})
        shown.screenshot(path=file, full_page=curves)
        browser.close()


def only_curves(page: Any) -> bool:
    """Leave head and curves on an open page; False, and nothing is done, where there are none."""
    curves = [f'figure[data-name="curve-{name}-against-parameters"]' for name in _UP]
    found = [curve for curve in curves if page.locator(curve).count()][:2]
    for curve in found:
        page.locator(curve).evaluate("figure => figure.classList.add('shown')")
    if found:
        page.add_style_tag(content=_CURVES)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
