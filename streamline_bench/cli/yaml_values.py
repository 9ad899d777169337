"""``KEY=VALUE`` options whose values are YAML: numbers, true and false, lists, text."""

from __future__ import annotations

from typing import Any

import click

from streamline_bench.cli.options import split_assignments


def yaml_assignments(option: str, given: tuple[str, ...]) -> dict[str, Any]:
    """Read what an option was given.

    Args:
        option: its name, for the message: ``--engine-arg``.

    Raises:
        click.BadParameter: one has no ``=``, or a value that is no YAML.
    """
    import yaml

    parsed: dict[str, Any] = {}
    for key, value in split_assignments(given, option):
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = " ".join(str(getattr(error, "problem", None) or error).split())
            raise click.BadParameter(
                f"'{value}' for '{key}' is not a YAML value ({reason}); quote it",
                param_hint=option,
            ) from None
    return parsed
