"""FLAP against a loop over hooked activations in float64, and against the masked dense model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import ArchitectureError, NumericsError, SparsityError
from streamline_bench.methods.tools.activations import Moments, visit_inputs
from streamline_bench.methods.width.flap import ColumnScores, column_score, search, standardised
from streamline_bench.methods.width.narrowing import UNITS_FILE
from streamline_bench.methods.width.width_plan import Prunable
from streamline_bench.modeling import LayerWidths, register
from streamline_bench.modeling.widths import output_paths

register()
IDS = torch.tensor([[1, 5, 9, 40, 22, 7, 63, 88], [1, 71, 3, 3, 12, 90, 31, 4]])


def loaded(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float64
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("opt", {"num_key_value_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("gpt2", {"num_key_value_heads": 4, "n_inner": 48}),
        ("gemma2", {"head_dim": 8}),
    ],
)
def test_the_result_is_the_dense_model_with_means_in_place_of_what_was_removed(
    family: str,
    changes: dict[str, Any],
    wide: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder = wide(family, **changes)
    recipe = make_recipe("flap", calibration_samples=6, sequence_length=16, sparsity=0.3)
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.sparsity_reached == pytest.approx(0.3, abs=0.03)
    dense, pruned = loaded(folder), loaded(out)
    family_row = architecture_of(dense.config)
    tokens = _tokens_of(folder, recipe)
    means = _mean_inputs(dense, tokens)
    removed = json.loads((out / UNITS_FILE).read_text())
    assert any(each["channels"] for each in removed.values())
    assert any(each["heads"] for each in removed.values())
    size = dense.config.hidden_size // dense.config.num_attention_heads
    for layer, gone in removed.items():
        places = [h * size + i for h in gone["heads"] for i in range(size)], gone["channels"]
        for path, columns in zip(output_paths(family_row), places, strict=True):
            module = decoder_layers(dense)[int(layer)].get_submodule(path)
            module.register_forward_pre_hook(_replacing(columns, means[int(layer), path]))
    with torch.no_grad():
        torch.testing.assert_close(pruned(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-4)
    generated = pruned.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape[1] == IDS.shape[1] + 3


def _tokens_of(folder: Path, recipe: Any) -> CalibrationTokens:
    from streamline_bench.core.data.calibration import load_calibration
    from streamline_bench.modeling.loading import load_config, load_tokenizer

    return load_calibration(
        recipe.calibration, load_tokenizer(folder), model_folder=folder,
        max_length=load_config(folder).max_position_embeddings, progress=False,
    )  # fmt: skip


def _mean_inputs(model: Any, tokens: CalibrationTokens) -> dict[tuple[int, str], torch.Tensor]:
    """By concatenation of every row, one sequence at a time."""
    rows = defaultdict(list)
    paths, handles = output_paths(architecture_of(model.config)), []
    for index, layer in enumerate(decoder_layers(model)):
        for path in paths:

            def hook(m: Any, args: Any, key: tuple[int, str] = (index, path)) -> None:
                rows[key].append(args[0].detach().reshape(-1, args[0].shape[-1]))

            handles.append(layer.get_submodule(path).register_forward_pre_hook(hook))
    with torch.no_grad():
        for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True):
            model(ids[mask][None])
    for handle in handles:
        handle.remove()
    return {key: torch.cat(each).mean(0) for key, each in rows.items()}


def _replacing(columns: list[int], mean: torch.Tensor) -> Callable[..., Any]:
    def hook(module: Any, args: Any) -> Any:
        inputs = args[0].clone()
        inputs[..., columns] = mean[columns]
        return (inputs, *args[1:])

    return hook


def test_scores_equal_a_loop_in_float64(wide: Callable[..., Path]) -> None:
    model = loaded(wide("llama"))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    tokens = CalibrationTokens(IDS, mask, "test", 13, "")
    found: dict[tuple[int, str], Moments] = defaultdict(Moments)
    paths = ("self_attn.o_proj", "mlp.down_proj")
    visit_inputs(
        model, {2: paths}, tokens, lambda *key: found[key[:2]].add(key[2]), progress=False
    )  # fmt: skip
    rows: dict[str, list[torch.Tensor]] = defaultdict(list)
    for path in paths:
        decoder_layers(model)[2].get_submodule(path).register_forward_pre_hook(
            lambda m, args, path=path: rows[path].extend(args[0][0])
        )
    with torch.no_grad():
        model(IDS[:1])
        model(IDS[1:, :5])
    for path in paths:
        weight = decoder_layers(model)[2].get_submodule(path).weight.detach()
        assert len(rows[path]) == found[2, path].count == 13
        for j in (0, 7, 19):
            inputs = [float(row[j]) for row in rows[path]]
            mean = sum(inputs) / 13
            variance = sum((x - mean) ** 2 for x in inputs) / 12
            column = [float(w) for w in weight[:, j]]
            expected = {
                "IFV": variance,
                "WIFV": variance * sum(w * w for w in column),
                "WIFN": sum(map(abs, column)) / len(column)
                * (sum(x * x for x in inputs) / 13) ** 0.5,
            }  # fmt: skip
            for metric, value in expected.items():
                scores = column_score(metric, weight, found[2, path], 2)  # type: ignore[arg-type]
                assert float(scores[j]) == pytest.approx(value, rel=1e-9)


UNITS = Prunable(LayerWidths(4, 2, 6), 2, 100, 10, (2, 1), 1000, 100, 2)


def test_the_lowest_of_the_whole_model_go_until_the_share_is_reached() -> None:
    heads = [torch.tensor([0.0, 0, 0, 0, 9, 9, 9, 9]), torch.tensor([4.0, 4, 4, 4, 6, 6, 6, 6])]
    channels = [torch.tensor([0.0, 1, 2, 3, 4, 50]), torch.tensor([5.0, 4, 3, 2, 1, 0])]
    scores = {i: ColumnScores(heads[i], channels[i], {}) for i in range(2)}
    kept, plan = search(scores, UNITS, 0.13)
    # By hand: scores are -0.51, -0.46, … in layer 0 and ±1.34, ±0.80, ±0.27 in layer 1; both
    # groups of a layer are at ±0.94, whatever their scale.
    assert kept[1].channel.tolist() == [0, 1, 2, 3, 4]  # -1.34 goes first, 10 parameters
    assert kept[0].key_value.tolist() == [1] and kept[0].query.tolist() == [2, 3]  # 110
    assert kept[1].key_value.tolist() == [0, 1]  # the next, 210, would be further from 130
    assert kept[0].channel.tolist() == list(range(6)) and plan.removed == 110
    assert plan.threshold == pytest.approx(float(standardised(heads[0])[0]))
    kept, plan = search(scores, UNITS, 0.17, multiple=4, bias_cost=(20, 5))
    # Two of six channels leave a multiple of four; a bias is taken off what is removed first.
    assert plan.removed == 2 * (100 - 20) + (2 * 10 - 5)
    assert sorted(len(units.channel) for units in kept.values()) == [4, 6]


def test_every_layer_keeps_one_of_each_and_more_is_refused() -> None:
    same = ColumnScores(torch.ones(8), torch.ones(6), {})
    kept, _ = search({0: same, 1: same}, UNITS, 0.3)
    assert all(len(units.key_value) >= 1 and len(units.channel) >= 1 for units in kept.values())
    with pytest.raises(SparsityError, match=r"0\.5 is out of reach.*to 0\.3000"):
        search({0: same, 1: same}, UNITS, 0.5)
    with pytest.raises(SparsityError, match=r"1\.5 is not a share"):
        search({0: same, 1: same}, UNITS, 1.5)


def test_activations_that_are_not_finite_name_the_layer() -> None:
    moments = Moments()
    moments.add(torch.tensor([[1.0, float("inf")], [2.0, 3.0]]))
    with pytest.raises(NumericsError, match=r"layer 3\b.*NaN"):
        moments.variance(3)


def test_a_module_that_never_runs_is_refused_by_name(wide: Callable[..., Path]) -> None:
    model = loaded(wide("llama"))
    decoder_layers(model)[1].never = torch.nn.Linear(2, 2)
    tokens = CalibrationTokens(IDS, torch.ones_like(IDS, dtype=torch.bool), "test", 16, "")
    with pytest.raises(ArchitectureError, match=r"Layer 1 .*'never'"):
        visit_inputs(model, {1: ["never"]}, tokens, lambda *each: None, progress=False)


def test_biases_are_stored_only_where_something_went(
    wide: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    folder = wide("llama")
    changes = {"calibration_samples": 4, "sequence_length": 16, "sparsity": 0.1}
    out = compress(folder, make_recipe("flap", **changes), tmp_path / "a", progress=False)
    names = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    removed = json.loads((out / UNITS_FILE).read_text())
    widths = json.loads((out / "config.json").read_text())["layer_widths"]
    for layer, gone in removed.items():
        prefix = f"model.layers.{layer}."
        for kind, path, flag in (
            ("heads", "self_attn.o_proj", "output_bias"), ("channels", "mlp.down_proj", "down_bias")
        ):  # fmt: skip
            assert (f"{prefix}{path}.bias" in names) == bool(gone[kind])
            assert widths[int(layer)].get(flag, False) == bool(gone[kind])
    plain = make_recipe("flap", **changes, **{"parameters.compensate": False})
    out = compress(folder, plain, tmp_path / "b", progress=False)
    assert not any(n.endswith("bias") for f in out.glob("*.safetensors") for n in load_file(f))
