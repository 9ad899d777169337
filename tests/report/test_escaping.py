"""Hostile strings in every view come out as text."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from streamline_bench.report.text import (
    csv_cell,
    markdown_text,
    terminal_text,
    visible_text,
)


def test_control_characters_become_visible() -> None:
    assert visible_text("a\x1b[31mred\x07\x9b") == "a\ufffd[31mred\ufffd\ufffd"
    assert visible_text("right\u202eleft") == "right\ufffdleft"
    assert visible_text("two\nlines\t\u4f60\u597d é") == "two\nlines\t\u4f60\u597d é"


def test_terminal_text_is_one_printable_line() -> None:
    assert terminal_text("a\nb\x1b]0;title\x07") == "a b\ufffd]0;title\ufffd"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", " =", "\t=", "\r="])
def test_spreadsheets_see_no_formula(start: str) -> None:
    cell = csv_cell(f"{start}HYPERLINK(1)")
    assert isinstance(cell, str)
    assert cell[0] in ("'", "\ufffd")


def test_numbers_stay_numbers() -> None:
    assert csv_cell(-0.5) == -0.5
    assert csv_cell(None) is None


@given(st.text(max_size=40))
def test_csv_keeps_one_cell(text: str) -> None:
    stream = io.StringIO()
    csv.writer(stream).writerow([csv_cell(text), "next"])
    (row,) = csv.reader(io.StringIO(stream.getvalue()))
    assert len(row) == 2 and row[1] == "next"
    assert not row[0].startswith(("=", "+", "-", "@", "\t", "\r"))


@given(st.text(alphabet="ab|\\`*_[]()<>&!#~-+$\n {}@:/.1wW", max_size=30))
def test_markdown_shows_the_text_itself(text: str) -> None:
    """Rendered by a Markdown parser inside a table, a cell holds the text and nothing else."""
    source = f"| a | b |\n| --- | --- |\n| x{markdown_text(text)}x | end |\n"
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(source)
    cells = [token for token in tokens if token.type == "inline"][2:]
    assert [cell.content for cell in cells][1:] == ["end"]
    assert {child.type for child in cells[0].children} <= {"text", "text_special"}
    shown = "".join(child.content for child in cells[0].children)
    assert shown == f"x{' '.join(text.split())}x"


@given(st.text(alphabet=" w.*_~(W:/hxe", max_size=30))
@example("see www.evil.com")
@example("(WWW.evil.com)")
def test_markdown_holds_no_bare_address(text: str) -> None:
    """GitHub links "www." in the source of a text, whatever stands before it, and any scheme."""
    shown = markdown_text(text)
    assert "www." not in shown.lower()
    assert "://" not in shown
