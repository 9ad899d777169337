"""Draws a similarity matrix as one self-contained SVG: no fonts, scripts or files from elsewhere.

Left, the mean cosine of every two boundaries, the chosen block outlined; right, the candidates of
the same size by their first layer. Colours follow the viewer's light or dark scheme.
"""

from __future__ import annotations

from html import escape

import numpy as np

from streamline_bench.core.scan.similarity import Block, Similarity

__all__ = ["similarity_svg"]

# A dark-to-light ramp of even steps in lightness (purple, blue, green, yellow).
_RAMP = (
    (68, 1, 84),
    (71, 39, 119),
    (62, 73, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 157, 137),
    (53, 183, 121),
    (109, 205, 89),
    (180, 222, 44),
    (253, 231, 37),
)
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
    low = _floor(float(similarity.cosine.min()))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img">',
        f"<title>{escape(title)} similarity of layer boundaries</title><style>{_STYLE}</style>",
        '<rect class="paper" width="100%" height="100%"/>',
        *_heading(similarity, title),
        f'<g transform="translate({_LEFT} {_TOP})">',
        '<g shape-rendering="crispEdges">',
        *_cells(similarity, cell, low),
        "</g>",
        *_matrix_axes(size, cell),
        *_outline(block, cell),
        "</g>",
        f'<g transform="translate({_LEFT + side + 14:.1f} {_TOP})">',
        *_colour_bar(low, side),
        "</g>",
        f'<g transform="translate({_LEFT + side + _GAP:.1f} {_TOP})">',
        *_profile(similarity, block, max(side, 260)),
        "</g></svg>",
    ]
    return "\n".join(parts) + "\n"


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


def _cells(similarity: Similarity, cell: float, low: float) -> list[str]:
    values = similarity.cosine
    drawn = []
    for after in range(len(values)):
        for before in range(after + 1):
            value = float(values[before, after])
            share = _share(value, low)
            x, y = before * cell, after * cell
            drawn.append(
                f'<rect x="{x:.2f}" y="{y:.2f}" width="{cell:.2f}" height="{cell:.2f}" '
                f'fill="{_colour(share)}"><title>boundaries {before} and {after}: cosine '
                f"{value:.4f}, angular distance {similarity.angular[before, after]:.4f}"
                "</title></rect>"
            )
            if cell >= 34 and after > before:
                shade = "#000" if share > 0.6 else "#fff"
                drawn.append(
                    f'<text class="num" x="{x + cell / 2:.2f}" y="{y + cell / 2 + 4:.2f}" '
                    f'style="fill:{shade}">{value:.2f}</text>'
                )
    return drawn


def _matrix_axes(size: int, cell: float) -> list[str]:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if s * cell >= 20)
    side = size * cell
    drawn = []
    for index in range(0, size, step):
        middle = (index + 0.5) * cell
        drawn.append(f'<text class="mid" x="{middle:.1f}" y="{side + 18:.1f}">{index}</text>')
        drawn.append(f'<text class="end" x="-8" y="{middle + 4:.1f}">{index}</text>')
    drawn.append(
        f'<text class="mid soft" x="{side / 2:.1f}" y="{side + 42:.1f}">'
        "boundary before the block (number of its first layer)</text>"
    )
    drawn.append(
        f'<text class="mid soft" transform="translate(-42 {side / 2:.1f}) rotate(-90)">'
        "boundary after the block</text>"
    )
    return drawn


def _outline(block: Block, cell: float) -> list[str]:
    x, y = block.start * cell, block.stop * cell
    place = f'x="{x:.2f}" y="{y:.2f}" width="{cell:.2f}" height="{cell:.2f}" rx="2"'
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
    xs = 12 + (_PROFILE - 24) * (np.arange(len(scores)) + 0.5) / len(scores)
    ys = bottom - (bottom - top) * (scores - low) / (high - low)
    name = "mean cosine" if block.metric == "cosine" else "angular distance"
    drawn = [
        f'<text y="4">Blocks of {block.n} layer{"s" * (block.n > 1)}: {name} of their ends</text>',
        f'<text class="said" y="24">{_layers(block.start, block.n)}: {block.score:.4f}</text>',
        *_profile_axes(xs, low, high, top, bottom),
        '<polyline class="line" points="'
        + " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        + '"/>',
    ]
    for start, (x, y) in enumerate(zip(xs, ys, strict=True)):
        chosen = start == block.start
        drawn.append(
            f'<circle class="{"chosen" if chosen else "dot"}" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="{5 if chosen else 3}"><title>{_layers(start, block.n)}: {scores[start]:.4f}'
            "</title></circle>"
        )
    return drawn


def _layers(start: int, n: int) -> str:
    return f"layers {start} to {start + n - 1}" if n > 1 else f"layer {start}"


def _profile_axes(
    xs: np.typing.NDArray[np.float64], low: float, high: float, top: float, bottom: float
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
    return 1.0 - float(np.sqrt(max(1.0 - value, 0.0) / (1.0 - low)))


def _colour(share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    index = min(int(place), len(_RAMP) - 2)
    mix = place - index
    red, green, blue = (
        round(a + (b - a) * mix) for a, b in zip(_RAMP[index], _RAMP[index + 1], strict=True)
    )
    return f"#{red:02x}{green:02x}{blue:02x}"


def _floor(value: float) -> float:
    """The lower end of the colour scale: a tenth below the least cosine, at most 0.9."""
    return min(float(np.floor(value * 10) / 10), 0.9)
