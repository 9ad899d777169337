"""Options that would be ignored beside others are refused: a user meant something by them."""

from __future__ import annotations

import click
from click.core import ParameterSource

_NOT_GIVEN = (None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


def refuse_given(ctx: click.Context, why: str, *names: str) -> None:
    """Refuse parameters that the command line gives although they have no effect.

    Args:
        why: behind the option: "it goes with --serve".
        names: as the command's function calls them.

    Raises:
        click.UsageError: one of them was given; defaults do not count.
    """
    for option in ctx.command.params:
        given = ctx.get_parameter_source(option.name or "")
        if option.name in names and given not in _NOT_GIVEN:
            raise click.UsageError(f"{max(option.opts, key=len)} has no effect here; {why}.")
