"""Which width of the residual stream reaches a share of parameters.

Slicing a share s of the channels removes less than s of the parameters: the shortcut matrices of
all residual connections come on top, and tied embeddings become two.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.surgery.sparsity import model_sizes
from streamline_bench.errors import SparsityError
from streamline_bench.modeling import register, streamline_config
from streamline_bench.modeling.rotations import Rotations, require_rotatable

__all__ = ["SlicedSizes", "WidthPlan", "sliced_host"]


@dataclass(frozen=True)
class WidthPlan:
    """A width and what it amounts to. Shares are of the source model's parameters.

    Attributes:
        width: channels kept at every boundary.
        head_width: channels kept before the LM head.
        slicing: share of the channels cut, ``1 - width / hidden``.
        parameters: of the result, shortcut matrices counted.
        total: parameters of the source.
        reached: ``1 - parameters / total``.
        requested: the share of parameters asked for; None if the slicing was given.
    """

    width: int
    head_width: int
    slicing: float
    parameters: int
    total: int
    reached: float
    requested: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the form that the manifest holds."""
        return asdict(self)


class SlicedSizes:
    """Sizes of a model as a function of the width of its stream.

    Args:
        config: of the source, any rotatable family.
        round_to: widths are multiples of this.
        slice_head: the stream is sliced before the LM head as well.
        total: parameters of the source; None: counted from the config.

    Raises:
        ArchitectureError: the residual stream of this model cannot be rotated.
    """

    def __init__(
        self, config: Any, *, round_to: int = 8, slice_head: bool = False, total: int | None = None
    ) -> None:
        register()
        require_rotatable(config)
        self._config = config
        self._hidden = int(config.hidden_size)
        self._round_to = round_to
        self._slice_head = slice_head
        self._given_total = total

    @cached_property
    def total(self) -> int:
        """Parameters of the source."""
        if self._given_total is not None:
            return self._given_total
        return model_sizes(self._config).total

    def of_slicing(self, slicing: float) -> WidthPlan:
        """Return the plan that cuts at least the share ``slicing`` of the channels.

        Raises:
            SparsityError: no channel is left.
        """
        # The paper's rule; the tiny term keeps (1 - 0.25) * 4096 from rounding to 3071.
        width = math.floor((1 - slicing) * self._hidden + 1e-6)
        width -= width % self._round_to
        if width < 1:
            raise SparsityError(
                f"Slicing {slicing} leaves no channel of {self._hidden} in steps of "
                f"{self._round_to}; give a smaller slicing or round_to."
            )
        return self._plan(width, None)

    def of_sparsity(self, sparsity: float) -> WidthPlan:
        """Return the plan whose share of removed parameters is nearest to ``sparsity``.

        Raises:
            SparsityError: no width comes near it.
        """
        low, high = 1, max((self._hidden - 1) // self._round_to, 1)
        if self._hidden <= self._round_to:
            raise SparsityError(
                f"A stream of {self._hidden} channels cannot be sliced in steps of "
                f"{self._round_to}; give a smaller round_to."
            )
        smallest, largest = self._reached(high), self._reached(low)
        while high - low > 1:
            middle = (low + high) // 2
            if self._reached(middle) >= sparsity:
                low = middle
            else:
                high = middle
        step = abs(self._reached(low) - self._reached(high)) or 1.0
        best = min((low, high), key=lambda steps: abs(self._reached(steps) - sparsity))
        reached = self._reached(best)
        if reached <= 0 or abs(reached - sparsity) > step:
            # Shortcut matrices can outweigh the first steps: what is least then is no share.
            least = f"{smallest:.4f} to" if smallest > 0 else "shares above 0 up to"
            raise SparsityError(
                f"Sparsity {sparsity} is out of reach: slicing this model's stream, shortcut "
                f"matrices counted, reaches {least} {largest:.4f}; choose a share in that range."
            )
        return self._plan(best * self._round_to, sparsity)

    def rotations(self, width: int) -> Rotations:
        """Return the spec of the model with that width."""
        return Rotations.uniform(
            int(self._config.num_hidden_layers),
            width,
            norm_divisor=self._hidden,
            head_width=width if self._slice_head else self._hidden,
            head_bias=self._head_bias,
        )

    def _plan(self, width: int, requested: float | None) -> WidthPlan:
        parameters = self._parameters(width)
        return WidthPlan(
            width=width,
            head_width=self.rotations(width).head_width,
            slicing=1 - width / self._hidden,
            parameters=parameters,
            total=self.total,
            reached=1 - parameters / self.total,
            requested=requested,
        )

    def _reached(self, steps: int) -> float:
        return 1 - self._parameters(steps * self._round_to) / self.total

    def _parameters(self, width: int) -> int:
        return model_sizes(
            streamline_config(sliced_host(self._config), rotations=self.rotations(width))
        ).total

    @cached_property
    def _head_bias(self) -> bool:
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._config)
        norm = model.get_submodule(architecture_of(self._config).final_norm)
        return getattr(norm, "bias", None) is not None


def sliced_host(config: Any) -> Any:
    """Return the host's config as a sliced model has it: untied, without factors of sub-layers."""
    entries = config.to_dict() | {"tie_word_embeddings": False}
    if "residual_multiplier" in entries:
        entries["residual_multiplier"] = 1.0
    return type(config).from_dict(entries)
