"""``streamline-bench lm-eval``: the harness's own command line, with our model and tasks known."""

from __future__ import annotations

import sys

import click

__all__ = ["command"]


@click.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Call lm_eval with --model streamline registered and our tasks on its --include_path.

    Everything behind the command goes to lm_eval as it is; a folder that --include_path names comes
    in addition to ours, and its tasks count where names are equal:
    streamline-bench lm-eval --model streamline --model_args pretrained=DIR --tasks streamline_demo
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from streamline_bench.harness.bridge import refuse_wrong, register
    from streamline_bench.harness.tasks.asked_tasks import task_folders

    setup_logging()
    sys.argv = ["lm_eval", *arguments]
    harness = HarnessCLI()
    asked = harness.parse_args()
    refuse_wrong(getattr(asked, "model", None), getattr(asked, "model_args", None))
    register()
    if hasattr(asked, "include_path"):
        # Its command line takes one folder, what is behind it takes several.
        asked.include_path = task_folders(asked.include_path)
    harness.execute(asked)
