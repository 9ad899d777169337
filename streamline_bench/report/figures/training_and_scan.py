"""Pictures as inline SVG, coloured by the page's style: similarity matrix and training curve.

Everything in them is a number, except the labels that the page writes beside them. Their text
alternatives say what a reader looks for in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from streamline_bench.report.data.removed_layers import named_layers

__all__ = ["curve_svg", "matrix_svg"]

_CELL = 14.0
_POINTS = 120
"""Of a curve's line: more would not be seen in its width."""
_MARGIN = 34.0
_WIDTH, _HEIGHT = 460.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 12.0, 32.0


def matrix_svg(scan: Mapping[str, Any]) -> Markup:
    """The mean cosine of every two boundaries i < j, with what was removed outlined.

    A block of n layers is the pair (start, start + n), layers that are apart are pairs (i, i + 1).
    """
    cosine: Sequence[Sequence[float]] = scan["cosine"]
    size = len(cosine)
    upper = [cosine[i][j] for i in range(size) for j in range(i + 1, size)]
    low, high = min(upper, default=0.0), max(upper, default=1.0)
    outlined = _outlined(scan)
    side = _CELL * size + _MARGIN
    parts = [
        f'<svg class="matrix" viewBox="0 0 {side:.0f} {side:.0f}" role="img" '
        f'style="--text:{side / 440 * 12:.1f}px" '
        f'aria-label="{_matrix_words(scan, outlined)}">'
    ]
    for i in range(size):
        for j in range(i + 1, size):
            share = (cosine[i][j] - low) / (high - low) if high > low else 1.0
            parts.append(
                f'<rect x="{_MARGIN + j * _CELL:.0f}" y="{i * _CELL:.0f}" width="13" height="13" '
                f'rx="2" style="--v:{share:.3f}"><title>boundaries {i} and {j}: cosine '
                f"{cosine[i][j]:.4f}</title></rect>"
            )
    parts += _matrix_axes(size)
    for i, j in outlined:
        x, y = _MARGIN + j * _CELL, i * _CELL
        parts.append(
            f'<rect class="chosen" x="{x - 1.5:.1f}" y="{y - 1.5:.1f}" width="16" height="16" '
            'rx="3"/>'
        )
    return Markup("".join([*parts, "</svg>"]))


def _outlined(scan: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The pairs of boundaries that enclose what was removed."""
    if scan["start"] is not None and scan["n"]:
        return [(scan["start"], scan["start"] + scan["n"])]
    return [(layer, layer + 1) for layer in scan["removed"]]


def _matrix_words(scan: Mapping[str, Any], outlined: Sequence[tuple[int, int]]) -> str:
    cosine: Sequence[Sequence[float]] = scan["cosine"]
    size = len(cosine)
    words = [f"Mean cosine between the {size} boundaries of {size - 1} layers"]
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
    if pairs:
        i, j = max(pairs, key=lambda pair: cosine[pair[0]][pair[1]])
        words.append(f"most similar: {i} and {j} ({cosine[i][j]:.3f})")
        i, j = min(pairs, key=lambda pair: cosine[pair[0]][pair[1]])
        words.append(f"least: {i} and {j} ({cosine[i][j]:.3f})")
    if outlined and scan["start"] is not None:
        i, j = outlined[0]
        words.append(
            f"removed: block of {j - i} layers, {named_layers(range(i, j))} ({cosine[i][j]:.3f})"
        )
    elif outlined:
        words.append(f"removed: {len(outlined)} separate layers, {named_layers(scan['removed'])}")
    return "; ".join(words)


def _matrix_axes(size: int) -> list[str]:
    step = max(1, math.ceil(size / 12))
    bottom = size * _CELL
    parts = []
    for index in range(0, size, step):
        middle = index * _CELL + 7
        parts.append(f'<text x="{_MARGIN - 6:.0f}" y="{middle + 3:.0f}" class="end">{index}</text>')
        parts.append(
            f'<text x="{_MARGIN + middle:.0f}" y="{bottom + 12:.0f}" class="mid">{index}</text>'
        )
    centre = _MARGIN + bottom / 2
    parts.append(f'<text x="{centre:.0f}" y="{bottom + 28:.0f}" class="mid">after the block</text>')
    parts.append(
        f'<text transform="translate(10 {bottom / 2:.0f}) rotate(-90)" class="mid">'
        "before the block</text>"
    )
    return parts


def curve_svg(curve: Sequence[Mapping[str, Any]], training: str = "replacement") -> Markup:
    """Training and validation loss over steps, logarithmic where the losses allow it."""
    lines = {
        name: [(point["step"], point[name]) for point in curve if point[name] is not None]
        for name in ("train_loss", "val_loss")
    }
    values = [value for line in lines.values() for _, value in line if math.isfinite(value)]
    if not values:
        return Markup("")
    logarithmic = min(values) > 0
    scale = math.log10 if logarithmic else float
    low, high = scale(min(values)), scale(max(values))
    last = max(point["step"] for point in curve) or 1

    def place(step: float, value: float) -> str:
        x = _LEFT + (step / last) * (_WIDTH - _LEFT - _RIGHT)
        share = (scale(value) - low) / (high - low) if high > low else 0.5
        return f"{x:.1f},{_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    parts = [
        f'<svg class="curve" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{_curve_words(lines, last, training)}">'
    ]
    parts += _curve_axes(min(values), max(values), last, "log" if logarithmic else "")
    for name, line in lines.items():
        finite = _thinned([(step, value) for step, value in line if math.isfinite(value)])
        path = " ".join(place(step, value) for step, value in finite)
        parts.append(f'<polyline class="{name}" points="{path}"/>')
        for step, value in finite if name == "val_loss" else ():
            x, y = place(step, value).split(",")
            parts.append(
                f'<circle class="{name}" cx="{x}" cy="{y}" r="2.5"><title>step {step}: '
                f"{value:.5g}</title></circle>"
            )
    return Markup("".join([*parts, "</svg>"]))


def _curve_words(lines: Mapping[str, Sequence[tuple[int, float]]], last: int, training: str) -> str:
    """First, best and last loss, of the validation where it was taken."""
    name, kind = ("val_loss", "validation") if lines["val_loss"] else ("train_loss", "training")
    line = [(step, value) for step, value in lines[name] if math.isfinite(value)]
    best = min(line, key=lambda point: point[1])
    told = [
        f"{which} {value:.4g} at step {step}"
        for which, (step, value) in (("first", line[0]), ("best", best), ("last", line[-1]))
    ]
    return f"Training of the {training}, {last} steps; {kind} loss: {', '.join(told)}"


def _thinned(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most some hundred points, the first and the last among them."""
    step = max(1, math.ceil(len(line) / _POINTS))
    return [point for index, point in enumerate(line) if index % step == 0 or point is line[-1]]


def _curve_axes(low: float, high: float, last: int, kind: str) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    label = f"step{', loss on a log scale' if kind else ''}"
    return [
        f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>',
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" class="end">{high:.3g}</text>',
        f'<text x="{_LEFT - 6}" y="{bottom}" class="end">{low:.3g}</text>',
        f'<text x="{_LEFT}" y="{bottom + 16}">0</text>',
        f'<text x="{right}" y="{bottom + 16}" class="end">{last}</text>',
        f'<text x="{(_LEFT + right) / 2}" y="{bottom + 24}" class="mid">{label}</text>',
    ]
