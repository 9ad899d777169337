"""``streamline-bench compress``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamline_bench.cli.options import (
    CALIBRATION_HELP,
    TARGET_HELP,
    device_option,
    dtype_option,
    parse_assignments,
    placement_option,
    setup_logging,
)

if TYPE_CHECKING:
    from streamline_bench.core.recipe.schema import Recipe


@click.command("compress")
@click.argument("model")
@click.option("--recipe", default="streamline", show_default=True, help="Recipe name or YAML file.")
@click.option("--sparsity", type=float, help="Share of the parameters to remove, between 0 and 1.")
@click.option("--n-layers", type=int, help="Net number of layers to remove, instead of --sparsity.")
@click.option("--target", metavar="LIMIT=VALUE,…", help=TARGET_HELP)
@click.option("--replacement", help="none, layer, ffn, swiglu, ffn_res, swiglu_res or linear.")
@click.option("--calibration", help=CALIBRATION_HELP)
@click.option(
    "--seed", type=int, help="Seed of random choices, new weights and the training's order."
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set a recipe key.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New folder.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--revision", help="Revision of a hub model.")
@device_option
@dtype_option("Dtype of the source in memory; the result keeps its stored one", auto=True)
@placement_option
@click.option("--explain", is_flag=True, help="Say what memory it needs; load and write nothing.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no log.")
def command(
    model: str,
    recipe: str,
    target: str | None,
    assignments: tuple[str, ...],
    output: Path | None,
    overwrite: bool,
    revision: str | None,
    device: str,
    dtype: str,
    placement: Any,
    explain: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **overrides: Any,
) -> None:
    """Remove layers from MODEL (a folder, a hub id or bundled) and write the result to --output."""
    from streamline_bench.core.machine.ranks import launched

    ranks = launched()
    setup_logging(quiet=quiet or as_json or not ranks.main)
    from streamline_bench.compression.pipeline import compress, explained
    from streamline_bench.compression.recipes import load_recipe, refuse_sizes, refuse_unread
    from streamline_bench.core.checkpoint.folder import read_manifest

    given = {**overrides, **parse_assignments(assignments)}
    plan = load_recipe(recipe, given)
    refuse_unread(plan, given)
    if target is not None:
        refuse_sizes(given)
        plan = _of_target(target, recipe, given, model, revision, trust_remote_code)
    where: dict[str, Any] = {
        "revision": revision, "device": device, "dtype": dtype, "placement": placement,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    if explain:
        if ranks.main:
            click.echo(explained(model, plan, **where))
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    compress(
        model,
        plan,
        output,
        **where,
        overwrite=overwrite,
        progress=not (quiet or as_json) and ranks.main,
    )
    if not ranks.main:
        return
    manifest = read_manifest(output)
    assert manifest is not None  # compress writes it last
    if as_json:
        click.echo(manifest.model_dump_json(indent=2))
    elif not quiet:
        click.echo(
            f"{output}: {manifest.layers_before} -> {manifest.layers_after} layers, "
            f"{manifest.parameters_before:,} -> {manifest.parameters_after:,} parameters "
            f"({manifest.sparsity_reached:.1%} removed)"
        )
        if whole := manifest.whole_folder:
            click.echo(
                f"These are of the text model; the whole folder ({whole['model_type']}): "
                f"{whole['parameters_before']:,} -> {whole['parameters_after']:,} parameters "
                f"({whole['sparsity_reached']:.1%} removed)"
            )


def _of_target(
    target: str,
    recipe: str,
    given: dict[str, Any],
    model: str,
    revision: str | None,
    trust_remote_code: bool,
) -> Recipe:
    from streamline_bench.compression.target import Target, solved
    from streamline_bench.modeling.loading import SourceModel

    asked = Target.parse(target)
    source = SourceModel.find(model, revision, trust_remote_code=trust_remote_code)
    return solved(recipe, given, asked, source)[0]
