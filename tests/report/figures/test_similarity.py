"""The picture of a similarity matrix: well-formed, self-contained, marking the right cell."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from streamline_bench.core.similarity import Similarity
from streamline_bench.report.figures.similarity import matrix_svg, named_layers, similarity_svg
from streamline_bench.report.row import ScanResult

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


def scan(cosine: list[list[float]], *removed: int) -> ScanResult:
    """Of one block where the removed layers are neighbours."""
    block = bool(removed) and removed[-1] - removed[0] == len(removed) - 1
    return ScanResult(cosine=cosine, num_tokens=9, n=len(removed) or None, removed=list(removed),
                      start=removed[0] if block else None)  # fmt: skip


def cells_and_marks(svg: str) -> tuple[dict[str, ET.Element], list[ET.Element]]:
    rects = list(ET.fromstring(svg.replace(f' xmlns="{SVG[1:-1]}"', "")).iter("rect"))
    cells = {
        title.text.split(":")[0]: rect
        for rect in rects
        if (title := rect.find("title")) is not None and title.text
    }
    return cells, [rect for rect in rects if rect.get("class") == "mark"]


def place(rect: ET.Element) -> tuple[float, float]:
    return float(rect.get("x", "nan")), float(rect.get("y", "nan"))


def test_page_and_file_are_one_drawing() -> None:
    """Same orientation and same colours: cell (i, j) is cell (i, j), whatever its size."""
    similarity = made(6)
    block = similarity.best_block(2, allow_first_layer=False)
    removed = range(block.start, block.stop)
    file, mark = cells_and_marks(similarity_svg(similarity, block))
    page, outlined = cells_and_marks(matrix_svg(scan(similarity.cosine.tolist(), *removed)))
    assert set(file) == set(page)
    assert {name: cell.get("fill") for name, cell in file.items()} == {
        name: cell.get("fill") for name, cell in page.items()
    }
    for cells, marks in ((file, mark), (page, outlined)):
        size = float(cells["boundaries 0 and 0"].get("width", "nan"))
        for i in range(7):
            for j in range(i, 7):
                assert place(cells[f"boundaries {i} and {j}"]) == pytest.approx(
                    (i * size, j * size)
                )
        assert place(marks[0]) == place(cells[f"boundaries {block.start} and {block.stop}"])


def test_matrix_without_variation_or_block() -> None:
    cells, marks = cells_and_marks(matrix_svg(scan([[1.0, 1.0]] * 2)))
    assert len(cells) == 3 and marks == []


def test_matrix_says_what_it_shows() -> None:
    cosine = [[1.0, 0.9, 0.5, 0.4], [0.9, 1.0, 0.8, 0.7], [0.5, 0.8, 1.0, 0.95], [0, 0, 0, 1.0]]
    label = ET.fromstring(matrix_svg(scan(cosine, 1, 2))).get("aria-label", "")
    for words in ("2 and 3 (0.950)", "0 and 3 (0.400)", "2 layers, layers 1 to 2 (0.700)"):
        assert words in label
    apart = matrix_svg(scan(cosine, 0, 2))
    assert ET.fromstring(apart).get("aria-label", "").endswith("2 separate layers, layers 0, 2")
    cells, marks = cells_and_marks(apart)
    assert [place(mark) for mark in marks] == [
        place(cells["boundaries 0 and 1"]), place(cells["boundaries 2 and 3"])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("removed", "words"),
    [([], ""), ([3], "layer 3"), ([4, 2, 5, 6], "layers 2, 4 to 6"), ([1, 2], "layers 1 to 2")],
)
def test_layers_are_named_as_stretches(removed: list[int], words: str) -> None:
    assert named_layers(removed) == words
