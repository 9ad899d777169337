"""Parameter accounting, against published sizes and against counting a built model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from surgery_in_memory import keep_layers
from transformers import AutoConfig

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.surgery import block_keep, layers_for_sparsity, model_sizes, of_layers
from streamline_bench.errors import CheckpointError, SparsityError

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-2-7B": ("llama", {}),
    "Llama-2-13B": (
        "llama",
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
    ),
    "Llama-3-8B": (
        "llama",
        {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "Qwen2.5-7B": (
        "qwen2",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
    "Qwen3-8B": (
        "qwen3",
        {
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "vocab_size": 151936,
        },
    ),
}


def config(name: str) -> Any:
    model_type, changes = CONFIGS[name]
    return AutoConfig.for_model(model_type, **changes)


@pytest.mark.parametrize(
    ("name", "layer", "total", "shares"),
    [  # published sizes: millions, billions, percent at 8, 9, ... layers
        ("Llama-2-7B", 202.4, 6.738, [24.03, 27.03, 30.03, 33.0]),
        ("Llama-2-13B", 317.2, 13.016, [19.5, 21.9, 24.37, 26.8]),
        ("Llama-3-8B", 218.1, 8.030, [21.73, 24.45, 27.16, 29.9]),
        # The table has 7.615 B and 27.5 %; the exact values are 7,615,616,512 and 27.54 %.
        ("Qwen2.5-7B", 233.1, 7.616, [24.48, 27.5, 30.6]),
        ("Qwen3-8B", 192.9, 8.191, [18.85, 21.2, 23.56, 25.9]),
    ],
)
def test_published_sizes(name: str, layer: float, total: float, shares: list[float]) -> None:
    sizes = model_sizes(config(name))
    assert len(set(sizes.layers)) == 1
    assert sizes.mean_layer / 1e6 == pytest.approx(layer, abs=0.05)
    assert sizes.total / 1e9 == pytest.approx(total, abs=0.0005)
    for n, share in enumerate(shares, start=8):
        digits = 0.006 if round(share, 1) != share else 0.06
        assert 100 * n * sizes.mean_layer / sizes.total == pytest.approx(share, abs=digits)
    plan = layers_for_sparsity(config(name), n_layers=8)
    assert plan.reached == pytest.approx(8 * sizes.mean_layer / sizes.total)
    assert plan.requested is None


FFN_7B = 2 * 4096 * 16384  # 134.2 M: the paper's feed-forward replacement


@pytest.mark.parametrize(
    ("name", "added", "n", "reached"),
    [
        ("Llama-2-7B", 0, 8, 0.2403),
        ("Llama-2-7B", FFN_7B, 9, 0.2504),
        ("Llama-2-13B", 0, 10, 0.2437),
        ("Llama-2-13B", 2 * 5120 * 20480, 11, 0.2520),
        ("Llama-3-8B", 0, 9, 0.2445),
        ("Qwen2.5-7B", 0, 8, 0.2448),
        ("Qwen3-8B", 0, 11, 0.2591),
    ],
)
def test_a_quarter_of_the_parameters(name: str, added: int, n: int, reached: float) -> None:
    plan = layers_for_sparsity(config(name), 0.25, added_parameters=added)
    assert plan.n_layers == n
    assert plan.reached == pytest.approx(reached, abs=6e-5)
    assert plan.requested == 0.25
    assert plan.added_parameters == added
    assert plan.removed == round(plan.reached * plan.total)
    embeddings = {"Llama-2-7B": 2 * 32000 * 4096, "Llama-3-8B": 2 * 128256 * 4096}
    if name in embeddings:
        assert plan.embeddings == embeddings[name]
        expected = plan.removed / (plan.total - embeddings[name])
        assert plan.reached_without_embeddings == pytest.approx(expected)


def test_headers_and_config_agree_with_the_built_model(
    variant: str, random_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = random_model(variant)
    model.save_pretrained(tmp_path)
    sizes = model_sizes(model.config)
    assert model_sizes(CheckpointReader(tmp_path)) == sizes
    assert sizes.total == model.num_parameters()
    layers = tuple(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model))
    assert sizes.layers == layers
    row = architecture_of(model.config)
    inside = {
        id(p): p.numel()
        for path in (*row.embeddings, row.lm_head)
        for name, p in model.named_parameters(remove_duplicate=False)
        if name.startswith(f"{path}.")
    }
    assert sizes.embeddings == sum(inside.values())


def test_checkpoints_without_the_head(random_model: Callable[..., Any], tmp_path: Path) -> None:
    model = random_model("gpt2")
    model.base_model.save_pretrained(tmp_path)
    assert model_sizes(CheckpointReader(tmp_path)) == model_sizes(model.config)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_reached_is_what_surgery_removes(n: int, random_model: Callable[..., Any]) -> None:
    model = random_model("llama-tied")
    before = model.num_parameters()
    plan = layers_for_sparsity(model.config, n_layers=n)
    keep_layers(model, block_keep(6, 1, n))
    assert plan.removed == before - model.num_parameters()
    assert plan.total == before


def test_layers_of_a_mixture_are_counted_one_by_one(random_model: Callable[..., Any]) -> None:
    """Every second layer is dense: which ones go decides how much goes."""
    model = random_model("qwen3_moe-period")
    before, plan = model.num_parameters(), layers_for_sparsity(model.config, n_layers=1)
    sizes = model_sizes(model.config).layers
    assert len(set(sizes)) == 2
    for layer in (1, 2):
        exact = of_layers(plan, model.config, [layer])
        assert exact.removed == sizes[layer] != plan.removed
        assert exact.reached == pytest.approx(sizes[layer] / before)
        assert (exact.n_layers, exact.requested) == (plan.n_layers, plan.requested)
    keep_layers(model, [0, 1, 3, 5])
    assert of_layers(plan, random_model("qwen3_moe-period").config, [2, 4]).removed == (
        before - model.num_parameters()
    )


def test_a_model_of_one_layer(random_model: Callable[..., Any]) -> None:
    config = random_model("llama", num_hidden_layers=1).config
    for arguments in ({"n_layers": 1}, {"sparsity": 0.25}):
        with pytest.raises(SparsityError, match="one layer, which cannot be removed"):
            layers_for_sparsity(config, **arguments)


@pytest.fixture(scope="module")
def small(random_model: Callable[..., Any]) -> Any:
    return random_model("llama").config


@pytest.mark.parametrize("n", [0, -1, 6, 60])
def test_impossible_numbers_of_layers(n: int, small: Any) -> None:
    with pytest.raises(SparsityError, match=f"{n} of 6 layers.*1 to 5"):
        layers_for_sparsity(small, n_layers=n)


@pytest.mark.parametrize("sparsity", [0, 1, -0.5, 25, float("nan")])
def test_sparsity_that_is_no_share(sparsity: float, small: Any) -> None:
    with pytest.raises(SparsityError, match="is not a share between 0 and 1"):
        layers_for_sparsity(small, sparsity)


@pytest.mark.parametrize("sparsity", [0.001, 0.9, 0.999])
def test_sparsity_out_of_reach(sparsity: float, small: Any) -> None:
    with pytest.raises(SparsityError, match=f"{sparsity} is out of reach.*n_layers"):
        layers_for_sparsity(small, sparsity)


def test_a_replacement_larger_than_what_goes(small: Any) -> None:
    with pytest.raises(SparsityError, match="reaches nothing"):
        layers_for_sparsity(small, 0.25, added_parameters=10**9)


def test_neither_or_both(small: Any) -> None:
    for arguments in ({}, {"sparsity": 0.25, "n_layers": 1}):
        with pytest.raises(SparsityError, match="either a sparsity or"):
            layers_for_sparsity(small, **arguments)


def test_the_closest_number_wins_and_a_tie_goes_to_fewer_layers(small: Any) -> None:
    sizes = model_sizes(small)
    for n in (1, 2, 3, 4):
        share = n * sizes.mean_layer / sizes.total
        half = sizes.mean_layer / sizes.total / 2
        assert layers_for_sparsity(small, share).n_layers == n
        assert layers_for_sparsity(small, share + 0.9 * half).n_layers == n
        assert layers_for_sparsity(small, share + half).n_layers == n
        assert layers_for_sparsity(small, share + 1.1 * half).n_layers == n + 1


def test_every_request_gets_the_closest_by_brute_force(small: Any) -> None:
    sizes = model_sizes(small)
    step = sizes.mean_layer / sizes.total
    found = []
    for percent in range(1, 100):
        request = percent / 100
        best = min(range(1, 6), key=lambda n: abs(n * step - request))
        if abs(best * step - request) < step / 2:
            assert layers_for_sparsity(small, request).n_layers == best
            found.append(best)
        else:
            with pytest.raises(SparsityError):
                layers_for_sparsity(small, request)
    assert set(found) == {1, 2, 3, 4, 5}
    assert len(found) < 99


def test_a_config_without_depth(random_model: Callable[..., Any], tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    reader = CheckpointReader(tmp_path)
    reader.config["num_hidden_layers"] = "six"
    with pytest.raises(CheckpointError, match="num_hidden_layers='six'"):
        model_sizes(reader)
