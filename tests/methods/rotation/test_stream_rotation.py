"""A sliced stream is the whole model with its stream projected onto the axes that were kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.state_store import BatchStore
from streamline_bench.errors import CalibrationError, NumericsError
from streamline_bench.methods.rotation.norm_fusion import fuse_norms
from streamline_bench.methods.rotation.stream_rotation import (
    Covariance,
    RotationOptions,
    StreamRotation,
    turned_at_random,
)

HIDDEN, DEPTH = 32, 3


@pytest.fixture(scope="module")
def tokens() -> CalibrationTokens:
    """Twelve sequences of up to 9 tokens, two of them padded."""
    ids = torch.randint(3, 100, (12, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[3, 5:] = 0
    mask[7, 2:] = 0
    return CalibrationTokens.from_tensors(ids, mask)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(2))


def rotate(
    model: Any, tokens: CalibrationTokens, folder: Path, width: int, head: int, **options: Any
) -> StreamRotation:
    store = BatchStore(folder / "signals", 1, budget=options.pop("budget", 1))
    fuse_norms(model)
    seed = options.pop("seed", 0)
    chosen = RotationOptions(**options)
    rotation = StreamRotation(model, tokens, store, chosen, seed=seed, progress=False)
    rotation.run(width, head)
    store.close()
    return rotation


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


class ProjectedModel:
    """The unfused model, whose stream is projected at boundary after boundary; brute force.

    Boundaries: 0 behind the embeddings, 2l + 1 behind attention of layer l, 2l + 2 behind its MLP;
    l + 1 behind layer l where both read the same input.
    """

    def __init__(self, model: Any, *, normalised: bool) -> None:
        self.projections: list[Tensor] = []
        self._model = model
        self._normalised = normalised
        self._signals: dict[int, Tensor] = {}
        self._middles: dict[int, tuple[Tensor, Tensor]] = {}
        row = architecture_of(model.config)
        self._centred = isinstance(model.get_submodule(row.final_norm), torch.nn.LayerNorm)
        parallel = row.is_parallel(model.config)
        for index, layer in enumerate(decoder_layers(model)):
            if index == 0:
                layer.register_forward_pre_hook(lambda _, args: (self._at(0, args[0]), *args[1:]))
            if parallel:
                layer.register_forward_hook(self._after_parallel_layer(index))
                continue
            norm = layer.get_submodule(row.mlp_norm)
            norm.register_forward_pre_hook(self._before_mlp(index))
            layer.register_forward_hook(self._after_layer(index))

    def fit(self, tokens: CalibrationTokens, widths: list[int]) -> None:
        for boundary, width in enumerate(widths):
            rows = []
            for ids, mask in tokens.batches(1, trim=True):
                with torch.no_grad():
                    self._model(ids, attention_mask=mask.long())
                signal = self._signals[boundary].reshape(-1, HIDDEN)
                rows.append(signal[mask.reshape(-1)[: len(signal)]])
            signals = torch.cat(rows)
            if self._normalised:
                signals = signals / (signals.square().mean(1, keepdim=True) + 1e-6).sqrt()
            right = np.linalg.svd(signals.numpy())[2][:width]
            self.projections.append(torch.from_numpy(right.T @ right))

    def _at(self, boundary: int, stream: Tensor) -> Tensor:
        if self._centred:
            stream = stream - stream.mean(-1, keepdim=True)
        self._signals[boundary] = stream
        if boundary < len(self.projections):
            return stream @ self.projections[boundary]
        return stream

    def _before_mlp(self, index: int) -> Any:
        def hook(norm: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            self._middles[index] = (args[0], self._at(2 * index + 1, args[0]))
            return (self._middles[index][1],)

        return hook

    def _after_layer(self, index: int) -> Any:
        def hook(layer: Any, args: Any, output: Tensor) -> Tensor:
            # The residual connection still carries what the hook on the norm has replaced.
            before, projected = (part.view_as(output) for part in self._middles[index])
            return self._at(2 * index + 2, output - before + projected)

        return hook

    def _after_parallel_layer(self, index: int) -> Any:
        return lambda layer, args, output: self._at(index + 1, output)


def boundaries(model: Any) -> int:
    """Places where the stream is turned, but for the one behind the embeddings."""
    parallel = architecture_of(model.config).is_parallel(model.config)
    return DEPTH if parallel else 2 * DEPTH


def test_a_rotation_without_slicing_leaves_the_logits(
    rotatable: str,
    double_model: Callable[..., Any],
    tokens: CalibrationTokens,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    model = double_model(rotatable)
    embeddings = model.get_input_embeddings().weight.detach().clone()
    before = logits(model, ids)
    rotation = rotate(model, tokens, tmp_path, HIDDEN, HIDDEN)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model.get_input_embeddings().weight, embeddings)
    assert rotation.kept == pytest.approx([1.0] * (boundaries(model) + 1))


@pytest.mark.parametrize("head", [24, HIDDEN])
def test_slicing_equals_projecting_the_stream(
    rotatable: str,
    head: int,
    double_model: Callable[..., Any],
    tokens: CalibrationTokens,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    whole = double_model(rotatable)
    projected = ProjectedModel(whole, normalised=False)
    projected.fit(tokens, [24] * boundaries(whole) + [head])
    model = double_model(rotatable)
    rotate(model, tokens, tmp_path, 24, head)
    torch.testing.assert_close(logits(model, ids), logits(whole, ids), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(logits(model, ids), logits(double_model(rotatable), ids), atol=0.1)


def test_axes_of_the_normalised_stream(
    double_model: Callable[..., Any], tokens: CalibrationTokens, ids: Tensor, tmp_path: Path
) -> None:
    whole = double_model("llama")
    ProjectedModel(whole, normalised=True).fit(tokens, [24] * (2 * DEPTH) + [HIDDEN])
    model = double_model("llama")
    rotate(model, tokens, tmp_path, 24, HIDDEN, signal="normalised")
    torch.testing.assert_close(logits(model, ids), logits(whole, ids), rtol=1e-8, atol=1e-8)


def test_a_random_orientation_gives_the_same_function(
    double_model: Callable[..., Any], tokens: CalibrationTokens, ids: Tensor, tmp_path: Path
) -> None:
    models = [double_model("qwen3") for _ in range(2)]
    rotate(models[0], tokens, tmp_path, 24, HIDDEN)
    rotate(models[1], tokens, tmp_path, 24, HIDDEN, final_orientation="random", seed=5)
    torch.testing.assert_close(logits(models[0], ids), logits(models[1], ids))
    shortcuts = [m.model.layers[1].mlp_shortcut.weight for m in models]
    assert not torch.allclose(shortcuts[0], shortcuts[1])


def test_batches_and_disk_make_no_difference(
    double_model: Callable[..., Any], tokens: CalibrationTokens, ids: Tensor, tmp_path: Path
) -> None:
    found = []
    for size, budget in ((1, 1), (5, 0)):
        model = double_model("phi3")
        rotate(model, tokens, tmp_path, 24, 24, batch_size=size, budget=budget)
        found.append(logits(model, ids))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    assert list(tmp_path.iterdir()) == []


def test_shortcuts_are_orthogonal_until_something_is_cut(
    double_model: Callable[..., Any], tokens: CalibrationTokens, tmp_path: Path
) -> None:
    for width in (HIDDEN, 24):
        model = double_model("llama")
        rotation = rotate(model, tokens, tmp_path, width, HIDDEN)
        # The last shortcut leads to the whole width: it is an isometry whatever was cut.
        shortcuts = [s for n, s in model.named_modules() if n.endswith("_shortcut")][:-1]
        assert len(shortcuts) == 2 * DEPTH - 1
        for shortcut in shortcuts:
            singular = torch.linalg.svdvals(shortcut.weight.detach())
            assert float(singular.max()) <= 1 + 1e-12
            assert (float(singular.min()) > 1 - 1e-12) == (width == HIDDEN)
        assert all(0 < share <= 1 + 1e-12 for share in rotation.kept)
        assert (min(rotation.kept) < 0.999) == (width < HIDDEN)


def test_nan_is_traced_to_its_layer(
    double_model: Callable[..., Any], tokens: CalibrationTokens, tmp_path: Path
) -> None:
    model = double_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"MLP of layer 1\b.*NaN"):
        rotate(model, tokens, tmp_path, 24, HIDDEN)


def _rows(count: int = 200, size: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(3, 0.1, size, dtype=torch.float64)
    mixed = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
    return torch.randn(count, size, generator=generator).double() * scales @ mixed + 0.3


def test_axes_are_the_right_singular_vectors() -> None:
    rows = _rows()
    covariance = Covariance(12)
    for part in rows.split(37):
        covariance.add(part)
    found = covariance.axes(0.01, "here")
    _, singular, right = np.linalg.svd(rows.numpy())
    np.testing.assert_allclose(found.energies, singular**2 / 200, rtol=1e-9)
    overlaps = np.abs(np.sum(right.T * found.axes.numpy(), axis=0))
    np.testing.assert_allclose(overlaps, 1.0, atol=1e-9)
    torch.testing.assert_close(found.axes.T @ found.axes, torch.eye(12).double())
    assert found.energies.diff().max() <= 0
    assert found.kept(4) == pytest.approx((singular[:4] ** 2).sum() / (singular**2).sum())
    assert found.kept(12) == 1.0


def test_damping_moves_no_axis() -> None:
    axes = []
    for damping in (0.0, 0.5):
        covariance = Covariance(12)
        covariance.add(_rows())
        axes.append(covariance.axes(damping, "here").axes.abs())
    torch.testing.assert_close(axes[0], axes[1])


def test_dead_channels_come_last() -> None:
    rows = _rows()
    rows[:, 3] = 0
    covariance = Covariance(12)
    covariance.add(rows.float())
    found = covariance.axes(0.01, "here")
    assert float(found.axes[3, -1].abs()) == pytest.approx(1)
    assert float(found.energies[-1]) == pytest.approx(0, abs=1e-12)


def test_a_random_orientation_spans_the_same_space() -> None:
    covariance = Covariance(12)
    covariance.add(_rows())
    axes = covariance.axes(0.01, "here").axes
    turned = turned_at_random(axes, 5, seed=3)
    torch.testing.assert_close(turned.T @ turned, torch.eye(12).double())
    torch.testing.assert_close(turned[:, 5:], axes[:, 5:])
    torch.testing.assert_close(turned[:, :5] @ turned[:, :5].T, axes[:, :5] @ axes[:, :5].T)
    assert not torch.allclose(turned[:, :5], axes[:, :5])
    assert torch.equal(turned, turned_at_random(axes, 5, seed=3))
    assert not torch.allclose(turned, turned_at_random(axes, 5, seed=4))


def test_what_has_no_axes_is_refused() -> None:
    covariance = Covariance(12)
    covariance.add(_rows(11))
    with pytest.raises(CalibrationError, match=r"\b12\b.*\b11\b.*samples"):
        covariance.axes(0.01, "here")
    covariance.add(torch.full((5, 12), float("nan")))
    with pytest.raises(NumericsError, match=r"layer 3\b.*NaN"):
        covariance.axes(0.01, "behind layer 3")
    silent = Covariance(2)
    silent.add(torch.zeros(4, 2))
    with pytest.raises(NumericsError, match=r"zero.*\b4\b"):
        silent.axes(0.01, "here")
