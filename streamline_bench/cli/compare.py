"""``streamline-bench compare`` and ``demo``: from options to a request and an execution."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from streamline_bench.cli.options import (
    TARGET_HELP,
    metrics_option,
    named_device_option,
    names_in,
    parse_assignments,
    placement_option,
    refuse_given,
    setup_logging,
    until_option,
    yaml_assignments,
)
from streamline_bench.core.machine.environment import is_bundled
from streamline_bench.errors import RecipeError

if TYPE_CHECKING:
    from streamline_bench.runs.execution.options import Execution
    from streamline_bench.runs.planning.request import Request, RowRequest
    from streamline_bench.runs.run import CompareResult


@click.command("compare")
@click.argument("model", required=False)
@click.option("--plan", help="YAML file with any of these options, or the name of a plan.")
@click.option("--recipes", help="Names, YAML files, groups (all, recovered, …); -NAME leaves out.")
@click.option("--model", "models", help="Comma-separated models, in place of MODEL.")
@click.option("--row", "rows", multiple=True, metavar="LABEL=RECIPE|CHECKPOINT:KEY=VALUE,…",
              help="Add a row under this label: a recipe with changes, or a checkpoint made "
              "elsewhere (a folder or hub id) with its revision, dtype, tokenizer, "
              "trust_remote_code, model_args.KEY or reference.")  # fmt: skip
@click.option("--tasks", help="Comma-separated lm-eval tasks or groups.")
@click.option("--include-path", multiple=True, help="Folder with your own task files.")
@metrics_option
@click.option("--sparsity", help="Share of the parameters to remove; several: 0.25,0.5.")
@click.option("--n-layers", help="Net number of layers to remove, instead of --sparsity.")
@click.option("--target", metavar="LIMIT=VALUE,…",
              help=f"{TARGET_HELP} Without measured, the run folder's own speeds count. The report "
              "says which rows are on the Pareto front.")  # fmt: skip
@click.option(
    "--search",
    type=click.IntRange(min=1),
    metavar="N",
    help="Add N sizes between neighbours on the Pareto front.",
)
@click.option("--seeds", help="Seeds of the rows that read one: 0,1,2.")
@click.option("--calibration", help="Text, jsonl, parquet, saved dataset, hub id or preset; a row "
              "for each of several: a.jsonl,b.jsonl.")  # fmt: skip
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE",
              help="Set a recipe key in the rows that read it.")  # fmt: skip
@click.option("--limit", type=float, help="Documents per task, or a share of them below 1.")
@click.option("--num-fewshot", type=int, help="Examples before each question.")
@click.option("--apply-chat-template", is_flag=True, default=None, help="Use the chat template.")
@click.option("--chat-template", metavar="NAME", help="Use the tokenizer's template of this name.")
@click.option("--engine", type=click.Choice(["hf", "vllm"]),
              help="What computes the answers: transformers (hf) or vLLM.")  # fmt: skip
@click.option("--config", "harness_config", metavar="FILE",
              help="Options of lm_eval, as lm_eval --config reads them.")  # fmt: skip
@click.option("--harness", "harness", multiple=True, metavar="[TASK:]KEY=VALUE",
              help="Set an option of lm_eval, for all tasks or one: gen_kwargs.temperature=0.7, "
              "gsm8k:num_fewshot=4, system_instruction='Be brief.'")  # fmt: skip
@click.option("--confirm-run-unsafe-code", is_flag=True, default=None,
              help="Let tasks run code that a model wrote.")  # fmt: skip
@click.option("--batch-size", help="Batch size of the scoring: a number (16) or auto.")
@click.option("--dtype", help="Dtype of the weights in memory.")
@named_device_option
@placement_option
@click.option("--revision", help="Revision of a hub model.")
@click.option("--trust-remote-code", is_flag=True, default=None,
              help="Run code that comes with the model.")  # fmt: skip
@click.option("--title", help="Heading of the report.")
@click.option("--throughput", type=click.Choice(["none", "vllm", "hf", "serve"]),
              help="Also measure speed; serve: latencies of vLLM's server.")  # fmt: skip
@click.option("--workload", multiple=True, metavar="KEY=VALUE",
              help="Set a key of the speed measurement, such as rounds=4.")  # fmt: skip
@click.option("--load", multiple=True, metavar="KEY=VALUE",
              help="With --throughput serve: set what is sent, such as concurrencies=[1,8,32] or "
              "slo='ttft=500ms,tpot=50ms'.")  # fmt: skip
@click.option("--noise-floor", is_flag=True, default=None, help="Score the dense model twice.")
@click.option("--noise-batch-size", help="Batch size of the second scoring.")
@click.option("--noise-dtype", help="Dtype of one more scoring of the dense model.")
@click.option("--noise-engine", type=click.Choice(["hf", "vllm"]),
              help="Engine of one more scoring of the dense model.")  # fmt: skip
@click.option("--text", help="Also compare next-token distributions on this file, or 'bundled'.")
@click.option("--text-field", help="Field of its records that holds the text.")
@click.option("--text-documents", type=click.IntRange(min=1),
              help="Read at most this many documents of it.")  # fmt: skip
@click.option("--text-window", type=click.IntRange(min=2), help="Tokens per window.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of a job.")
@until_option
@click.option("--trunk/--no-trunk", default=True, help="Run shared layers once for all models.")
@click.option("--executor", type=click.Choice(["local", "ray", "slurm"]), default="local",
              help="Where the jobs run.")  # fmt: skip
@click.option("--ray-address", default="auto", help="Address of a Ray cluster.")
@click.option("--slurm", multiple=True, metavar="KEY=VALUE",
              help="Set an option of sbatch, such as partition=gpu.")  # fmt: skip
@click.option("--cpus-per-job", default="1", metavar="N[,KIND=N…]",
              help="CPUs per job on a cluster, such as 8,compress=2; KIND is compress, "
              "score, text or measure.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1),
              help="Jobs at a time, on this machine or in Slurm's queue.")  # fmt: skip
@click.option("--gpus", help="Comma-separated ids of the GPUs to use.")
@click.option("--gpus-per-job", metavar="N[,KIND=N…]",
              help="GPUs per job, such as 1,compress=4; 1 with --gpus. Several GPUs train or score "
              "in as many processes; vLLM splits a model over them.")  # fmt: skip
@click.option("--retries", type=click.IntRange(min=0), default=2,
              help="Attempts after a job's process died.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds per job.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Run folder.")
@click.option("--plan-size", metavar="difference=D,discordance=Q",
              help="Run nothing: say how many documents a difference of D takes, where one of two "
              "models alone is right on a share Q of them (power=P: 0.8).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no log.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str | None,
    models: str | None,
    plan: str | None,
    output: Path | None,
    until: str,
    plan_size: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compare recipes on MODEL: a folder, a hub id, or 'bundled' for the bundled model.

    The same command continues an interrupted run; with more rows, tasks, sizes or seeds, it does
    what is new. If a recipe fails, its row says so, and the others continue. Exit codes: 0: every
    result is there; 1: a row, the noise floor, the text or the speed has no result; 2: wrong input,
    or no report; 130 and 143: stopped by Ctrl-C or SIGTERM.
    """
    setup_logging(quiet=quiet or as_json)
    if plan_size is not None:
        click.echo(planned_size(plan_size))
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output': the run folder.")
    from streamline_bench.runs.run import compare_request

    where = options["executor"]
    if where != "local":
        refuse_given(ctx, "a cluster shares out its own machines", "gpus")
    if where == "ray":
        refuse_given(ctx, "a Ray cluster keeps its own queue", "workers")
    else:
        refuse_given(ctx, "it needs --executor ray", "ray_address")
    if where != "slurm":
        refuse_given(ctx, "it needs --executor slurm", "slurm")
    if where == "local":
        refuse_given(ctx, "it needs --executor ray or slurm", "cpus_per_job")
    if model is not None and models is not None:
        raise click.UsageError("Give the models either as MODEL or with --model.")
    request = read_options(models or model, plan, options)
    if until == "compress":
        _note_unmeasured(request)
    if request.throughput == "none":
        refuse_given(ctx, "it needs --throughput", "workload")
    if request.throughput != "serve":
        refuse_given(ctx, "it needs --throughput serve", "load")
    if request.text is None:
        refuse_given(ctx, "it needs --text", "text_field", "text_documents", "text_window")
    with _stops_with_a_word():
        result = compare_request(
            request, output, execution=read_execution(options), until=until,
            progress=not (quiet or as_json), asked=_recipe_keys(options),
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(result.summary(), indent=2))
        sys.exit(result.exit_code)
    _finish(result)


def planned_size(text: str) -> str:
    """Say how many documents it takes (RecipeError: a value is missing or no share)."""
    from streamline_bench.stability.statistics.score import documents_needed

    given: dict[str, float] = {"power": 0.8}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            given[name.strip()] = float(value)
        except ValueError:
            raise RecipeError(
                f"--plan-size '{text}': '{part}' has no number; write "
                "difference=0.02,discordance=0.12."
            ) from None
    known = {"difference", "discordance", "power"}
    if given.keys() != known:
        wrong = sorted(given.keys() ^ known)[0]
        raise RecipeError(
            f"--plan-size '{text}': '{wrong}' is missing or unknown; write "
            "difference=0.02,discordance=0.12."
        )
    needed = documents_needed(given["difference"], given["discordance"], power=given["power"])
    return (
        f"{needed:,} documents: a difference of {100 * given['difference']:g} points is found with "
        f"{100 * given['power']:g} % power at 95 % confidence, where "
        f"{100 * given['discordance']:g} % of the documents are discordant. Documents that belong "
        "together (one passage, one subject) count for less."
    )


@click.command("demo")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("streamline-demo"),
              help="Run folder; the same command continues an interrupted demo.")  # fmt: skip
@click.option("--sparsity", type=float, default=0.25, help="Share of the parameters to remove.")
@click.option("--rows", help="Comma-separated recipes; dense is added if missing.")
@click.option("--limit", type=click.IntRange(min=1), help="Documents per task.")
@until_option
@click.option("--batch-size", type=click.IntRange(min=1), default=32, help="Of the scoring.")
@click.option("--overwrite", is_flag=True, help="Delete the results of an earlier demo first.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no log.")
def demo(output: Path, rows: str | None, quiet: bool, **options: Any) -> None:
    """Prune, replace, evaluate and compare the bundled model, offline, in a few minutes."""
    setup_logging(quiet=quiet)
    from streamline_bench.demo import DEMO_ROWS, run_demo

    names = tuple(name.strip() for name in rows.split(",")) if rows else DEMO_ROWS
    with _stops_with_a_word():
        result = run_demo(output, rows=names, progress=not quiet, **options)
    _finish(result)


_MEASURED = ("throughput", "noise_floor", "noise_batch_size", "noise_dtype", "noise_engine", "text")


def _note_unmeasured(request: Request) -> None:
    """Say what a run that ends after compressing only writes into its plan."""
    asked = [name for name in _MEASURED if getattr(request, name) not in (None, False, "none")]
    if asked:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        click.echo(f"Note: {options}: not measured until the run goes on after compress.", err=True)


@contextmanager
def _stops_with_a_word() -> Iterator[None]:
    """Exit with 130 after Ctrl-C and 143 after SIGTERM, saying how to go on."""
    from streamline_bench.runs.run import Terminated

    try:
        yield
    except (KeyboardInterrupt, Terminated) as stopped:
        click.echo("Interrupted; the same command continues the run.", err=True)
        sys.exit(130 if isinstance(stopped, KeyboardInterrupt) else 143)


def _finish(result: CompareResult) -> NoReturn:
    """Say what failed and which page to open, and exit: 0 when everything is there, else 1."""
    from streamline_bench.core.machine.environment import printable

    if result.report is not None and result.report.with_suffix(".json").is_file():
        from streamline_bench.report.leaderboard import read_leaderboard
        from streamline_bench.report.views.terminal import terminal_table

        click.echo(terminal_table(read_leaderboard(result.report.with_suffix(".json"))))
    for reason in dict.fromkeys(result.alone.values()):
        rows = ", ".join(printable(label) for label, why in result.alone.items() if why == reason)
        click.echo(f"{rows}: scored alone ({printable(reason.rstrip('.'))})", err=True)
    for task, reason in result.left_out.items():
        click.echo(f"{printable(task)} is not compared: {printable(reason)}", err=True)
    for sentence in result.ignored_options:
        click.echo(f"Note: {printable(sentence)}", err=True)
    for name, reason in [*result.failures.items(), *result.reasons.items()]:
        click.echo(f"{printable(name)} failed: {printable(reason)}", err=True)
    if result.report is not None:
        click.echo(f"Open {result.report}")
    else:
        click.echo(f"{result.run} has no report yet.", err=True)
    sys.exit(result.exit_code)


def read_options(model: str | None, plan: str | None, options: Mapping[str, Any]) -> Request:
    """Lay the options over the plan file, and both over what the bundled model presets.

    RecipeError: something is missing or wrong.
    """
    from streamline_bench.compression.recipes import SIZE_KEYS
    from streamline_bench.demo import bundled_request
    from streamline_bench.runs.planning.harness_options import harness_keys, with_harness_options
    from streamline_bench.runs.planning.request import Request, make_request, read_request

    payload = _checked(read_request(plan), plan) if plan else {}
    # Options of other keys do not hold the value itself.
    plain = Request.model_fields.keys() - {"model", "recipes", "tasks", "overrides", "workload",
                                            "load", "metrics", "pairs", "include_path"}  # fmt: skip
    if options.get("harness_config"):
        payload |= harness_keys(options["harness_config"], "--config")
    payload |= {key: options[key] for key in plain if options.get(key) is not None}
    if options.get("include_path"):
        payload["include_path"] = list(options["include_path"])
    if options.get("chat_template"):
        payload["apply_chat_template"] = options["chat_template"]
    if model is not None:
        several = names_in(model)
        payload["model"] = model if Path(model).is_dir() or len(several) == 1 else several
    for key in ("recipes", "tasks"):
        if options.get(key):
            payload[key] = names_in(options[key])
    payload = with_harness_options(payload, options.get("harness") or ())
    if options["rows"]:
        payload["recipes"] = [*payload.get("recipes", []), *map(parse_row, options["rows"])]
    given = _recipe_keys(options)
    # Sizes are alternatives: one that is given replaces the plan's, whichever it was.
    sized = given.keys() & set(SIZE_KEYS)
    replaced = {*SIZE_KEYS, "target"} if sized or options.get("target") else set()
    if sized and not options.get("target"):
        payload.pop("target", None)
    planned = payload.get("set") or {}
    payload["set"] = {k: v for k, v in planned.items() if k not in replaced} | given
    for key in ("metrics", "pairs"):
        if options.get(key):
            payload[key] = {**(payload.get(key) or {}), **options[key]}
    for key in ("workload", "load"):
        if options.get(key):
            laid = yaml_assignments(f"--{key}", options[key])
            payload[key] = {**(payload.get(key) or {}), **laid}
    if is_bundled(payload.get("model")):
        payload = bundled_request(payload)
    for key, what in (("model", "MODEL"), ("recipes", "--recipes"), ("tasks", "--tasks")):
        if not payload.get(key):
            raise RecipeError(f"Nothing to compare: give {what}, or a --plan that has '{key}'.")
    return make_request(payload, f"Plan {plan}" if plan else "The comparison")


def _recipe_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe keys for every row that the options hold."""
    return {**parse_assignments(options["assignments"]), **_axes(options)}


def _axes(options: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe keys that may have several values: a list of them, or the only one."""
    found: dict[str, Any] = {}
    kinds = {"sparsity": float, "n_layers": int, "seeds": int, "calibration": str}
    for name, kind in kinds.items():
        if options.get(name) is None:
            continue
        try:
            values: list[Any] = [kind(each) for each in names_in(str(options[name]))]
        except ValueError:
            example = {"sparsity": "0.25,0.5", "n_layers": "4,8", "seeds": "0,1,2"}[name]
            raise RecipeError(
                f"--{name.replace('_', '-')} is '{options[name]}'; give numbers such as {example}."
            ) from None
        # Only rows that read a seed are given one.
        key = "seed" if name == "seeds" else name
        found[key] = values if len(values) != 1 or name == "seeds" else values[0]
    return found


def _checked(payload: dict[str, Any], plan: str) -> dict[str, Any]:
    """Refuse kinds of values that options could not be laid over."""
    for key in ("recipes", "tasks"):
        if not isinstance(payload.get(key, []), list):
            example = f"{key}: [{payload[key]}]"
            raise RecipeError(f"Plan {plan}: '{key}' must be a list, such as '{example}'.")
    for key in ("set", "workload", "load", "metrics", "pairs"):
        if not isinstance(payload.get(key) or {}, dict):
            raise RecipeError(f"Plan {plan}: '{key}' must be a mapping such as '{key}: {{k: v}}'.")
    return payload


def parse_row(text: str) -> RowRequest:
    """Read ``LABEL=RECIPE:KEY=VALUE,KEY=VALUE`` or ``LABEL=FOLDER_OR_HUB_ID:KEY=VALUE``.

    RecipeError: another form, or neither a recipe nor a checkpoint.
    """
    from streamline_bench.runs.planning.request import RowRequest

    label, equals, rest = text.partition("=")
    whole = Path(rest).expanduser().is_dir()
    name, colon, assignments = (rest, "", "") if whole else rest.partition(":")
    given: dict[str, Any] = {}
    for each in assignments.split(",") if colon else []:
        key, separator, value = each.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"'{each}' in row '{text}' is not KEY=VALUE.")
        given[key.strip()] = value
    if not equals or not label or not name:
        raise RecipeError(f"'{text}' is not a row; write LABEL=RECIPE:KEY=VALUE,KEY=VALUE.")
    if _is_checkpoint(name):
        return _checkpoint_row(label, name, given)
    return RowRequest(recipe=name, label=label, overrides=given)


def _is_checkpoint(name: str) -> bool:
    """Whether a row's name is a folder or a hub id, and not a recipe's name or file."""
    if name.endswith((".yaml", ".yml")):
        return False
    return "/" in name or name.startswith((".", "~")) or Path(name).is_dir()


_LOADING = ("revision", "dtype", "trust_remote_code", "tokenizer", "reference")


def _checkpoint_row(label: str, name: str, given: Mapping[str, Any]) -> RowRequest:
    from streamline_bench.core.recipe.validation import suggest_or_list
    from streamline_bench.runs.planning.request import make_row

    arguments = {k.partition(".")[2]: v for k, v in given.items() if k.startswith("model_args.")}
    own = {key: value for key, value in given.items() if not key.startswith("model_args.")}
    unknown = [key for key in own if key not in _LOADING]
    if unknown:
        known = [*_LOADING, "model_args.KEY"]
        raise RecipeError(
            f"Row '{label}' is the checkpoint {name}, which has no "
            f"'{unknown[0]}'{suggest_or_list(unknown[0], known)}"
        )
    payload = {"checkpoint": name, "label": label, "model_args": arguments, **own}
    return make_row(payload, f"Row '{label}'")


def read_execution(options: Mapping[str, Any]) -> Execution:
    """Return how to run it (RecipeError: values that cannot be)."""
    from streamline_bench.runs.execution.options import Execution

    cpus, cpus_by_kind = per_job("--cpus-per-job", options["cpus_per_job"])
    gpus, gpus_by_kind = per_job("--gpus-per-job", options["gpus_per_job"])
    same = "executor ray_address workers retries timeout trunk placement".split()
    return Execution(
        gpus=tuple(names_in(options["gpus"] or "")),
        gpus_per_job=gpus,
        gpus_by_kind=gpus_by_kind,
        cpus_per_job=1 if cpus is None else cpus,
        cpus_by_kind=cpus_by_kind,
        slurm=_sbatch_options(options["slurm"]),
        **{key: options[key] for key in same},
    )


def _sbatch_options(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [part.partition("=") for part in given]
    for name, _, value in pairs:
        if not name.strip(" -") or not value:
            raise RecipeError(f"--slurm '{name}' has no value; write such as partition=gpu.")
    return {name.strip(" -").replace("-", "_"): value for name, _, value in pairs}


def per_job(option: str, text: str | None) -> tuple[int | None, dict[str, int]]:
    """Read ``8`` or ``8,compress=2``: of all jobs, of one kind (RecipeError: another form)."""
    common, by_kind = None, {}
    for part in [] if text is None else text.split(","):
        kind, separator, number = part.rpartition("=")
        if not number.strip().isdecimal() or (separator and not kind.strip()):
            raise RecipeError(f"{option} '{text}' is neither a number nor such as '8,compress=2'.")
        if separator:
            by_kind[kind.strip()] = int(number)
        else:
            common = int(number)
    return common, by_kind
