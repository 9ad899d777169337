"""A streamed model: the same numbers, one layer's weights at a time, each read once per pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamline_bench.core import scan as scanning
from streamline_bench.core import state_store
from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import LayersEntangled, PartialForward
from streamline_bench.core.scan import scan
from streamline_bench.core.streaming import (
    HEAD,
    held_layer,
    is_streamed,
    layer_copy,
    settle,
    streamed_model,
)
from streamline_bench.errors import CheckpointError, NumericsError, OutputError
from streamline_bench.modeling.loading import load_config, load_model


@pytest.fixture(scope="session")
def tokens() -> CalibrationTokens:
    ids = torch.randint(3, 100, (4, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(11)[None, :] < torch.tensor([11, 4, 11, 8])[:, None]
    return CalibrationTokens.from_tensors(ids, mask)


def stream(folder: Path, **options: Any) -> Any:
    return load_model(folder, device="cpu", streamed=True, **options)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each stored tensor is read."""
    counts: Counter[str] = Counter()
    tensor = CheckpointReader.tensor

    def counted(self: CheckpointReader, name: str, *rest: Any) -> torch.Tensor:
        counts[name] += 1
        return tensor(self, name, *rest)

    monkeypatch.setattr(CheckpointReader, "tensor", counted)
    return counts


def nbytes(parameters: Any) -> int:
    return sum(p.nbytes for p in parameters if not p.is_meta)


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# -- scans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [
        *("llama", "llama-tied", "gemma3_text", "phi", "opt", "gpt2", "gpt_neox", "mixtral"),
        *("deepseek_v3", "gpt_oss"),
    ],
)
def test_the_same_numbers_as_in_memory(
    random_model: Any, variant: str, tokens: CalibrationTokens, tmp_path: Path
) -> None:
    random_model(variant).save_pretrained(tmp_path)
    model, streamed = load_model(tmp_path, device="cpu"), stream(tmp_path)
    for last_state in ("raw", "postnorm"):
        options: Any = {"last_state": last_state, "batch_size": 3, "progress": False}
        expected, found = (scan(each, tokens, **options) for each in (model, streamed))
        np.testing.assert_array_equal(found.cosine, expected.cosine)
        np.testing.assert_array_equal(found.angular, expected.angular)
    ids, mask = tokens.input_ids, tokens.attention_mask.long()
    with torch.no_grad():
        logits = [m(ids, attention_mask=mask, use_cache=False).logits for m in (model, streamed)]
    assert torch.equal(*logits)
    assert nbytes(decoder_layers(streamed).parameters()) == 0
    with held_layer(streamed, HEAD) as head:
        assert all(not parameter.is_meta for parameter in head.parameters())


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_each_layer_is_read_once_and_one_is_held(
    random_model: Any, name: str, tokens: CalibrationTokens, reads: Counter[str], tmp_path: Path
) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path)
    largest = max(nbytes(layer.parameters()) for layer in decoder_layers(model))
    streamed = stream(tmp_path)
    resident, peaks = nbytes(streamed.parameters()), []
    for module in streamed.modules():
        module.register_forward_hook(lambda *_: peaks.append(nbytes(streamed.parameters())))
    scan(streamed, tokens, batch_size=1, progress=False)
    inside = {n: count for n, count in reads.items() if "layers." in n}
    assert set(inside.values()) == {1}
    assert len(inside) == sum("layers." in n for n in CheckpointReader(tmp_path).names)
    assert max(peaks) == resident + largest
    assert nbytes(streamed.parameters()) == resident


def test_the_next_layer_is_read_ahead(
    random_model: Any, tokens: CalibrationTokens, reads: Counter[str], tmp_path: Path
) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    expected = scan(model, tokens, progress=False)
    streamed = streamed_model(tmp_path, load_config(tmp_path), prefetch=True)
    taken = reads.copy()
    with held_layer(streamed, 2, 3):
        streamed._layer_stream._ahead[3].result()
        assert {name.split(".")[2] for name in reads - taken} == {"2", "3"}
    found = scan(streamed, tokens, progress=False)
    np.testing.assert_array_equal(found.cosine, expected.cosine)
    assert max(count for name, count in reads.items() if "layers.5" in name) == 1


def test_states_that_exceed_the_memory_lie_in_files(
    random_model: Any, tokens: CalibrationTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model("llama").save_pretrained(tmp_path / "model")
    expected = scan(stream(tmp_path / "model"), tokens, progress=False)
    monkeypatch.setattr(state_store, "free_memory", lambda device: 4)
    (tmp_path / "work").mkdir()
    made = []
    create = state_store.create_mapped
    monkeypatch.setattr(
        state_store, "create_mapped", lambda path, *rest: made.append(path) or create(path, *rest)
    )
    found = scan(stream(tmp_path / "model"), tokens, work=tmp_path / "work", progress=False)
    np.testing.assert_array_equal(found.cosine, expected.cosine)
    assert len(made) == 7 * len(tokens) and not any((tmp_path / "work").iterdir())


def test_too_little_disk_is_said_before_a_layer_is_read(
    random_model: Any,
    tokens: CalibrationTokens,
    reads: Counter[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(state_store, "free_memory", lambda device: 4)
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(state_store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"3\.48e-05 GB.*1e-05 GB free; free space"):
        scan(stream(tmp_path), tokens, progress=False)
    assert not any("layers." in name for name in reads)


def test_layers_that_hand_on_more_than_states_are_read_per_batch(
    random_model: Any,
    tokens: CalibrationTokens,
    reads: Counter[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    expected = scan(model, tokens, progress=False)
    kept: dict[str, int] = {}
    streamed = stream(tmp_path)
    for layer in decoder_layers(streamed):  # as models do that share keys and values
        own = layer.forward

        def sharing(*args: Any, own: Any = own, **kwargs: Any) -> Any:
            kwargs["shared"][str(len(kwargs["shared"]))] = 1
            kwargs.pop("shared")
            return own(*args, **kwargs)

        layer.forward = sharing
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "shared": kept}), with_kwargs=True
        )
    with PartialForward(streamed) as forward, pytest.raises(LayersEntangled):
        ids, mask = tokens.input_ids, tokens.attention_mask
        forward.layer(0, ids, mask, forward.embedded(ids, mask))
    reads.clear()
    found = scan(streamed, tokens, batch_size=1, progress=False)
    np.testing.assert_array_equal(found.cosine, expected.cosine)
    assert "4 times" in caplog.text
    assert reads["model.layers.3.mlp.up_proj.weight"] == 4


def test_an_accelerator_is_not_asked_after_each_batch(
    random_model: Any, tokens: CalibrationTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("llama")
    weight = model.model.embed_tokens.weight
    row, column = (tokens.input_ids == tokens.input_ids[2, 5]).nonzero()[0].tolist()
    with torch.no_grad():
        weight[tokens.input_ids[2, 5]] = float("nan")
    with pytest.raises(NumericsError) as at_once:
        scan(model, tokens, progress=False)
    monkeypatch.setattr(scanning, "_CHECKED_AT_ONCE", ())
    with pytest.raises(NumericsError) as later:
        scan(model, tokens, progress=False)
    assert str(later.value) == str(at_once.value)
    assert f"sample {row}, token {column}" in str(later.value)


def test_sharded_checkpoints(random_model: Any, tokens: CalibrationTokens, tmp_path: Path) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    expected = scan(model, tokens, progress=False)
    found = scan(stream(tmp_path), tokens, progress=False)
    np.testing.assert_array_equal(found.cosine, expected.cosine)


def test_another_dtype_than_the_stored_one(
    random_model: Any, tokens: CalibrationTokens, tmp_path: Path
) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    full = scan(model, tokens, progress=False)
    expected = scan(load_model(tmp_path, device="cpu", dtype="bfloat16"), tokens, progress=False)
    found = scan(stream(tmp_path, dtype="bfloat16"), tokens, progress=False)
    np.testing.assert_array_equal(found.cosine, expected.cosine)
    assert np.abs(found.cosine - full.cosine).max() > 1e-4


def test_stored_names_without_the_base_models_prefix(
    random_model: Any, tokens: CalibrationTokens, tmp_path: Path
) -> None:
    """As GPT-2 lies on the hub: ``h.0.ln_1.weight``, not ``transformer.h.0.ln_1.weight``."""
    model = random_model("gpt2")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    expected = scan(model, tokens, progress=False)
    found = scan(stream(tmp_path), tokens, progress=False)
    np.testing.assert_array_equal(found.cosine, expected.cosine)


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.down_proj.weight", "model.embed_tokens.weight"]
)
def test_missing_weights_are_named(
    random_model: Any, tokens: CalibrationTokens, tmp_path: Path, name: str
) -> None:
    random_model("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if k != name})
    short = name.rpartition("model.layers.3.")[2].removeprefix("model.")
    with pytest.raises(CheckpointError, match=f"holds no weights for '{short}'"):
        scan(stream(tmp_path), tokens, progress=False)


# -- the model itself ------------------------------------------------------------------------------


def test_a_layer_that_fails_is_let_go(
    random_model: Any, tokens: CalibrationTokens, tmp_path: Path
) -> None:
    random_model("llama").save_pretrained(tmp_path)
    streamed = stream(tmp_path)

    def fail(*_: Any) -> None:
        raise RuntimeError("stopped here")

    streamed.model.layers[2].mlp.register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="stopped here"):
        streamed.model(input_ids=tokens.input_ids, use_cache=False)
    assert nbytes(decoder_layers(streamed).parameters()) == 0


@pytest.mark.parametrize("load", [stream, lambda folder: load_model(folder, device="cpu")])
def test_a_copy_of_a_layer_has_weights_of_its_own(
    random_model: Any, load: Callable[[Path], Any], reads: Counter[str], tmp_path: Path
) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    copied = layer_copy(loaded, 3)
    reads.clear()
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    angles = model.model.rotary_emb(hidden, torch.arange(5)[None])
    with torch.no_grad():
        expected = decoder_layers(model)[3](hidden, position_embeddings=angles)
        assert torch.equal(copied(hidden, position_embeddings=angles), expected)
        for parameter in copied.parameters():
            parameter.add_(1)
        with held_layer(loaded, 3) as layer:
            assert torch.equal(layer(hidden, position_embeddings=angles), expected)
    assert max(reads.values(), default=0) <= 1  # by the layer held, not by its copy


def test_one_that_is_settled_is_a_model_in_memory(random_model: Any, tmp_path: Path) -> None:
    whole = random_model("llama")
    whole.save_pretrained(tmp_path)
    model = stream(tmp_path)
    assert is_streamed(model)
    settle(model, "cpu")
    assert not is_streamed(model)
    found, expected = model.state_dict(), whole.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = torch.tensor([[1, 5, 9, 40, 22, 7]])
    (tmp_path / "model.safetensors").unlink()  # nothing is read any more
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
        decoder_layers(model)[0].mlp.down_proj.weight.zero_()  # nor is it the file's memory
