"""Arguments, recipes, reports and the response cache of ``StreamlineLM``, used as a library."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from streamline_bench.errors import CacheError, CheckpointError, RecipeError
from streamline_bench.harness.arguments import (
    _parameters_in_source,
    parameters_of,
    sort_arguments,
)
from streamline_bench.harness.lm import StreamlineLM
from streamline_bench.harness.model_creation import separate_cache

CPU = {"device": "cpu", "dtype": "float32", "batch_size": 4}
REQUESTS = [
    Instance("loglikelihood", {}, (f"w{i} w{i + 1} w{i + 2}", f" w{2 * i} w9"), 0)
    for i in range(12)
]
DROPPED = {"recipe": "streamline_none", "n_layers": 2}


@pytest.fixture
def calibration(tmp_path: Path) -> str:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(7 * i) % 96}" for i in range(4000)))
    return str(text)


@pytest.fixture
def dropped(calibration: str) -> dict[str, Any]:
    return {**DROPPED, "calibration": calibration, "sequence_length": 32}


def scores(model: Any) -> list[float]:
    return [score for score, _ in model.loglikelihood(REQUESTS, disable_tqdm=True)]


class TestArguments:
    def test_each_goes_where_it_belongs(self) -> None:
        sorted_ = sort_arguments(
            {
                "pretrained": "x",
                "dtype": "float32",
                "attn_implementation": "eager",
                "recipe": "streamline",
                "sparsity": 0.25,
                "replacement": None,
                "training.lr": 1e-3,
                "training": {"epochs": 2},
                "cache": "/tmp/c",
                "placement": "streamed",
            },
            parameters_of(HFLM),
        )
        assert sorted_.harness == {
            "pretrained": "x",
            "dtype": "float32",
            "attn_implementation": "eager",
        }
        assert sorted_.recipe == "streamline"
        assert sorted_.overrides == {
            "sparsity": 0.25,
            "replacement": "none",
            "training.lr": 1e-3,
            "training.epochs": 2,
        }
        assert (sorted_.cache, sorted_.placement) == ("/tmp/c", "streamed")

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [("sparisty", "sparsity"), ("max_lenght", "max_length"), ("recipie", "recipe")],
    )
    def test_a_mistyped_key_is_refused_with_the_right_one(self, wrong: str, right: str) -> None:
        with pytest.raises(RecipeError, match=rf"'{wrong}=1'; did you mean '{right}'\?"):
            sort_arguments({"pretrained": "x", wrong: 1}, parameters_of(HFLM))

    def test_what_the_models_config_holds_can_be_changed(self, tiny_llama: Path) -> None:
        given = {"pretrained": str(tiny_llama), "rms_norm_eps": 0.5, "load_in_8bit": False}
        own = parameters_of(HFLM)
        assert sort_arguments(given, own).harness == given
        with pytest.raises(RecipeError, match="'rms_norm_epsilon=1'"):
            sort_arguments(
                {"pretrained": str(tiny_llama), "rms_norm_epsilon": 1}, parameters_of(HFLM)
            )
        model = StreamlineLM(pretrained=str(tiny_llama), rms_norm_eps=0.5, **CPU)
        assert model.model.config.rms_norm_eps == 0.5

    def test_a_device_map_that_the_harness_would_not_follow(self) -> None:
        given = {"pretrained": "x", "device_map": "auto"}
        with pytest.raises(RecipeError, match="add it"):
            sort_arguments(given, parameters_of(HFLM))
        assert sort_arguments({**given, "parallelize": True}, parameters_of(HFLM)).harness

    def test_a_placement_needs_a_recipe(self) -> None:
        with pytest.raises(RecipeError, match=r"'placement=streamed'.* add recipe"):
            sort_arguments({"pretrained": "x", "placement": "streamed"}, parameters_of(HFLM))

    def test_a_recipe_key_needs_a_recipe(self) -> None:
        with pytest.raises(RecipeError, match=r"'n_layers=2' is part of a recipe"):
            sort_arguments({"pretrained": "x", "n_layers": 2}, parameters_of(HFLM))

    def test_a_wrong_dotted_key_is_refused(self, tiny_llama: Path) -> None:
        with pytest.raises(RecipeError, match=r"training\.lrr"):
            StreamlineLM(pretrained=str(tiny_llama), **CPU, **DROPPED, **{"training.lrr": 1})

    def test_the_early_check_knows_the_same_names(self) -> None:
        assert _parameters_in_source("huggingface", "HFLM") == parameters_of(HFLM)

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"sparsity": 0.5}, "recipe="),
            ({"recipe": "streamlin"}, "'streamline'"),
            ({"sparisty": 0.5}, "'sparsity'"),
            ({"pretrained": "bundled", "xyzzy": 1}, "'xyzzy=1'"),
            ({"pretrained": "/no/such/folder"}, "/no/such/folder does not exist"),
            ({"recipe": "streamline", "sparsity": 0.2, "n_layers": 1}, "not both"),
        ],
    )
    def test_the_early_check_needs_no_torch(self, arguments: dict[str, Any], named: str) -> None:
        program = (
            "import sys\n"
            "from streamline_bench.harness.bridge import refuse_wrong\n"
            "refuse_wrong('hf', {'sparisty': 1})\n"
            "refuse_wrong('streamline', {'pretrained': 'x', 'recipe': 'streamline'})\n"
            "try:\n"
            f"    refuse_wrong('streamline', {{'pretrained': 'x', **{arguments!r}}})\n"
            "except SystemExit as ended:\n"
            "    print(ended.code, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert ended.stdout.split() == ["2", "False", "False"]
        assert named in ended.stderr
        assert len(ended.stderr.splitlines()) == 1


class TestRefusals:
    def test_no_model(self) -> None:
        with pytest.raises(CheckpointError, match="add pretrained="):
            StreamlineLM(**CPU)

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist"):
            StreamlineLM(pretrained=str(tmp_path / "none"), **CPU)

    def test_missing_tokenizer(self, tiny_llama: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
        for path in folder.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(CheckpointError, match=r"No tokenizer can be loaded .*tokenizer=<"):
            StreamlineLM(pretrained=str(folder), **CPU)

    def test_a_recipe_and_a_model_object(self, tiny_llama: Path) -> None:
        model = HFLM(pretrained=str(tiny_llama), **CPU).model
        with pytest.raises(RecipeError, match="folder or hub id"):
            StreamlineLM(pretrained=model, recipe="streamline", **CPU)

    def test_a_recipe_on_a_compressed_model(
        self, tiny_llama: Path, dropped: dict[str, Any]
    ) -> None:
        first = StreamlineLM(pretrained=str(tiny_llama), **CPU, **dropped)
        with pytest.raises(RecipeError, match="compressed already"):
            StreamlineLM(pretrained=first.get_model_info()["streamline"]["path"], **CPU, **dropped)


class TestRecipes:
    def test_compressed_once_reused_afterwards_and_said(
        self, tiny_llama: Path, dropped: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, logger="streamline_bench"):
            first = StreamlineLM(pretrained=str(tiny_llama), **CPU, **dropped)
            assert "Compressed with recipe 'streamline_none'" in caplog.text
            assert "Reusing" not in caplog.text
            again = StreamlineLM(pretrained=str(tiny_llama), **CPU, **dropped)
        assert "Reusing the result of recipe 'streamline_none'" in caplog.text
        assert scores(first) == scores(again)

    def test_the_loaded_model_is_the_smaller_one_and_the_report_says_so(
        self, tiny_llama: Path, dropped: dict[str, Any]
    ) -> None:
        model = StreamlineLM(pretrained=str(tiny_llama), **CPU, **dropped)
        info = model.get_model_info()
        ours = info["streamline"]
        assert len(model.model.model.layers) == 4
        assert (ours["layers_before"], ours["layers_after"]) == (6, 4)
        assert ours["parameters_after"] == info["model_num_parameters"]
        assert ours["parameters_after"] < ours["parameters_before"]
        assert ours["recipe"]["name"] == "streamline_none"
        assert ours["source"]["name"] == str(tiny_llama)
        assert len(ours["content_key"]) == len(ours["weights_sha256"]) == 64
        # The folder by itself is the same model, for us and for the stock class.
        as_folder = StreamlineLM(pretrained=ours["path"], **CPU)
        stock = HFLM(pretrained=ours["path"], **CPU)
        assert scores(as_folder) == pytest.approx(scores(model), abs=1e-6)
        assert scores(stock) == pytest.approx(scores(model), abs=1e-4)
        assert as_folder.get_model_info()["streamline"]["layers_after"] == 4

    def test_another_cache_folder(
        self, tiny_llama: Path, dropped: dict[str, Any], tmp_path: Path
    ) -> None:
        model = StreamlineLM(
            pretrained=str(tiny_llama), **CPU, **dropped, cache=str(tmp_path / "own")
        )
        assert Path(model.get_model_info()["streamline"]["path"]).is_relative_to(tmp_path / "own")


class TestResponseCache:
    def test_two_models_in_one_file_keep_their_answers(
        self, tiny_llama: Path, dropped: dict[str, Any], tmp_path: Path
    ) -> None:
        file = str(tmp_path / "answers.db")
        dense = StreamlineLM(pretrained=str(tiny_llama), **CPU)
        pruned = StreamlineLM(pretrained=str(tiny_llama), **CPU, **dropped)
        expected = scores(dense), scores(pruned)
        assert expected[0] != expected[1]
        for _ in range(2):
            assert ask(CachingLM(dense, file)) == expected[0]
            assert ask(CachingLM(pruned, file)) == expected[1]

    def test_the_same_model_again_is_not_asked(
        self, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = str(tmp_path / "answers.db")
        first = ask(CachingLM(StreamlineLM(pretrained=str(tiny_llama), **CPU), file))
        second = StreamlineLM(pretrained=str(tiny_llama), **CPU)
        monkeypatch.setattr(second, "_loglikelihood_tokens", None)
        assert ask(CachingLM(second, file)) == first

    def test_other_settings_or_weights_are_another_model(
        self, make_tiny_model: Callable[..., Path], tmp_path: Path
    ) -> None:
        folder = make_tiny_model("llama", num_hidden_layers=2)
        other = Path(shutil.copytree(folder, tmp_path / "other"))
        state = load_file(other / "model.safetensors")
        state["model.norm.weight"] = torch.flip(state["model.norm.weight"], [0]) * 1.5
        save_file(state, other / "model.safetensors", metadata={"format": "pt"})
        models = [
            StreamlineLM(pretrained=str(folder), **CPU),
            StreamlineLM(pretrained=str(other), **CPU),
            StreamlineLM(pretrained=str(folder), **CPU, add_bos_token=True),
            StreamlineLM(pretrained=str(folder), **{**CPU, "dtype": "bfloat16"}),
            StreamlineLM(pretrained=str(folder), **CPU, max_length=64),
        ]
        assert len({model._identity() for model in models}) == len(models)
        same = StreamlineLM(pretrained=str(folder), **{**CPU, "batch_size": 1})
        assert same._identity() == models[0]._identity()

    def test_a_model_object_is_named_by_its_weights(self, tiny_llama: Path) -> None:
        stock = HFLM(pretrained=str(tiny_llama), **CPU)
        first = StreamlineLM(pretrained=stock.model, tokenizer=stock.tokenizer, batch_size=4)
        before = first._identity()
        with torch.no_grad():
            stock.model.model.norm.weight.mul_(2)
        second = StreamlineLM(pretrained=stock.model, tokenizer=stock.tokenizer, batch_size=4)
        assert second._identity() != before

    def test_a_cache_of_another_kind_is_refused(self) -> None:
        with pytest.raises(CacheError, match="without --use_cache"):
            separate_cache({}, "x")


def ask(model: CachingLM) -> list[float]:
    return [score for score, _ in model.loglikelihood(REQUESTS)]


@pytest.mark.parametrize("device", ["cuda:9", "meta", "mps:1"])
def test_another_device_than_was_asked_for_is_refused(tiny_llama: Path, device: str) -> None:
    if torch.cuda.device_count() > 9:
        pytest.skip("this machine has the GPU that must be missing")
    # The stock class computes elsewhere without a word.
    assert HFLM(pretrained=str(tiny_llama), device=device).device.type in ("cpu", "cuda")
    with pytest.raises(RecipeError, match=f"'{device}'"):
        StreamlineLM(pretrained=str(tiny_llama), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["auto", "cuda:0", "cpu"])
def test_where_no_device_is_asked_for_it_is_the_harness_s_choice(
    tiny_llama: Path, device: str
) -> None:
    # Its command line says cuda:0 where its user says nothing.
    assert StreamlineLM(pretrained=str(tiny_llama), device=device).device.type == "cpu"


@pytest.mark.parametrize(
    ("units", "given", "dtype"),
    [
        (False, {}, torch.float32),
        (True, {}, torch.bfloat16),
        (False, {"dtype": "auto"}, torch.bfloat16),
        (False, {"dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_bfloat16_where_the_cpu_has_no_units_for_it(
    units: bool,
    given: dict[str, str],
    dtype: torch.dtype,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("streamline_bench.harness.lm.has_bfloat16_units", lambda: units)
    half = tmp_path / "half"
    shutil.copytree(tiny_llama, half)
    AutoModelForCausalLM.from_pretrained(tiny_llama).bfloat16().save_pretrained(half)
    with caplog.at_level(logging.INFO, "streamline_bench"):
        ours = StreamlineLM(str(half), device="cpu", batch_size=4, **given)
    assert ours.model.dtype == dtype
    assert ("no units" in caplog.text) is (dtype == torch.float32)
    stock = HFLM(str(half), device="cpu", batch_size=4, dtype=dtype)
    assert scores(ours) == pytest.approx(scores(stock), abs=1e-4 if dtype == torch.float32 else 0.1)


def test_chat_templates_that_differ_are_named(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers takes the template of one file without a word; so would the harness."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0]['content'] }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    StreamlineLM(str(folder), **CPU)
    assert "tokenizer_config.json" not in caplog.text
    (folder / "chat_template.jinja").write_text("{{ messages[0]['role'] }}")
    StreamlineLM(str(folder), **CPU)
    assert "chat_template.jinja" in caplog.text and "tokenizer_config.json" in caplog.text
