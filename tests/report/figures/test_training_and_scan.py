"""The pictures: right number of marks in the right places, valid XML."""

from __future__ import annotations

from xml.etree import ElementTree

from streamline_bench.report.figures.training_and_scan import curve_svg, matrix_svg


def test_matrix_has_a_cell_per_pair_and_outlines_the_block() -> None:
    cosine = [[1.0, 0.9, 0.5], [0.9, 1.0, 0.8], [0.5, 0.8, 1.0]]
    root = ElementTree.fromstring(
        matrix_svg({"cosine": cosine, "start": 1, "n": 1, "removed": [1]})
    )
    cells = [rect for rect in root.iter("rect") if rect.get("class") is None]
    assert [rect.get("style") for rect in cells] == ["--v:1.000", "--v:0.000", "--v:0.750"]
    (chosen,) = [rect for rect in root.iter("rect") if rect.get("class") == "chosen"]
    target = cells[2]
    assert float(chosen.get("x")) + 1.5 == float(target.get("x"))
    assert float(chosen.get("y")) + 1.5 == float(target.get("y"))


def test_matrix_without_variation_or_block() -> None:
    root = ElementTree.fromstring(
        matrix_svg({"cosine": [[1.0, 1.0]] * 2, "start": None, "n": None, "removed": []})
    )
    assert len(list(root.iter("rect"))) == 1


def test_matrix_says_what_it_shows() -> None:
    cosine = [[1.0, 0.9, 0.5, 0.4], [0.9, 1.0, 0.8, 0.7], [0.5, 0.8, 1.0, 0.95], [0, 0, 0, 1.0]]
    scan = {"cosine": cosine, "start": 1, "n": 2, "removed": [1, 2]}
    root = ElementTree.fromstring(matrix_svg(scan))
    assert root.get("aria-label") == (
        "Mean cosine between the 4 boundaries of 3 layers; most similar: 2 and 3 (0.950); "
        "least: 0 and 3 (0.400); removed: block of 2 layers, layers 1 to 2 (0.700)"
    )
    apart = {**scan, "start": None, "removed": [0, 2]}
    root = ElementTree.fromstring(matrix_svg(apart))
    assert root.get("aria-label").endswith("removed: 2 separate layers, layers 0, 2")
    chosen = [rect for rect in root.iter("rect") if rect.get("class") == "chosen"]
    cells = [rect for rect in root.iter("rect") if rect.get("class") is None]
    for mark, cell in zip(chosen, (cells[0], cells[-1]), strict=True):  # (0, 1) and (2, 3)
        assert float(mark.get("x")) + 1.5 == float(cell.get("x"))
        assert float(mark.get("y")) + 1.5 == float(cell.get("y"))


def test_curve_says_first_best_and_last_loss() -> None:
    curve = [{"step": step, "train_loss": 9.0, "val_loss": loss}
             for step, loss in ((0, 3.0), (40, 1.5), (80, 1.75))]  # fmt: skip
    root = ElementTree.fromstring(curve_svg(curve, "recovery"))
    assert root.get("aria-label") == (
        "Training of the recovery, 80 steps; validation loss: first 3 at step 0, best 1.5 at "
        "step 40, last 1.75 at step 80"
    )
    unvalidated = [{**point, "val_loss": None} for point in curve]
    assert "training loss: first 9 at step 0" in curve_svg(unvalidated)


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
