"""Weights that are spread over the processes of a launch, as accelerate is set to do.

``accelerate launch`` hands its settings on in environment variables. Without FSDP2 or DeepSpeed
every process has the whole model and gradients are added up; with FSDP2 each layer's weights,
gradients and moments are divided among the processes, and whole only while the layer runs.
DeepSpeed (:mod:`.zero`) divides the same, or leaves the weights whole. What is written is whole.

A model whose weights are divided comes from the host (:func:`on_host`) and goes to its device part
by part: no device ever holds all of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.machine.ranks import current, is_on, launched
from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.core.streaming import is_streamed, settle
from streamline_bench.errors import RecipeError, library_errors

log = logging.getLogger(__name__)


def refuse_launch(training: TrainingSpec) -> None:
    """Refuse settings of ``accelerate launch`` that contradict the recipe, or are not known here.

    Raises:
        RecipeError: the recipe decides on precision and accumulation, or the engine is another.
    """
    if current().count == 1:
        return
    engines = {
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    }
    for name, engine in engines.items():
        if is_on(name):
            raise RecipeError(
                f"Accelerate is set to use {engine}, which a training here does not use; take "
                "distributed_type FSDP with fsdp_version 2, DEEPSPEED, or MULTI_GPU."
            )
    if is_on("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise RecipeError("Accelerate is set to use FSDP version 1; set fsdp_version: 2.")
    if is_on("ACCELERATE_USE_FSDP") and is_on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise RecipeError(
            "Accelerate is set to recompute activations, which the recipe decides; leave "
            "fsdp_activation_checkpointing out, and set training.gradient_checkpointing=true."
        )
    _refuse_other("ACCELERATE_MIXED_PRECISION", "mixed_precision", {
        "no", "bf16" if training.autocast == "bf16" else "no",
    }, f"training.autocast is {training.autocast}")  # fmt: skip
    steps = training.gradient_accumulation
    _refuse_other("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", {
        "1", str(steps),
    }, f"training.gradient_accumulation is {steps}")  # fmt: skip
    _refuse_other("ACCELERATE_DYNAMO_BACKEND", "dynamo_backend", {"no"}, "nothing is compiled")


def _refuse_other(variable: str, name: str, allowed: set[str], ours: str) -> None:
    given = os.environ.get(variable, "").lower()
    if given and given not in allowed:
        raise RecipeError(
            f"Accelerate's {name} is {given}, and in the recipe {ours}; change one of the two."
        )


@dataclass(frozen=True)
class Division:
    """Among how many processes of a launch a training through a model is divided.

    Attributes:
        processes: that share the sequences of each step.
        weights, moments: that divide each of them; 1: every process has all. Gradients are divided
            as moments are.
        zero: by DeepSpeed, whose weights are all float32.
    """

    processes: int = 1
    weights: int = 1
    moments: int = 1
    zero: bool = False


def division() -> Division:
    """Return what the launch's variables say, also where the main process works alone.

    Raises:
        RecipeError: accelerate's settings of DeepSpeed contradict each other.
    """
    count = launched().count
    if count == 1:
        return Division()
    if is_on("ACCELERATE_USE_DEEPSPEED"):
        from accelerate.utils import DeepSpeedPlugin

        with library_errors("Accelerate's settings of DeepSpeed cannot be used", kind=RecipeError):
            stage = DeepSpeedPlugin(zero3_init_flag=False).zero_stage
        return Division(count, count if stage == 3 else 1, count, zero=True)
    divided = count if is_on("ACCELERATE_USE_FSDP") else 1
    return Division(count, divided, divided)


def on_host(model: Any) -> None:
    """Have all of a model's weights on the host, in place, from where they can be divided."""
    if is_streamed(model):
        settle(model, "cpu")
    model.to("cpu")


def is_sharded() -> bool:
    """Whether what belongs to a model in training is spread over the processes."""
    return current().count > 1 and (is_on("ACCELERATE_USE_FSDP") or is_zero())


def is_zero() -> bool:
    """Whether it is DeepSpeed that spreads it."""
    return current().count > 1 and is_on("ACCELERATE_USE_DEEPSPEED")


def shard(model: Any) -> None:
    """Spread a model over the processes, in place, by accelerate's own plugin; layers are units.

    Args:
        model: on the host: each unit is whole on the device only until it is divided.

    Raises:
        RecipeError: accelerate cannot.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    with library_errors("The model cannot be spread by FSDP2", "use MULTI_GPU", RecipeError):
        plugin = FullyShardedDataParallelPlugin()
        # The weights are there already, and the decoder layers are the units whatever their class.
        plugin.cpu_ram_efficient_loading = False
        plugin.auto_wrap_policy = None
        accelerator = Accelerator(mixed_precision="no", fsdp_plugin=plugin)
        # Accelerate counts processes without GPUs as plain data parallel ones.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        _shard_layers(model, plugin)
        fsdp2_prepare_model(accelerator, model)


def _shard_layers(model: Any, plugin: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in decoder_layers(model):
        if next(layer.parameters(), None) is not None:
            fully_shard(
                layer, reshard_after_forward=plugin.reshard_after_forward,
                offload_policy=plugin.cpu_offload,
            )  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, on every process; they must all ask for it."""
    if _is_divided(tensor):
        with gathered(tensor):
            return tensor.detach().clone()
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


@contextmanager
def gathered(*tensors: Tensor, changed: bool = False) -> Iterator[None]:
    """Have weights that ZeRO-3 has divided whole for a while; all processes must ask for it.

    Args:
        changed: the main process changes them, for all.
    """
    divided = [tensor for tensor in tensors if _is_divided(tensor)]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if changed else None):
        yield


def _is_divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")  # DeepSpeed's mark


@torch.no_grad()
def put(target: Tensor, value: Tensor | None) -> None:
    """Copy a whole tensor, which the main process has, into one that may be spread."""
    if hasattr(target, "full_tensor"):
        target.copy_(spread(target, value))
        return
    with gathered(target, changed=True):
        if value is not None:  # else a buffer, which a training leaves as it is
            target.copy_(value)
    if is_zero() and not _is_divided(target):
        torch.distributed.broadcast(target, 0)


def spread(like: Any, value: Tensor | None) -> Tensor:
    """Return a tensor of the main process, spread as another one of its shape is."""
    from torch.distributed.tensor import distribute_tensor

    if value is None:
        value = torch.empty(like.shape, dtype=like.dtype)
    device = like.to_local().device
    given = value.to(device=device, dtype=like.dtype)
    return distribute_tensor(given, like.device_mesh, like.placements)


def moments_on_cpu(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the whole moments, see :func:`.state.optimizer_moments`; at the main process alone."""
    kept: dict[str, Tensor] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            full = whole(torch.as_tensor(value)).detach()
            if current().main:
                kept[f"{index}.{name}"] = full.to("cpu", copy=True)
    return kept


def spread_moments(
    moments: Mapping[str, Tensor], parameters: list[nn.Parameter]
) -> dict[str, Tensor]:
    """Return the main process's whole moments as each process has its part of them."""

    def shapes() -> dict[str, tuple[torch.Size, Tensor | None]]:
        return {
            name: (tensor.shape, tensor if tensor.dim() == 0 else None)
            for name, tensor in moments.items()
        }

    parts: dict[str, Tensor] = {}
    for name, (shape, scalar) in current().first(shapes).items():
        like = parameters[int(name.partition(".")[0])]
        spread_out = scalar is None and hasattr(like, "full_tensor") and shape == like.shape
        parts[name] = spread(like, moments.get(name)) if spread_out else scalar  # type: ignore[assignment]
    return parts
