"""The sizes that methods name, beside the checkpoints that they make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.compression import compress, load_recipe
from streamline_bench.compression.recipes import applicable
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.machine.environment import bundled_model
from streamline_bench.core.surgery import cached_values
from streamline_bench.methods.base import Compression, Size, get_method
from streamline_bench.methods.rotation.slicegpt import SlicedSizes
from streamline_bench.modeling.loading import SourceModel

BRIEF = {
    "calibration": "auto", "sequence_length": 16, "calibration.samples": 16,
    "training.min_steps": 1, "training.epochs": 1, "training.data.samples": 8,
    "training.data.sequence_length": 16, "training.batch_size": 4,
}  # fmt: skip


def sizes_of(source: Path, name: str, **changes: Any) -> list[Size]:
    """The sizes of a recipe, whatever size it has itself."""
    recipe = load_recipe(name, changes)
    bare = recipe.model_copy(update={"sparsity": None, "n_layers": None})
    work = Compression(SourceModel.find(source), bare, Path())
    return list(get_method(recipe.method).sizes(work))


def made(source: Path, output: Path, name: str, size: Size, **changes: Any) -> CheckpointReader:
    given = applicable(BRIEF, load_recipe(name)) | changes | dict(size.given)
    return CheckpointReader(compress(source, load_recipe(name, given), output, progress=False))


def facts(reader: CheckpointReader) -> tuple[int, int, int]:
    return reader.num_parameters, reader.stored_bytes, sum(cached_values(reader) or ())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("last_layers", {}),
        ("llm_pruner", {"parameters.criterion": "l1"}),
        ("llm_pruner_uniform", {"parameters.criterion": "l1", "parameters.head_unit": "q_within"}),
        ("minitron", {}),
        (
            "minitron",
            {"parameters.axes": "stream,heads,channels", "parameters.head_unit": "kv_group"},
        ),
    ],
)
def test_every_size_of_the_bundled_model(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    sizes = sizes_of(bundled_model(), name, **changes)
    assert len({(size.parameters, size.cached) for size in sizes}) == len(sizes) >= 11
    every = {"minitron": max(1, len(sizes) // 2), "last_layers": 1}.get(name, 25)
    for number, size in enumerate(sizes):
        if number % every:
            continue  # written one by one, they would take minutes
        found = made(bundled_model(), tmp_path / str(number), name, size, **changes)
        assert facts(found) == (size.parameters, size.nbytes, size.cached)


@pytest.mark.parametrize(
    "name", ["streamline", "streamline_ffn_res", "ridge_map", "attention_drop", "slicegpt"]
)
def test_a_size_of_other_methods_is_that_of_its_checkpoint(
    name: str, recipe_source: Path, tmp_path: Path
) -> None:
    sizes = sizes_of(recipe_source, name)
    size = sizes[len(sizes) // 2]
    found = made(recipe_source, tmp_path / "made", name, size)
    assert facts(found) == (size.parameters, size.nbytes, size.cached)


@pytest.mark.parametrize("name", ["joint_drop", "flap"])
def test_where_the_parts_differ_it_is_the_most(
    name: str, recipe_source: Path, tmp_path: Path
) -> None:
    sizes = sizes_of(recipe_source, name)
    size = sizes[len(sizes) // 2]
    parameters, nbytes, cached = facts(made(recipe_source, tmp_path / "made", name, size))
    assert parameters <= size.parameters
    assert nbytes <= size.nbytes
    assert cached <= (size.cached or 0)


def test_every_number_of_experts(mixture_source: Path, tmp_path: Path) -> None:
    sizes = sizes_of(mixture_source, "expert_random")
    assert len(sizes) == 6  # of eight, a token is routed to two
    for size in sizes[::2]:
        found = made(mixture_source, tmp_path / str(size.nbytes), "expert_random", size)
        assert facts(found) == (size.parameters, size.nbytes, size.cached)


def test_sliced_sizes_are_those_of_models_built_at_every_width(
    make_tiny_model: Callable[..., Path],
) -> None:
    config = SourceModel.find(make_tiny_model("llama", num_hidden_layers=2)).config
    sizes = SlicedSizes(config, round_to=1)
    plans = {plan.width: plan.parameters for plan in sizes.every()}
    by_building = {width: sizes._parameters(width) for width in range(1, 32)}
    smaller = {width: count for width, count in by_building.items() if count < sizes.total}
    assert plans == smaller


def test_protected_layers_are_not_promised(recipe_source: Path) -> None:
    counts = {name: len(sizes_of(recipe_source, name)) for name in ("sleb", "streamline_none")}
    assert counts == {"sleb": 6, "streamline_none": 7}
    assert len(sizes_of(recipe_source, "replaceme_lstsq", **{"parameters.blocks": 3})) == 2
    assert len(sizes_of(recipe_source, "prune_comp", **{"parameters.selection": "sleb"})) == 6
