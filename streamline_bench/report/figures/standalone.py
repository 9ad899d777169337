"""A figure of the page as a file of its own: the page's style is written into every element.

The colours are those of the light page, on white. Selectors of the page's style sheet that name
classes and elements, one inside the other, are followed; others do not concern figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from xml.etree import ElementTree

from streamline_bench.core.machine.environment import resource

NAMESPACE = "http://www.w3.org/2000/svg"
_FONT = "Helvetica, Arial, sans-serif"
_DRAWN = (
    *("fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "stroke-opacity"),
    *("color", "font-size", "font-weight", "text-anchor"),
)
_INHERITED = ("color", "fill", "stroke", "stroke-width", "font-size", "font-weight", "text-anchor")
_TEXT = "--text"
_Rule = tuple[tuple[tuple[str | None, frozenset[str]], ...], dict[str, str]]


def styled(svg: str) -> ElementTree.Element:
    """Parse an inline figure and give every element the style that it has on the page."""
    root = ElementTree.fromstring(svg)
    _style(root, (), {"color": "#16191d", "fill": "#16191d", "font-size": "11.5px"})
    return root


def standalone_svg(svg: str) -> str:
    """Return the figure as the text of an SVG file: no style sheet, no script, white paper."""
    root = styled(svg)
    width, height = size_of(root)
    root.set("xmlns", NAMESPACE)
    root.set("width", f"{width:g}")
    root.set("height", f"{height:g}")
    root.set("font-family", _FONT)
    paper = ElementTree.Element("rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
    root.insert(0, paper)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def size_of(root: ElementTree.Element) -> tuple[float, float]:
    """Width and height of a figure, in its own units."""
    box = [float(part) for part in root.get("viewBox", "0 0 100 100").split()]
    return box[2], box[3]


def _style(
    one: ElementTree.Element, above: tuple[ElementTree.Element, ...], given: Mapping[str, str]
) -> None:
    found = {name: given[name] for name in _INHERITED if name in given}
    for name in _DRAWN:
        if (set_here := one.get(name)) is not None:
            found[name] = set_here
    # A figure may set the size of its text itself.
    own = dict(_declarations(one.attrib.pop("style", "")))
    found[_TEXT] = own.get(_TEXT, given.get(_TEXT, ""))
    for selector, declared in _rules():
        if _matches(selector, (*above, one)):
            found |= {k: found[_TEXT] if v == f"var({_TEXT})" else v for k, v in declared.items()}
    for name, value in found.items():
        if name not in ("color", _TEXT):
            one.set(name, found["color"] if value == "currentColor" else value)
    for part in one:
        _style(part, (*above, one), found)


def _matches(selector: tuple[tuple[str | None, frozenset[str]], ...],
             path: tuple[ElementTree.Element, ...]) -> bool:  # fmt: skip
    *outer, last = selector
    if not _is(path[-1], last):
        return False
    place = len(path) - 1
    for wanted in reversed(outer):
        place = next((n for n in range(place - 1, -1, -1) if _is(path[n], wanted)), -1)
        if place < 0:
            return False
    return True


def _is(one: ElementTree.Element, wanted: tuple[str | None, frozenset[str]]) -> bool:
    tag, classes = wanted
    return (tag is None or one.tag == tag) and classes <= set((one.get("class") or "").split())


@cache
def _rules() -> tuple[_Rule, ...]:
    """The rules of the page's style sheet, light, that can concern a figure."""
    path = resource("reports") / "templates" / "leaderboard.css"
    sheet = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S)
    first, _, rest = sheet.partition("@media (prefers-color-scheme: dark)")
    colours = dict(_declarations(first[first.index("{") + 1 : first.index("}")]))
    screen = first + rest.partition("}\n}")[2].partition("@media (max-width")[0]
    found: list[_Rule] = []
    for heads, body in re.findall(r"([^{}]+)\{([^{}]*)\}", screen):
        declared = {
            name: _plain(value, colours)
            for name, value in _declarations(body)
            if name in _DRAWN and "color-mix" not in value
        }
        for head in heads.split(","):
            selector = tuple(_part(word) for word in head.split())
            if declared and all(selector) and selector:
                found.append((tuple(part for part in selector if part), declared))
    return tuple(found)


def _part(word: str) -> tuple[str | None, frozenset[str]] | None:
    """``g.dense`` -> ("g", {"dense"}); None for other kinds of selectors."""
    match = re.fullmatch(r"([a-z]\w*)?((?:\.[\w-]+)*)", word)
    if match is None or not word:
        return None
    return match[1], frozenset(filter(None, match[2].split(".")))


def _declarations(body: str) -> Iterator[tuple[str, str]]:
    for declared in body.split(";"):
        name, _, value = declared.partition(":")
        if value:
            yield name.strip(), value.strip()


def _plain(value: str, colours: Mapping[str, str]) -> str:
    """No variables, and colours that every viewer knows."""
    value = re.sub(r"var\((--[\w-]+)[^)]*\)", lambda m: colours.get(m[1], m[0]), value)
    value = re.sub(
        r"rgb\((\d+) (\d+) (\d+)\)",
        lambda m: f"#{int(m[1]):02x}{int(m[2]):02x}{int(m[3]):02x}",
        value,
    )
    return re.sub(r"^#(\w)(\w)(\w)$", r"#\1\1\2\2\3\3", value)
