"""The pictures: right number of marks in the right places, valid XML."""

from __future__ import annotations

from xml.etree import ElementTree

from streamline_bench.report.figures import curve_svg, matrix_svg


def test_matrix_has_a_cell_per_pair_and_outlines_the_block() -> None:
    cosine = [[1.0, 0.9, 0.5], [0.9, 1.0, 0.8], [0.5, 0.8, 1.0]]
    root = ElementTree.fromstring(matrix_svg({"cosine": cosine, "start": 1, "n": 1}))
    cells = [rect for rect in root.iter("rect") if rect.get("class") is None]
    assert [rect.get("style") for rect in cells] == ["--v:1.000", "--v:0.000", "--v:0.750"]
    (chosen,) = [rect for rect in root.iter("rect") if rect.get("class") == "chosen"]
    target = cells[2]
    assert float(chosen.get("x")) + 1.5 == float(target.get("x"))
    assert float(chosen.get("y")) + 1.5 == float(target.get("y"))


def test_matrix_without_variation_or_block() -> None:
    root = ElementTree.fromstring(
        matrix_svg({"cosine": [[1.0, 1.0]] * 2, "start": None, "n": None})
    )
    assert len(list(root.iter("rect"))) == 1


def test_curve_places_points_by_step_and_loss() -> None:
    curve = [
        {"step": 0, "train_loss": None, "val_loss": 1.0},
        {"step": 50, "train_loss": 0.3, "val_loss": 0.1},
        {"step": 100, "train_loss": 0.2, "val_loss": 0.01},
    ]
    root = ElementTree.fromstring(curve_svg(curve))
    lines = {line.get("class"): line.get("points").split() for line in root.iter("polyline")}
    assert len(lines["train_loss"]) == 2 and len(lines["val_loss"]) == 3
    points = [tuple(map(float, point.split(","))) for point in lines["val_loss"]]
    assert points[1][0] - points[0][0] == points[2][0] - points[1][0]
    # On a log scale a tenth is the same step down each time; the picture's y grows downwards.
    assert abs((points[1][1] - points[0][1]) - (points[2][1] - points[1][1])) < 0.2
    assert points[0][1] < points[2][1]


def test_curve_without_losses_is_empty() -> None:
    assert curve_svg([{"step": 0, "train_loss": None, "val_loss": None}]) == ""
    nan = float("nan")
    assert curve_svg([{"step": 1, "train_loss": nan, "val_loss": nan}]) == ""
    ElementTree.fromstring(curve_svg([{"step": 0, "train_loss": 0.0, "val_loss": 0.0}]))
