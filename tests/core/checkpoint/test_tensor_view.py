"""Looking for NaN and infinity in weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import (
    NumericsError,
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named(
    folder: Path, value: float, dtype: torch.dtype
) -> None:
    path = folder / "model.safetensors"
    state = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(state, path, {"format": "pt"})
    CheckpointReader(folder).check_finite()
    state["model.layers.3.mlp.up_proj.weight"][-1, -1] = value
    save_file(state, path, {"format": "pt"})
    with pytest.raises(NumericsError, match=r"'model\.layers\.3\.mlp\.up_proj\.weight'"):
        CheckpointReader(folder).check_finite()


def test_finite_check_reads_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamline_bench.core.checkpoint import tensor_view

    monkeypatch.setattr(tensor_view, "_CHUNK", 64)
    path = folder / "model.safetensors"
    state = load_file(path)
    state["float8"] = torch.full((100,), 2.0).to(torch.float8_e5m2)
    state["whole"] = torch.full((3,), -1)  # all bits set: NaN, were it read as a float
    save_file(state, path)
    CheckpointReader(folder).check_finite()
    state["float8"] = torch.full((100,), float("nan")).to(torch.float8_e5m2)
    save_file(state, path)
    with pytest.raises(NumericsError, match="'float8'"):
        CheckpointReader(folder).check_finite()
