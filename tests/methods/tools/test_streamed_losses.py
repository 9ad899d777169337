"""Searches and gradients on a streamed model: the numbers and faults of the resident one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamline_bench.core import state_store
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import NumericsError
from streamline_bench.methods.depth.shortened_llama import taylor_scores
from streamline_bench.methods.tools.gradients import gradients_by_layer, sum_gradients
from streamline_bench.methods.tools.likelihood import skip_losses
from streamline_bench.modeling.loading import load_model


@pytest.fixture(scope="module")
def tokens() -> CalibrationTokens:
    ids = torch.randint(3, 100, (10, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(9)[None, :] < torch.tensor([9, 4, 9, 8, 1, 9, 9, 2, 9, 5])[:, None]
    return CalibrationTokens.from_tensors(ids, mask)


@pytest.fixture
def both(tiny_llama: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    """Return a function that loads the tiny model twice, in memory and streamed."""

    def load(change: str | None = None) -> list[Any]:
        folder = tiny_llama
        if change is not None:
            weights = load_file(folder / "model.safetensors")
            weights[change][0, 3] = float("nan")
            folder = tmp_path / "model"
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return [load_model(folder, device="cpu", streamed=each) for each in (False, True)]

    return load


@pytest.mark.parametrize("removed", [(), (2,), (0, 4)])
@pytest.mark.parametrize("on_disk", [False, True])
def test_losses_without_each_layer_from_one_reading(
    both: Callable[..., list[Any]],
    tokens: CalibrationTokens,
    removed: tuple[int, ...],
    on_disk: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resident, streamed = both()
    candidates = [layer for layer in range(6) if layer not in removed]
    expected = skip_losses(resident, tokens, candidates, removed=removed, progress=False)
    reads: Counter[str] = Counter()
    tensor = CheckpointReader.tensor

    def counted(self: CheckpointReader, name: str, *rest: Any) -> torch.Tensor:
        reads[name] += 1
        return tensor(self, name, *rest)

    monkeypatch.setattr(CheckpointReader, "tensor", counted)
    if on_disk:
        monkeypatch.setattr(state_store, "free_memory", lambda device: 4)
    found = skip_losses(
        streamed, tokens, candidates, removed=removed, work=tmp_path, progress=False
    )
    assert found == expected
    assert set(reads.values()) == {1}
    # And the LM head, and the lowest layer if it is removed: the form of its output is needed.
    assert len(reads) == 9 * (len(candidates) + (0 in removed)) + 1


@pytest.mark.parametrize("squares", [False, True])
def test_gradients_of_some_layers(
    both: Callable[..., list[Any]], tokens: CalibrationTokens, squares: bool
) -> None:
    wanted = {2: ["mlp.up_proj.weight"], 4: ["self_attn.q_proj.weight", "mlp.down_proj.weight"]}
    models = both()
    layers = models[0].model.layers
    weights = {(i, n): layers[i].get_parameter(n) for i, names in wanted.items() for n in names}
    sums: list[dict[tuple[int, str], Any]] = [
        sum_gradients(models[0], weights, tokens, squares=squares, progress=False)
    ]
    for model in models:
        found = gradients_by_layer(model, wanted, tokens, squares=squares, progress=False)
        sums.append({(i, n): s for i, each in found for n, (_, s) in each.items()})
    for by_layer in sums[1:]:  # in memory and streamed
        assert by_layer.keys() == sums[0].keys()
        for place, expected in sums[0].items():
            assert torch.equal(by_layer[place].mean, expected.mean)
            if squares:
                assert torch.equal(by_layer[place].squares, expected.squares)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight", "lm_head.weight"]
)
def test_faults_are_named_as_in_memory(
    both: Callable[..., list[Any]], tokens: CalibrationTokens, name: str
) -> None:
    ids = tokens.input_ids.clone()
    ids[:, 0] = 0  # the row that is not a number
    faulty = CalibrationTokens.from_tensors(ids, tokens.attention_mask)
    for call in (lambda m: skip_losses(m, faulty, range(6), progress=False),
                 lambda m: taylor_scores(m, faulty, progress=False)):  # fmt: skip
        said = []
        for model in both(name):
            with pytest.raises(NumericsError) as error:
                call(model)
            said.append(str(error.value))
        assert said[0] == said[1]
