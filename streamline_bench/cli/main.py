"""The ``streamline-bench`` command: a lazy group, and the one place that turns errors into exits.

A subcommand's module is imported only when that subcommand is called, so ``--help`` stays fast.
Exit codes: 0 success, 1 a gate that failed, 2 a user's error (one sentence on stderr).
"""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Mapping
from typing import NoReturn

import click

from streamline_bench.core.machine.environment import printable
from streamline_bench.core.machine.ranks import say_once
from streamline_bench.errors import StreamlineBenchError, library_errors
from streamline_bench.version import __version__

COMMANDS: Mapping[str, tuple[str, str]] = {
    "architecture": ("architecture", "Show a model's architecture and which methods apply to it."),
    "cache": ("cache", "List or empty the cache of compressed models."),
    "compare": ("compare", "Compare recipes on a model: compress, score, leaderboard."),
    "compress": ("compress", "Remove layers from a model and write the result as a checkpoint."),
    "demo": ("compare.demo", "Run the whole pipeline on the bundled model, ending in a report."),
    "divergence": ("stability.by_text", "Compare two models' next-token distributions on a text."),
    "gate": ("gate", "Fail if a run lost accuracy, stability or speed against a reference."),
    "lm-eval": ("lists.lm_eval", "Call the lm-eval harness with our models and tasks registered."),
    "opencompass": ("opencompass", "Evaluate recipes with OpenCompass and make the report."),
    "recipes": ("lists.recipes", "List the recipes, or show one."),
    "report": ("report", "Render the report of a run folder again."),
    "scan": ("scan", "Show which blocks of layers change the hidden states least."),
    "stability": ("stability", "Compare the answers of two evaluated models."),
    "tasks": ("lists.tasks", "List the evaluation tasks in the package."),
    "throughput": ("throughput", "Measure tokens per second, latency and memory of models."),
}
"""Subcommand -> (module in ``streamline_bench.cli``, function if not ``command``; help)."""


class LazyGroup(click.Group):
    """A group whose subcommands live in modules of their own, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name][0].partition(".")
        found = importlib.import_module(f"streamline_bench.cli.{module}")
        command: click.Command = getattr(found, function or "command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from streamline_bench.core.recipe.validation import suggest

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command '{args[0]}'{suggest(args[0], list(COMMANDS))}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            with library_errors():
                return super().invoke(ctx)
        except (StreamlineBenchError, OSError) as error:
            _end(error)


_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(cls=LazyGroup, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="streamline-bench")
def cli() -> None:
    """Measure what large language models lose and gain when layers are removed.

    A first look, offline, in a few minutes: streamline-bench demo
    """


_OF_THE_FILE_SYSTEM = {
    errno.EACCES, errno.EDQUOT, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR,
    errno.EPERM, errno.EROFS,
}  # fmt: skip
"""Refusals of a path that somebody named, wherever it was first used."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error of the user becomes one sentence and exit code 2."""
    try:
        cli.main(args=arguments, prog_name="streamline-bench")
    except (StreamlineBenchError, OSError) as error:
        _end(error)


def _end(error: StreamlineBenchError | OSError) -> NoReturn:
    """Print the sentence and exit with 2; an error that the user cannot correct is raised again."""
    foreign = isinstance(error, OSError) and error.errno not in _OF_THE_FILE_SYSTEM
    if foreign or os.environ.get("STREAMLINE_BENCH_TRACEBACK"):
        raise error
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename or 'A file'} cannot be used ({error.strerror}); give another path."
    say_once(lambda: click.echo(f"streamline-bench: {printable(text, keep=chr(10))}", err=True))
    ended = SystemExit(text)  # the sentence stays with it, for who calls the command from Python
    ended.code = 2
    raise ended from error


if __name__ == "__main__":
    main()
