"""LLM-Streamline on any choice of layers, at several cuts, and in several steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_in_memory import keep_layers
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.core.checkpoint.folder import Manifest, read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.recipe.schema import ReplacementSpec, TrainingSpec
from streamline_bench.core.training import train_replacement
from streamline_bench.errors import RecipeError, SparsityError
from streamline_bench.methods.base import Compression
from streamline_bench.modeling import register
from streamline_bench.modeling.loading import SourceModel, load_model

TWO_CUTS = [1, 2, 4, 5, 6]
STEPS = {"method": "streamline", "parameters": {"iterations": 2}}
QUICK = {
    "sequence_length": 16, "training.epochs": 1, "training.min_steps": 2,
    "training.data.samples": 16, "training.batch_size": 8, "training.warmup_steps": 0,
}  # fmt: skip


@pytest.fixture
def make(
    recipe_source: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> Callable[..., tuple[Path, Manifest]]:
    """Return a function: changes of the recipe ``streamline`` -> folder and manifest."""

    def made(
        name: str = "out", source: Path = recipe_source, recipe: str = "streamline", **changes: Any
    ) -> tuple[Path, Manifest]:
        if "layers" in changes:
            changes["parameters.selection"] = given(*changes.pop("layers"))
        settings = {**QUICK, **{key.replace("__", "."): v for key, v in changes.items()}}
        asked = make_recipe(recipe, **settings)
        out = compress(source, asked, tmp_path / name, progress=False)
        manifest = read_manifest(out)
        assert manifest is not None
        return out, manifest

    return made


def given(*layers: int) -> dict[str, Any]:
    return {"method": "given_layers", "parameters": {"layers": list(layers)}}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.tensor(name) for name in reader.names}


def assert_same(one: Path, two: Path) -> None:
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ["layer", "linear"])
def test_on_the_block_that_it_chooses_itself_the_result_is_its_own(
    make: Callable[..., tuple[Path, Manifest]], kind: str
) -> None:
    own, manifest = make("own", n_layers=2, replacement=kind)
    block = manifest.chosen["removed_layers"]
    assert len(block) == (3 if kind == "layer" else 2)
    listed, other = make("listed", n_layers=2, replacement=kind, layers=block)
    assert_same(own, listed)
    assert other.chosen["removed_layers"] == block and other.training == manifest.training | {
        "seconds": other.training["seconds"]
    }


def test_every_cut_gets_the_layer_that_a_training_of_its_own_gives(
    make: Callable[..., tuple[Path, Manifest]],
    recipe_source: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    out, manifest = make(n_layers=3, layers=TWO_CUTS)
    assert manifest.layers_after == 5 and manifest.chosen["removed_layers"] == TWO_CUTS
    recipe = make_recipe("streamline", **QUICK)
    work = Compression(SourceModel(recipe_source), recipe, tmp_path)
    found, source = tensors(out), tensors(recipe_source)
    for number, (start, n, place) in enumerate([(1, 2, 1), (4, 3, 3)]):
        alone = train_replacement(
            load_model(recipe_source, device="cpu"),
            start=start,
            n=n,
            spec=ReplacementSpec(kind="layer"),
            training=recipe.training,
            tokens=work.tokens(recipe.training.data),
            work=tmp_path / f"alone-{number}",
            seed=recipe.seed,
            progress=False,
        )
        for name, tensor in alone.state.items():
            new = f"model.layers.{place}.{name.removeprefix('0.')}"
            assert torch.equal(found[new], tensor.to(found[new].dtype)), new
        best = manifest.training["cuts"][number]["best_loss"]
        assert best == alone.summary["best_loss"]
    for place, origin in {0: 0, 2: 3, 4: 7}.items():
        name = f"model.layers.{place}.mlp.up_proj.weight"
        assert torch.equal(found[name], source[name.replace(f".{place}.", f".{origin}.")])
    rows = [json.loads(line) for line in (out / "training_curve.jsonl").read_text().splitlines()]
    losses = [cut["best_loss"] for cut in manifest.training["cuts"]]
    assert min(row["val_loss"] for row in rows if row["val_loss"]) >= sum(losses) / 2 - 1e-12


@pytest.mark.parametrize("kind", ["layer", "ffn_res"])
def test_untrained_replacements_change_nothing(
    make: Callable[..., tuple[Path, Manifest]], recipe_source: Path, kind: str
) -> None:
    """Copies of the first removed layers stay where they were; a residual network adds zero."""
    changes = {"replacement": kind, "objective": "none"}
    keep = [0, 1, 3, 4, 7] if kind == "layer" else [0, 3, 7]
    out, _ = make(n_layers=8 - len(keep), layers=TWO_CUTS, **changes)
    register()
    made = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(recipe_source, dtype=torch.float32).eval()
    keep_layers(model, keep)
    ids = torch.tensor([[1, 7, 23, 42, 11]])
    with torch.no_grad():
        assert torch.equal(made(ids).logits, model(ids).logits)


def test_with_the_lm_loss_all_cuts_are_trained_in_the_model_that_is_written(
    make: Callable[..., tuple[Path, Manifest]],
    recipe_source: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """The best validation loss is that of the checkpoint, computed by plain transformers."""
    changes = {"n_layers": 3, "objective": "lm"}
    out, manifest = make(layers=TWO_CUTS, training__min_steps=6, training__lr=3e-3, **changes)
    assert manifest.training["blocks"] == [[1, 2], [4, 3]]
    assert manifest.training["best_step"] > 0
    recipe = make_recipe("streamline", **QUICK)
    work = Compression(SourceModel(recipe_source), recipe, tmp_path)
    tokens = work.tokens(recipe.training.data)
    _, held_out = tokens.split(TrainingSpec().validation_share, recipe.seed)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [float(model(ids[None], labels=ids[None]).loss) for ids in held_out.input_ids]
    assert manifest.training["best_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    found, source = tensors(out), tensors(recipe_source)
    name = "model.layers.{}.self_attn.o_proj.weight"
    for place, origin, same in [(0, 0, True), (1, 1, False), (2, 3, True), (3, 4, False)]:
        assert torch.equal(found[name.format(place)], source[name.format(origin)]) is same


def test_in_two_steps_the_result_is_that_of_two_compressions(
    make: Callable[..., tuple[Path, Manifest]], recipe_source: Path
) -> None:
    text = str(recipe_source / "calibration.jsonl")
    changes = {"calibration": text, "training.lr": 3e-3}
    at_once, manifest = make("steps", recipe="streamline_iterative", n_layers=3, **changes)
    first, before = make("first", n_layers=2, **changes)
    (first / "streamline.json").unlink()  # what is compressed is not compressed again
    second, after = make("second", source=first, n_layers=1, **changes)
    assert_same(at_once, second)
    block = before.chosen["removed_layers"]
    left = [layer for layer in range(8) if layer not in block[1:]]
    later = [left[layer] for layer in after.chosen["removed_layers"]]
    steps = manifest.chosen["iterations"]
    assert [step["removed_layers"] for step in steps] == [block, later]
    assert manifest.chosen["removed_layers"] == sorted({*block, *later})
    assert manifest.layers_after == 5
    assert manifest.parameters_after == after.parameters_after
    last = (at_once / "training_curve.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == manifest.training["steps"] == 4


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"layers": [1, 4, 5]}, SparsityError, r"layers 1 to 1\b.*nothing is removed"),
        ({"layers": [1, 2, 3], "n_layers": 1}, SparsityError, "raise n_layers by 1"),
        ({"parameters.iterations": 3}, SparsityError, r"\b2 layers.*3 parts.*lower"),
        ({"parameters.iterations": 2, "replacement": "linear"}, RecipeError, "'linear'.*layer"),
        ({"parameters.iterations": 2, "layers": [1, 2, 3]}, RecipeError, "given_layers.*leave"),
        ({"parameters.selection": STEPS}, RecipeError, "at once.*leave iterations out"),
        ({"parameters.selection": "linear_patch"}, RecipeError, "does more than choose layers"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    make: Callable[..., tuple[Path, Manifest]],
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        make(**{"n_layers": 1 if changes.get("layers") == [1, 4, 5] else 2, **changes})
