"""Settings of ``accelerate launch``: what is refused, and that the documented ones are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamline_bench.core.machine import ranks
from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.core.training.sharding import is_sharded, is_zero, refuse_launch
from streamline_bench.core.training.zero import zero_settings
from streamline_bench.errors import RecipeError


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
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, r"mixed_precision is fp16.*autocast is auto"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, r"mixed_precision is bf16.*autocast is auto"),
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


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_the_documented_settings_are_those_of_accelerate(
    repository: Path, of_two: pytest.MonkeyPatch, name: str
) -> None:
    """Read and handed on by accelerate's own launcher."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    file = repository / "reports/docs/pages/howto/accelerate" / f"{name}.yaml"
    given = ["--config_file", str(file), "-m", "streamline_bench", "compress"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    if name == "fsdp2":
        environment = prepare_multi_gpu_env(arguments)
    else:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        arguments.main_process_port = 0  # any
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    for variable, value in environment.items():
        of_two.setenv(variable, value)
    refuse_launch(TrainingSpec())
    assert (is_sharded(), is_zero()) == (True, name != "fsdp2")
    if name != "fsdp2":
        settings = zero_settings(8, TrainingSpec()).deepspeed_config
        assert settings["zero_optimization"]["stage"] == int(name[-1])
