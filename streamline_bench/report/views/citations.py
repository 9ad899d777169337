"""BibTeX entries: of the run itself, and of the papers of the methods in it."""

from __future__ import annotations

import re

from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.text import visible_text

_ARXIV = re.compile(r"(?:arxiv[:\s.]*|abs/)(\d{4}\.\d{4,5})", re.IGNORECASE)
_YEAR = re.compile(r"\b(?:19|20)\d\d\b")
_BRACES = str.maketrans({"\\": " ", "{": "(", "}": ")", "%": r"\%", "&": r"\&", "#": r"\#",
                         "_": r"\_", "$": r"\$", "~": " ", "^": " "})  # fmt: skip


def citations(board: Leaderboard) -> str:
    """Return BibTeX of the run and of every paper that a recipe of it names, each once."""
    dates = sorted(row.provenance.date for row in board.rows if row.provenance.date)
    version = board.versions.get("streamline-bench", "")
    entries = [
        _entry(
            "streamline-bench-run",
            title=board.title,
            howpublished=f"Comparison made with streamline-bench {version}",
            year=dates[-1][:4] if dates else None,
            note=f"{len(board.rows)} models; evaluated {dates[-1][:10]}" if dates else None,
        )
    ]
    papers: dict[str, str] = {}
    for row in board.rows:
        recipe = row.provenance.recipe or {}
        if recipe.get("paper"):
            papers.setdefault(str(recipe["paper"]), str(recipe.get("link") or ""))
    for paper, link in papers.items():
        number = _ARXIV.search(f"{paper} {link}")
        year = _YEAR.search(paper.replace(number[1], "") if number else paper)
        title = re.sub(r"\s*\((?:[^()]*)\)\s*$", "", paper)
        entries.append(
            _entry(
                f"arxiv-{number[1]}" if number else _key(title),
                title=title,
                year=year[0] if year else None,
                eprint=number[1] if number else None,
                archiveprefix="arXiv" if number else None,
                url=link if link.startswith("https://") else None,
                note=paper,
            )
        )
    return "\n\n".join(dict.fromkeys(entries))


def _key(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:40] or "paper"


def _entry(key: str, **fields: str | None) -> str:
    """One entry; a string of a run cannot end its field."""
    lines = [
        f"  {name} = {{{' '.join(visible_text(value).translate(_BRACES).split())}}},"
        for name, value in fields.items()
        if value
    ]
    return "\n".join([f"@misc{{{key},", *lines, "}"])
