"""``streamline-bench throughput``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from streamline_bench.cli.options import (
    DEVICE_HELP,
    FiniteRange,
    print_table,
    refuse_existing,
    refuse_given,
    refuse_unwritable_folder,
    setup_logging,
    was_given,
)
from streamline_bench.core.machine.environment import printable

if TYPE_CHECKING:
    from streamline_bench.throughput import ServingLoad

_DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])
_GIB = 1 << 30
_BLOCKS = ("blocks", "until_precision", "minutes", "self_check")
_VLLM = ("kv_cache_gib", "kv_cache_dtype", "max_model_len", "tensor_parallel", "gpus")
_ROUNDS = ("rounds", "warmup_rounds")
_SERVING = (
    "request_rate", "concurrency", "arrivals", "requests", "warmup_requests", "max_concurrency",
    "prompts", "prefix_tokens", "slo", "search", "port",
)  # fmt: skip
_Number = TypeVar("_Number", int, float)


def _list_of(
    kind: Callable[[str], _Number], least: float | None = None
) -> Callable[..., tuple[_Number, ...]]:
    def read(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[_Number, ...]:
        if value is None:
            return ()
        try:
            numbers = tuple(kind(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"'{value}' is not a list of numbers such as 1,8") from None
        if not all(number > 0 if least is None else number >= least for number in numbers):
            raise click.BadParameter(f"'{value}' must hold numbers above 0 only")
        return numbers

    return read


def _interpreters(
    ctx: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    found = {}
    for value in values:
        label, separator, path = value.partition("=")
        if not separator or not label:
            raise click.BadParameter(f"'{value}' must be LABEL=PATH of a Python interpreter")
        found[label] = str(Path(path).absolute())  # not resolved: a link marks its environment
    return found


@click.command("throughput")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--dense", help="Label of the reference model  [default: the first]")
@click.option("--engine", type=click.Choice(["vllm", "hf"]),
              help="vLLM or transformers  [default: hf; with --serve: vllm]")  # fmt: skip
@click.option("--serve", "serving", is_flag=True,
              help="Start a vLLM server per model and measure its latencies.")  # fmt: skip
@click.option("--paper", is_flag=True,
              help="The paper's setting: transformers, one sequence at a time.")  # fmt: skip
@click.option("--batch", callback=_list_of(int), default="1,8,32",
              help="Batch sizes, comma-separated; each is measured.")  # fmt: skip
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, help="Tokens of each prompt.")
@click.option("--output-tokens", type=click.IntRange(1), default=128,
              help="Tokens that each sequence generates.")  # fmt: skip
@click.option("--blocks", type=click.IntRange(1), default=3,
              help="Blocks; each starts every model anew, in random order.")  # fmt: skip
@click.option("--until-precision", type=FiniteRange(0, 1, min_open=True, max_open=True),
              help="Add blocks until half of every ratio's interval is less, as 0.02.")  # fmt: skip
@click.option("--minutes", type=FiniteRange(0, min_open=True),
              help="Start no block that would not end by then.")  # fmt: skip
@click.option("--self-check", is_flag=True,
              help="Also measure a copy of the dense model: its ratio is noise.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=6,
              help="Measured rounds of every model and batch size in a block.")  # fmt: skip
@click.option("--warmup-rounds", type=click.IntRange(0), default=1,
              help="Rounds before them that do not count.")  # fmt: skip
@click.option("--request-rate", callback=_list_of(float), default="1,4,inf",
              help="With --serve: requests per second; inf: all at once.")  # fmt: skip
@click.option("--concurrency", callback=_list_of(int),
              help="With --serve: requests in flight, in place of rates.")  # fmt: skip
@click.option("--slo", help="With --serve: find the highest load for an objective such as "
              "ttft=500ms,tpot=50ms,p=95.")  # fmt: skip
@click.option("--search", type=click.Choice(["concurrency", "rate"]), default="concurrency",
              help="With --slo: what is raised.")  # fmt: skip
@click.option("--arrivals", type=click.Choice(["poisson", "constant"]), default="poisson",
              help="With --serve: when requests of a rate come.")  # fmt: skip
@click.option("--requests", type=click.IntRange(1), default=32,
              help="With --serve: requests that count at each load of a block.")  # fmt: skip
@click.option("--warmup-requests", type=click.IntRange(0),
              help="With --serve: requests before them  [default: 8, or more]")  # fmt: skip
@click.option("--max-concurrency", type=click.IntRange(1),
              help="With --serve: most requests at the same time.")  # fmt: skip
@click.option("--prompts", default="random",
              help="With --serve: random, or a .jsonl file of prompts.")  # fmt: skip
@click.option("--prefix-tokens", type=click.IntRange(0), default=0,
              help="With --serve: tokens that all random prompts share.")  # fmt: skip
@click.option("--port", type=click.IntRange(1, 65535),
              help="With --serve: port of the server  [default: a free one]")  # fmt: skip
@click.option("--dtype", type=_DTYPES, default="auto",
              help="Dtype of the weights; auto: that of the first model.")  # fmt: skip
# Not the shared option: it tries the device, and would hold memory that the models need.
@click.option("--device", default="auto", help=DEVICE_HELP)
@click.option("--threads", type=click.IntRange(1),
              help="CPU threads of each model  [default: OMP_NUM_THREADS, or 1]")  # fmt: skip
@click.option("--clock", type=click.Choice(["wall", "cpu"]),
              help="Clock of tokens per second  [default: cpu on a CPU, else wall]")  # fmt: skip
@click.option("--eager/--no-eager", default=None,
              help="With vLLM: run without compilation and CUDA graphs.")  # fmt: skip
@click.option("--prefix-caching", is_flag=True,
              help="With vLLM: reuse the cache of prompts seen before.")  # fmt: skip
@click.option("--kv-cache-gib", type=FiniteRange(0, min_open=True),
              help="With vLLM: size of the cache of keys and values.")  # fmt: skip
@click.option("--kv-cache-dtype", default="auto",
              help="With vLLM: dtype of that cache, such as fp8.")  # fmt: skip
@click.option("--max-model-len", type=click.IntRange(1),
              help="With vLLM: longest sequence  [default: what is asked]")  # fmt: skip
@click.option("--tensor-parallel-size", "tensor_parallel", type=click.IntRange(1), default=1,
              help="With vLLM: accelerators that each model is split over.")  # fmt: skip
@click.option("--gpus", callback=_list_of(int, least=0),
              help="With vLLM: numbers of the accelerators of each model.")  # fmt: skip
@click.option("--one-at-a-time", is_flag=True, default=None,
              help="Measure one model after the other, as where they do not fit.")  # fmt: skip
@click.option("--timeout", type=FiniteRange(0, min_open=True), default=600,
              help="Seconds that one round, or one load of a server, may take.")  # fmt: skip
@click.option("--start-timeout", type=FiniteRange(0, min_open=True), default=900,
              help="Seconds that loading may take.")  # fmt: skip
@click.option("--python", "pythons", multiple=True, metavar="LABEL=PATH", callback=_interpreters,
              help="Interpreter that runs one model, to compare two environments.")  # fmt: skip
@click.option("--revision", help="Revision of the hub models.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a model.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, help="Seed of the prompts and of the order."
)
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of a table.")
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="Folder for throughput.json and the logs.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an existing throughput.json.")
@click.option("-q", "--quiet", is_flag=True, help="Print failures only.")
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
    """Measure how fast each MODEL generates, compared with the first one.

    MODEL is a folder or hub name, or LABEL=FOLDER. Each model runs in its own process. The models
    take turns, round by round, so that other load on the machine affects all of them. Every block
    starts new processes, because a process keeps the speed that its start gave it; the interval is
    over the blocks. A model that crashes, hangs or does not fit becomes a failed row; the exit code
    is then 1.
    """
    if serving and (paper or engine == "hf"):
        wrong = "--paper" if paper else "--engine hf"
        raise click.UsageError(f"--serve needs vLLM's server; it cannot be used with {wrong}.")
    if paper and engine == "vllm":
        raise click.UsageError("--paper needs transformers; it cannot be used with --engine vllm.")
    if len(models) == 1 and options["until_precision"] and not options["self_check"]:
        raise click.UsageError("--until-precision is about ratios; name a second model.")
    _refuse_ignored(ctx, engine or "hf", serving, paper)
    setup_logging(quiet=quiet or as_json)
    if output is None:
        refuse_given(ctx, "it needs --output", "overwrite")
    named = _named(models, revision)
    from streamline_bench.throughput import measure, serve
    from streamline_bench.throughput.record import RECORD_NAME

    if output is not None:
        refuse_unwritable_folder(output)
        refuse_existing(output / RECORD_NAME, overwrite)
    how = {**_asked(named, options), "output": output, "progress": not (quiet or as_json)}
    if serving:
        record = serve(named, load=_load(ctx, options), port=options["port"], **how)
    else:
        mode: Literal["paper", "offline"] = "paper" if paper else "offline"
        record = measure(named, engine=engine or "hf", mode=mode, **how)
    failures = {model.label: model.reason for model in record.models if model.reason}
    if as_json:
        click.echo(record.model_dump_json(indent=2))
    elif not quiet:
        from streamline_bench.cli.tables import throughput_notes, throughput_tables

        for table in throughput_tables(record):
            print_table(table)
        click.echo(throughput_notes(record))
    if quiet or as_json:
        for label, reason in failures.items():
            click.echo(f"{printable(label)} failed: {printable(reason)}", err=True)
    if failures:
        sys.exit(1)


def _refuse_ignored(ctx: click.Context, engine: str, serving: bool, paper: bool) -> None:
    if serving:
        why = "--serve sends requests to one model at a time"
        refuse_given(ctx, why, "batch", *_ROUNDS, "clock", "one_at_a_time")
        if ctx.params["slo"] is None:
            refuse_given(ctx, "it needs --slo", "search")
        _refuse_without_rates(ctx)
        if ctx.params["prompts"] != "random":
            refuse_given(ctx, "--prompts has its own lengths", "prompt_tokens", "prefix_tokens")
        return
    refuse_given(ctx, "it needs --serve", *_SERVING)
    if engine == "hf":
        refuse_given(ctx, "it needs --engine vllm", "eager", "prefix_caching", *_VLLM)
    if paper:
        refuse_given(ctx, "--paper runs one sequence at a time", "batch")


def _refuse_without_rates(ctx: click.Context) -> None:
    """Refuse what is about request rates where none is sent."""
    searched = ctx.params["slo"] is not None
    if was_given(ctx, "request_rate") or not (ctx.params["concurrency"] or searched):
        return
    if not searched:
        refuse_given(ctx, "--concurrency says how many are in flight", "max_concurrency")
    if not searched or ctx.params["search"] == "concurrency":
        refuse_given(ctx, "it needs --request-rate, or --search rate", "arrivals")


def _load(ctx: click.Context, options: Mapping[str, Any]) -> ServingLoad:
    """Return what is sent."""
    from pydantic import ValidationError

    from streamline_bench.core.recipe.validation import wrong_value
    from streamline_bench.throughput import ServingLoad

    rates = {"request_rates": options["request_rate"]} if was_given(ctx, "request_rate") else {}
    own_lengths = options["prompts"] != "random" and not was_given(ctx, "output_tokens")
    names = "arrivals requests warmup_requests max_concurrency prompts prefix_tokens search"
    try:
        return ServingLoad(
            **rates,
            concurrencies=options["concurrency"],
            slo=options["slo"],
            output_lengths="data" if own_lengths else "fixed",
            **{name: options[name] for name in names.split()},
        )
    except ValidationError as error:
        raise click.UsageError(wrong_value(error, ServingLoad)) from None


def _named(models: tuple[str, ...], revision: str | None) -> dict[str, str]:
    """Return label -> folder; a missing folder is an error before anything is started."""
    from streamline_bench.core.checkpoint.folder import is_local, resolve_pretrained

    named: dict[str, str] = {}
    for given in models:
        label, separator, model = given.partition("=")
        if not separator or not label or Path(given).exists():
            label, model = Path(given).name or Path(given).resolve().name, given
        if label in named:
            raise click.UsageError(f"Two models are called '{label}'; name one LABEL={model}.")
        named[label] = model
    # A revision is of the models on the hub; where there is none, it is refused.
    on_hub = [model for model in named.values() if not is_local(model)] or list(named.values())
    return {
        label: str(resolve_pretrained(model, revision if model in on_hub else None))
        for label, model in named.items()
    }


def _asked(models: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what both ways of measuring are given."""
    from pydantic import ValidationError

    from streamline_bench.core.recipe.validation import wrong_value
    from streamline_bench.throughput import Setup, Workload
    from streamline_bench.throughput.workload import chosen_device

    def chosen(names: str) -> dict[str, Any]:
        return {name: options[name] for name in names.split()}

    lengths = "prompt_tokens output_tokens seed prefix_caching"
    more = " ".join((*_BLOCKS, *_ROUNDS))
    workload = Workload(batch_sizes=options["batch"], **chosen(f"{lengths} {more}"))
    cache = options["kv_cache_gib"]
    limits = "dtype threads clock eager one_at_a_time timeout start_timeout trust_remote_code"
    limits += " pythons"
    for path in options["pythons"].values():
        if not (Path(path).is_file() and os.access(path, os.X_OK)):
            raise click.UsageError(
                f"--python: '{path}' cannot be run; give the path of a Python interpreter."
            )
    on_device = " ".join(name for name in _VLLM if name != "kv_cache_gib")
    try:
        setup = Setup(
            kv_cache_bytes=None if cache is None else int(cache * _GIB),
            device=chosen_device(options["device"]),
            **chosen(f"{limits} {on_device}"),
        )
    except ValidationError as error:
        if error.errors()[0]["type"] == "value_error":
            raise click.UsageError(wrong_value(error, Setup)) from None
        raise click.BadParameter(
            f"'{options['device']}' is not a device; give auto, cpu, cuda or cuda:N",
            param_hint="--device",
        ) from None
    dense = options["dense"] or next(iter(models))
    return {"dense": dense, "workload": workload, "setup": setup}
