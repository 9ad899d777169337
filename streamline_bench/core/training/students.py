"""The replacements of several blocks, trained at once on the output of the model they are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from streamline_bench.core.training.block import Student


class Students:
    """The replacements of several blocks, trained as one."""

    label, task, draws = Student.label, Student.task, Student.draws

    def __init__(self, parts: Sequence[Student]) -> None:
        self.parts = parts

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the weights of all; names begin with ``cut0.``, ``cut1.``, …"""
        return {
            f"cut{number}.{name}": parameter
            for number, part in enumerate(self.parts)
            for name, parameter in part.named_parameters().items()
        }

    def state_on_cpu(self) -> dict[str, Tensor]:
        """Return a copy of all weights, under the same names."""
        return {
            f"cut{number}.{name}": tensor
            for number, part in enumerate(self.parts)
            for name, tensor in part.state_on_cpu().items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        for part, own in zip(self.parts, states_by_cut(state, len(self.parts)), strict=True):
            part.load(own)

    def begin(self, step: int | None) -> None:
        """Nothing to prepare, as for one."""

    def take(self, rows: slice, of: int) -> None:
        """Nothing is drawn."""


def states_by_cut(state: Mapping[str, Tensor], cuts: int) -> list[dict[str, Tensor]]:
    """Return for each of several blocks the weights of its replacement, by their own names."""
    found: list[dict[str, Tensor]] = [{} for _ in range(cuts)]
    for name, tensor in state.items():
        cut, _, own = name.partition(".")
        found[int(cut.removeprefix("cut"))][own] = tensor
    return found
