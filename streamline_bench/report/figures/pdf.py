"""Writes a figure as a PDF of one page, with lines and letters, no pixels and no other package.

What figures of a report consist of is known: paths of straight lines and circles, rectangles,
polylines, text, translated and turned groups. Letters are those of Helvetica, which every viewer
has; one that Western European encoding lacks is written as "?" (the SVG has them all).
"""

from __future__ import annotations

import re
import zlib
from xml.etree import ElementTree

from streamline_bench.report.figures.standalone import size_of, styled

_WIDTHS = (
    "278 278 355 556 556 889 667 191 333 333 389 584 278 333 278 278 556 556 556 556 556 556 556 "
    "556 556 556 278 278 584 584 584 556 1015 667 667 722 722 667 611 778 722 278 500 667 556 833 "
    "722 778 667 778 722 667 611 722 667 944 667 667 611 278 278 278 469 556 333 556 556 500 556 "
    "556 278 556 556 222 222 500 222 833 556 556 556 556 333 500 278 556 500 722 500 500 500 334 "
    "260 334 584"
)
_WIDTH = dict(zip(range(32, 127), map(int, _WIDTHS.split()), strict=True))
"""Widths of Helvetica's letters, in thousandths of the height (Adobe's metrics)."""
_PLAIN = str.maketrans(
    {"\N{RIGHTWARDS ARROW}": ">", "\N{LEFTWARDS ARROW}": "<", "\N{MINUS SIGN}": "\N{EN DASH}"}
)
"""What Helvetica has in place of letters that it lacks."""
_QUARTER = 0.5523
"""Of a quarter circle's radius: where the handles of its Bézier curve lie."""
_COMMANDS = re.compile(r"([MLHVhvaZ])([^MLHVhvaZ]*)")
_NUMBERS = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def to_pdf(svg: str) -> bytes:
    """Return the figure as a PDF file of its own size, in points."""
    root = styled(svg)
    width, height = size_of(root)
    drawing = _Drawing()
    drawing.lines.append(f"1 0 0 -1 0 {height:g} cm")  # down is positive, as in SVG
    drawing.draw(root)
    content = zlib.compress("\n".join(drawing.lines).encode("cp1252", "replace"))
    states = " ".join(
        f"/G{n} << /ca {opacity:g} /CA {opacity:g} >>" for opacity, n in drawing.states.items()
    )
    fonts = " ".join(
        f"/{name} << /Type /Font /Subtype /Type1 /BaseFont /{font} /Encoding /WinAnsiEncoding >>"
        for name, font in (("F0", "Helvetica"), ("F1", "Helvetica-Bold"))
    )
    return _file(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width:g} {height:g}] /Contents 4 0 R "
            f"/Resources << /Font << {fonts} >> /ExtGState << {states} >> >> >>".encode(),
            b"<< /Length %d /Filter /FlateDecode >>\nstream\n%b\nendstream"
            % (len(content), content),
        ]
    )


def _file(objects: list[bytes]) -> bytes:
    """Objects with their numbers, the table of their places, and the trailer."""
    made, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(made))
        made += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    return (
        made
        + b"xref\n0 %d\n0000000000 65535 f \n%b" % (size, table)
        + (b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, len(made)))
    )


class _Drawing:
    """Operators of a page, and the opacities that they use."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.states: dict[float, int] = {}

    def draw(self, one: ElementTree.Element) -> None:
        """Draw an element and what is in it."""
        self.lines.append("q")
        for kind, given in re.findall(r"(translate|rotate)\(([^)]*)\)", one.get("transform", "")):
            self._moved(kind, _numbers(given))
        opacity = float(one.get("opacity", 1)) * float(one.get("stroke-opacity", 1))
        self.lines.append(f"/G{self.states.setdefault(opacity, len(self.states))} gs")
        if one.tag == "text":
            self._text(one)
        elif (path := _path_of(one)) is not None:
            self._painted(one, path)
        for part in one:
            if part.tag != "title":
                self.draw(part)
        self.lines.append("Q")

    def _moved(self, kind: str, values: list[float]) -> None:
        if kind == "translate":
            x, y = values[0], values[1] if len(values) > 1 else 0.0
            self.lines.append(f"1 0 0 1 {x:g} {y:g} cm")
        elif values[0] == -90:  # the only turn that figures have
            self.lines.append("0 -1 1 0 0 0 cm")

    def _painted(self, one: ElementTree.Element, path: list[str]) -> None:
        fill, stroke = _colour(one.get("fill")), _colour(one.get("stroke"))
        if fill is not None:
            self.lines.append(f"{fill} rg")
        if stroke is not None:
            dashes = " ".join(_written(*_numbers(one.get("stroke-dasharray", ""))))
            width = _numbers(one.get("stroke-width", "1"))[0]
            self.lines.append(f"{stroke} RG {width:g} w [{dashes}] 0 d")
        end = {(True, True): "B", (True, False): "f", (False, True): "S"}
        self.lines += [*path, end.get((fill is not None, stroke is not None), "n")]

    def _text(self, one: ElementTree.Element) -> None:
        words = (one.text or "").translate(_PLAIN).encode("cp1252", "replace").decode("cp1252")
        height = _numbers(one.get("font-size", "11.5"))[0]
        bold = int(
            one.get("font-weight", "400").isdecimal() and one.get("font-weight", "400") > "5"
        )
        width = sum(_WIDTH.get(ord(letter), 556) for letter in words) * height / 1000
        share = {"middle": 0.5, "end": 1.0}.get(one.get("text-anchor", ""), 0.0)
        x, y = float(one.get("x", 0)) - share * width, float(one.get("y", 0))
        shown = re.sub(r"([\\()])", r"\\\1", words)
        colour = _colour(one.get("fill")) or "0 0 0"
        self.lines.append(
            f"BT {colour} rg /F{bold} {height:g} Tf 1 0 0 -1 {x:.2f} {y:.2f} Tm ({shown}) Tj ET"
        )


def _numbers(text: str) -> list[float]:
    return [float(found) for found in _NUMBERS.findall(text)]


def _written(*values: float) -> list[str]:
    return [f"{value:.6g}" for value in values]


def _colour(value: str | None) -> str | None:
    """``#1f55c4`` -> three shares; None for none."""
    if value is None or not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return None
    shares = (int(value[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return " ".join(f"{share:.3f}" for share in shares)


def _path_of(one: ElementTree.Element) -> list[str] | None:
    """The operators of a shape; None for an element that is none."""
    number = {name: float(found) for name in ("x", "y", "width", "height", "cx", "cy", "r")
              if (found := one.get(name)) is not None and not found.endswith("%")}  # fmt: skip
    if one.tag == "rect":
        corner = number.get("x", 0.0), number.get("y", 0.0), number["width"], number["height"]
        return [f"{' '.join(_written(*corner))} re"]
    if one.tag == "circle":
        return _circle(number["cx"], number["cy"], number["r"])
    if one.tag == "polyline":
        places = _numbers(one.get("points", ""))
        pairs = zip(places[::2], places[1::2], strict=True)
        return [f"{x:g} {y:g} {'l' if n else 'm'}" for n, (x, y) in enumerate(pairs)]
    return _lines(one.get("d", "")) if one.tag == "path" else None


def _circle(x: float, y: float, r: float) -> list[str]:
    k = _QUARTER * r
    curves = (
        (x + r, y + k, x + k, y + r, x, y + r), (x - k, y + r, x - r, y + k, x - r, y),
        (x - r, y - k, x - k, y - r, x, y - r), (x + k, y - r, x + r, y - k, x + r, y),
    )  # fmt: skip
    return [f"{x + r:g} {y:g} m", *(f"{' '.join(_written(*curve))} c" for curve in curves), "h"]


def _lines(path: str) -> list[str]:
    """A path; the arcs of figures are the two halves of a circle, drawn with the first."""
    found: list[str] = []
    x = y = 0.0
    circle = False
    for command, given in _COMMANDS.findall(path):
        values = _numbers(given)
        if command == "a":
            if not circle:
                found = found[:-1] + _circle(x + values[5] / 2, y, values[0])
            circle = not circle
            x += values[5]
            continue
        if command == "Z":
            found.append("h")
            continue
        steps = (
            zip(values[::2], values[1::2], strict=True)
            if command in "ML"
            else ((value, y) if command == "H" else (x, value) if command == "V"
                  else (x + value, y) if command == "h" else (x, y + value) for value in values)
        )  # fmt: skip
        for step, (x, y) in enumerate(steps):
            found.append(f"{x:g} {y:g} {'m' if command == 'M' and not step else 'l'}")
    return found
