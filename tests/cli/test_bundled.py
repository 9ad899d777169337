"""``bundled`` names the model that comes along, in every command that takes a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from streamline_bench.core.checkpoint.folder import resolve_pretrained
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.machine.environment import bundled_model

MODEL = bundled_model()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder of that name lies here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAMLINE_BENCH_CACHE", str(tmp_path / "cache"))


def test_scan_compress_and_divergence(call: Callable[..., Any], tmp_path: Path) -> None:
    sizes = ("--samples", 1, "--sequence-length", 16, "--device", "cpu")
    scanned = call("scan", "bundled", *sizes, "--json")
    assert scanned.code == 0, scanned.err
    assert (
        json.loads(scanned.out)["num_layers"] == CheckpointReader(MODEL).config["num_hidden_layers"]
    )
    out = tmp_path / "out"
    made = call(
        "compress", "bundled", "--recipe", "last_layers", "--n-layers", 6, "-o", out,
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert made.code == 0, made.err
    source = json.loads(made.out)["source"]
    assert source == {
        "name": "bundled",
        "revision": None,
        "weights_sha256": CheckpointReader(MODEL).fingerprint(progress=False),
    }
    compared = call(
        "divergence", "bundled", out, MODEL / "held_out.jsonl", "--documents", 1,
        "--window", 16, "--device", "cpu", "--json",
    )  # fmt: skip
    assert compared.code == 0, compared.err
    assert json.loads(compared.out)["kl"]["value"] > 0


def test_throughput_opencompass_and_lm_eval(call: Callable[..., Any]) -> None:
    from streamline_bench.harness.arguments import parameters_of, sort_arguments
    from streamline_bench.harness.preparation import prepare
    from streamline_bench.opencompass.run_plan import RunPlan, entries, source_keys
    from streamline_bench.opencompass.source import entry_source

    refused = call("throughput", "bundled", "./absent", "--device", "cpu")
    assert (refused.code, "Model folder ./absent does not exist" in refused.err) == (2, True)
    assert prepare(
        sort_arguments({"pretrained": "bundled"}, parameters_of(HFLM))
    ).pretrained == str(MODEL)
    (dense,) = entries("bundled", ["dense"], {})
    keys = source_keys(RunPlan((dense,), ("piqa",)), dense)
    assert entry_source(**keys).prepared.pretrained == str(MODEL)
    recipe = {"pretrained": "bundled", "recipe": "last_layers", "n_layers": 6, "device": "cpu"}
    made = prepare(sort_arguments(recipe, parameters_of(HFLM)))
    assert made.manifest is not None
    assert made.manifest.source.name == "bundled"


def test_a_folder_of_that_name_comes_first(tiny_llama: Path, tmp_path: Path) -> None:
    from streamline_bench.cli.compare import is_bundled
    from streamline_bench.harness.arguments import parameters_of, sort_arguments
    from streamline_bench.harness.preparation import prepare

    assert is_bundled("bundled")
    shutil.copytree(tiny_llama, tmp_path / "bundled")
    assert not is_bundled("bundled")
    assert resolve_pretrained("bundled") == Path("bundled")
    # A relative name without "./" is the harness's business, which takes the folder too.
    assert (
        prepare(sort_arguments({"pretrained": "bundled"}, parameters_of(HFLM))).pretrained
        == "bundled"
    )
