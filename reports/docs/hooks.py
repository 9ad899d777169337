"""Fills the generated parts of the documentation: recipes from ``baselines/``, commands from click.

A page holds the line ``<!-- generated: NAME -->``; everything above it is written by hand.
"""

from __future__ import annotations

import html
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import yaml

ROOT = Path(__file__).parents[2]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page (called by MkDocs for every page)."""
    parts = {"recipes": recipes, "commands": commands, "example": example, "families": families}
    return re.sub(
        r"<!-- generated: (\w+) -->", lambda found: "\n".join(parts[found[1]]()), markdown
    )


def recipes() -> Iterator[str]:
    """Yield a table of all recipes, then each with its source, settings and published numbers."""
    loaded = [
        yaml.safe_load(path.read_text("utf-8")) for path in sorted(ROOT.glob("baselines/*.yaml"))
    ]
    yield from ("| recipe | method | cost | what it is |", "|---|---|---|---|")
    for recipe in loaded:
        name = recipe["name"]
        yield f"| [{name}](#{name}) | `{recipe['method']}` | {recipe['cost']} | {recipe['title']} |"
    for recipe in loaded:
        yield from _recipe(recipe)


def _recipe(recipe: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"## {recipe['name']}", "", f"**{recipe['title']}**", "")
    if recipe.get("paper"):
        link = recipe.get("link")
        yield f"Source: [{recipe['paper']}]({link})" if link else f"Source: {recipe['paper']}"
        yield ""
    yield from (str(recipe.get("reproduces", "")), "", "```yaml")
    about = {"name", "title", "paper", "link", "reproduces", "published", "unpublished"}
    settings = {key: value for key, value in recipe.items() if key not in about}
    yield yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=90).rstrip()
    yield from ("```", "")
    published = recipe.get("published") or []
    if published:
        yield from ("| model | metric | value | sparsity | source |", "|---|---|---|---|---|")
    for row in published:
        value = f"{row['value']}{' (perplexity)' if row.get('unit') == 'perplexity' else ''}"
        cells = (row["model"], row["metric"], value, row.get("sparsity", ""), row["source"])
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


_MARKS = {"exact": "✓", "runs": "○", "no result": "·"}


def families() -> Iterator[str]:
    """Yield the matrix of model types and recipes, then the reasons of its refusals."""
    matrix = json.loads((ROOT / "reports" / "families.json").read_text("utf-8"))
    routes_file = ROOT / "streamline_bench" / "modeling" / "vllm" / "stock_routes.json"
    vllm, served = json.loads(routes_file.read_text("utf-8")), matrix["served"]["cells"]
    cells: Mapping[str, Mapping[str, str]] = matrix["cells"]
    recipes = list(max(cells.values(), key=len))
    reasons: dict[str, int] = {}
    yield (
        f"Made with transformers {matrix['transformers']}: {len(cells)} model types and variants. "
        f"The column of vLLM is what the registry of vLLM {vllm['vllm']} says."
    )
    if matrix["partly"]:
        whole = sum(len(row) == len(recipes) for row in cells.values())
        names = ", ".join(matrix["partly"]).replace("_", " ")
        yield (
            f"All columns were made for {whole} of them; these have no result (·) for some of the "
            f"others: {names}."
        )
    yield ""
    names = ["model type", "vLLM", *(name.replace("_", " ") for name in recipes)]
    yield "| " + " | ".join(names) + " |"
    yield "|---" * len(names) + "|"
    for model_type, row in cells.items():
        base = model_type if model_type in vllm["routes"] else model_type.partition("-")[0]
        tokens = served.get(model_type, "").partition(":")[0]
        route = vllm["routes"].get(base, "none") + (
            f", {tokens} tokens" if tokens == "same" else ""
        )
        shown = [f"`{model_type}`", route]
        for recipe in recipes:
            kind, _, reason = row.get(recipe, "no result").partition(": ")
            if kind not in _MARKS:
                reason = reason.replace(f"'{model_type}'", "'X'")
                number = reasons.setdefault(f"{kind}: {reason}", len(reasons) + 1)
            shown.append(_MARKS.get(kind) or f"[{number}](#r{number})")
        yield "| " + " | ".join(shown) + " |"
    yield ""
    for reason, number in reasons.items():
        text = html.escape(reason).replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
        yield f'<a id="r{number}"></a>{number}. {text}'
        yield ""


def example() -> Iterator[str]:
    """Yield the files of the example package."""
    folder = ROOT / "tests" / "example_method"
    languages = {".toml": "toml", ".py": "python", ".yaml": "yaml"}
    for path in sorted(folder.rglob("*")):
        if path.suffix in languages and path.name != "__init__.py":
            yield from (f"`{path.relative_to(folder)}`", "", f"```{languages[path.suffix]}")
            yield from (path.read_text("utf-8").rstrip(), "```", "")


def commands() -> Iterator[str]:
    """Yield every command with its usage, its help and a table of its options."""
    sys.path.insert(0, str(ROOT))
    from streamline_bench.cli.main import COMMANDS, cli

    context = click.Context(cli, info_name="streamline-bench", show_default=True)
    for name in sorted(COMMANDS):
        command = cli.get_command(context, name)
        assert command is not None, name
        yield from _command(command, click.Context(command, context, info_name=name))


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    yield from ("", f"## {context.info_name}", "", "```text")
    yield from (context.get_usage().removeprefix("Usage: "), "```", "")
    yield from (inspect.cleandoc(command.help or "").replace("\b", ""), "")
    options = [
        row
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option)
        and (row := parameter.get_help_record(context)) is not None
    ]
    if options:
        yield from ("| option | what it does |", "|---|---|")
    for names, text in options:
        safe = text.replace("|", "\\|").replace("<", "&lt;")
        yield f"| `{names.replace('|', ' / ')}` | {safe} |"
