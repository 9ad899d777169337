"""sleb: every step equals a search over separately pruned models; the search resumes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_in_memory import keep_layers
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.compression.cache import cache_root
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.errors import SparsityError
from streamline_bench.methods.base import Compression
from streamline_bench.methods.depth import sleb
from streamline_bench.modeling.loading import SourceModel


def _greedy(work: Compression, n: int) -> tuple[list[int], list[float]]:
    model = AutoModelForCausalLM.from_pretrained(work.folder).eval()
    ids = work.tokens(work.recipe.calibration).input_ids
    removed: list[int] = []
    reached: list[float] = []
    for _ in range(n):
        losses = {}
        for layer in range(1, 5):
            if layer in removed:
                continue
            pruned = copy.deepcopy(model)
            keep_layers(pruned, [i for i in range(6) if i not in (*removed, layer)])
            with torch.no_grad():
                losses[layer] = pruned(ids, labels=ids).loss.item()
        removed.append(min(losses, key=losses.__getitem__))
        reached.append(losses[removed[-1]])
    return removed, reached


@pytest.fixture(scope="module")
def folder(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("llama", initializer_range=0.2, seed=7)


def test_steps_equal_a_search_over_separate_models(
    folder: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    recipe = make_recipe("sleb", n_layers=3)
    order, losses = _greedy(Compression(SourceModel(folder), recipe, tmp_path), 3)
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.chosen["order"] == order
    assert manifest.chosen["loss_after_step"] == pytest.approx(losses, rel=1e-6)
    same_as_surgery(out, folder, order)


def test_an_interrupted_search_goes_on(
    folder: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe("sleb", n_layers=3)
    whole = compress(folder, recipe, tmp_path / "whole", progress=False)
    shutil.rmtree(cache_root() / "scans")
    calls: list[list[int]] = []
    search = sleb.skip_losses

    def interrupted(*given: Any, removed: Any, **rest: Any) -> Any:
        calls.append(removed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(*given, removed=removed, **rest)

    monkeypatch.setattr(sleb, "skip_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(folder, recipe, tmp_path / "out", progress=False)
    (kept,) = (cache_root() / "scans").rglob("*-sleb-*-steps.json")
    assert len(json.loads(kept.read_text(encoding="utf-8"))) == 2
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    assert [len(removed) for removed in calls] == [0, 1, 2, 2]
    facts = [read_manifest(path) for path in (whole, out)]
    assert all(fact is not None for fact in facts)
    assert facts[0].chosen == facts[1].chosen  # type: ignore[union-attr]


def test_barriers_make_the_size_unreachable(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(SparsityError, match=r"\b4\b.*protect"):
        compress(tiny_llama, make_recipe("sleb", n_layers=5), tmp_path / "out", progress=False)
