"""``streamline-bench architecture``."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from streamline_bench.cli.options import print_table, setup_logging

_OUTSIDE = ("base", "layers", "embeddings", "final_norm", "lm_head", "depth_key")
_INSIDE = (
    "attention", "query", "key", "value", "output", "fused_qkv", "mlp", "gate", "up", "down",
    "fused_gate_up", "experts", "router", "input_norm", "mlp_norm", "attention_output_norm",
    "mlp_output_norm", "parallel_residual", "intermediate_key",
)  # fmt: skip
_ENTRIES = ("layer_lists", "index_lists", "prefix_counts", "periods", "extra_layers")


@click.command("architecture")
@click.argument("model")
@click.option("--revision", help="Revision of a hub model.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(model: str, revision: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Show what is known about the architecture of MODEL, and which methods apply to it.

    Of MODEL (a folder, a hub id or bundled) only config.json is read, no weights. Every layer is
    tried: would the others stay what they are without it?
    """
    setup_logging(quiet=True)
    found = _found(model, revision, trust_remote_code)
    if as_json:
        click.echo(json.dumps({"model": model, **found}, indent=2))
    else:
        _show(found)


def _found(model: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    import transformers

    from streamline_bench.core.architecture import architecture_of, depth_of
    from streamline_bench.core.architecture_guard import layer_kinds
    from streamline_bench.core.checkpoint.folder import resolve_pretrained
    from streamline_bench.methods.applicable import methods_for, removable_layers
    from streamline_bench.modeling.loading import load_config

    folder = resolve_pretrained(model, revision, weights=False)
    config = load_config(Path(folder), trust_remote_code=trust_remote_code)
    row = architecture_of(config)
    refused = removable_layers(config)
    return {
        "model_type": row.model_type,
        "source": "inferred" if row.inferred else "verified",
        "transformers": transformers.__version__,
        "num_layers": depth_of(config),
        "outside": {key: getattr(row, key) for key in _OUTSIDE},
        "inside": {key: getattr(row, key) for key in _INSIDE},
        "entries": {key: _plain(getattr(row, key)) for key in _ENTRIES},
        "kinds": layer_kinds(config),
        "refused_layers": {str(layer): reason for layer, reason in refused.items()},
        "methods": methods_for(config, refused),
    }


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    depth, refused = found["num_layers"], found["refused_layers"]
    how = "verified by hand" if found["source"] == "verified" else "inferred from the model itself"
    click.echo(
        f"{found['model_type']}: {how} (transformers {found['transformers']}), {depth} layers\n"
    )
    table = Table(box=None, show_header=False)
    for part in ("outside", "inside", "entries"):
        for key, value in found[part].items():
            table.add_row(key.replace("_", " "), _text(value))
    print_table(table)
    click.echo("\nKinds of layers: " + "; ".join(_spans(found["kinds"])))
    if refused:
        click.echo(f"\n{len(refused)} of {depth} layers cannot be removed alone:")
        for reason in dict.fromkeys(refused.values()):
            click.echo(f"  {reason}")
    else:
        click.echo("\nChecked: without any one layer, every other layer stays what it is.")
    methods = Table(box=None, header_style="bold")
    methods.add_column("method")
    methods.add_column("applies", overflow="fold")
    for name, reason in found["methods"].items():
        methods.add_row(name, reason or "yes")
    click.echo()
    print_table(methods)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} ({item})" for key, item in value.items()) or "-"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value or "-"


def _spans(kinds: list[str]) -> list[str]:
    """Return each run of equal layers as ``0-4: kind``."""
    spans = []
    for kind, run in groupby(enumerate(kinds), key=lambda pair: pair[1]):
        indices = [index for index, _ in run]
        first, last = indices[0], indices[-1]
        spans.append(f"{first}: {kind}" if first == last else f"{first}-{last}: {kind}")
    return spans
