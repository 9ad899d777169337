"""``streamline-bench divergence``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from streamline_bench.cli.options import device_option, dtype_option, print_table, setup_logging

if TYPE_CHECKING:
    from rich.table import Table

    from streamline_bench.stability.comparison import Estimate, TokenDivergence


@click.command("divergence")
@click.argument("dense")
@click.argument("pruned")
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--text-field", default="text", show_default=True, help="Field with the text.")
@click.option("--documents", type=click.IntRange(min=1), help="Read at most this many documents.")
@click.option(
    "--window",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Tokens per window.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@device_option
@dtype_option("Dtype of the weights; distributions are compared in float32.")
@click.option("--confidence", type=click.FloatRange(0.5, 0.9999), default=0.95, show_default=True)
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
    window: int,
    batch_size: int,
    device: str,
    dtype: str,
    confidence: float,
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
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
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    result = token_divergence(
        folder,
        pruned,
        itertools.islice(read_texts(text, text_field, tokenizer), documents),
        window=window,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        confidence=confidence,
        trust_remote_code=trust_remote_code,
        progress=not quiet,
    )
    if as_json:
        click.echo(result.model_dump_json(indent=2))
    else:
        print_table(_table(result))


def _table(result: TokenDivergence) -> Table:
    from rich.table import Table

    table = Table(
        title=f"{result.tokens} tokens of {result.documents} documents, windows of {result.window}"
    )
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("interval", justify="right")
    for name, value in (
        ("perplexity, dense", result.dense_perplexity),
        ("perplexity, pruned", result.pruned_perplexity),
    ):
        table.add_row(name, "beyond float64" if value is None else f"{value:.4f}", "")
    for name, estimate in (
        ("more nats per token", result.nats_per_token),
        ("KL(dense || pruned), nats per token", result.kl),
        ("same first token, share", result.same_top),
    ):
        table.add_row(name, f"{estimate.value:.4f}", _interval(estimate))
    return table


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{estimate.low:.4f}, {estimate.high:.4f}]"
