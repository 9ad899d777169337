"""Training by DeepSpeed's ZeRO, stages 2 and 3, as accelerate is set to do.

Stage 2 divides gradients and AdamW's moments among the processes, stage 3 the weights too. What
DeepSpeed decides elsewhere (precision, accumulation, clipping, rates) is the recipe's here. The
arithmetic is that of one process: float32 weights, sums of gradients, torch's AdamW.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamline_bench.core.machine.ranks import alone, current
from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.core.training.engine import LossSum, adamw
from streamline_bench.core.training.state import TrainingState
from streamline_bench.errors import RecipeError, library_errors

if TYPE_CHECKING:
    from streamline_bench.core.training.loop import Trainee

_MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHTS_TOO = 3  # the stage that divides them
_PRECISION = "the recipe decides on precision (training.autocast)"
_REFUSED = {
    "optimizer": "a training takes torch's AdamW",
    "scheduler": "the recipe decides on the rate (training.lr)",
    "fp16": _PRECISION, "bf16": _PRECISION, "amp": _PRECISION, "torch_autocast": _PRECISION,
    "compile": "nothing is compiled",
}  # fmt: skip
"""Sections of DeepSpeed's settings that a training does not follow, and why."""


class ZeroEngine:
    """DeepSpeed's engine around a model and its loss; see :class:`.engine.Engine`.

    Args:
        model: to be divided, in place; on the host, from where it goes to the device part by part
            (stage 3) or whole.
        loss: of that model.
        state: where the training goes on, if it has taken steps.
        device: where the model is trained.

    Raises:
        RecipeError: DeepSpeed's settings contradict the recipe, or it cannot train the model.
    """

    def __init__(
        self, trainee: Trainee, model: Any, loss: LossSum, training: TrainingSpec, lr: float,
        state: TrainingState, device: torch.device,
    ) -> None:  # fmt: skip
        width = int(model.config.get_text_config().hidden_size)
        settings = zero_settings(width, training)
        if state.step and current().main:  # whose weights are spread with the model
            with alone():
                trainee.load(state.weights)
        self.parameters = list(trainee.named_parameters().values())
        self.optimizer: torch.optim.Optimizer = adamw(self.parameters, training, lr, device.type)
        with library_errors("The model cannot be spread by DeepSpeed", "use FSDP", RecipeError):
            deepspeed = _deepspeed(device.type)
            model.float()  # all of one dtype, which what is trained has already
            settings.set_moe_leaf_modules(model)
            if settings.zero_stage == _WEIGHTS_TOO:
                _divide(deepspeed, model, settings.deepspeed_config, device)
            self._engine: Any = deepspeed.initialize(
                model=_WithLoss(model, loss), optimizer=self.optimizer,
                config=settings.deepspeed_config,
            )[0]  # fmt: skip
            if state.step:
                self._load(state.moments)

    def loss(self, batch: Any, source: Any) -> Tensor:
        total: Tensor = self._engine(batch, source)
        return total

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()
        if self._engine.optimizer.overflow:  # it has left the step out
            raise FloatingPointError("the norm of the gradients is not finite")

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = next(iter(self.optimizer.state.values()))["step"]
        kept: dict[str, Tensor] = {}
        for index, parameter in enumerate(self.parameters):
            for name in _MOMENTS:
                full = safe_get_full_optimizer_state(parameter, name)
                if current().main:
                    kept[f"{index}.{name}"] = full.to("cpu", copy=True)
            if current().main:
                kept[f"{index}.step"] = torch.as_tensor(steps).to("cpu", copy=True)
        return kept

    def _load(self, moments: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`moments` gave, or another engine; DeepSpeed counts steps once."""
        zero = self._engine.optimizer
        given = current().first(lambda: sorted(moments))
        steps = current().first(
            lambda: max(float(moments[name]) for name in given if name.endswith(".step"))
        )
        self._begin_state(zero, steps)
        for index, parameter in enumerate(self.parameters):
            for name in _MOMENTS:
                if (key := f"{index}.{name}") in given:
                    _put_moment(parameter, name, moments.get(key))

    def _begin_state(self, zero: Any, steps: float) -> None:
        """Give AdamW the state that it otherwise makes in its first step."""
        divided = hasattr(zero, "fp32_partitioned_groups_flat")  # stage 3
        parts = (
            zero.fp32_partitioned_groups_flat if divided else zero.single_partition_of_fp32_groups
        )
        for part in parts:
            counter = torch.tensor(steps, device=part.device if part.is_cuda else "cpu")
            self.optimizer.state[part] = {
                "step": counter, **{name: torch.zeros_like(part) for name in _MOMENTS}
            }  # fmt: skip
        if not divided:
            zero._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        self._engine.destroy()


def _deepspeed(device: str) -> Any:
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device == "cpu":  # gloo adds up: DeepSpeed's own sums would first be compiled for a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _divide(deepspeed: Any, model: nn.Module, settings: Any, device: torch.device) -> None:
    """Divide weights one by one. Given whole ones, DeepSpeed's engine first moves all of them."""
    deepspeed.init_distributed()
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=torch.float32)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


class _WithLoss(nn.Module):
    """A model whose output is its loss: DeepSpeed's engine watches what it is given to call."""

    def __init__(self, model: nn.Module, loss: LossSum) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any, source: Any) -> Tensor:
        return self._loss(batch, source)


def _put_moment(parameter: nn.Parameter, name: str, value: Tensor | None) -> None:
    """Give each process its part of a whole moment, which the main one has."""
    from deepspeed.utils import (
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    shape = getattr(parameter, "ds_shape", parameter.shape)
    full = torch.zeros(shape, device=parameter.device)
    if value is not None:
        full.copy_(value)
    torch.distributed.broadcast(full, 0)
    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, full, name)
        return
    size = safe_get_local_optimizer_state(parameter, name).numel()
    padded = full.new_zeros(size * current().count)
    padded[: full.numel()] = full.flatten()
    own = padded.narrow(0, size * current().rank, size)
    safe_set_local_optimizer_state(parameter, own, name)


def zero_settings(width: int, training: TrainingSpec) -> Any:
    """Return accelerate's plugin with its settings of DeepSpeed, completed by the recipe.

    Args:
        width: of the model's hidden states, for sizes that are left open.

    Raises:
        RecipeError: they contradict each other, or ask for what a training does not do.
    """
    from accelerate.utils import DeepSpeedPlugin

    ours = {
        "gradient_clipping": training.max_grad_norm, "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1, "train_batch_size": current().count,
    }  # fmt: skip
    automatic = {  # accelerate's own choices
        "zero_optimization.reduce_bucket_size": width * width,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * width * width),
        "zero_optimization.stage3_param_persistence_threshold": 10 * width,
        "fp16.enabled": False, "bf16.enabled": False,
    }  # fmt: skip
    with library_errors("Accelerate's settings of DeepSpeed cannot be used", kind=RecipeError):
        plugin = DeepSpeedPlugin(zero3_init_flag=False)
        plugin.deepspeed_config_process(must_match=False, **ours, **automatic)
    _refuse_settings(plugin, training)
    # The loop says when a step is complete: micro-batches of a step may differ in number.
    plugin.deepspeed_config |= {**ours, "managed_gradient_accumulation": False}
    return plugin


def _refuse_settings(plugin: Any, training: TrainingSpec) -> None:
    stage = plugin.get_value("zero_optimization.stage")
    if stage not in (2, 3):
        raise RecipeError(
            f"DeepSpeed's ZeRO stage is {stage}; set zero_stage 2 or 3, or use MULTI_GPU, where "
            "every process has all."
        )
    for what in ("offload_optimizer", "offload_param"):
        device = plugin.get_value(f"zero_optimization.{what}.device")
        if device not in (None, "none"):
            raise RecipeError(
                f"DeepSpeed is set to keep a part on '{device}' ({what}), which a training here "
                "does not do; leave it out, or use FSDP with fsdp_offload_params: true."
            )
    for section, reason in _REFUSED.items():
        given = plugin.get_value(section)
        if given and (not isinstance(given, dict) or given.get("enabled", True)):
            raise RecipeError(
                f"DeepSpeed's settings have a section '{section}', and {reason}; leave it out."
            )
    clipping = plugin.get_value("gradient_clipping")
    if clipping not in (None, training.max_grad_norm):
        raise RecipeError(
            f"DeepSpeed's gradient_clipping is {clipping}, and in the recipe "
            f"training.max_grad_norm is {training.max_grad_norm}; change one of the two."
        )
    steps = plugin.get_value("gradient_accumulation_steps")
    if steps not in (None, 1, training.gradient_accumulation):
        raise RecipeError(
            f"DeepSpeed's gradient_accumulation_steps is {steps}, and in the recipe "
            f"training.gradient_accumulation is {training.gradient_accumulation}; change one of "
            "the two."
        )
