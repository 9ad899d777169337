"""leaderboard.html: one file, no request, every string shown as text."""

from __future__ import annotations

import base64
import copy
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.run_file import NoiseRun, read_run_file
from streamline_bench.report.views.page import to_html
from streamline_bench.stability.settings import Settings

valid = Leaderboard.model_validate

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" onclick='alert(3)' "
    "{{ 7*7 }} {% raw %} javascript:alert(4) \x1b[31m \u202e &lt; ]]> --> </style>"
)


ENUMERATIONS = ("kind", "decision", "status", "unit", "replacement", "cost")
"""Fields whose values the schema fixes, or the page only compares."""


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def board(
    make_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    run = make_run(tmp_path_factory.mktemp("run"))
    given = read_run_file(run).model_copy(
        update={"noise": [NoiseRun(label="batch size 1", eval="dense/eval")],
                "commands": ["lm_eval --tasks x", "streamline-bench compress m -o layer"]}
    )  # fmt: skip
    board = build_leaderboard(given, run, settings=Settings(draws=200), progress=False)
    return board.model_dump(mode="json")


def poisoned(value: Any) -> Any:
    """The same data with every string that is not an enumeration made hostile."""
    if isinstance(value, dict):
        return {key: part if key in ENUMERATIONS else poisoned(part) for key, part in value.items()}
    if isinstance(value, list):
        return [poisoned(part) for part in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


@pytest.fixture(scope="module")
def hostile(board: dict[str, Any], parts_named: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    made = poisoned(copy.deepcopy(board))
    made["versions"] = {HOSTILE: HOSTILE, "streamline-bench": HOSTILE}
    made["not_compared"] = {HOSTILE: HOSTILE}
    made["commands"] = [HOSTILE, f"lm_eval {HOSTILE}"]
    made["failed_jobs"] = {HOSTILE: HOSTILE}
    made["ignored_options"] = [HOSTILE]
    for row in made["rows"]:
        if not row["is_dense"]:
            row |= parts_named(HOSTILE)
            row["curve_notes"] = [f"replacement{HOSTILE}"]
            row["scored_with"] = [HOSTILE]
        row["other_metrics"] = {HOSTILE: {HOSTILE: 1.5}}
        row["provenance"]["versions"] = {HOSTILE: HOSTILE}
        row["seconds"] = {HOSTILE: 3.0}
        row["provenance"]["recipe"] = {HOSTILE: [HOSTILE]}
        row["published"] = [
            {"model": HOSTILE, "metric": HOSTILE, "value": 1.0, "source": HOSTILE, "task": HOSTILE,
             "unit": HOSTILE, "ours": {"value": 0.5, "method": HOSTILE}}
        ]  # fmt: skip
    made["rows"].append({**made["rows"][1], "label": f"lost{HOSTILE}", "failed": HOSTILE,
                         "accuracy_macro": None, "accuracy_micro": None, "macro": None,
                         "micro": None, "tasks": [], "worst_flips": []})  # fmt: skip
    return Leaderboard.model_validate(made).model_dump(mode="json")


def test_one_file_without_requests(board: dict[str, Any]) -> None:
    source = to_html(valid(board))
    page = Page(source)
    for tag, attributes in page.elements:
        if tag == "link":  # an empty icon keeps a browser from asking for favicon.ico
            assert attributes == {"rel": "icon", "href": "data:,"}
            continue
        assert tag not in ("iframe", "object", "embed", "img", "base", "form")
        assert "src" not in attributes and "srcset" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert "@import" not in source and "url(" not in source
    assert "http" not in re.sub(r'http-equiv="[^"]+"', "", source)
    assert len(source) < 250_000


def test_the_policy_allows_exactly_our_script(board: dict[str, Any]) -> None:
    source = to_html(valid(board))
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(
        attributes["content"]
        for tag, attributes in Page(source).elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_hostile_strings_add_no_element_or_attribute(
    board: dict[str, Any], hostile: dict[str, Any]
) -> None:
    page = Page(to_html(valid(hostile)))
    assert page.count("script") == 1 and page.count("style") == 1 and page.count("img") == 0
    known = {name for _, attributes in Page(to_html(valid(board))).elements for name in attributes}
    found = {name for _, attributes in page.elements for name in attributes}
    assert found <= known | {"rowspan", "colspan"}, "of failed rows and published numbers"
    assert not any(name.startswith("on") for name in found)
    shown = "".join(page.text)
    assert "<script>alert(1)</script>" in shown, "shown as text, not dropped"
    assert "{{ 7*7 }}" in shown
    for name in ("batch size 1", "group ", "perplexity ", "generation "):
        assert f"{name}</script><script>alert(1)" in shown, name
    assert "\x1b" not in shown and "\u202e" not in shown


def test_every_row_task_and_flip_is_there(board: dict[str, Any]) -> None:
    page = Page(to_html(valid(board)))
    text = re.sub(r"\s+", " ", "".join(page.text))
    for words in ("Leaderboard", "Task by task", "Worst flips", "How every number was made"):
        assert words in text
    for task in ("colours", "places", "stories"):
        assert task in text
    flips = sum(len(row["worst_flips"]) for row in board["rows"])
    assert sum(a.get("class") == "flip" for tag, a in page.elements if tag == "details") == flips
    assert sum((a.get("class") or "") == "matrix" for tag, a in page.elements) == 1
    assert sum((a.get("class") or "") == "curve" for tag, a in page.elements) == 2
    assert "ab" * 32 in text and "lm_eval --tasks x" in text
    assert "Compress streamline-bench compress m -o layer Evaluate lm_eval --tasks x" in text


def test_a_dense_row_alone_renders(board: dict[str, Any]) -> None:
    alone = {**board, "rows": board["rows"][:1]}
    assert "Change against" not in to_html(valid(alone))
