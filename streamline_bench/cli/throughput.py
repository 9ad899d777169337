"""``streamline-bench throughput``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from streamline_bench.cli.given import refuse_given
from streamline_bench.cli.options import print_table, setup_logging

if TYPE_CHECKING:
    from streamline_bench.throughput.record import ThroughputRecord

__all__ = ["command"]

_DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])
_GIB = 1 << 30
_OF_BATCHES = ("batch", "rounds", "warmup_rounds", "clock", "one_at_a_time")
_OF_SERVING = ("request_rate", "requests", "max_concurrency", "port")
_OF_VLLM = ("eager", "prefix_caching", "kv_cache_gib")
_Number = TypeVar("_Number", int, float)


def _list_of(kind: Callable[[str], _Number]) -> Callable[..., tuple[_Number, ...]]:
    def read(ctx: click.Context, option: click.Parameter, value: str) -> tuple[_Number, ...]:
        try:
            numbers = tuple(kind(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"'{value}' is not a list of numbers such as 1,8") from None
        if not all(number > 0 for number in numbers):
            raise click.BadParameter(f"'{value}' has a number that is not above 0")
        return numbers

    return read


@click.command("throughput")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--dense", help="Label of the reference model  [default: the first]")
@click.option(
    "--engine",
    type=click.Choice(["vllm", "hf"]),
    help="vLLM or transformers  [default: hf; with --serve: vllm]",
)
@click.option("--serve", "serving", is_flag=True, help="vllm serve + vllm bench serve: latencies.")
@click.option(
    "--paper", is_flag=True, help="One sequence at a time through transformers, as in the paper."
)
@click.option(
    "--batch",
    callback=_list_of(int),
    default="1,8,32",
    show_default=True,
    help="Sequences generated at once, one measurement each.",
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--output-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True)
@click.option("--warmup-rounds", type=click.IntRange(0), default=1, show_default=True)
@click.option(
    "--request-rate",
    callback=_list_of(float),
    default="1,4,inf",
    show_default=True,
    help="With --serve: requests per second.",
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="With --serve: at each rate.",
)
@click.option("--max-concurrency", type=click.IntRange(1), help="With --serve: in flight at most.")
@click.option("--port", type=click.IntRange(1, 65535), help="With --serve  [default: a free one]")
@click.option("--dtype", type=_DTYPES, default="auto", show_default=True)
# Not the shared option: to try the device, it would hold memory there beside the models.
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda or cuda:N; auto: cuda where there is one.",
)
@click.option(
    "--threads", type=click.IntRange(1), help="Of each model  [default: OMP_NUM_THREADS, or 1]"
)
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    help="What tokens are counted against  [default: cpu seconds on a CPU, else wall]",
)
@click.option("--eager/--no-eager", default=None, help="vLLM without compilation and CUDA graphs.")
@click.option("--prefix-caching", is_flag=True, help="Let vLLM reuse prompts it has seen.")
@click.option("--kv-cache-gib", type=click.FloatRange(0, min_open=True), help="vLLM's cache.")
@click.option("--one-at-a-time", is_flag=True, help="For models that do not fit beside each other.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600, show_default=True)
@click.option(
    "--start-timeout", type=click.FloatRange(0, min_open=True), default=900, show_default=True
)
@click.option("--revision", help="Of every MODEL that is a hub name.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the models bring along.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of a table.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for throughput.json and each model's log.",
)
@click.option("--overwrite", is_flag=True, help="Replace a throughput.json that is there.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no table.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    models: tuple[str, ...],
    serving: bool,
    paper: bool,
    engine: str | None,
    revision: str | None,
    as_json: bool,
    output: Path | None,
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure how fast each MODEL generates, beside the first one.

    MODEL is a folder or hub name, or LABEL=FOLDER. Each runs in a process of its own; they take
    turns round by round, so that other load on the machine hits all alike. A model that crashes,
    hangs or does not fit becomes a failed row, and the exit code 1.
    """
    if serving and (paper or engine == "hf"):
        wrong = "--paper" if paper else "--engine hf"
        raise click.UsageError(f"--serve runs vLLM's server; it does not go with {wrong}.")
    if paper and engine == "vllm":
        raise click.UsageError("--paper runs transformers; it does not go with --engine vllm.")
    _refuse_ignored(ctx, engine or "hf", serving, paper)
    setup_logging(quiet=quiet or as_json)
    named = _named(models, revision)
    _require_free(output, overwrite)
    record = _measured(
        named, engine or "hf", serving, paper, output, not (quiet or as_json), **options
    )
    if as_json:
        click.echo(record.model_dump_json(indent=2))
    elif not quiet:
        _show(record)
    if any(model.reason for model in record.models):
        sys.exit(1)


def _refuse_ignored(ctx: click.Context, engine: str, serving: bool, paper: bool) -> None:
    if serving:
        refuse_given(ctx, "--serve sends requests, model after model", *_OF_BATCHES)
        return
    refuse_given(ctx, "it goes with --serve", *_OF_SERVING)
    if engine == "hf":
        refuse_given(ctx, "it goes with --engine vllm", *_OF_VLLM)
    if paper:
        refuse_given(ctx, "--paper runs one sequence at a time", "batch")


def _named(models: tuple[str, ...], revision: str | None) -> dict[str, str]:
    """Labels and folders; folders that are not there are refused before anything is started."""
    from streamline_bench.core.checkpoint.folder import resolve_pretrained

    named: dict[str, str] = {}
    for given in models:
        label, separator, model = given.partition("=")
        if not separator or not label or Path(given).exists():
            label, model = Path(given).name or Path(given).resolve().name, given
        if label in named:
            raise click.UsageError(f"Two models are called '{label}'; name one LABEL={model}.")
        named[label] = str(resolve_pretrained(model, revision))
    return named


def _require_free(output: Path | None, overwrite: bool) -> None:
    from streamline_bench.errors import OutputError
    from streamline_bench.throughput.record import RECORD_NAME

    if output is None or overwrite:
        return
    try:
        there = (output / RECORD_NAME).exists()
    except OSError as error:
        raise OutputError(
            f"Output {output} cannot be read ({error.strerror}); give another --output."
        ) from None
    if there:
        raise OutputError(
            f"Output {output / RECORD_NAME} exists; give another --output or pass --overwrite."
        )


def _measured(
    models: dict[str, str],
    engine: str,
    serving: bool,
    paper: bool,
    output: Path | None,
    progress: bool,
    *,
    dense: str | None,
    batch: tuple[int, ...],
    prompt_tokens: int,
    output_tokens: int,
    rounds: int,
    warmup_rounds: int,
    request_rate: tuple[float, ...],
    requests: int,
    max_concurrency: int | None,
    port: int | None,
    kv_cache_gib: float | None,
    prefix_caching: bool,
    seed: int,
    device: str,
    **setup: Any,
) -> ThroughputRecord:
    from pydantic import ValidationError

    from streamline_bench.throughput import ServingLoad, Setup, Workload, measure, serve
    from streamline_bench.throughput.workload import chosen_device

    workload = Workload(
        batch_sizes=batch,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        rounds=rounds,
        warmup_rounds=warmup_rounds,
        seed=seed,
        prefix_caching=prefix_caching,
    )
    cache = None if kv_cache_gib is None else int(kv_cache_gib * _GIB)
    try:
        how = Setup(kv_cache_bytes=cache, device=chosen_device(device), **setup)
    except ValidationError:
        raise click.BadParameter(
            f"'{device}' is none of auto, cpu, cuda, cuda:N", param_hint="--device"
        ) from None
    shared: dict[str, Any] = {
        "dense": dense or next(iter(models)),
        "workload": workload,
        "setup": how,
        "output": output,
        "progress": progress,
    }
    if serving:
        load = ServingLoad(
            request_rates=request_rate, requests=requests, max_concurrency=max_concurrency
        )
        return serve(models, load=load, port=port, **shared)
    return measure(models, engine=engine, mode="paper" if paper else "offline", **shared)


def _show(record: ThroughputRecord) -> None:
    from streamline_bench.cli.throughput_table import notes, tables

    for table in tables(record):
        print_table(table)
    click.echo(notes(record))
