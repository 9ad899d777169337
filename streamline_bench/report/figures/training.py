"""Draws the losses of a training, as inline SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from markupsafe import Markup

from streamline_bench.report.row import CurvePoint

_POINTS = 120
"""Points of a curve's line: more could not be seen in its width."""
_WIDTH, _HEIGHT = 460.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 12.0, 32.0
_Line = list[tuple[int, float]]


def curve_svg(curve: Sequence[CurvePoint], training: str = "replacement") -> Markup:
    """Training and validation loss over steps, logarithmic where the losses allow it.

    Empty without a finite loss.
    """
    lines: dict[str, _Line] = {
        "train_loss": [(p.step, p.train_loss) for p in curve if _is_drawn(p.train_loss)],
        "val_loss": [(p.step, p.val_loss) for p in curve if _is_drawn(p.val_loss)],
    }
    values = [value for line in lines.values() for _, value in line]
    if not values:
        return Markup("")
    logarithmic = min(values) > 0
    scale = math.log10 if logarithmic else float
    low, high = scale(min(values)), scale(max(values))
    last = max(point.step for point in curve) or 1

    def place(step: float, value: float) -> tuple[str, str]:
        x = _LEFT + (step / last) * (_WIDTH - _LEFT - _RIGHT)
        share = (scale(value) - low) / (high - low) if high > low else 0.5
        return f"{x:.1f}", f"{_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    parts = [
        f'<svg class="curve" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{_curve_words(lines, last, training)}">'
    ]
    parts += _curve_axes(min(values), max(values), last, "log" if logarithmic else "")
    for name, line in lines.items():
        shown = _thinned(line)
        path = " ".join(",".join(place(step, value)) for step, value in shown)
        parts.append(f'<polyline class="{name}" points="{path}"/>')
        for step, value in shown if name == "val_loss" else ():
            x, y = place(step, value)
            parts.append(
                f'<circle class="{name}" cx="{x}" cy="{y}" r="2.5"><title>step {step}: '
                f"{value:.5g}</title></circle>"
            )
    return Markup("".join([*parts, "</svg>"]))


def _is_drawn(loss: float | None) -> TypeGuard[float]:
    return loss is not None and math.isfinite(loss)


def _curve_words(lines: Mapping[str, _Line], last: int, training: str) -> str:
    """First, best and last loss, of the validation where it was measured."""
    name, kind = ("val_loss", "validation") if lines["val_loss"] else ("train_loss", "training")
    line = lines[name]
    best = min(line, key=lambda point: point[1])
    words = [
        f"{which} {value:.4g} at step {step}"
        for which, (step, value) in (("first", line[0]), ("best", best), ("last", line[-1]))
    ]
    return f"Training of the {training}, {last} steps; {kind} loss: {', '.join(words)}"


def _thinned(line: _Line) -> _Line:
    """At most some hundred points, among them the first and the last."""
    step = max(1, math.ceil(len(line) / _POINTS))
    return [point for index, point in enumerate(line) if index % step == 0 or point is line[-1]]


def _curve_axes(low: float, high: float, last: int, kind: str) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    label = f"step{', loss on a log scale' if kind else ''}"
    return [
        f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>',
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" class="end">{_short(high)}</text>',
        f'<text x="{_LEFT - 6}" y="{bottom}" class="end">{_short(low)}</text>',
        f'<text x="{_LEFT}" y="{bottom + 16}">0</text>',
        f'<text x="{right}" y="{bottom + 16}" class="end">{last}</text>',
        f'<text x="{(_LEFT + right) / 2}" y="{bottom + 24}" class="mid">{label}</text>',
    ]


def _short(loss: float) -> str:
    """Three digits or, where these are too long for the space on the left, two and an exponent."""
    text = f"{loss:.3g}"
    if len(text) <= 6:
        return text
    if 1000 <= loss < 1e6:
        return f"{loss:.0f}"
    return re.sub(r"e([+-])0*", lambda sign: f"e{sign[1].strip('+')}", f"{loss:.1e}")
