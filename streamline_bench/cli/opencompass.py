"""``streamline-bench opencompass``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamline_bench.cli.options import (
    named_device_option,
    names_in,
    parse_assignments,
    setup_logging,
    yaml_assignments,
)

if TYPE_CHECKING:
    from streamline_bench.opencompass.run_plan import RunPlan


def _write_configs(context: click.Context, _: click.Parameter, folder: Path | None) -> None:
    """Write the configs and leave, without a model."""
    if folder is None or context.resilient_parsing:
        return
    from streamline_bench.opencompass.run_plan import write_configs

    names = write_configs(folder)
    click.echo(
        f"{folder}: {len(names)} models; opencompass --config-dir {folder} --models {names[0]}"
    )
    context.exit()


@click.command("opencompass")
@click.option("--write-configs", type=click.Path(path_type=Path, file_okay=False), is_eager=True,
              expose_value=False, callback=_write_configs,
              help="Only write a folder for opencompass --config-dir, one model per recipe.",
              )  # fmt: skip
@click.argument("model")
@click.argument("checkpoints", nargs=-1, metavar="[LABEL=CHECKPOINT]...")
@click.option("--recipes", default="dense,streamline",
              help="Comma-separated; the others are compared with the first one.")  # fmt: skip
@click.option("--sparsity", type=float, help="Share of the parameters to remove, between 0 and 1.")
@click.option("--n-layers", type=int, help="Net number of layers to remove, instead of --sparsity.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set a recipe key.")
@click.option("--datasets", default="bundled",
              help="bundled, paper, classification, generation, a benchmark, or "
              "package.module:variable.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Questions per data set.")
@click.option("--engine", type=click.Choice(["hf", "vllm"]), default="hf")
@click.option("--engine-arg", "engine_arguments", multiple=True, metavar="KEY=VALUE",
              help="Argument of from_pretrained or of vllm.LLM.")  # fmt: skip
@click.option("--chat", is_flag=True, help="Put prompts into the tokenizer's chat template.")
@named_device_option
@click.option("--dtype", help="Dtype of the weights  [default: that of the checkpoint]")
@click.option("--batch-size", type=click.IntRange(min=1), default=64)
@click.option("--max-seq-len", type=click.IntRange(min=2), help="Longest prompt, in tokens.")
@click.option("--max-out-len", type=click.IntRange(min=1), default=256)
@click.option("--share-prefixes/--stock-inferencer", default=True,
              help="Score the choices of a question together, or one by one (stock).")  # fmt: skip
@click.option("--gpus", type=click.IntRange(min=0),
              help="GPUs per task  [default: 1 if there is a GPU]")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), default=1)
@click.option("--in-process", is_flag=True, help="Run all tasks in one process; starts faster.")
@click.option("--python", default=sys.executable, show_default="this one",
              help="Interpreter of the environment that has OpenCompass.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Run folder.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in that folder.")
@click.option("--config-only", is_flag=True, help="Write the config, print the command, stop.")
@click.option("--json", "as_json", is_flag=True, help="Print run.json.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no log.")
def command(
    model: str,
    checkpoints: tuple[str, ...],
    recipes: str,
    sparsity: float | None,
    n_layers: int | None,
    assignments: tuple[str, ...],
    python: str,
    gpus: int | None,
    output: Path,
    overwrite: bool,
    config_only: bool,
    in_process: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Evaluate MODEL under several recipes with OpenCompass, and make the report.

    Compressed checkpoints can be added; they are evaluated as they are. The same command continues
    an interrupted run. Data is expected in ./data or $COMPASS_DATA_CACHE/data.
    """
    setup_logging(quiet=quiet or as_json)
    progress = not (quiet or as_json)
    from streamline_bench.opencompass.evaluate import claimed_folder, evaluate, write_config
    from streamline_bench.opencompass.execution import inspect_environment
    from streamline_bench.opencompass.run_plan import entries

    # A config alone, for given GPUs, can be written where OpenCompass is not installed.
    environment = None if config_only and gpus is not None else inspect_environment(python)
    if gpus is None and environment is not None:
        gpus = min(1, environment.gpus)
    given = {"sparsity": sparsity, "n_layers": n_layers, **parse_assignments(assignments)}
    overrides = {key: value for key, value in given.items() if value is not None}
    models = entries(model, names_in(recipes), overrides, [_labelled(each) for each in checkpoints])
    plan = _plan(models, gpus or 0, settings)
    with claimed_folder(output, plan, overwrite=overwrite):
        if environment is None or config_only:
            config = write_config(output, plan)
            click.echo(f"opencompass {config} -w {output / 'work'}")
            return
        run = evaluate(output, plan, environment, in_process=in_process, progress=progress)
        from streamline_bench.report.build import build_report

        report = build_report(output, progress=progress)
    if as_json:
        click.echo(json.dumps(run.model_dump(mode="json"), indent=2))
    elif not quiet:
        click.echo(report)


def _plan(models: Any, gpus: int, settings: dict[str, Any]) -> RunPlan:
    from streamline_bench.opencompass.run_plan import RunPlan

    given = settings.pop("device")
    device = None if given == "auto" else given
    options = {
        "model_kwargs": yaml_assignments("--engine-arg", settings.pop("engine_arguments")) or None,
        "device": device or (None if gpus else "cpu"),
        "dtype": settings.pop("dtype"),
        "max_seq_len": settings.pop("max_seq_len"),
    }
    return RunPlan(
        models=models,
        datasets=tuple(names_in(settings.pop("datasets"))),
        options={key: value for key, value in options.items() if value is not None},
        gpus=0 if (device or "").startswith("cpu") else gpus,
        **settings,
    )


def _labelled(argument: str) -> tuple[str, str]:
    label, separator, path = argument.partition("=")
    return (label, path) if separator else (Path(argument).name, argument)
