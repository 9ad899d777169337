"""Several processes take the steps that one process takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from joined_trainings import Case, Launch, difference, launched
from safetensors.torch import load_file

CASES: dict[str, Case] = {
    "mse": ("mse", {"epochs": 1, "min_steps": 20}),  # from a file that both fill
    "mse-recomputed": ("mse", {"min_steps": 20, "cache_gb": 0.0, "gradient_accumulation": 2}),
    "lm": ("lm", {"min_steps": 20, "batch_size": 1, "gradient_accumulation": 3}),
    "kd": ("kd", {"min_steps": 20, "lr": 1e-3}),
    "lora": ("lora", {"min_steps": 20, "gradient_accumulation": 2}),  # with dropout
    "lora-alone": ("lora", {"batch_size": 1}),  # one process has no row
    "partial": ("partial", {"min_steps": 20}),
    "checkpointing": ("lm", {"min_steps": 20, "gradient_checkpointing": True}),
    "full": ("full", {"min_steps": 20, "checkpoint_every": 4}),
}
STORED: Case = ("lora", {"stored": "bfloat16"})
DIVIDED = ("checkpointing", "partial", "lora", "kd")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainings")


@pytest.fixture(scope="module")
def codes(folder: Path) -> dict[str, list[int]]:
    """Exit codes of all launches; what they made is in the folder, ``case/launch``."""
    resumed, divided = ({f"full/{name}": CASES["full"]} for name in ("resumed", "fsdp-resumed"))
    two = {f"{name}/two": case for name, case in CASES.items()}
    fsdp = {f"{name}/fsdp": CASES[name] for name in DIVIDED}
    return launched(folder, {
        "one": Launch(1, {f"{name}/one": case for name, case in CASES.items()}),
        "two": Launch(2, two | {"stored/two": STORED}),
        "begun": Launch(2, resumed, dies_after=10),
        "resumed": Launch(3, resumed),
        "fsdp": Launch(2, fsdp | {"stored/fsdp": STORED}, FSDP, in_parts=True),
        "fsdp-begun": Launch(2, divided, FSDP, dies_after=10),
        "fsdp-again": Launch(2, divided, FSDP, dies_after=14),
        "fsdp-resumed": Launch(1, divided),
        "spoiled": Launch(2, {"full/spoiled": CASES["full"]}, spoiled=True),
    })  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(
    folder: Path, codes: dict[str, list[int]], case: str
) -> None:
    assert (codes["one"], codes["two"]) == ([0], [0, 0])
    assert difference(folder / case, "one", "two") < 1e-6
    one, two = (
        json.loads((folder / case / name / "summary.json").read_text()) for name in ("one", "two")
    )
    assert two.pop("processes") == 2
    assert one["steps"] >= 18
    assert one["best_step"] == two["best_step"]
    assert one["best_loss"] == pytest.approx(two["best_loss"], rel=1e-6, abs=1e-8)
    assert (one["tokens"], one["sequences"]) == (two["tokens"], two["sequences"])


def test_a_process_dies_and_another_number_of_processes_goes_on(
    folder: Path, codes: dict[str, list[int]]
) -> None:
    assert (codes["begun"], codes["resumed"]) == ([1, 9], [0, 0, 0])
    assert difference(folder / "full", "one", "resumed") < 1e-6


@pytest.mark.parametrize("case", DIVIDED)
def test_weights_spread_by_fsdp_are_trained_as_in_one_process(
    folder: Path, codes: dict[str, list[int]], case: str
) -> None:
    assert codes["fsdp"] == [0, 0]
    assert difference(folder / case, "one", "fsdp") < 1e-6
    one, spread = (
        load_file(folder / case / name / "result.safetensors") for name in ("one", "fsdp")
    )
    assert {name: tensor.shape for name, tensor in one.items()} == {
        name: tensor.shape for name, tensor in spread.items()
    }


def test_frozen_weights_are_spread_as_they_are_stored(
    folder: Path, codes: dict[str, list[int]]
) -> None:
    assert codes["two"] == codes["fsdp"] == [0, 0]
    assert difference(folder / "stored", "two", "fsdp") < 1e-6
    assert difference(folder, "stored/fsdp", "lora/fsdp") > 1e-6  # bfloat16 it was


def test_a_training_by_fsdp_goes_on_with_and_without_it(
    folder: Path, codes: dict[str, list[int]]
) -> None:
    assert (codes["fsdp-begun"], codes["fsdp-again"]) == ([1, 9], [1, 9])
    assert codes["fsdp-resumed"] == [0]
    assert difference(folder / "full", "one", "fsdp-resumed") < 1e-6


def test_a_gradient_of_one_process_that_is_not_finite_ends_all(
    folder: Path, codes: dict[str, list[int]]
) -> None:
    assert codes["spoiled"] == [2, 2]
    assert "of the recovered model is NaN or infinite at step 1" in _log(folder, "spoiled")


def _log(folder: Path, launch: str) -> str:
    return (folder / f"{launch}-0.log").read_text()
