"""``streamline-bench tasks``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import yaml

from streamline_bench.cli.options import print_table


@click.command("tasks")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--path", "only_path", is_flag=True, help="Print the folder, for --include_path.")
def command(as_json: bool, only_path: bool) -> None:
    """List the lm-eval tasks and groups in the package."""
    from streamline_bench.resources import resource

    root = resource("tasks") / "lm_eval"
    if only_path:
        click.echo(root)
        return
    rows = _rows(root)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.table import Table

    table = Table("name", "kind", "set", box=None, header_style="bold")
    for row in rows:
        table.add_row(row["name"], row["kind"], row["set"])
    print_table(table)
    click.echo(f"\nlm_eval --include_path {root} --tasks NAME ...")


class _Loader(yaml.SafeLoader):
    """Reads ``!function`` tags as plain text: listing tasks runs no code."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def _rows(root: Path) -> list[dict[str, str]]:
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
