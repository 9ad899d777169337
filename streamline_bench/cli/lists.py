"""``streamline-bench recipes``, ``tasks`` and ``lm-eval``: what comes with the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import yaml

from streamline_bench.cli.options import print_table, refuse_given


@click.command("recipes")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes, or show the recipe NAME (a name or the path of a YAML file)."""
    from streamline_bench.compression.recipes import list_recipes, listed_recipes, load_recipe

    if name is not None:
        payload = load_recipe(name).model_dump(mode="json", exclude={"overridden"})
        as_yaml = yaml.safe_dump(payload, sort_keys=False, allow_unicode=True).removesuffix("\n")
        click.echo(json.dumps(payload, indent=2) if as_json else as_yaml)
    elif as_json:
        known = [load_recipe(each).model_dump(mode="json") for each in list_recipes()]
        click.echo(json.dumps(known, indent=2))
    else:
        rows = ((each.name, each.cost, each.method, each.title) for each in listed_recipes())
        _print_list(("recipe", "cost", "method", "what"), rows)


@click.command("tasks")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--path", "only_path", is_flag=True, help="Print the folder, for --include_path.")
@click.pass_context
def tasks(ctx: click.Context, /, as_json: bool, only_path: bool) -> None:
    """List the lm-eval tasks and groups in the package."""
    from streamline_bench.core.machine.environment import resource

    root = resource("tasks") / "lm_eval"
    if only_path:
        refuse_given(ctx, "--path prints a path only", "as_json")
        click.echo(root)
    elif as_json:
        click.echo(json.dumps(_tasks_in(root), indent=2))
    else:
        _print_list(("name", "kind", "set"), (row.values() for row in _tasks_in(root)))
        click.echo("\nlm_eval --tasks NAME ...")


@click.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Call lm_eval with --model streamline registered and our tasks on its --include_path.

    All arguments go to lm_eval unchanged. Folders given as --include_path, with commas between
    them, are added to ours; of tasks with the same name, that of the last folder counts. Example:
    streamline-bench lm-eval run --model streamline --model_args pretrained=DIR --tasks NAME
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from streamline_bench.harness.bridge import refuse_wrong, register
    from streamline_bench.harness.tasks.asked_tasks import include_folders, quick_index

    setup_logging()
    sys.argv = ["lm_eval", *arguments]
    harness = HarnessCLI()
    asked = harness.parse_args()
    refuse_wrong(getattr(asked, "model", None), getattr(asked, "model_args", None))
    register()
    if not hasattr(asked, "include_path"):
        harness.execute(asked)
        return
    given = asked.include_path or ""
    own = [given] if given and Path(given).is_dir() else [each for each in given.split(",") if each]
    named = getattr(asked, "tasks", None) or []
    # Its command line takes one folder, what is behind it takes several.
    asked.include_path = include_folders(own)
    listed = (
        named.split(",") if isinstance(named, str) else [n for t in named for n in t.split(",")]
    )
    with quick_index(listed, own) if listed else nullcontext():
        harness.execute(asked)


def _print_list(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    from rich.table import Table

    table = Table(*header, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    print_table(table)


class _Loader(yaml.SafeLoader):
    """Reads ``!function`` tags as plain text, so that listing tasks runs no code."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def _tasks_in(root: Path) -> list[dict[str, str]]:
    rows = []
    for path in sorted(root.rglob("*.yaml")):
        payload: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        if not isinstance(payload, dict):
            continue
        kind = "group" if isinstance(payload.get("task"), list) or "group" in payload else "task"
        name = payload.get("group") if kind == "group" else payload.get("task")
        if isinstance(name, str):
            rows.append({"name": name, "kind": kind, "set": str(path.parent.relative_to(root))})
    return rows
