"""ReplaceMe: the folded checkpoint does M A + Y, with A from an independent fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamline_bench.compression import compress
from streamline_bench.core.architecture import Architecture
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import ArchitectureError, CalibrationError, SparsityError
from streamline_bench.methods.maps.replaceme import refuse_normed_mlp

RIDGE = 1e-6
MLP = {"gpt2": "transformer.h.{}.mlp", "gpt_neox": "gpt_neox.layers.{}.mlp"}
MLP["opt"] = "model.decoder.layers.{}.fc2"
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "opt": {"ffn_dim": 48},
    "phi": {},
    "phi3": {},
    "gpt_neox": {},
    "granite": {"residual_multiplier": 0.7},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


@dataclass
class Around:
    """States of all tokens around a block, float64 ``[rows, hidden]``, from the intact model."""

    mlp: Tensor
    stream: Tensor
    target: Tensor

    @property
    def rest(self) -> Tensor:
        return self.stream - self.mlp


@pytest.fixture(scope="module")
def double_model(make_tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that saves a random model of a family in float64.

    Its layers 2 and 3, or others given, do little, so that they go first, and attention does little
    anywhere, so that what holds for some tokens holds for others.
    """

    def make(model_type: str = "llama", *, quiet: tuple[int, ...] = (2, 3), **changes: Any) -> Path:
        folder = make_tiny_model(model_type, **{**FAMILIES[model_type], **changes})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "norm" not in name and "ln_" not in name:
                    noise = torch.randn(tensor.shape, generator=generator)
                    tensor.copy_(_strength(name, quiet) * noise)
        model.save_pretrained(folder)
        return folder

    return make


def _strength(name: str, quiet: tuple[int, ...]) -> float:
    share = 0.5 if any(f".{layer}." in name for layer in quiet) else 1.0
    return share * (0.05 if "attn" in name or "attention" in name else 0.25)


def _load(folder: Path) -> Any:
    # Grouped products of experts exist in low precision only.
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def _sequences(folder: Path, text: Path, length: int = 16) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = text.read_text(encoding="utf-8").split("\n\n")
    ids = [tokenizer(document)["input_ids"][:length] for document in documents]
    return torch.tensor(ids)


def _around(folder: Path, ids: Tensor, start: int, stop: int) -> Around:
    model = _load(folder)
    model_type = model.config.model_type
    module = model.get_submodule(MLP.get(model_type, "model.layers.{}.mlp").format(start - 1))
    seen: list[Tensor] = []
    module.register_forward_hook(
        lambda m, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    hidden = states[0].shape[-1]
    scale = getattr(model.config, "residual_multiplier", 1.0)
    mlp = seen[0].reshape(-1, hidden) * scale
    return Around(mlp, states[start].reshape(-1, hidden), states[stop].reshape(-1, hidden))


def _ridge_fit(x: Tensor, z: Tensor, ridge: float = RIDGE) -> Tensor:
    """Ridge regression through an augmented least-squares problem."""
    size = x.shape[1]
    strength = (ridge * x.square().sum() / size).sqrt()
    more = strength * torch.eye(size, dtype=x.dtype)
    solution: Tensor = torch.linalg.lstsq(
        torch.cat([x, more]), torch.cat([z, torch.zeros_like(more)])
    ).solution
    return solution


def _recipe(make_recipe: Callable[..., Any], name: str = "replaceme_lstsq", **changes: Any) -> Any:
    return make_recipe(name, **{"calibration.seed": 0, "calibration.form": "documents", **changes})


def _facts(folder: Path) -> Any:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def _fitted_rows(
    folder: Path, recipe: Any, share: float = 0.05, *, held_out: bool = False
) -> Tensor:
    """The sequences that the method fitted on, or held out, through the public interfaces."""
    from streamline_bench.core.data.calibration import load_calibration

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = load_calibration(recipe.calibration, tokenizer, progress=False)
    fit = tokens.split(share, recipe.seed)[held_out]
    assert bool(fit.attention_mask.all())
    return fit.input_ids


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_folded_boundary_is_m_a_plus_y(
    model_type: str,
    double_model: Callable[..., Path],
    make_recipe: Callable[..., Any],
    text_file: Path,
    tmp_path: Path,
) -> None:
    source = double_model(model_type)
    recipe = _recipe(make_recipe)
    mixture = model_type in MIXTURES
    dtype = "float32" if mixture else "float64"
    out = compress(source, recipe, tmp_path / "out", dtype=dtype, progress=False)
    (block,) = _facts(out).chosen["blocks"]
    start, stop = block["start"], block["stop"]
    assert (start >= 1, stop - start, block["map_in_layer"]) == (True, 2, start - 1)
    fitted = _around(source, _fitted_rows(source, recipe), start, stop)
    assert stop < 6, "transformers gives the last state behind the norm: this test would not see it"
    a = _ridge_fit(fitted.mlp, fitted.target - fitted.rest)
    ids = _sequences(source, text_file)[:5, :12].flip(1)
    probe = _around(source, ids, start, stop)
    with torch.no_grad():
        states = _load(out)(ids, output_hidden_states=True).hidden_states
    boundary = states[start].reshape(probe.stream.shape)
    close = 1e-3 if mixture else 1e-8
    torch.testing.assert_close(boundary, probe.mlp @ a + probe.rest, rtol=close, atol=close)
    assert not torch.allclose(boundary, probe.stream, atol=1e-2)


def test_result_is_a_stock_checkpoint_of_fewer_parameters(
    double_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    source = double_model()
    out = compress(source, _recipe(make_recipe), tmp_path / "out", progress=False)
    before, after = CheckpointReader(source), CheckpointReader(out)
    assert after.config["model_type"] == "llama"
    assert after.config["num_hidden_layers"] == 4
    manifest = _facts(out)
    start = manifest.chosen["blocks"][0]["start"]
    changed = set()
    for name in after.names:
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) >= start:
            parts[2] = str(int(parts[2]) + 2)
        if not torch.equal(after.tensor(name), before.tensor(".".join(parts))):
            changed.add(name)
    assert changed == {f"model.layers.{start - 1}.mlp.down_proj.weight"}
    assert manifest.parameters_after == after.num_parameters
    removed = manifest.chosen["size"]["removed"]
    assert removed == manifest.parameters_before - manifest.parameters_after


@pytest.mark.parametrize(("diagonal", "at_most"), [(False, 0.95), (True, 0.995)])
def test_boundary_error_is_measured_on_held_out_tokens_and_falls(
    diagonal: bool,
    at_most: float,
    double_model: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    source = double_model()
    recipe = _recipe(make_recipe, **{"parameters.diagonal": diagonal})
    out = compress(source, recipe, tmp_path / "out", dtype="float64", progress=False)
    chosen = _facts(out).chosen
    (block,) = chosen["blocks"]
    error = block["boundary_mse"]
    assert error["mapped"] < at_most * error["none"]
    tokens = _held_out(source, recipe)
    assert chosen["tokens_held_out"] == tokens.numel()
    around = _around(source, tokens, block["start"], block["stop"])
    expected = (around.stream - around.target).square().mean()
    assert error["none"] == pytest.approx(float(expected), rel=1e-9)
    with torch.no_grad():
        states = _load(out)(tokens, output_hidden_states=True).hidden_states
    reached = states[block["start"]].reshape(around.target.shape)
    expected = (reached - around.target).square().mean()
    assert error["mapped"] == pytest.approx(float(expected), rel=1e-7)


def _held_out(folder: Path, recipe: Any) -> Tensor:
    from streamline_bench.core.data.calibration import load_calibration

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = load_calibration(recipe.calibration, tokenizer, progress=False)
    return tokens.split(0.05, recipe.seed)[1].input_ids


@pytest.mark.parametrize("accurate", [False, True])
def test_cosine_objective_raises_the_cosine_it_names(
    accurate: bool,
    double_model: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    source = double_model()
    changes = {"parameters.accurate": accurate, "parameters.lr": 5e-3}
    recipe = _recipe(make_recipe, "replaceme_cosine", **changes)
    out = compress(source, recipe, tmp_path / "out", dtype="float64", progress=False)
    (block,) = _facts(out).chosen["blocks"]
    curve = block["loss_per_epoch"]
    assert len(curve) == 10
    assert curve == sorted(curve, reverse=True)
    ids = _fitted_rows(source, recipe)
    around = _around(source, ids, block["start"], block["stop"])
    with torch.no_grad():
        states = _load(out)(ids, output_hidden_states=True).hidden_states
    boundary = states[block["start"]].reshape(around.target.shape)
    rest = torch.zeros_like(around.rest) if accurate else around.rest
    cosine = torch.nn.functional.cosine_similarity
    before = cosine(around.stream - rest, around.target - rest, dim=-1).mean()
    after = cosine(boundary - rest, around.target - rest, dim=-1).mean()
    assert curve[0] <= 1 - float(before) + 1e-6  # Adam starts at the identity
    assert float(after) > 1 - curve[-1]  # an epoch's mean lags behind its end
    assert not list(tmp_path.rglob("rows-*.bin"))


def test_pads_take_no_part(
    double_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    words = [f"w{(7 * i) % 96}" for i in range(600)]
    lengths = [5 + i % 11 for i in range(50)]
    documents, at = [], 0
    for length in lengths:
        documents.append(" ".join(words[at : at + length]))
        at += length
    ragged = tmp_path / "ragged.txt"
    ragged.write_text("\n\n".join(documents), encoding="utf-8")
    source = double_model()
    folders = [
        compress(
            source,
            _recipe(make_recipe, calibration=str(ragged), **{"parameters.batch_size": batch_size}),
            tmp_path / str(batch_size),
            dtype="float64",
            progress=False,
        )
        for batch_size in (1, 8)
    ]
    (alone,), (together,) = (_facts(folder).chosen["blocks"] for folder in folders)
    assert alone["boundary_mse"] == pytest.approx(together["boundary_mse"], rel=1e-8)
    chosen = _facts(folders[1]).chosen
    assert chosen["tokens_fitted"] + chosen["tokens_held_out"] == sum(lengths)


def test_two_blocks_apart_are_m_a_plus_y_each(
    double_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    source = double_model(num_hidden_layers=9, quiet=(2, 5))
    recipe = _recipe(make_recipe, n_layers=2, **{"parameters.blocks": 2})
    out = compress(source, recipe, tmp_path / "out", dtype="float64", progress=False)
    manifest = _facts(out)
    blocks = manifest.chosen["blocks"]
    assert [(block["start"], block["stop"]) for block in blocks] == [(2, 3), (5, 6)]
    assert [block["map_in_layer"] for block in blocks] == [1, 4]
    assert manifest.chosen["removed_layers"] == [2, 5]
    for block in blocks:
        assert block["boundary_mse"]["mapped"] < block["boundary_mse"]["none"]

    before, after = CheckpointReader(source), CheckpointReader(out)
    old = [0, 1, 3, 4, 6, 7, 8]
    down = "model.layers.{}.mlp.down_proj.weight"
    changed = set()
    for name in after.names:
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(old[int(parts[2])])
        if not torch.equal(after.tensor(name), before.tensor(".".join(parts))):
            changed.add(name)
    assert changed == {down.format(1), down.format(3)}

    rows = _fitted_rows(source, recipe)
    for host, start in ((1, 2), (3, 5)):
        fitted = _around(source, rows, start, start + 1)
        a = _ridge_fit(fitted.mlp, fitted.target - fitted.rest)
        # The folded model with this one map taken out again, on tokens that were not fitted.
        plain = _load(out)
        plain.model.layers[host].mlp.down_proj.weight.data = before.tensor(down.format(start - 1))
        seen: list[Tensor] = []
        plain.model.layers[host].mlp.register_forward_hook(lambda m, i, o, to=seen: to.append(o))
        ids = rows[:5, :12].flip(1)
        with torch.no_grad():
            behind = plain(ids, output_hidden_states=True).hidden_states[host + 1]
            found = _load(out)(ids, output_hidden_states=True).hidden_states[host + 1]
        expected = seen[0] @ a + (behind - seen[0])
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        assert not torch.allclose(found, behind, atol=1e-2)


def test_on_layers_that_another_method_chooses_every_cut_has_its_map(
    double_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """On the layers of its own blocks, listed, it gives what its own blocks do."""
    source = double_model(num_hidden_layers=9, quiet=(2, 5))
    given = {"method": "given_layers", "parameters": {"layers": [2, 5]}}
    own, listed = (
        compress(
            source,
            _recipe(make_recipe, n_layers=2, **change),
            tmp_path / name,
            dtype="float64",
            progress=False,
        )
        for name, change in (
            ("own", {"parameters.blocks": 2}),
            ("listed", {"parameters.selection": given}),
        )
    )
    one, two = CheckpointReader(own), CheckpointReader(listed)
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.names)
    blocks = [_facts(folder).chosen["blocks"] for folder in (own, listed)]
    for block in blocks[0]:
        block.pop("angular_distance")
    assert blocks[0] == blocks[1]
    first = {**given, "parameters": {"layers": [0, 3]}}
    with pytest.raises(SparsityError, match=r"Layer 0 .*linear_patch"):
        compress(
            source,
            _recipe(make_recipe, n_layers=2, **{"parameters.selection": first}),
            tmp_path / "first",
            progress=False,
        )


def test_adjacent_blocks_merge_or_follow_each_other(
    double_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    source = double_model(num_hidden_layers=5)
    changes = {"parameters.blocks": 4, "n_layers": 4}  # all but layer 0: adjacent for certain
    merged = _facts(
        compress(source, _recipe(make_recipe, **changes), tmp_path / "merged", progress=False)
    )
    assert [(b["start"], b["stop"]) for b in merged.chosen["blocks"]] == [(1, 5)]
    recipe = _recipe(make_recipe, **changes, **{"parameters.merge_consecutive": False})
    out = compress(source, recipe, tmp_path / "chain", dtype="float64", progress=False)
    blocks = _facts(out).chosen["blocks"]
    assert [b["map_in_layer"] for b in blocks] == [0, 0, 0, 0]
    assert [b["on_whole_stream"] for b in blocks] == [False, True, True, True]
    ids = _fitted_rows(source, recipe)
    start = _around(source, ids, 1, 2)
    composed = _ridge_fit(start.mlp, start.target - start.rest)
    for layer in (2, 3):
        step = _around(source, ids, layer, layer + 1)
        composed = composed @ _ridge_fit(step.stream, step.target)
    last = _raw_last(source, ids)
    composed = composed @ _ridge_fit(_around(source, ids, 4, 5).stream, last)
    expected = composed.T @ CheckpointReader(source).tensor("model.layers.0.mlp.down_proj.weight")
    found = CheckpointReader(out).tensor("model.layers.0.mlp.down_proj.weight")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # What is reported of the chain is the error of the product, not that of its last map.
    (chain,) = _facts(out).chosen["composed"]
    assert (chain["start"], chain["stop"], chain["map_in_layer"]) == (1, 5, 0)
    assert "composed" not in merged.chosen
    held_out = _fitted_rows(source, recipe, held_out=True)
    kept, target = _around(source, held_out, 1, 2), _raw_last(source, held_out)
    mapped = (kept.mlp @ composed + kept.rest - target).square().mean()
    assert chain["boundary_mse"]["mapped"] == pytest.approx(float(mapped), rel=1e-6)
    dropped = (kept.stream - target).square().mean()
    assert chain["boundary_mse"]["none"] == pytest.approx(float(dropped), rel=1e-6)
    assert chain["boundary_mse"]["mapped"] != pytest.approx(blocks[-1]["boundary_mse"]["mapped"])


def _raw_last(folder: Path, ids: Tensor) -> Tensor:
    """The output of the last layer before the final norm: what the folded model must give."""
    model = _load(folder)
    seen: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    return seen[0].reshape(-1, seen[0].shape[-1])


def test_too_few_tokens_are_refused(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = _recipe(make_recipe, calibration_samples=2)
    with pytest.raises(CalibrationError, match=r"\b32\b.*\b16\b.*samples"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_too_little_room_for_activations_is_refused(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = _recipe(make_recipe, "replaceme_cosine", **{"parameters.cache_gb": 1e-4})
    with pytest.raises(CalibrationError, match=r"0\.000389 GB.*cache_gb.*0\.0001\b"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)


def test_unequal_blocks_are_refused(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = _recipe(make_recipe, n_layers=3, **{"parameters.blocks": 2})
    with pytest.raises(SparsityError, match=r"\b3 layers\b.*\b2 blocks\b"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2"])
def test_families_with_a_norm_behind_the_mlp_are_refused(
    model_type: str,
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    changes = {"head_dim": 8} if model_type.startswith("gemma") else {}
    source = make_tiny_model(model_type, **changes)
    with pytest.raises(ArchitectureError, match=rf"'{model_type}'.*norm.*ridge_map"):
        compress(source, _recipe(make_recipe), tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ({"down": ""}, "MLP output"),
        ({"input_norm": "", "mlp_norm": ""}, "norms"),
        ({"mlp": "", "experts": "experts"}, "mlp"),
    ],
)
def test_an_mlp_that_is_not_known_is_refused(missing: dict[str, str], named: str) -> None:
    with pytest.raises(ArchitectureError, match=f"'unheard'.*{named}.*linear_patch"):
        refuse_normed_mlp(Architecture("unheard", **missing))  # type: ignore[arg-type]
