"""The picture of a training: points in the right places, valid XML, words for a reader."""

from __future__ import annotations

from xml.etree import ElementTree

from streamline_bench.report.figures.training import curve_svg
from streamline_bench.report.row import CurvePoint


def point(step: int, train_loss: float | None, val_loss: float | None) -> CurvePoint:
    return CurvePoint(step=step, train_loss=train_loss, val_loss=val_loss)


def test_curve_says_first_best_and_last_loss() -> None:
    curve = [point(step, 9.0, loss) for step, loss in ((0, 3.0), (40, 1.5), (80, 1.75))]
    root = ElementTree.fromstring(curve_svg(curve, "recovery"))
    assert root.get("aria-label") == (
        "Training of the recovery, 80 steps; validation loss: first 3 at step 0, best 1.5 at "
        "step 40, last 1.75 at step 80"
    )
    unvalidated = [point(one.step, one.train_loss, None) for one in curve]
    assert "training loss: first 9 at step 0" in curve_svg(unvalidated)


def test_curve_places_points_by_step_and_loss() -> None:
    curve = [point(0, None, 1.0), point(50, 0.3, 0.1), point(100, 0.2, 0.01)]
    root = ElementTree.fromstring(curve_svg(curve))
    lines = {line.get("class"): line.get("points").split() for line in root.iter("polyline")}
    assert len(lines["train_loss"]) == 2 and len(lines["val_loss"]) == 3
    points = [tuple(map(float, pair.split(","))) for pair in lines["val_loss"]]
    assert points[1][0] - points[0][0] == points[2][0] - points[1][0]
    # On a log scale a tenth is the same step down each time; the picture's y grows downwards.
    assert abs((points[1][1] - points[0][1]) - (points[2][1] - points[1][1])) < 0.2
    assert points[0][1] < points[2][1]


def test_curve_without_losses_is_empty() -> None:
    assert curve_svg([point(0, None, None)]) == ""
    nan = float("nan")
    assert curve_svg([point(1, nan, nan)]) == ""
    ElementTree.fromstring(curve_svg([point(0, 0.0, 0.0)]))


def test_a_loss_is_written_in_few_letters() -> None:
    for high, low, written in (
        (2370.4, 4.45, ("2370", "4.45")),
        (1.23e7, 1.2e-4, ("1.2e7", "1.2e-4")),
    ):
        root = ElementTree.fromstring(curve_svg([point(0, high, high), point(9, low, low)]))
        assert [text.text for text in root.iter() if text.tag.endswith("text")][:2] == [*written]
