"""Settings of ``accelerate launch``: what is refused, and that the documented ones are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamline_bench.core.machine import ranks
from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.core.training.sharding import is_sharded, is_zero, refuse_launch
from streamline_bench.core.training.zero import zero_config
from streamline_bench.errors import MissingDependencyError, RecipeError


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process is one of two, and no setting of accelerate is there."""
    monkeypatch.setattr(ranks, "_current", ranks.Ranks(1, 2))
    return monkeypatch


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, r"Megatron-LM.*FSDP"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, r"version 1; set fsdp_version: 2"),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_ACTIVATION_CHECKPOINTING": "true",
            },
            r"fsdp_activation_checkpointing out.*gradient_checkpointing=true",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, r"mixed_precision is fp16.*autocast is none"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, r"mixed_precision is bf16.*autocast is none"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, r"is 4.*gradient_accumulation is 2"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"dynamo_backend is inductor"),
    ],
)
def test_settings_that_contradict_the_recipe_are_refused(
    of_two: pytest.MonkeyPatch, settings: dict[str, str], named: str
) -> None:
    for name, value in settings.items():
        of_two.setenv(name, value)
    with pytest.raises(RecipeError, match=named):
        refuse_launch(TrainingSpec(gradient_accumulation=2))


def test_settings_that_agree_with_the_recipe_are_taken(of_two: pytest.MonkeyPatch) -> None:
    of_two.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    of_two.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    refuse_launch(TrainingSpec(gradient_accumulation=2, autocast="bf16"))


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_the_documented_settings_are_those_of_accelerate(
    repository: Path, tmp_path: Path, of_two: pytest.MonkeyPatch, engine: str
) -> None:
    """Read and handed on by accelerate's own launcher."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    page = repository / "reports/docs/pages/howto/several-gpus.md"
    files = re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    (settings,) = (each for each in files if f"distributed_type: {engine}" in each)
    file = tmp_path / "settings.yaml"
    file.write_text(settings)
    given = ["--config_file", str(file), "-m", "streamline_bench", "compress"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    if engine == "FSDP":
        environment = prepare_multi_gpu_env(arguments)
    else:
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    for name, value in environment.items():
        of_two.setenv(name, value)
    refuse_launch(TrainingSpec())
    assert (is_sharded(), is_zero()) == (True, engine == "DEEPSPEED")
    if engine == "DEEPSPEED":
        assert zero_config(model(), TrainingSpec())["zero_optimization"]["stage"] == 3


def model() -> Any:
    """Stands for a model whose hidden states are 8 wide."""
    config = SimpleNamespace(hidden_size=8)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))


@pytest.fixture
def deepspeed_settings(of_two: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return DeepSpeed's settings for a file of them that accelerate names."""

    def settings(zero: dict[str, Any], training: dict[str, Any], **others: Any) -> dict[str, Any]:
        file = tmp_path / "zero.json"
        file.write_text(json.dumps({"zero_optimization": zero, **others}))
        of_two.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        of_two.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
        return zero_config(model(), TrainingSpec(**training))

    return settings


@pytest.mark.parametrize(
    ("zero", "others", "named"),
    [
        ({"stage": 1}, {}, r"stage is 1; set zero_stage 2 or 3"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, r"'cpu' \(offload_optimizer\)"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, r"'nvme' \(offload_param\)"),
        ({"stage": 2}, {"bf16": {"enabled": True}}, r"'bf16', and the recipe.*training.autocast"),
        ({"stage": 2}, {"fp16": {"enabled": True}}, r"'fp16', and the recipe"),
        ({"stage": 2}, {"optimizer": {"type": "Lamb"}}, r"'optimizer', and a training takes"),
        ({"stage": 2}, {"gradient_clipping": 1.0}, r"is 1.0.*max_grad_norm is 2.0"),
        ({"stage": 2}, {"gradient_accumulation_steps": 3}, r"steps is 3.*accumulation is 4"),
        ({"stage": "auto"}, {"unheard_of": "auto"}, r"DeepSpeed cannot be used.*unheard_of"),
    ],
)
def test_settings_of_deepspeed_that_contradict_the_recipe_are_refused(
    deepspeed_settings: Callable[..., dict[str, Any]], zero: dict[str, Any],
    others: dict[str, Any], named: str,
) -> None:  # fmt: skip
    with pytest.raises(RecipeError, match=named):
        deepspeed_settings(zero, {"max_grad_norm": 2, "gradient_accumulation": 4}, **others)


def test_the_recipe_decides_where_deepspeed_leaves_it_open(
    deepspeed_settings: Callable[..., dict[str, Any]],
) -> None:
    automatic = dict.fromkeys(("gradient_clipping", "train_batch_size"), "auto")
    given = deepspeed_settings(
        {"stage": 3, "reduce_bucket_size": "auto"}, {"max_grad_norm": 2.0}, **automatic,
        bf16={"enabled": "auto"}, fp16={"enabled": False}, gradient_accumulation_steps=1,
    )  # fmt: skip
    assert (given["gradient_clipping"], given["train_batch_size"]) == (2.0, 2)
    assert given["zero_optimization"]["reduce_bucket_size"] == 64
    assert given["bf16"] == {"enabled": False}


def test_a_missing_deepspeed_is_named_with_the_line_that_installs_it(
    of_two: pytest.MonkeyPatch,
) -> None:
    of_two.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    of_two.setattr(ranks, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r"pip install 'streamline-bench\[deepspeed\]'"
    ):
        ranks.start_group("cpu")
