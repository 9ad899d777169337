"""What every recipe of ``baselines/`` makes is a folder that transformers and lm-eval load."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM

from streamline_bench.compression import list_recipes, load_recipe
from streamline_bench.compression.pipeline import SHARED_VERSION
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.training.trainer import TRAINING_VERSION
from streamline_bench.harness.lm import StreamlineLM
from streamline_bench.methods.base import get_method
from streamline_bench.methods.recovery.recover import RECOVERY_VERSION
from streamline_bench.modeling import register


@pytest.fixture(params=list(list_recipes()))
def checkpoint(request: pytest.FixtureRequest, recipe_checkpoint: Callable[[str], Path]) -> Path:
    return recipe_checkpoint(request.param)


def test_the_checkpoint_is_stock_where_a_stock_class_can_express_it(
    checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["checkpoint"]
    register()
    model, report = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    recipe = load_recipe(name)
    stock = get_method(recipe.method).stock(recipe)
    manifest = read_manifest(checkpoint)
    removed = manifest.chosen.get("removed_sublayers") if manifest else None
    if removed and removed["attention"] == removed["mlp"]:  # whole layers only
        stock = True
    source = "mixtral" if recipe.mixtures_only else "llama"
    assert model.config.model_type == (source if stock else "streamline")
    if name == "dense":
        assert manifest is None
    else:
        assert sum(p.numel() for p in model.parameters()) == manifest.parameters_after
        assert manifest.parameters_after < manifest.parameters_before


def test_cached_generation_equals_repeated_full_forwards(checkpoint: Path) -> None:
    register()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 7, 23, 42, 11]])
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with torch.no_grad():
        for _ in range(8):
            logits = model(ids, use_cache=False).logits[0, -1]
            logits[model.config.eos_token_id] = -torch.inf  # as min_new_tokens does
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    assert cached.tolist() == ids.tolist()


def test_the_harness_scores_it_as_transformers_does(checkpoint: Path) -> None:
    lm = StreamlineLM(str(checkpoint), device="cpu", dtype="float32")
    pairs = [("w1 w2 w3", " w4"), ("w1 w2 w3", " w11 w12"), ("w9 w8", " w13 w14 w15")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for (context, choice), (score, _) in zip(pairs, lm.loglikelihood(requests), strict=True):
        whole, start = lm.tok_encode(context + choice), len(lm.tok_encode(context))
        with torch.no_grad():
            logits = lm.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        expected = sum(float(logits[i - 1, whole[i]]) for i in range(start, len(whole)))
        assert score == pytest.approx(expected, abs=1e-4)


GOLDEN = Path(__file__).with_name("golden.json")
RENEW = "pytest tests/methods/test_every_recipe.py -k same_tensors --update-golden"


@pytest.mark.parametrize("name", [each for each in list_recipes(built_in=True) if each != "dense"])
def test_a_version_of_a_method_gives_the_same_tensors(
    name: str,
    recipe_source: Path,
    mixture_source: Path,
    recipe_checkpoint: Callable[[str], Path],
    request: pytest.FixtureRequest,
) -> None:
    """The cache would return results of earlier arithmetic if a change did not raise a version."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    recipe = load_recipe(name)
    source = mixture_source if recipe.mixtures_only else recipe_source
    found = _portrait(recipe_checkpoint(name), source)
    versions = _versions(recipe)
    known = golden.get(name)
    same = known is not None and _agree(known, found)
    kind = type(get_method(recipe.method)).__name__
    advice = (
        f"{name} gives other tensors than tests/methods/golden.json has: raise {kind}.version, or "
        f"TRAINING_VERSION, RECOVERY_VERSION or SHARED_VERSION where that is what changed, and "
        f"then renew the file ({RENEW})."
    )
    if request.config.getoption("--update-golden"):
        assert same or known is None or versions != known["versions"], advice
        entries = {**golden, name: {"versions": versions, **(known if same else found)}}
        entries[name]["versions"] = versions
        rows = (f"{json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries))
        GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
        return
    assert same, advice
    assert versions == known["versions"], f"A version was raised: renew the file ({RENEW})."


def _versions(recipe: Recipe) -> dict[str, int]:
    found = {"shared": SHARED_VERSION, "method": get_method(recipe.method).version}
    if recipe.replacement.kind != "none" or recipe.recovery:
        found["training"] = TRAINING_VERSION
    return {**found, "recovery": RECOVERY_VERSION} if recipe.recovery else found


def _portrait(folder: Path, source: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, in a form that agrees between machines.

    Config, names, shapes, dtypes, and which tensors are copies of which are exact: one digest. New
    tensors are computed, and sums of floats depend on the processor's vectors, so that a digest of
    their bytes or of rounded values would differ somewhere on the next machine. They are kept as
    numbers, by kind of tensor: norm, and a fixed projection of the absolute values (the sign of a
    principal axis is the solver's choice).
    """
    reader = CheckpointReader(folder)
    dense = CheckpointReader(source)
    originals = {_bytes(dense.tensor(name)): name for name in dense.names}
    config = dict(reader.config)
    # The older names of entries, for readers of earlier releases, repeat what others say.
    for key in ("transformers_version", "torch_dtype", "rope_theta"):
        config.pop(key, None)
    exact: list[Any] = [config]
    computed: dict[str, list[float]] = {}
    for name in sorted(reader.names):
        tensor = reader.tensor(name)
        copied = originals.get(_bytes(tensor))
        exact.append([name, str(tensor.dtype), list(tensor.shape), copied])
        if copied is None:
            flat = tensor.double().flatten().abs()
            wave = torch.cos(0.7 * torch.arange(len(flat), dtype=torch.float64))
            sums = computed.setdefault(re.sub(r"\.\d+\.", ".N.", name), [0.0, 0.0])
            sums[0] += float(flat.square().sum())
            sums[1] += float((flat * wave).sum())
    digest = hashlib.sha256(json.dumps(exact, sort_keys=True).encode()).hexdigest()
    values = {role: [round(s**0.5, 7), round(p, 7)] for role, (s, p) in computed.items()}
    return {"exact": digest[:16], "computed": values}


def _bytes(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).digest()


def _agree(known: dict[str, Any], found: dict[str, Any]) -> bool:
    if known["exact"] != found["exact"] or known["computed"].keys() != found["computed"].keys():
        return False
    return all(
        values == pytest.approx(found["computed"][role], abs=1e-4 * (values[0] + 1e-6))
        for role, values in known["computed"].items()
    )


def test_the_golden_file_has_ours_and_no_other() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert {*golden, "dense"} == set(list_recipes(built_in=True))
