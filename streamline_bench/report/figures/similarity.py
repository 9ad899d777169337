"""Draws a similarity matrix: mean cosine of every two layer boundaries, removed blocks outlined.

Across: the boundary before a block; down: the boundary after it. :func:`matrix_svg` is the picture
of a report's page, coloured by the page's style. :func:`similarity_svg` is a file of its own (no
fonts, scripts or files from elsewhere; colours follow the viewer's light or dark scheme) and also
shows the candidates of one size by their first layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from markupsafe import Markup

from streamline_bench.report.row import ScanResult

if TYPE_CHECKING:
    from streamline_bench.core.similarity import Block, Similarity

Matrix = Sequence[Sequence[float]]

# A dark-to-light ramp of even steps in lightness (purple, blue, green, yellow).
_RAMP = (
    (68, 1, 84), (71, 39, 119), (62, 73, 137), (49, 104, 142), (38, 130, 142),
    (31, 157, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
)  # fmt: skip
_LEFT, _TOP, _GAP, _PROFILE, _BOTTOM = 72, 92, 120, 330, 64
# Plain colours, no CSS variables: several viewers of SVG do not know them.
_STYLE = """
text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-size:12px;fill:#1f2328}
.title{font-size:17px;font-weight:600}
.end{text-anchor:end}.mid{text-anchor:middle}.num{font-size:10.5px;text-anchor:middle}
.paper{fill:#fff}.soft{fill:#656d76}.said{fill:#cf222e;font-weight:600}
.rule{stroke:#d0d7de;fill:none}.line{stroke:#8c959f;stroke-width:1.5;fill:none}
.dot{fill:#1f2328}.chosen{fill:#cf222e}.halo{stroke:#fff;stroke-width:5;fill:none}
.mark{stroke:#cf222e;stroke-width:2.5;fill:none}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3}.paper{fill:#0d1117}.soft{fill:#8d96a0}.said{fill:#ff7b72}
.rule{stroke:#30363d}.line{stroke:#6e7681}.dot{fill:#e6edf3}.chosen{fill:#ff7b72}}
"""


def similarity_svg(similarity: Similarity, block: Block, title: str = "") -> str:
    """Return the picture as SVG text.

    Args:
        block: outlined in the matrix and marked in the profile of blocks of its size.
        title: name of the model; escaped.
    """
    size = similarity.num_layers + 1
    cell = min(max(520 / size, 6.0), 48.0)
    side = cell * size
    width, height = _LEFT + side + _GAP + _PROFILE + 24, _TOP + max(side, 260) + _BOTTOM
    cosine, angular = similarity.cosine.tolist(), similarity.angular.tolist()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img">',
        f"<title>{escape(title)} similarity of layer boundaries</title><style>{_STYLE}</style>",
        '<rect class="paper" width="100%" height="100%"/>',
        *_heading(similarity, title),
        f'<g transform="translate({_LEFT} {_TOP})">',
        *_matrix(cosine, [(block.start, block.stop)], cell, 12.0, angular),
        "</g>",
        f'<g transform="translate({_LEFT + side + 14:.1f} {_TOP})">',
        *_colour_bar(_floor(cosine), side),
        "</g>",
        f'<g transform="translate({_LEFT + side + _GAP:.1f} {_TOP})">',
        *_profile(similarity, block, max(side, 260)),
        "</g></svg>",
    ]
    return "\n".join(parts) + "\n"


def matrix_svg(scan: ScanResult) -> Markup:
    """The matrix as inline SVG, what was removed outlined.

    A block of n layers is the pair (start, start + n), layers that are apart are pairs (i, i + 1).
    """
    size = len(scan.cosine)
    side = size * _CELL
    width = side / (1 - _MARGIN * 12 / 440)
    text = width / 440 * 12  # 12 pixels where the picture is 440 pixels wide
    left = _MARGIN * text
    return Markup(
        "".join(
            [
                f'<svg class="matrix" viewBox="0 0 {width:.1f} {width:.1f}" role="img" '
                f'style="--text:{text:.1f}px" aria-label="{_matrix_words(scan)}">',
                f'<g transform="translate({left:.1f} 0)">',
                *_matrix(scan.cosine, _outlined(scan), _CELL, text),
                "</g></svg>",
            ]
        )
    )


_CELL = 14.0
_MARGIN = 4.2
"""Room for the axes of the page's picture, in heights of its text."""


def _outlined(scan: ScanResult) -> list[tuple[int, int]]:
    """The pairs of boundaries that enclose what was removed."""
    if scan.start is not None and scan.n:
        return [(scan.start, scan.start + scan.n)]
    return [(layer, layer + 1) for layer in scan.removed]


def _matrix_words(scan: ScanResult) -> str:
    cosine, size = scan.cosine, len(scan.cosine)
    words = [f"Mean cosine between the {size} boundaries of {size - 1} layers"]
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
    if pairs:
        i, j = max(pairs, key=lambda pair: cosine[pair[0]][pair[1]])
        words.append(f"most similar: {i} and {j} ({cosine[i][j]:.3f})")
        i, j = min(pairs, key=lambda pair: cosine[pair[0]][pair[1]])
        words.append(f"least: {i} and {j} ({cosine[i][j]:.3f})")
    outlined = _outlined(scan)
    if outlined and scan.start is not None:
        i, j = outlined[0]
        words.append(
            f"removed: block of {j - i} layers, {named_layers(range(i, j))} ({cosine[i][j]:.3f})"
        )
    elif outlined:
        words.append(f"removed: {len(outlined)} separate layers, {named_layers(scan.removed)}")
    return "; ".join(words)


def named_layers(removed: Iterable[int]) -> str:
    """``[2, 4, 5, 6]`` -> ``layers 2, 4 to 6``; an empty string for none."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(removed):
        if runs and layer == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    if not runs:
        return ""
    several = len(runs) > 1 or runs[0][0] != runs[0][1]
    written = (str(first) if first == last else f"{first} to {last}" for first, last in runs)
    return f"layer{'s' if several else ''} {', '.join(written)}"


def _matrix(
    cosine: Matrix,
    outlined: Iterable[tuple[int, int]],
    cell: float,
    text: float,
    angular: Matrix | None = None,
) -> list[str]:
    """Cells, axes and outlines; ``text`` is the height of the axes' letters."""
    return [
        '<g shape-rendering="crispEdges">',
        *_cells(cosine, cell, angular),
        "</g>",
        *_matrix_axes(len(cosine), cell, text),
        *(mark for pair in outlined for mark in _outline(pair, cell)),
    ]


def _heading(similarity: Similarity, title: str) -> list[str]:
    last = "raw output" if similarity.last_state == "raw" else "after the final norm"
    facts = (
        f"Mean cosine of the hidden states at every two layer boundaries; "
        f"{similarity.num_tokens:,} tokens of {similarity.num_samples:,} sequences; "
        f"last boundary: {last}"
    )
    return [
        f'<text class="title" x="24" y="34">{escape(title) or "Layer similarity"}</text>',
        f'<text class="soft" x="24" y="56">{escape(facts)}</text>',
    ]


def _cells(cosine: Matrix, cell: float, angular: Matrix | None) -> list[str]:
    low = _floor(cosine)
    drawn = []
    for after in range(len(cosine)):
        for before in range(after + 1):
            value = cosine[before][after]
            share = _share(value, low)
            x, y = before * cell, after * cell
            more = "" if angular is None else f", angular distance {angular[before][after]:.4f}"
            drawn.append(
                f'<rect x="{x:.6g}" y="{y:.6g}" width="{cell:.6g}" height="{cell:.6g}" '
                f'fill="{_colour(share)}"><title>boundaries {before} and {after}: cosine '
                f"{value:.4f}{more}</title></rect>"
            )
            if cell >= 34 and after > before:
                shade = "#000" if share > 0.6 else "#fff"
                drawn.append(
                    f'<text class="num" x="{x + cell / 2:.2f}" y="{y + cell / 2 + 4:.2f}" '
                    f'style="fill:{shade}">{value:.2f}</text>'
                )
    return drawn


def _matrix_axes(size: int, cell: float, text: float) -> list[str]:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if s * cell >= 20 / 12 * text)
    side = size * cell
    drawn = []
    for index in range(0, size, step):
        middle = (index + 0.5) * cell
        below, beside = side + 1.5 * text, -0.67 * text
        drawn.append(f'<text class="mid" x="{middle:.1f}" y="{below:.1f}">{index}</text>')
        level = middle + 0.33 * text
        drawn.append(f'<text class="end" x="{beside:.1f}" y="{level:.1f}">{index}</text>')
    drawn.append(
        f'<text class="mid soft" x="{side / 2:.1f}" y="{side + 3.5 * text:.1f}">'
        "boundary before the block (number of its first layer)</text>"
    )
    drawn.append(
        f'<text class="mid soft" transform="translate({-3 * text:.1f} {side / 2:.1f}) rotate(-90)">'
        "boundary after the block</text>"
    )
    return drawn


def _outline(pair: tuple[int, int], cell: float) -> list[str]:
    x, y = pair[0] * cell, pair[1] * cell
    place = f'x="{x:.6g}" y="{y:.6g}" width="{cell:.6g}" height="{cell:.6g}" rx="2"'
    # White under red shows on every colour of the ramp.
    return [f'<rect class="halo" {place}/>', f'<rect class="mark" {place}/>']


def _colour_bar(low: float, side: float) -> list[str]:
    steps = 40
    height = min(side, 220.0)
    drawn = [
        f'<rect y="{i * height / steps:.2f}" width="12" height="{height / steps:.2f}" '
        f'shape-rendering="crispEdges" fill="{_colour(1 - i / (steps - 1))}"/>'
        for i in range(steps)
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = 1 - (1 - share) ** 2 * (1 - low)
        drawn.append(f'<text x="18" y="{(1 - share) * height + 4:.1f}">{value:.2f}</text>')
    return drawn


def _profile(similarity: Similarity, block: Block, height: float) -> list[str]:
    scores = similarity.scores(block.n, block.metric)
    low, high = float(scores.min()), float(scores.max())
    margin = max((high - low) * 0.12, 1e-4)
    # No tick beyond what a cosine or a distance can be.
    low, high = max(low - margin, 0.0 if block.metric == "angular" else -1.0), high + margin
    high = min(high, 1.0)
    top, bottom = 40.0, height
    xs = [12 + (_PROFILE - 24) * (index + 0.5) / len(scores) for index in range(len(scores))]
    ys = [bottom - (bottom - top) * (score - low) / (high - low) for score in scores]
    name = "mean cosine" if block.metric == "cosine" else "angular distance"
    best = f"{named_layers(range(block.start, block.stop))}: {block.score:.4f}"
    drawn = [
        f'<text y="4">Blocks of {block.n} layer{"s" * (block.n > 1)}: {name} of their ends</text>',
        f'<text class="said" y="24">{best}</text>',
        *_profile_axes(xs, low, high, top, bottom),
        '<polyline class="line" points="'
        + " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        + '"/>',
    ]
    for start, (x, y) in enumerate(zip(xs, ys, strict=True)):
        chosen = start == block.start
        drawn.append(
            f'<circle class="{"chosen" if chosen else "dot"}" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="{5 if chosen else 3}"><title>{named_layers(range(start, start + block.n))}: '
            f"{scores[start]:.4f}</title></circle>"
        )
    return drawn


def _profile_axes(
    xs: Sequence[float], low: float, high: float, top: float, bottom: float
) -> list[str]:
    drawn = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - (bottom - top) * share
        drawn.append(f'<path class="rule" d="M0 {y:.1f}H{_PROFILE}"/>')
        drawn.append(
            f'<text class="end soft" x="-6" y="{y + 4:.1f}">{low + share * (high - low):.3f}</text>'
        )
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if s * _PROFILE / len(xs) >= 22)
    for start in range(0, len(xs), step):
        drawn.append(f'<text class="mid" x="{xs[start]:.1f}" y="{bottom + 18:.1f}">{start}</text>')
    middle = _PROFILE / 2
    drawn.append(
        f'<text class="mid soft" x="{middle}" y="{bottom + 42:.1f}">first layer of the block</text>'
    )
    return drawn


def _share(value: float, low: float) -> float:
    """Place of a cosine on the ramp: by the square root of 1 - cosine, about its angle.

    The states before the first layers are far from all others; on an even scale the rest, in
    which blocks are chosen, would be of one colour.
    """
    return 1.0 - math.sqrt(max(1.0 - value, 0.0) / (1.0 - low))


def _colour(share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    index = min(int(place), len(_RAMP) - 2)
    mix = place - index
    red, green, blue = (
        round(a + (b - a) * mix) for a, b in zip(_RAMP[index], _RAMP[index + 1], strict=True)
    )
    return f"#{red:02x}{green:02x}{blue:02x}"


def _floor(cosine: Matrix) -> float:
    """The lower end of the colour scale: the least cosine, rounded down to a tenth; at most 0.9."""
    return min(math.floor(min(map(min, cosine)) * 10) / 10, 0.9)
