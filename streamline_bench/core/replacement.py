"""The lightweight networks that stand in for a removed block of layers.

All map the residual stream to itself, ``[batch, seq, hidden] -> [batch, seq, hidden]``, position by
position. ``ffn`` and ``swiglu`` are LLM-Streamline's (arXiv:2403.19135): bare, so that they must
learn the identity from scratch. ``ffn_res`` and ``swiglu_res`` are labelled improvements: they read
a normed input, add to the residual stream, and start as the identity because their last linear map
starts at zero. ``linear`` is one affine map that starts as the identity (as in ReplaceMe,
arXiv:2505.02819). Kind ``layer`` is not built here: it is a copy of the model's own layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from streamline_bench.core.recipe.schema import ReplacementSpec
from streamline_bench.errors import RecipeError

NETWORK_KINDS = ("ffn", "swiglu", "ffn_res", "swiglu_res", "linear")
_EPS_KEYS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_DEFAULT_EPS = 1e-5  # torch's own, which is what families without an entry use
_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner")


class ReplacementNetwork(nn.Module):
    """Base of all replacement networks: ``forward(hidden [batch, seq, d]) -> [batch, seq, d]``."""

    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's global generator."""
        raise NotImplementedError


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, computed in float32, returned in the input's dtype."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * normed).to(hidden.dtype)


class FeedForwardNetwork(ReplacementNetwork):
    """``ffn``, ``swiglu`` and, with ``residual``, their pre-norm residual forms.

    Plain: ``down(relu(up(x)))`` with biases. Gated: ``down(silu(gate(x)) * up(x))`` without.
    Residual: ``x + f(norm(x))`` with the output map at zero, so that it starts as the identity.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, gated: bool, residual: bool, eps: float
    ) -> None:
        super().__init__()
        bias = not gated
        self.residual = residual
        self.norm = RMSNorm(hidden_size, eps) if residual else None
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self._start_as_identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = hidden if self.norm is None else self.norm(hidden)
        if self.gate_proj is None:
            inner = nn.functional.relu(self.up_proj(inner))
        else:
            inner = nn.functional.silu(self.gate_proj(inner)) * self.up_proj(inner)
        output: torch.Tensor = self.down_proj(inner)
        return hidden + output if self.residual else output

    def reset_parameters(self) -> None:
        for module in (self.gate_proj, self.up_proj, self.down_proj):
            if module is not None:
                module.reset_parameters()
        if self.norm is not None:
            nn.init.ones_(self.norm.weight)
        self._start_as_identity()

    def _start_as_identity(self) -> None:
        if not self.residual:
            return
        nn.init.zeros_(self.down_proj.weight)
        if self.down_proj.bias is not None:
            nn.init.zeros_(self.down_proj.bias)


class AffineNetwork(ReplacementNetwork):
    """``linear``: ``A x + b`` with A the identity and b zero at the start."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.reset_parameters()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.proj(hidden)
        return output

    def reset_parameters(self) -> None:
        if self.proj.weight.is_meta:  # nothing to set yet, and eye_ refuses to
            return
        nn.init.eye_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)


def build_network(spec: ReplacementSpec, config: Any) -> ReplacementNetwork:
    """Build the network of ``spec`` for a model with ``config``, in torch's default dtype.

    Sizes default to the paper's: 4 x hidden for ``ffn``, the model's own MLP width for ``swiglu``.

    Raises:
        RecipeError: the kind is ``none`` or ``layer``, which have no network of their own.
    """
    hidden_size, intermediate_size = network_sizes(spec, config)
    if spec.kind == "linear":
        return AffineNetwork(hidden_size)
    return FeedForwardNetwork(
        hidden_size,
        intermediate_size,
        gated=spec.kind.startswith("swiglu"),
        residual=spec.kind.endswith("_res"),
        eps=float(_first_entry(config, _EPS_KEYS, _DEFAULT_EPS)),
    )


def network_parameters(spec: ReplacementSpec, config: Any) -> int:
    """Return how many parameters ``build_network(spec, config)`` has, without building it."""
    if spec.kind == "none":
        return 0
    hidden, intermediate = network_sizes(spec, config)
    if spec.kind == "linear":
        return hidden * hidden + hidden
    norm = hidden if spec.kind.endswith("_res") else 0
    if spec.kind.startswith("swiglu"):
        return 3 * hidden * intermediate + norm
    return 2 * hidden * intermediate + intermediate + hidden + norm


def network_sizes(spec: ReplacementSpec, config: Any) -> tuple[int, int]:
    """Return (hidden size, intermediate size); the latter is the hidden size for ``linear``.

    Raises:
        RecipeError: the kind has no network of its own.
    """
    if spec.kind not in NETWORK_KINDS:
        known = ", ".join(NETWORK_KINDS)
        raise RecipeError(
            f"Replacement kind '{spec.kind}' has no network of its own; kinds with one: {known}."
        )
    hidden = int(config.hidden_size)
    if spec.kind == "linear":
        return hidden, hidden
    if spec.intermediate_size is not None:
        return hidden, spec.intermediate_size
    if spec.kind.startswith("swiglu"):
        # Families such as gpt2 mean 4 x hidden by an absent entry.
        found: Any = _first_entry(config, _WIDTH_KEYS, 4 * hidden)
        if isinstance(found, (list, tuple)):  # a width for each layer
            if len(set(found)) > 1:
                raise RecipeError(
                    f"The MLPs of this model differ in width ({min(found)} to {max(found)}); give "
                    "replacement.intermediate_size."
                )
            found = found[0]
        return hidden, int(found)
    return hidden, 4 * hidden


def _first_entry(config: Any, keys: Iterable[str], default: float) -> float:
    found = (getattr(config, key, None) for key in keys)
    return next((value for value in found if value is not None), default)
