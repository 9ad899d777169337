"""A causal LM's own forward pass, entered at any layer boundary and with layers left out.

Search methods evaluate many models that share their lower layers. Here those layers run once:
their output is put in where the upper layers begin. The parent's forward pass still runs, so that
masks, rotary embeddings, per-layer attention types, scalings and the head are right for every
family; what a bypassed layer costs is one function call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.errors import NumericsError

__all__ = ["PartialForward", "require_finite_states"]


class PartialForward:
    """Context in which a model can be run in parts; without gradients, in evaluation mode.

    Boundary ``l`` is the input of layer ``l``; boundary ``L`` the output of the last layer before
    the final norm.

    Attributes:
        states: boundary -> hidden states ``[batch, seq, hidden]`` of the last recorded pass.
    """

    def __init__(self, model: Any) -> None:
        self.states: dict[int, Tensor] = {}
        self._model = model
        self._base = model.get_submodule(architecture_of(model.config).base)
        self._layers = list(decoder_layers(model))
        self._device = model.get_input_embeddings().weight.device
        self._start = 0
        self._state: Tensor | None = None
        self._skip: Collection[int] = ()
        self._record = False
        self._training: list[Any] = []
        self._own_forward: list[Any] = []

    def __enter__(self) -> PartialForward:
        self._training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        for index, layer in enumerate(self._layers):
            self._own_forward.append(layer.__dict__.get("forward"))
            layer.forward = self._bypass(index, layer.forward)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for layer, own in zip(self._layers, self._own_forward, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own
        self._own_forward = []
        self.states = {}
        for module in self._training:
            module.training = True

    def logits(self, ids: Tensor, mask: Tensor, **where: Any) -> Tensor:
        """Return the logits ``[batch, seq, vocabulary]``; for ``where`` see :meth:`hidden`."""
        output: Tensor = self._run(self._model, ids, mask, **where).logits
        return output

    def hidden(self, ids: Tensor, mask: Tensor, **where: Any) -> Tensor:
        """Return the last hidden states ``[batch, seq, hidden]``, after the final norm.

        Args:
            ids: int64 ``[batch, seq]``.
            mask: bool ``[batch, seq]``, true where there is a token.
            start: boundary to enter at; the layers below it are not run.
            state: hidden states ``[batch, seq, hidden]`` at that boundary.
            skip: layers that pass their input on.
            record: keep the states at all boundaries that are run, in :attr:`states`.
        """
        output: Tensor = self._run(self._base, ids, mask, **where).last_hidden_state
        return output

    def _run(
        self,
        module: Any,
        ids: Tensor,
        mask: Tensor,
        *,
        start: int = 0,
        state: Tensor | None = None,
        skip: Collection[int] = (),
        record: bool = False,
    ) -> Any:
        if (start > 0) != (state is not None):
            raise ValueError("a pass that starts above boundary 0 needs a state, others take none")
        self._start, self._state, self._skip, self._record = start, state, skip, record
        if record:
            self.states = {}
        # Without pads the mask is left out: attention then takes its fastest path.
        padded = not bool(mask.all())
        with torch.no_grad():
            output = module(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device).long() if padded else None,
                use_cache=False,
            )
        self._state = None
        return output

    def _bypass(self, index: int, original: Any) -> Any:
        last = index == len(self._layers) - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            if index < self._start:
                output: Any = self._state
            else:
                hidden = args[0] if args else kwargs["hidden_states"]
                if self._record:
                    self.states[index] = hidden
                output = hidden if index in self._skip else original(*args, **kwargs)
            if last and self._record:
                self.states[index + 1] = output
            return output

        return forward


def require_finite_states(states: Mapping[int, Tensor], last: Tensor, mask: Tensor) -> None:
    """Refuse a model whose own hidden states are no numbers, naming where they first are none.

    Args:
        states: boundary -> hidden states ``[batch, seq, hidden]``, from the bottom upwards.
        last: what comes out at the top, ``[batch, seq, …]``: states behind the final norm, or
            logits.
        mask: bool ``[batch, seq]``; pads do not count.

    Raises:
        NumericsError: some are NaN or infinite.
    """
    if bool(torch.isfinite(last).all()):
        return
    for boundary, tensor in (*states.items(), (None, last)):
        if not bool(torch.isfinite(tensor[mask.to(tensor.device)]).all()):
            place = "the final norm or the LM head"
            if boundary is not None:
                place = f"layer {boundary - 1}" if boundary else "the embeddings"
            raise NumericsError(
                f"The model computes NaN or infinity from {place} on; check the weights there and "
                "the calibration text, or compute in float32 or bfloat16."
            )
