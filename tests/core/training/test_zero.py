"""DeepSpeed's ZeRO takes the steps that one process takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from joined_trainings import Case, Launch, difference, launched
from safetensors.torch import load_file

from streamline_bench.core.machine import ranks
from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.core.training.zero import zero_settings
from streamline_bench.errors import RecipeError

CASES: dict[str, Case] = {
    # One process has fewer rows.
    "lm": ("lm", {"min_steps": 20, "batch_size": 1, "gradient_accumulation": 3, "lr": 5e-4}),
    "kd": ("kd", {"min_steps": 20, "gradient_checkpointing": True, "lr": 1e-3}),
    "lora": ("lora", {"min_steps": 20, "stored": "bfloat16"}),  # with dropout
    "partial": ("partial", {"min_steps": 20}),
    "full": ("full", {"min_steps": 20, "checkpoint_every": 4}),
}
STAGES = ("zero2", "zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainings")


@pytest.fixture(scope="module")
def codes(folder: Path) -> dict[str, list[int]]:
    """Exit codes of all launches; what they made is in the folder, ``case/launch``."""
    pytest.importorskip(
        "deepspeed",
        reason="DeepSpeed is not installed; run: pip install 'streamline-bench[deepspeed]'",
    )
    divided = {"stage": 3, "stage3_param_persistence_threshold": 0}  # small weights too
    file = folder / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": divided, "gradient_clipping": "auto"}))
    used = {"ACCELERATE_USE_DEEPSPEED": "true"}
    variables = {
        "zero2": {**used, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
        "zero3": {**used, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)},
    }
    launches = {"one": Launch(1, {f"{name}/one": case for name, case in CASES.items()}, wide=True)}
    for stage, given in variables.items():
        goes_on, moves = ({f"full/{stage}-{how}": CASES["full"]} for how in ("resumed", "moved"))
        launches |= {
            stage: Launch(
                2, {f"{name}/{stage}": case for name, case in CASES.items()}, given, in_parts=True
            ),
            f"{stage}-begun": Launch(2, goes_on, given, dies_after=10, in_parts=True),
            f"{stage}-resumed": Launch(2, goes_on, given, in_parts=True),
            f"{stage}-left": Launch(2, moves, given, dies_after=6),
            f"{stage}-by-three": Launch(3, moves, given, dies_after=14),
            f"{stage}-moved": Launch(1, moves),
            f"{stage}-spoiled": Launch(2, {"full/spoiled": CASES["full"]}, given, spoiled=True),
        }
    contradicted = {**variables["zero2"], "ACCELERATE_GRADIENT_CLIPPING": "7"}
    launches["contradicted"] = Launch(2, {"lm/contradicted": CASES["lm"]}, contradicted)
    return launched(folder, launches)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
def test_deepspeed_trains_what_one_process_does(
    folder: Path, codes: dict[str, list[int]], case: str, stage: str
) -> None:
    assert (codes["one"], codes[stage]) == ([0], [0, 0])
    assert difference(folder / case, "one", stage) < 1e-6
    one, zero = (load_file(folder / case / name / "result.safetensors") for name in ("one", stage))
    assert one.keys() == zero.keys()
    assert max(float((one[name] - zero[name]).abs().max()) for name in one) < 1e-6
    told = [
        json.loads((folder / case / name / "summary.json").read_text()) for name in ("one", stage)
    ]
    assert told[0].get("trained_parameters") == told[1].get("trained_parameters")
    # DeepSpeed would write files of its own, and the other process may not.
    files = [{path.name for path in (folder / case / name).iterdir()} for name in ("one", stage)]
    assert files[0] == files[1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_dies_and_the_training_goes_on_to_the_bit(
    folder: Path, codes: dict[str, list[int]], stage: str
) -> None:
    assert (codes[f"{stage}-begun"], codes[f"{stage}-resumed"]) == ([1, 9], [0, 0])
    whole, resumed = (
        load_file(folder / "full" / name / "training.safetensors")
        for name in (stage, f"{stage}-resumed")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("stage", STAGES)
def test_it_goes_on_by_three_processes_and_without_deepspeed(
    folder: Path, codes: dict[str, list[int]], stage: str
) -> None:
    assert (codes[f"{stage}-left"], codes[f"{stage}-by-three"]) == ([1, 9], [1, 1, 9])
    assert codes[f"{stage}-moved"] == [0]
    assert difference(folder / "full", "one", f"{stage}-moved") < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_of_one_process_that_is_not_finite_ends_all(
    folder: Path, codes: dict[str, list[int]], stage: str
) -> None:
    assert codes[f"{stage}-spoiled"] == [2, 2]
    log = (folder / f"{stage}-spoiled-0.log").read_text()
    assert "gradient norm of the recovered model is not finite at step 1" in log


def test_settings_that_contradict_the_recipe_end_all(
    folder: Path, codes: dict[str, list[int]]
) -> None:
    assert codes["contradicted"] == [2, 2]
    log = (folder / "contradicted-0.log").read_text()
    assert "gradient_clipping is 7.0" in log
    assert "Traceback" not in log


@pytest.fixture
def deepspeed_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Return DeepSpeed's settings for a file of them that accelerate names; one of two asks."""
    monkeypatch.setattr(ranks, "_current", ranks.Ranks(1, 2))

    def settings(zero: dict[str, Any], training: dict[str, Any], **others: Any) -> dict[str, Any]:
        file = tmp_path / "zero.json"
        file.write_text(json.dumps({"zero_optimization": zero, **others}))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
        return zero_settings(8, TrainingSpec(**training)).deepspeed_config

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
