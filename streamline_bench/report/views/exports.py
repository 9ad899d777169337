r"""What researchers paste: a table as LaTeX and Markdown, tidy results, figures as SVG and PDF.

::

    <folder>/table.tex        booktabs; \input it
    <folder>/table.md
    <folder>/axes.tex, axes.md  what patches add to selections, where a board can tell
    <folder>/results.csv      one line per row, scope and metric
    <folder>/citations.bib
    <folder>/figures/*.svg, *.pdf
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from streamline_bench.core.files import atomic_write_bytes, atomic_write_text
from streamline_bench.errors import OutputError
from streamline_bench.report import text
from streamline_bench.report.figures.pareto import tradeoffs
from streamline_bench.report.figures.pdf import to_pdf
from streamline_bench.report.figures.serving import serving_curves
from streamline_bench.report.figures.similarity import matrix_svg
from streamline_bench.report.figures.sizes import size_curves
from streamline_bench.report.figures.standalone import standalone_svg
from streamline_bench.report.figures.training import curve_svg
from streamline_bench.report.frame import results
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.text import csv_cell, latex_text, markdown_text
from streamline_bench.report.views.citations import citations
from streamline_bench.report.views.entries import shown
from streamline_bench.report.views.overview import mean_grade, ranked
from streamline_bench.report.views.pivot import note, pivots, table


def write_exports(board: Leaderboard, folder: Path) -> Path:
    """Write every export of a board into ``folder``, made if missing; return it.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    frame = results(board).map(csv_cell)
    texts = {
        "table.tex": to_latex(board),
        "table.md": to_table(board),
        "results.csv": frame.to_csv(index=False),
        "citations.bib": citations(board) + "\n",
    }
    if found := pivots(board):
        tables = [(*table(pivot), f"{board.title}, {pivot.name}: {note(board)}") for pivot in found]
        texts["axes.tex"] = "\n".join(_latex(*one) for one in tables)
        texts["axes.md"] = "\n".join(_markdown(*one) for one in tables)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for name, content in texts.items():
            atomic_write_text(folder / name, content)
        for name, svg in figures(board):
            atomic_write_text(folder / "figures" / f"{name}.svg", standalone_svg(svg))
            atomic_write_bytes(folder / "figures" / f"{name}.pdf", to_pdf(svg))
    except OSError as error:
        raise OutputError(
            f"The exports cannot be written to '{folder}' ({error.strerror or error}); give a "
            "folder that can be."
        ) from None
    return folder


def figures(board: Leaderboard) -> Iterator[tuple[str, str]]:
    """Yield the name and the SVG of every figure of the page; no two names are equal."""
    used: Counter[str] = Counter()
    for name, svg in _drawn(board):
        used[name.lower()] += 1
        count = used[name.lower()]
        yield (f"{name}-{count}" if count > 1 else name), svg


def _drawn(board: Leaderboard) -> Iterator[tuple[str, str]]:
    rows = ranked(shown(board))
    for pareto in tradeoffs(rows):
        yield f"accuracy-against-{pareto.kind}", str(pareto.svg)
    for curve in [*size_curves(board, rows), *serving_curves(rows)]:
        yield _file_name(f"{curve.up}-against-{curve.across}"), str(curve.svg)
    for row in board.rows:
        if row.scan is not None:
            yield _file_name(f"similarity-{row.label}"), str(matrix_svg(row.scan))
        for training, points in (("replacement", row.curve), ("recovery", row.recovery_curve)):
            if svg := curve_svg(points, training) if points else "":
                yield _file_name(f"training-{row.label}-{training}"), str(svg)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "figure"


def to_latex(board: Leaderboard) -> str:
    """The ranking as a LaTeX table (packages booktabs and, for letters, a UTF-8 engine)."""
    return _latex(*_table(board), _note(board))


def _latex(head: Sequence[str], lines: Sequence[Sequence[str]], words: str) -> str:
    columns = "l" * 2 + "r" * (len(head) - 2)
    body = [" & ".join(map(latex_text, line)) + r" \\" for line in lines]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(latex_text, head)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            f"% {text.visible_text(words, keep='')}",
            "",
        ]
    )


def to_table(board: Leaderboard) -> str:
    """The ranking as one Markdown table."""
    return _markdown(*_table(board), _note(board))


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]], words: str) -> str:
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    escaped = [[markdown_text(cell) for cell in line] for line in (head, *lines)]
    cells = [escaped[0], rule, *escaped[1:]]
    made = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"{made}\n\n{markdown_text(words)}\n"


def _note(board: Leaderboard) -> str:
    if board.dense_row.accuracy_macro is None:
        figures = "grades: mean over tasks, difference"
    else:
        figures = "accuracy is the mean over tasks (standard error); difference"
    return (
        f"{board.title}: {figures} to {board.dense} in points, brackets hold {board.level} "
        "intervals."
    )


def _table(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Heading and cells; a column in which every cell is empty is left out."""
    rows = [row for row in ranked(shown(board)) if row.failed is None]
    head = ["model", "cost", "rank", "accuracy %", "difference", "stability %", "retention %",
            "grades", "token KL", "speed", "removed %"]  # fmt: skip
    lines = [_cells(board, row) for row in rows]
    kept = [place for place in range(len(head)) if place < 2 or any(line[place] for line in lines)]
    return [head[place] for place in kept], _chosen(lines, kept)


def _chosen(lines: Sequence[Sequence[str]], kept: Sequence[int]) -> list[list[str]]:
    return [[line[place] or text.MISSING for place in kept] for line in lines]


def _cells(board: Leaderboard, row: Row) -> list[str]:
    rank, macro = board.shown_ranks.get(row.label), row.macro
    graded = None if row.accuracy_macro or row.is_dense else mean_grade(row)
    speed = row.speed.ratio if row.speed else None
    return [
        row.label,
        row.cost or ("reference" if row.is_dense else ""),
        f"{rank.place} [{rank.low}, {rank.high}]" if rank else "",
        text.with_error(row.accuracy_macro) if row.accuracy_macro else "",
        text.with_interval(macro.difference if macro else None, signed=True),
        text.with_interval(macro.stability if macro else None),
        text.with_interval(macro.retention if macro else None),
        text.with_interval(graded, signed=True),
        text.decimal(row.divergence.kl.value) if row.divergence else "",
        text.times(speed) if speed is not None else "",
        text.percent(row.sparsity_reached) if row.sparsity_reached else "",
    ]
