"""``streamline-bench scan``."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamline_bench.cli.options import (
    CALIBRATION_HELP,
    device_option,
    dtype_option,
    placement_option,
    print_table,
    refuse_existing,
    refuse_given,
    refuse_unwritable_folder,
    setup_logging,
)

if TYPE_CHECKING:
    import pandas as pd

    from streamline_bench.core.similarity import Similarity

log = logging.getLogger(__name__)

_FILES = ("similarity.json", "similarity.svg")
_STARTS_SHOWN = 5


def _sizes(ctx: click.Context, option: click.Parameter, value: str | None) -> list[int]:
    try:
        return [int(part) for part in value.split(",")] if value else []
    except ValueError:
        raise click.BadParameter(f"'{value}' is not a list of numbers such as 1,2,8") from None


@click.command("scan")
@click.argument("model")
@click.option("--calibration", default="auto", help=CALIBRATION_HELP)
@click.option("--text-field", default="text", help="Field that holds the text.")
@click.option("--samples", type=click.IntRange(1), default=50, help="Calibration sequences.")
@click.option("--sequence-length", type=click.IntRange(2), default=2048,
              help="Tokens per sequence.")  # fmt: skip
@click.option("--documents", is_flag=True,
              help="One document per sequence, instead of packed text.")  # fmt: skip
@click.option("--n", "sizes", callback=_sizes, help="Block sizes to show in detail, such as 4,8.")
@click.option("--metric", type=click.Choice(["cosine", "angular"]), default="cosine")
@click.option("--last-state", type=click.Choice(["raw", "postnorm"]), default="raw",
              help="Last state: before (raw) or after the final norm.")  # fmt: skip
@placement_option
@click.option("--batch-size", type=click.IntRange(1), default=1)
@click.option("--seed", type=int, default=0, help="Seed of the data order.")
@click.option("--revision", help="Revision of a hub model.")
@device_option
@dtype_option("Dtype of the weights in memory; cosines are taken in float32", auto=True)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="Folder for similarity.json and .svg  [default: scan-NAME]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; write files only with -o.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no table.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    sizes: list[int],
    metric: Any,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Show how similar the hidden states before and after each block of layers of MODEL are.

    One pass over the calibration text compares every pair of layer boundaries. Layer-removal
    methods remove the block with the highest similarity.
    """
    setup_logging(quiet=quiet or as_json)
    if output is None and as_json:
        refuse_given(ctx, "it needs --output", "overwrite")
    name = Path(model).name or Path(model).resolve().name
    if output is None and not as_json:
        output = Path(f"scan-{name}")
    _require_free(output, overwrite)
    similarity = _scanned(model, sizes, progress=not (quiet or as_json), **options)
    if output is not None:
        _write(similarity, sizes, metric, output, name)
    table = _table(similarity, sizes, metric)
    if as_json:
        files = [str(output / file) for file in _FILES] if output is not None else []
        numbers = ("num_layers", "num_tokens", "num_samples", "last_state")
        payload: dict[str, Any] = {
            "model": model,
            **{name: getattr(similarity, name) for name in numbers},
            **similarity.details,
            "blocks": json.loads(table.to_json(orient="records", double_precision=15)),
            "files": files,
        }
        click.echo(json.dumps(payload, indent=2))
    elif not quiet:
        _show(table, metric, similarity)
        click.echo(f"\nWritten: {', '.join(str(output / file) for file in _FILES if output)}")


def _require_free(output: Path | None, overwrite: bool) -> None:
    """Before the scan, not after it: nobody wants to wait for a refusal."""
    if output is None:
        return
    refuse_unwritable_folder(output)
    for file in _FILES:
        refuse_existing(output / file, overwrite)


def _scanned(model: str, sizes: list[int], *, progress: bool, **asked: Any) -> Similarity:
    from streamline_bench.compression.placement import decide_placement, within_memory
    from streamline_bench.core.architecture import depth_of, sequence_limit
    from streamline_bench.core.architecture_guard import layer_kinds
    from streamline_bench.core.checkpoint.folder import resolve_pretrained
    from streamline_bench.core.data.calibration import load_calibration
    from streamline_bench.core.recipe.schema import CalibrationSpec, Recipe
    from streamline_bench.core.scan import scan
    from streamline_bench.errors import SparsityError
    from streamline_bench.modeling.loading import (
        SourceModel,
        computing_dtype,
        load_config,
        load_model,
        load_tokenizer,
    )

    folder = resolve_pretrained(model, asked["revision"])
    same = ("text_field", "samples", "sequence_length", "seed")
    spec = CalibrationSpec(
        source=asked["calibration"],
        form="documents" if asked["documents"] else "packed",
        **{key: asked[key] for key in same},
    )
    trust = {"trust_remote_code": asked["trust_remote_code"]}
    config = load_config(folder, **trust)
    num_layers = depth_of(config)
    for n in sizes:
        if not 1 <= n <= num_layers:
            raise SparsityError(
                f"A block of {n} layers cannot be removed from {num_layers}; give --n from 1 to "
                f"{num_layers}."
            )
    tokens = load_calibration(
        spec,
        load_tokenizer(folder, **trust),
        model_folder=folder,
        max_length=sequence_limit(config),
        vocabulary=config.vocab_size,
        progress=progress,
    )
    how = {"last_state": asked["last_state"], "batch_size": asked["batch_size"]}
    source, device = SourceModel(folder, progress=progress, **trust), asked["device"]
    dtype = computing_dtype(asked["dtype"], device, source.reader)
    log.info("dtype: %s on %s (%s)", dtype, device, asked["dtype"])
    # What needs a scan and nothing else.
    recipe = Recipe(
        name="scan", method="shortgpt", calibration=spec,
        parameters={"batch_size": asked["batch_size"]},
    )  # fmt: skip
    work = Path(tempfile.gettempdir())
    decided = decide_placement(asked["placement"], source, recipe, device, dtype, work)
    place = {"device": device, "dtype": dtype, "streamed": decided.streamed}
    with within_memory(decided, device):
        found = scan(load_model(folder, **place, **trust), tokens, progress=progress, **how)
    kinds = layer_kinds(config)
    if len(set(kinds)) > 1:
        found = replace(found, details={**found.details, "layer_kinds": kinds})
    return found


def _table(similarity: Similarity, sizes: list[int], metric: str) -> pd.DataFrame:
    """The best block of each size; with ``sizes`` the best few of each of them."""
    import pandas as pd

    rank = f"rank_{metric}"
    if not sizes:
        every = similarity.table()
        best: pd.DataFrame = every[every[rank] == 1].reset_index(drop=True)
        return best
    ranked = pd.concat([similarity.table(n) for n in sizes])
    ranked = ranked[ranked[rank] <= _STARTS_SHOWN]
    shown: pd.DataFrame = ranked.sort_values(["n", rank], kind="stable").reset_index(drop=True)
    return shown


def _write(similarity: Similarity, sizes: list[int], metric: Any, output: Path, name: str) -> None:
    from streamline_bench.core.files import atomic_write_text
    from streamline_bench.errors import OutputError
    from streamline_bench.report.figures.similarity import similarity_svg

    n = sizes[0] if sizes else max(1, round(similarity.num_layers / 4))
    picture = similarity_svg(similarity, similarity.best_block(n, metric), name)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Output {output} cannot be made ({error.strerror}); give another --output."
        ) from None
    atomic_write_text(output / "similarity.svg", picture)
    similarity.save(output / "similarity.json")


def _show(table: pd.DataFrame, metric: str, similarity: Similarity) -> None:
    from rich.table import Table

    shown = Table(box=None, header_style="bold")
    for heading in ("n", "layers", "mean cosine", "angular distance", f"rank ({metric})"):
        shown.add_column(heading, justify="right")
    kinds = similarity.details.get("layer_kinds")
    if kinds:
        shown.add_column("kinds of layers")
    for row in table.to_dict("records"):
        last = row["stop"] - 1
        layers = f"{row['start']}-{last}" if row["n"] > 1 else f"{last}"
        mark = " *" if row["contains_first_layer"] else ""
        numbers = (f"{row['cosine']:.4f}", f"{row['angular']:.4f}", str(row[f"rank_{metric}"]))
        parts = Counter(kinds[row["start"] : row["stop"]]) if kinds else {}
        listed = [", ".join(f"{count} {kind}" for kind, count in parts.items())] if kinds else []
        shown.add_row(str(row["n"]), layers + mark, *numbers, *listed)
    tokens = similarity.details["calibration"]
    cut = tokens["requested_length"]
    click.echo(
        f"{similarity.num_layers} layers; {similarity.num_tokens:,} tokens of {tokens['source']} "
        f"in {similarity.num_samples:,} sequences of {tokens['sequence_length']}"
        + (f" (the model's limit; {cut} asked for)" if cut else "")
    )
    print_table(shown)
    if bool(table["contains_first_layer"].any()):
        click.echo("* contains layer 0: removing it often ruins a model, whatever its score")
