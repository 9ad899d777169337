"""The picture of a similarity matrix: well-formed, self-contained, marking the right cell."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from streamline_bench.core.scan.similarity import Similarity
from streamline_bench.report.figures.similarity import similarity_svg

SVG = "{http://www.w3.org/2000/svg}"


def made(layers: int) -> Similarity:
    angle = np.abs(np.subtract.outer(*[np.linspace(0, 2.0, layers + 1) ** 2] * 2))
    return Similarity(np.cos(angle), angle / np.pi, 1000, 8)


@pytest.mark.parametrize("layers", [2, 5, 12, 80])
@pytest.mark.parametrize("metric", ["cosine", "angular"])
def test_one_cell_per_pair_and_one_dot_per_candidate(layers: int, metric: str) -> None:
    similarity = made(layers)
    block = similarity.best_block(max(layers // 4, 1), metric, allow_first_layer=False)
    root = ET.fromstring(similarity_svg(similarity, block, "model"))
    said = [title.text for title in root.iter(f"{SVG}title") if title.text]
    assert sum(text.startswith("boundaries ") for text in said) == (layers + 1) * (layers + 2) / 2
    assert len(list(root.iter(f"{SVG}circle"))) == layers - block.n + 1


def test_the_outline_lies_on_the_blocks_cell() -> None:
    similarity = made(12)
    block = similarity.best_block(3, allow_first_layer=False)
    root = ET.fromstring(similarity_svg(similarity, block))
    cells = {
        rect.find(f"{SVG}title").text.split(":")[0]: rect  # type: ignore[union-attr]
        for rect in root.iter(f"{SVG}rect")
        if rect.find(f"{SVG}title") is not None
    }
    mark = next(rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "mark")
    cell = cells[f"boundaries {block.start} and {block.stop}"]
    assert (mark.get("x"), mark.get("y")) == (cell.get("x"), cell.get("y"))


def test_names_are_escaped_and_nothing_is_fetched() -> None:
    similarity = made(4)
    text = similarity_svg(similarity, similarity.best_block(1), "</svg><script>alert(1)</script>")
    root = ET.fromstring(text)
    assert not list(root.iter(f"{SVG}script"))
    assert text.count("http") == 1  # the namespace
    assert "url(" not in text
    assert "prefers-color-scheme:dark" in text
