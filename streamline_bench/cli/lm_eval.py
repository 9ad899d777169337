"""``streamline-bench lm-eval``: the harness's own command line, with our model and tasks known."""

from __future__ import annotations

import sys

import click

__all__ = ["command", "harness_arguments"]

_SUBCOMMANDS = ("run", "ls", "list", "validate")


@click.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Call lm_eval with --model streamline registered and our tasks on its --include_path.

    Everything behind the command goes to lm_eval as it is:
    streamline-bench lm-eval --model streamline --model_args pretrained=DIR --tasks streamline_demo
    """
    from streamline_bench.harness.bridge import register
    from streamline_bench.resources import resource

    register()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *harness_arguments(arguments, str(resource("tasks") / "lm_eval"))]
    cli_evaluate()


def harness_arguments(arguments: tuple[str, ...], tasks: str) -> list[str]:
    """Add ``--include_path`` with our tasks, unless the user names another folder.

    The harness takes one folder only; a user's own takes precedence.
    """
    given = list(arguments)
    named = any(each.split("=")[0] == "--include_path" for each in given)
    if named or not given or given[0] in ("-h", "--help"):
        return given
    if given[0] in _SUBCOMMANDS:
        return [*given, "--include_path", tasks]
    return ["run", *given, "--include_path", tasks]
