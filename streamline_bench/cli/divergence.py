"""``streamline-bench divergence``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import click

from streamline_bench.cli.options import device_option, dtype_option, print_table, setup_logging


@click.command("divergence")
@click.argument("dense")
@click.argument("pruned")
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--text-field", default="text", help="Field of a record that holds the text.")
@click.option("--documents", type=click.IntRange(min=1), help="Read at most this many documents.")
@click.option("--window", type=click.IntRange(min=2), default=2048, help="Tokens per window.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, help="Windows read at once.")
@device_option
@dtype_option("Dtype of the weights; distributions are compared in float32.")
@click.option("--confidence", type=click.FloatRange(0.5, 0.9999), default=0.95,
              help="Of the intervals.")  # fmt: skip
@click.option("--revision", help="Revision of DENSE on the hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the models.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    dense: str,
    pruned: str,
    text: Path,
    text_field: str,
    documents: int | None,
    revision: str | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Compare the next-token distributions of DENSE and PRUNED on TEXT.

    TEXT is a .txt, .json, .jsonl, .csv, .tsv or .parquet file, which may be compressed. The result
    has both perplexities and KL(dense || pruned) per token. KL also changes when probability moves
    between tokens that are not in the text.
    """
    setup_logging(quiet=quiet)
    from streamline_bench.core.checkpoint.folder import resolve_pretrained
    from streamline_bench.divergence import read_texts, token_divergence
    from streamline_bench.modeling.loading import load_tokenizer

    folder = resolve_pretrained(dense, revision)
    tokenizer = load_tokenizer(folder, trust_remote_code=settings["trust_remote_code"])
    texts = itertools.islice(read_texts(text, text_field, tokenizer), documents)
    result = token_divergence(folder, pruned, texts, progress=not quiet, **settings)
    if as_json:
        click.echo(result.model_dump_json(indent=2))
    else:
        from streamline_bench.cli.tables import divergence_table

        print_table(divergence_table(result))
