"""``streamline-bench recipes``."""

from __future__ import annotations

import json

import click

from streamline_bench.cli.options import print_table


@click.command("recipes")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(name: str | None, as_json: bool) -> None:
    """List the recipes, or show the recipe NAME (a name or the path of a YAML file)."""
    from streamline_bench.compression.recipes import list_recipes, listed_recipes, load_recipe

    if name is not None:
        _show(load_recipe(name).model_dump(mode="json", exclude={"overridden"}), as_json)
        return
    if as_json:
        recipes = [load_recipe(known) for known in list_recipes()]
        click.echo(json.dumps([recipe.model_dump(mode="json") for recipe in recipes], indent=2))
        return
    from rich.table import Table

    table = Table("recipe", "cost", "method", "what", box=None, header_style="bold")
    for recipe in listed_recipes():
        table.add_row(recipe.name, recipe.cost, recipe.method, recipe.title)
    print_table(table)


def _show(payload: dict[str, object], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(payload, indent=2))
        return
    import yaml

    click.echo(yaml.safe_dump(payload, sort_keys=False, allow_unicode=True), nl=False)
