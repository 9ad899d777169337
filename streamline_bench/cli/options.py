"""What the commands share: logging, common options, ``KEY=VALUE``, refusals, tables."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from streamline_bench.errors import OutputError, RecipeError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.table import Table

_Command = TypeVar("_Command", bound=Callable[..., Any])

DEVICE_HELP = "cpu, cuda or cuda:N; auto: cuda if there is one."

CALIBRATION_HELP = (
    "Files of .txt, .jsonl, .json, .csv, .tsv or .parquet (all but parquet also .gz, .xz, .bz2, "
    ".zst), several with commas or a pattern; or a saved data set, a hub id or a preset."
)

TARGET_HELP = (
    "The largest size that fits, instead of --sparsity: memory=24GiB,concurrency=32,context=4096; "
    "bytes=10GB; latency=20ms per output token or ttft=300ms, as measured=throughput.json has it."
)

_NOT_GIVEN = (None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


class FiniteRange(click.FloatRange):
    """A range of numbers without "nan" and "inf", which Python reads as numbers too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"'{value}' is not a finite number", param, ctx)
        return number


def device_option(command: _Command) -> _Command:
    """Add ``--device``; the command gets a torch device that is there, ``auto`` resolved."""
    checked = partial(_device, elsewhere=False)
    return click.option("--device", default="auto", callback=checked, help=DEVICE_HELP)(command)


def dtype_option(what: str, *, auto: bool = False) -> Callable[[_Command], _Command]:
    """Add ``--dtype``: float32 unless given; ``what`` says of which tensors.

    Args:
        auto: ``auto`` is a choice, and taken unless another is given.
    """
    dtypes = ["float32", "bfloat16", "float16"]
    if auto:
        dtypes.insert(0, "auto")
        what = f"{what}; auto: that of the checkpoint on a GPU, float32 on a CPU."
    return click.option("--dtype", type=click.Choice(dtypes), default=dtypes[0], help=what)


def placement_option(command: _Command) -> _Command:
    """Add ``--placement``: where the weights of the source are."""
    choices = click.Choice(["auto", "resident", "streamed"])
    what = "Weights of the source: all in memory, or one layer at a time; auto: by free memory."
    return click.option("--placement", type=choices, default="auto", help=what)(command)


def named_device_option(command: _Command) -> _Command:
    """Add ``--device`` for work that may be done elsewhere; None: not given, as good as auto."""
    named = partial(_device, elsewhere=True)
    return click.option("--device", show_default="auto", callback=named, help=DEVICE_HELP)(command)


def until_option(command: _Command) -> _Command:
    """Add ``--until``: the last stage of a comparison that is run."""
    from streamline_bench.runs.execution.options import STAGES

    stages = click.Choice(STAGES)
    add = click.option("--until", type=stages, default=STAGES[-1], help="Last stage to run.")
    return add(command)


def _device(
    ctx: click.Context, option: click.Parameter, value: str | None, *, elsewhere: bool
) -> str | None:
    from streamline_bench.core.machine.environment import found_device, known_device

    if value is None or (elsewhere and value == "auto"):
        return value
    try:
        return known_device(value) if elsewhere else found_device(value)
    except RecipeError as error:
        raise click.BadParameter(str(error)) from None


def setup_logging(*, quiet: bool) -> None:
    """Show our own log on stderr; keep the libraries' to warnings, and their progress quiet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("streamline_bench").setLevel(logging.ERROR if quiet else logging.INFO)
    if quiet:
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ[f"{library}_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


def split_assignments(assignments: tuple[str, ...], option: str) -> Iterator[tuple[str, str]]:
    """Yield key and value of each ``KEY=VALUE`` (click.BadParameter: no ``=``, or no key)."""
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key.strip():
            raise click.BadParameter(f"'{assignment}' is not KEY=VALUE", param_hint=option)
        yield key.strip(), value


def parse_assignments(assignments: tuple[str, ...]) -> dict[str, str]:
    """Read ``--set key=value`` options as text; of a key given twice, the last value counts."""
    return dict(split_assignments(assignments, "--set"))


def metrics_option(command: _Command) -> _Command:
    """Add ``--metric``: what judges a task; and ``--pair``: which tasks ask the same."""
    add = click.option(
        "--metric", "metrics", multiple=True, metavar="TASK=NAME", callback=_names_by_task,
        help="Judge this task or group by this metric of its samples.",
    )  # fmt: skip
    pair = click.option(
        "--pair", "pairs", multiple=True, metavar="FREE=CHOICE", callback=_names_by_task,
        help="Task FREE asks what task CHOICE asks, without choices: compare what both lose.",
    )  # fmt: skip
    return add(pair(command))


def _names_by_task(
    ctx: click.Context, option: click.Parameter, value: tuple[str, ...]
) -> dict[str, str]:
    return dict(split_assignments(value, option.opts[0]))


def yaml_assignments(option: str, given: tuple[str, ...]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` options with YAML values (click.BadParameter: another form, not YAML)."""
    import yaml

    parsed: dict[str, Any] = {}
    for key, value in split_assignments(given, option):
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = " ".join(str(getattr(error, "problem", None) or error).split())
            raise click.BadParameter(
                f"'{value}' for '{key}' is not a YAML value ({reason}); quote it", param_hint=option
            ) from None
    return parsed


def was_given(ctx: click.Context, name: str) -> bool:
    """Whether the user gave an option; its default does not count."""
    return ctx.get_parameter_source(name) not in _NOT_GIVEN


def refuse_given(ctx: click.Context, why: str, *names: str) -> None:
    """Refuse options that were given (defaults do not count) although they have no effect.

    Args:
        why: what the option needs: "it needs --serve".
        names: as the command's function calls them.
    """
    for option in ctx.command.params:
        if option.name in names and was_given(ctx, option.name):
            raise click.UsageError(f"{max(option.opts, key=len)} has no effect here; {why}.")


def refuse_existing(file: Path, overwrite: bool, option: str = "--output") -> None:
    """Refuse, before any work, an output that exists (OutputError), unless it may be replaced."""
    with _usable(file, option):
        if not overwrite and file.exists():
            raise OutputError(f"Output {file} exists; give another {option} or pass --overwrite.")


def refuse_unwritable_file(file: Path | None, option: str = "--output") -> None:
    """Refuse, before any work, a file that cannot be written (OutputError); None: there is none."""
    if file is None:
        return
    with _usable(file, option):
        if file.is_dir():
            raise OutputError(f"Output {file} is a folder; give the name of a file with {option}.")
        if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
            raise OutputError(
                f"Output {file} cannot be made in {file.parent}; make this folder, or give another "
                f"{option}."
            )


def refuse_unwritable_folder(output: Path) -> None:
    """Refuse, before any work, a folder that cannot be made or written to (OutputError)."""
    with _usable(output, "--output"):
        if output.exists() and not output.is_dir():
            raise OutputError(
                f"Output {output} is a file; give the name of a folder with --output."
            )
        # Nothing is made yet, so that work that fails leaves nothing behind.
        nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise OutputError(
                f"Output {output} cannot be made in {nearest}; give another --output."
            )


@contextmanager
def _usable(path: Path, option: str) -> Iterator[None]:
    """Turn what the file system says of a path (too long a name) into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"Output {path} cannot be used ({error.strerror}); give another {option}."
        ) from None


def names_in(text: str) -> list[str]:
    """Return the parts of a comma-separated list; empty ones do not count."""
    return [name.strip() for name in text.split(",") if name.strip()]


def write_json(result: BaseModel, output: Path | None, as_json: bool) -> None:
    """Write a result as JSON where ``--output`` says, and print it where ``--json`` asks for it."""
    payload = result.model_dump_json(indent=2)
    if output is not None:
        from streamline_bench.core.files import atomic_write_text

        atomic_write_text(output, payload + "\n")
    if as_json:
        click.echo(payload)


def print_table(table: Table) -> None:
    """Print a rich table; into a file or pipe at a width that does not depend on the terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(table)
