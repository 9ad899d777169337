"""Sizes of sliced models: the published figures, from configs alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from streamline_bench.compression import compress
from streamline_bench.core.architecture import ARCHITECTURES
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.errors import ArchitectureError, CalibrationError, RecipeError, SparsityError
from streamline_bench.methods.base import Compression
from streamline_bench.methods.rotation.norm_fusion import NormFusion
from streamline_bench.methods.rotation.slicegpt import SlicedSizes, SliceGPT
from streamline_bench.methods.rotation.stream_rotation import Covariance, PrincipalAxes
from streamline_bench.modeling import register
from streamline_bench.modeling.loading import SourceModel

LLAMA_2_7B: dict[str, Any] = {}
LLAMA_2_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAMA_3_8B = {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
QWEN_2_5_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
QWEN_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
TINY = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def _counted_by_hand(config: Any, k: int) -> int:
    """Weights of a sliced Llama with a head of whole width, written down from the paper."""
    d, f, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = config.num_key_value_heads * d // config.num_attention_heads
    readers = k * (d + 2 * kv) + 2 * k * f
    inner = readers + d * k + k * k + f * k + k * k
    last = readers + d * k + k * k + f * d + k * d
    return config.vocab_size * (k + d) + (depth - 1) * inner + last


@pytest.mark.parametrize(
    ("entries", "slicing", "removed"),
    [
        (LLAMA_2_7B, 0.25, 0.153),
        (LLAMA_2_7B, 0.30, 0.215),
        (LLAMA_2_7B, 0.35, 0.275),
        (LLAMA_2_13B, 0.25, 0.1545),
        (LLAMA_3_8B, 0.25, 0.156),
    ],
)
def test_parameters_removed_by_a_slicing(
    entries: dict[str, Any], slicing: float, removed: float
) -> None:
    config = LlamaConfig(**entries)
    plan = SlicedSizes(config).of_slicing(slicing)
    assert plan.reached == pytest.approx(removed, abs=6e-4)
    assert plan.width % 8 == 0
    assert plan.parameters == _counted_by_hand(config, plan.width)


@pytest.mark.parametrize(
    ("family", "entries", "width", "slicing"),
    [
        ("llama", LLAMA_2_7B, 2744, 0.330),
        ("llama", LLAMA_3_8B, 2728, 0.334),
        ("qwen2", QWEN_2_5_7B, 2440, 0.319),
        ("qwen3", QWEN_3_8B, 2696, 0.342),
    ],
)
def test_width_that_removes_a_quarter_of_the_parameters(
    family: str, entries: dict[str, Any], width: int, slicing: float
) -> None:
    plan = SlicedSizes(AutoConfig.for_model(family, **entries)).of_sparsity(0.25)
    assert plan.width == width
    assert plan.slicing == pytest.approx(slicing, abs=6e-4)
    assert plan.reached == pytest.approx(0.25, abs=2e-3)


def test_a_quarter_of_llama_2_13b_lies_between_two_widths() -> None:
    """0.328 of the channels is 3440 of them; 3432 come as near from the other side."""
    config = LlamaConfig(**LLAMA_2_13B)
    total = SlicedSizes(config).total
    below, above = (1 - _counted_by_hand(config, width) / total for width in (3440, 3432))
    assert (round(below, 4), round(above, 4)) == (0.2491, 0.2509)
    assert 0.25 - below == pytest.approx(above - 0.25, abs=5e-5)
    assert pytest.approx(0.328, abs=5e-4) == 1 - 3440 / 5120
    plan = SlicedSizes(config).of_sparsity(0.25)
    assert plan.width in (3432, 3440)
    assert abs(plan.reached - 0.25) == min(0.25 - below, above - 0.25)


def test_the_width_is_the_nearest_of_all() -> None:
    config = LlamaConfig(**TINY)
    sizes = SlicedSizes(config, round_to=1)
    total = sizes.total
    for sparsity in (0.1, 0.25, 0.5, 0.8):
        best = min(
            range(1, 32), key=lambda k: abs(1 - _counted_by_hand(config, k) / total - sparsity)
        )
        assert sizes.of_sparsity(sparsity).width == best


def test_widths_are_rounded_down() -> None:
    sizes = SlicedSizes(LlamaConfig(**TINY))
    assert sizes.of_slicing(0.0).width == 32
    assert sizes.of_slicing(0.25).width == 24
    assert sizes.of_slicing(0.30).width == 16
    with pytest.raises(SparsityError, match=r"\b32\b.*\b8\b.*round_to"):
        sizes.of_slicing(0.8)


def test_tied_embeddings_become_two() -> None:
    tied = LlamaConfig(**TINY, tie_word_embeddings=True)
    loose = LlamaConfig(**TINY)
    assert (
        SlicedSizes(tied).of_slicing(0.25).parameters
        == SlicedSizes(loose).of_slicing(0.25).parameters
    )
    assert SlicedSizes(loose).total - SlicedSizes(tied).total == 100 * 32


def test_biases_of_layer_norms_reach_the_head() -> None:
    opt = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, **TINY}
    config = AutoConfig.for_model("opt", **opt)
    assert SlicedSizes(config).rotations(24).head_bias
    assert not SlicedSizes(LlamaConfig(**TINY)).rotations(24).head_bias
    assert SlicedSizes(config, slice_head=True).rotations(24).head_width == 24


def test_what_cannot_be_reached_is_refused() -> None:
    sizes = SlicedSizes(LlamaConfig(**TINY))
    with pytest.raises(SparsityError, match=r"0\.99\b.*\b0\.\d"):
        sizes.of_sparsity(0.99)
    tied = SlicedSizes(LlamaConfig(**{**TINY, "tie_word_embeddings": True}), round_to=1)
    with pytest.raises(SparsityError, match=r"above 0 up to 0\.\d+"):
        tied.of_sparsity(0.99)
    with pytest.raises(SparsityError, match=r"\b32\b.*\b64\b.*round_to"):
        SlicedSizes(LlamaConfig(**TINY), round_to=64).of_sparsity(0.25)


IDS = torch.tensor([[1, 5, 9, 40, 22, 7], [1, 80, 33, 3, 96, 12]])


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Return a function that gives the recipe: a sparsity, or a slicing of the channels."""

    def make(**parameters: Any) -> Recipe:
        slicing = parameters.pop("slicing", None)
        changes = {f"parameters.{key}": value for key, value in parameters.items()}
        made = make_recipe("slicegpt", sparsity=0.3, **changes)
        if slicing is None:
            return made
        sliced = {**made.parameters, "slicing": slicing}
        return made.model_copy(update={"sparsity": None, "parameters": sliced})

    return make


def _load(folder: Path) -> Any:
    register()
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def _logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return _load(folder)(IDS).logits  # type: ignore[no-any-return]


def _in_bfloat16(folder: Path, target: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {"head_dim": 8}),
        ("qwen3", {"head_dim": 8}),
        ("phi3", {}),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
        ("phi", {}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_nothing_sliced_leaves_the_logits_unchanged(
    family: str,
    extra: dict[str, Any],
    make_tiny_model: Callable[..., Path],
    recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    source = make_tiny_model(family, num_hidden_layers=3, tie_word_embeddings=True, **extra)
    out = compress(source, recipe(slicing=0.0), tmp_path / "out", progress=False)
    torch.testing.assert_close(_logits(out), _logits(source), rtol=1e-4, atol=1e-6)
    assert _load(out).config.tie_word_embeddings is False


def test_the_share_of_parameters_is_reached_and_recorded(
    tiny_llama: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    out = compress(tiny_llama, recipe(), tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    size = manifest.chosen["size"]
    assert manifest.sparsity_reached == pytest.approx(0.3, abs=0.03)
    assert size["reached"] == pytest.approx(manifest.sparsity_reached)
    assert size["parameters"] == manifest.parameters_after == CheckpointReader(out).num_parameters
    assert sum(p.numel() for p in _load(out).parameters()) == manifest.parameters_after
    assert size["requested"] == 0.3
    assert size["slicing"] > 0.3  # the shortcut matrices eat some of it
    assert manifest.layers_before == manifest.layers_after == 6
    kept = manifest.chosen["energy_kept"]
    assert len(kept) == 13
    assert kept[-1] == 1.0
    assert all(0.3 < share < 1 for share in kept[:-1])
    assert manifest.calibration["tokens"] >= 32
    assert _logits(out).isfinite().all()


def test_principal_axes_lose_less_than_random_ones(
    tiny_llama: Path,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, original = _logits(tiny_llama), Covariance.axes

    def error(name: str) -> float:
        out = compress(tiny_llama, recipe(slicing=0.5), tmp_path / name, progress=False)
        return float((_logits(out) - dense).square().mean())

    principal = error("principal")
    for seed in (0, 1, 2):
        generator = torch.Generator().manual_seed(seed)

        def others(
            self: Covariance, damping: float, where: str, drawn: torch.Generator = generator
        ) -> PrincipalAxes:
            found = original(self, damping, where)
            noise = torch.randn(found.axes.shape, generator=drawn, dtype=torch.float64)
            return PrincipalAxes(torch.linalg.qr(noise).Q, found.energies)

        monkeypatch.setattr(Covariance, "axes", others)
        assert principal < 0.8 * error(f"random-{seed}")


def test_more_channels_give_better_logits(
    tiny_llama: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """And the stored dtype is the source's."""
    dense = _logits(tiny_llama)
    errors = []
    for slicing in (0.75, 0.25, 0.0):
        out = compress(tiny_llama, recipe(slicing=slicing), tmp_path / str(slicing), progress=False)
        errors.append(float((_logits(out) - dense).square().mean()))
    assert errors[0] > errors[1] > 100 * errors[2]
    reader = CheckpointReader(out)
    assert {reader.entry(name).dtype for name in reader.names} == {"F32"}


def test_a_bfloat16_source_gives_a_bfloat16_result(
    tiny_llama: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    source = _in_bfloat16(tiny_llama, tmp_path / "source")
    out = compress(source, recipe(), tmp_path / "out", progress=False)
    reader = CheckpointReader(out)
    assert {reader.entry(name).dtype for name in reader.names} == {"BF16"}


def test_tensors_of_another_dtype_are_cast_one_at_a_time(
    tiny_llama: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    source = _in_bfloat16(tiny_llama, tmp_path / "source")
    result = SliceGPT().compress(
        Compression(SourceModel(source), recipe(), tmp_path, progress=False)
    )
    seen: list[weakref.ref[torch.Tensor]] = []
    for tensor in result.tensors.values():
        assert tensor.dtype == torch.bfloat16
        assert sum(reference() is not None for reference in seen) <= 1
        seen.append(weakref.ref(tensor))
    assert len(seen) == len(result.tensors) > 40


def test_options_reach_the_rotation(
    tiny_llama: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    plain = compress(tiny_llama, recipe(slicing=0.25), tmp_path / "plain", progress=False)
    options: list[dict[str, Any]] = [
        {"final_orientation": "random"},
        {"activation_gb": 0, "batch_size": 8},
        {"signal": "normalised"},
        {"slice_head": True},
    ]
    found = []
    for number, option in enumerate(options):
        out = tmp_path / str(number)
        found.append(compress(tiny_llama, recipe(slicing=0.25, **option), out, progress=False))
    for same in found[:2]:
        torch.testing.assert_close(_logits(same), _logits(plain), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(_logits(found[2]), _logits(plain), rtol=1e-3, atol=1e-5)
    assert _load(found[3]).lm_head.in_features == 24
    assert _load(plain).lm_head.in_features == 32


def test_twice_the_same_is_the_same(
    tiny_llama: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folders = [compress(tiny_llama, recipe(), tmp_path / n, progress=False) for n in "ab"]
    assert len({CheckpointReader(folder).fingerprint() for folder in folders}) == 1


def test_too_few_tokens_for_a_covariance(
    tiny_llama: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    few = make_recipe("slicegpt", sparsity=0.3, calibration_samples=1)
    with pytest.raises(CalibrationError, match=r"\b32\b.*\b16\b.*samples"):
        compress(tiny_llama, few, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gemma2", "norms between a sub-layer's output"), ("mixtral", "mixtures of experts")],
)
def test_families_whose_norms_cannot_be_absorbed_are_refused(
    family: str,
    reason: str,
    make_tiny_model: Callable[..., Path],
    recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    source = make_tiny_model(family, num_hidden_layers=2)
    with pytest.raises(ArchitectureError, match=f"'{family}' model .*{reason}"):
        compress(source, recipe(), tmp_path / "out", progress=False)


def test_an_inferred_family_is_checked(
    make_tiny_model: Callable[..., Path],
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Granite multiplies what its sub-layers add: without that it is another model."""
    row = replace(ARCHITECTURES["granite"], inferred=True)
    monkeypatch.setitem(ARCHITECTURES, "granite", row)  # type: ignore[arg-type]
    source = make_tiny_model("granite", num_hidden_layers=2, residual_multiplier=0.3)
    compress(source, recipe(), tmp_path / "right", progress=False)
    right = NormFusion.__init__

    def wrong(self: NormFusion, model: Any) -> None:
        right(self, model)
        self._factor = 0.9

    monkeypatch.setattr(NormFusion, "__init__", wrong)
    with pytest.raises(ArchitectureError, match=r"'granite' model.*other logits.*depth method"):
        compress(source, recipe(), tmp_path / "wrong", progress=False)


def test_sizes_that_make_no_sense_are_refused(
    tiny_llama: Path,
    recipe: Callable[..., Recipe],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SparsityError, match=r"n_layers=.*sparsity"):
        compress(tiny_llama, make_recipe("slicegpt", n_layers=2), out, progress=False)
    both = recipe(slicing=0.25).model_copy(update={"sparsity": 0.3})
    with pytest.raises(SparsityError, match=r"sparsity.*parameters\.slicing"):
        compress(tiny_llama, both, out, progress=False)
    with pytest.raises(SparsityError, match="out of reach"):
        compress(tiny_llama, make_recipe("slicegpt", sparsity=0.999), out, progress=False)
    with pytest.raises(RecipeError, match=r"mean 'parameters\.slicing'"):
        recipe(slicin=0.2)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_lora_recovers_a_sliced_model(
    family: str,
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    """The shortcut matrices stay as the axes gave them; what the loader sees is the same model."""
    extra = {"word_embed_proj_dim": 32, "ffn_dim": 48} if family == "opt" else {}
    source = make_tiny_model(family, num_hidden_layers=2, **extra)
    plain = compress(
        source, make_recipe("slicegpt", sparsity=0.2), tmp_path / "plain", progress=False
    )
    steps = {"recovery.training.min_steps": 4, "recovery.training.epochs": 1}
    data = {"recovery.training.data.samples": 16, "recovery.training.data.sequence_length": 16}
    recipe = make_recipe("slicegpt_lora", sparsity=0.2, **steps, **data)
    tuned = compress(source, recipe, tmp_path / "tuned", progress=False)
    before, after = (_load(folder).state_dict() for folder in (plain, tuned))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if "shortcut" in name or "embed" in name]
