"""Runs parts of a causal LM, from any layer boundary or up to one, and keeps hidden states.

Nothing of a model's own pass is rebuilt: it runs itself, and the layers' ``forward`` is replaced
where a part is left out. So masks, rotary embeddings, per-layer attention types, scalings and the
head are right for every family; what a bypassed layer costs is one function call.

Boundary ``l`` is the input of layer ``l``; boundary ``L`` the output of the last layer before the
final norm. States that do not fit into memory lie in memory-mapped files, which are reserved before
they are filled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.errors import NumericsError, OutputError


class PassEnded(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook to end a pass of :func:`run_until`."""


@contextmanager
def evaluating(model: nn.Module, *, frozen: bool = False) -> Iterator[None]:
    """Evaluation mode (no dropout); every module's own mode back at the end.

    Args:
        frozen: let no parameter ask for gradients meanwhile.
    """
    training = [module for module in model.modules() if module.training]
    gradients = [(p, p.requires_grad) for p in model.parameters() if frozen]
    try:
        model.eval()
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute by another function; its own ``forward`` back at the end."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in what a layer gives: a tensor, or the first of a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def run_base(model: Any, ids: Tensor, mask: Tensor, module: Any = None) -> Any:
    """Run a causal LM without its head, without a cache.

    Without pads the mask is left out: attention then takes its fastest path.

    Args:
        ids: int64 ``[batch, seq]``.
        mask: bool ``[batch, seq]``, true where there is a token.
        module: what is called; None: the model without its head.
    """
    device = model.get_input_embeddings().weight.device
    padded = not bool(mask.all())
    called = model.get_submodule(architecture_of(model.config).base) if module is None else module
    return called(
        input_ids=ids.to(device),
        attention_mask=mask.to(device).long() if padded else None,
        use_cache=False,
    )


def run_until(call: Callable[[], Any], handles: Iterable[Any]) -> None:
    """Run a pass that a hook may end by raising :class:`PassEnded`; then remove the hooks."""
    try:
        call()
    except PassEnded:
        return
    finally:
        for handle in handles:
            handle.remove()


class PartialForward:
    """Context in which a model can be run in parts; without gradients, in evaluation mode.

    Attributes:
        states: boundary -> hidden states ``[batch, seq, hidden]`` of the last recorded pass.
    """

    def __init__(self, model: Any) -> None:
        self.states: dict[int, Tensor] = {}
        self._model = model
        self._base = model.get_submodule(architecture_of(model.config).base)
        self._layers = list(decoder_layers(model))
        self._start = 0
        self._state: Tensor | None = None
        self._skip: Collection[int] = ()
        self._record = False
        self._restored = ExitStack()

    def __enter__(self) -> PartialForward:
        self._restored.enter_context(evaluating(self._model))
        for index, layer in enumerate(self._layers):
            forward = self._bypass(index, layer.forward)
            self._restored.enter_context(replaced_forward(layer, forward))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restored.close()
        self.states = {}

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
        with torch.no_grad():
            output = run_base(self._model, ids, mask, module)
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
    """Refuse a model that computes NaN or infinity, and name the first place.

    Args:
        states: boundary -> hidden states ``[batch, seq, hidden]``, from the bottom upwards.
        last: what comes out at the top, ``[batch, seq, …]``: states after the final norm, or
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


def create_mapped(path: Path, shape: Sequence[int], dtype: torch.dtype, remedy: str = "") -> Tensor:
    """Return a tensor of a new file; what is written to it is written to the file.

    Args:
        remedy: what else helps where the file does not fit (``lower training.cache_gb``).

    Raises:
        OutputError: the file cannot be written, or the disk is too full for it.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    try:
        path.unlink(missing_ok=True)  # left by an attempt that was killed
        with path.open("xb") as file:
            # Reserved at once, so that a full disk is an error now and not a SIGBUS later.
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(
            f"The activations in {path} ({size / 1e9:.1f} GB) cannot be written "
            f"({error.strerror}); free space{remedy and ' or '}{remedy}."
        ) from error
    return open_mapped(path, shape, dtype)


def open_mapped(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the tensor of a file that :func:`create_mapped` made."""
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(*shape)


class BatchStore:
    """Tensors by batch number: in memory, or on disk where there are many.

    Each may be replaced by one of another width.

    Args:
        folder: of the files; made when needed.
        size: bytes that all tensors together will take.
        budget: bytes that may be held in memory; beyond it every tensor is on disk.
    """

    def __init__(self, folder: Path, size: int, budget: int) -> None:
        self.on_disk = size > budget
        self._folder = folder
        self._held: dict[int, Tensor] = {}
        if self.on_disk:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        tensor = tensor.detach().to("cpu").contiguous()
        if self.on_disk:
            # Held is a view of the file: its pages count as the file's.
            mapped = create_mapped(self._folder / f"{number}.bin", tensor.shape, tensor.dtype)
            tensor = mapped.copy_(tensor)
        self._held[number] = tensor

    def __getitem__(self, number: int) -> Tensor:
        """Return the tensor of a batch, on the CPU; treat it as read-only."""
        return self._held[number]

    def close(self) -> None:
        """Drop all tensors and the files that held them."""
        self._held.clear()
        if self.on_disk:
            shutil.rmtree(self._folder, ignore_errors=True)
