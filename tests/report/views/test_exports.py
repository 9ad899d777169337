"""Tables, tidy results and figures to paste into a paper; no string of a run is code in them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest

from streamline_bench.errors import OutputError
from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.figures.pdf import to_pdf
from streamline_bench.report.figures.standalone import standalone_svg
from streamline_bench.report.frame import COLUMNS, results
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.run_file import read_run_file
from streamline_bench.report.text import latex_text
from streamline_bench.report.views.citations import citations
from streamline_bench.report.views.exports import figures, to_latex, to_table, write_exports
from streamline_bench.stability.settings import Settings

HOSTILE = r"\input{/etc/passwd} a_b & 50% $x$ #1 ~ ^ {} =1+1 | <b>"


@pytest.fixture(scope="module")
def board(
    make_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Leaderboard:
    run = make_run(tmp_path_factory.mktemp("run"))
    return build_leaderboard(read_run_file(run), run, settings=Settings(draws=100), progress=False)


def named(board: Leaderboard, label: str) -> Leaderboard:
    """The board whose last row is called so."""
    payload = board.model_dump(mode="json")
    old = payload["rows"][-1]["label"]
    payload["rows"][-1]["label"] = label
    payload["ranks"] = {label if k == old else k: v for k, v in payload["ranks"].items()}
    return Leaderboard.model_validate(payload)


def test_the_table_has_the_numbers_of_the_board(board: Leaderboard) -> None:
    latex, table = to_latex(board), to_table(board)
    assert latex.count(r" \\") == 1 + len(board.rows) and r"\toprule" in latex
    for row in board.rows:
        shown = f"{100 * row.accuracy_macro.value:.1f}"
        assert shown in latex and shown in table
    line = next(line for line in table.splitlines() if line.startswith("| layer"))
    rank = board.ranks["layer"]
    assert f"{rank.place} \\[{rank.low}, {rank.high}\\]" in line


def test_strings_are_no_commands(board: Leaderboard) -> None:
    made = named(board, HOSTILE)
    latex = to_latex(made)
    assert r"\input" not in latex and r"\textbackslash{}input\{" in latex
    line = next(line for line in latex.splitlines() if "etc/passwd" in line)
    assert line.count("&") - line.count(r"\&") == latex.splitlines()[2].count("&")
    assert "<b>" not in to_table(made)
    assert latex_text("a\nb\x1b") == "a b\ufffd"


def test_results_are_tidy(board: Leaderboard) -> None:
    frame = results(board)
    assert list(frame.columns) == list(COLUMNS)
    found = frame[
        (frame.row == "layer") & (frame.scope == "colours") & (frame.metric == "accuracy")
    ]
    task = next(task for task in board.rows[2].tasks if task.task == "colours")
    assert found.value.tolist() == [task.accuracy.value] and found.n.tolist() == [task.n]
    table = frame[frame.scope == "mean over tasks"].pivot(
        index="row", columns="metric", values="value"
    )
    for row in board.rows[1:]:
        assert table.loc[row.label, "accuracy"] == row.accuracy_macro.value
        assert table.loc[row.label, "difference"] == row.macro.difference.value
    assert not frame.duplicated(["row", "scope", "metric"]).any()


def test_everything_is_written(board: Leaderboard, tmp_path: Path) -> None:
    folder = write_exports(named(board, HOSTILE), tmp_path / "exports")
    read = pd.read_csv(folder / "results.csv")
    assert len(read) == len(results(board))
    drawn = dict(figures(board))
    svgs = sorted(path.stem for path in (folder / "figures").glob("*.svg"))
    assert len(svgs) == len(drawn) == len(list((folder / "figures").glob("*.pdf")))
    assert all(re.fullmatch(r"[\w.-]+", name) for name in svgs)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write_exports(board, tmp_path / "file")


def test_a_figure_stands_alone(board: Leaderboard) -> None:
    for name, svg in figures(board):
        text = standalone_svg(svg)
        root = ElementTree.fromstring(text)
        assert "var(" not in text and "style=" not in text and "script" not in text, name
        assert root.find("{http://www.w3.org/2000/svg}rect").get("fill") == "#ffffff"
        texts = [one for one in root.iter() if one.tag.endswith("text")]
        assert texts and all(one.get("fill") == "#59636e" or one.get("fill") == "#16191d"
                             for one in texts)  # fmt: skip
        assert all(float(one.get("font-size").removesuffix("px")) > 5 for one in texts)


def content(pdf: bytes) -> str:
    """The operators of the only page; every offset of the table is checked on the way."""
    table = pdf.rindex(b"xref\n", 0, pdf.rindex(b"startxref"))
    places = [int(line[:10]) for line in pdf[table:].splitlines()[3:] if line.endswith(b" n ")]
    for number, place in enumerate(places, start=1):
        assert pdf[place:].startswith(b"%d 0 obj" % number)
    packed = re.search(rb"stream\n(.*)\nendstream", pdf, re.S).group(1)
    return zlib.decompress(packed).decode("cp1252")


def test_a_pdf_holds_the_letters_and_lines_of_the_figure() -> None:
    svg = (
        '<svg class="sizes" viewBox="0 0 200 100"><text x="100" y="20" class="mid">a (b) 1+</text>'
        '<g transform="translate(10 20) rotate(-90)"><path class="axis" d="M0 0H10v5"/></g>'
        '<path class="band" d="M1 1L2 2Z"/><circle cx="5" cy="6" r="2"/>'
        '<g class="series s1"><path class="line" d="M5 50a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z"/></g>'
        '<text x="0" y="9">字</text><title>not drawn</title></svg>'
    )
    pdf = to_pdf(svg)
    drawn = content(pdf)
    assert b"/MediaBox [0 0 200 100]" in pdf and pdf.count(b"/Type /Page ") == 1
    assert r"(a \(b\) 1+) Tj" in drawn and "(?) Tj" in drawn and "not drawn" not in drawn
    width = (556 + 278 + 333 + 556 + 333 + 278 + 556 + 584) * 11.5 / 1000
    assert f"{100 - width / 2:.2f} 20.00 Tm" in drawn, "in the middle, by Helvetica's widths"
    assert "0 -1 1 0 0 0 cm" in drawn and "10 0 l" in drawn and "10 5 l" in drawn
    assert "0.769 0.251 0.173 RG" in drawn, "the colour of the second line"
    assert drawn.count(" c\n") == 8, "two circles of four curves"
    assert drawn.count("q\n") == drawn.count("Q") and b"/ca 0.08" in pdf


def test_citations_name_the_run_and_every_paper_once(board: Leaderboard) -> None:
    payload = board.model_dump(mode="json")
    paper = {"paper": "A title, with parts (ICLR 2025, arXiv 2403.19135)",
             "link": "https://arxiv.org/abs/2403.19135"}  # fmt: skip
    for row in payload["rows"][1:]:
        row["provenance"]["recipe"] = paper
    text = citations(Leaderboard.model_validate(payload))
    assert text.count("@misc{") == 2 and "eprint = {2403.19135}" in text
    assert "title = {A title, with parts}" in text and "year = {2025}" in text
    payload["rows"][1]["provenance"]["recipe"] = {
        "paper": "} @string{x = 1} \\write18 {",
        "link": "x",
    }
    hostile: Any = citations(Leaderboard.model_validate(payload))
    assert hostile.count("{") == hostile.count("}") and "\\write" not in hostile
    assert "@string{" not in hostile
