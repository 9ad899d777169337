"""``streamline-bench lm-eval``: the harness's own command line, with our models and tasks."""

from __future__ import annotations

import sys

import click


@click.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Call lm_eval with --model streamline registered and our tasks on its --include_path.

    All arguments go to lm_eval unchanged. A folder given as --include_path is added to ours; its
    tasks win if names are equal. Example:
    streamline-bench lm-eval run --model streamline --model_args pretrained=DIR --tasks NAME
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
