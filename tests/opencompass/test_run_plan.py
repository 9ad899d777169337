"""Which models and data sets a run has, and the config written for it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.compression import list_recipes, load_recipe
from streamline_bench.errors import OutputError, StreamlineBenchError
from streamline_bench.opencompass.run_plan import (
    ModelEntry,
    RunPlan,
    config_text,
    entries,
    write_configs,
)


def plan(**changes: Any) -> RunPlan:
    values: dict[str, Any] = {
        "models": entries("hub/model", ["dense", "streamline"], {"sparsity": 0.5, "a.b": 1}),
        "datasets": ("bundled", "piqa"),
        "options": {"device": "cpu"},
    }
    return RunPlan(**{**values, **changes})


def assigned(source: str, name: str) -> Any:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise AssertionError(name)


def test_models_of_the_config() -> None:
    dense, pruned = assigned(config_text(plan(batch_size=7, gpus=1)), "models")
    assert dense["type"] == "streamline_bench.opencompass.StreamlineModel"
    assert (dense["abbr"], dense["path"], dense["device"]) == ("dense", "hub/model", "cpu")
    assert "recipe" not in dense
    assert (pruned["recipe"], pruned["sparsity"], pruned["overrides"]) == (
        "streamline",
        0.5,
        {"a.b": 1},
    )
    assert (pruned["batch_size"], pruned["run_cfg"]) == (7, {"num_gpus": 1})


def test_each_recipe_gets_what_it_has_a_use_for() -> None:
    many = {"sparsity": 0.25, "training.epochs": 1}
    dense, sleb, streamline = entries("hub/model", ["dense", "sleb", "streamline"], many)
    assert not dense.overrides
    assert (sleb.overrides, streamline.overrides) == ({"sparsity": 0.25}, many)


@pytest.mark.parametrize(
    ("engine", "chat", "name"),
    [
        ("hf", True, "StreamlineChatModel"),
        ("vllm", False, "StreamlineVLLM"),
        ("vllm", True, "StreamlineVLLMChat"),
    ],
)
def test_class_of_the_config(engine: str, chat: bool, name: str) -> None:
    models = assigned(config_text(plan(engine=engine, chat=chat)), "models")
    assert models[0]["type"].endswith(f".{name}")


def test_data_sets_of_the_config() -> None:
    text = config_text(plan(datasets=("c3", "other.configs.arc:ARC_datasets"), limit=9))
    assert "from streamline_bench.opencompass.configs.paper import C3_datasets as" in text
    assert "from other.configs.arc import ARC_datasets as datasets_1" in text
    assert '"[0:9]"' in text
    assert "summarizer" not in text
    assert "SharedPrefix" in text
    assert "SharedPrefix" not in config_text(plan(share_prefixes=False))
    assert "import bundled_summarizer as summarizer" in config_text(plan())


def test_names_in_the_config_are_quoted() -> None:
    odd = ModelEntry("a", "x'\"\\\n]", "recipe'")
    assert assigned(config_text(plan(models=(odd,))), "models")[0]["path"] == "x'\"\\\n]"


def test_paths_are_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # OpenCompass runs in a folder of its own
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.yaml").touch()
    monkeypatch.chdir(tmp_path)
    made = entries("model", ["dense", "./mine.yaml"], {}, [("other", "model")])
    assert [each.path for each in made] == [str(tmp_path / "model")] * 3
    assert (made[1].label, made[1].recipe) == ("mine", str(tmp_path / "mine.yaml"))


def test_mistakes_are_named() -> None:
    with pytest.raises(StreamlineBenchError, match=r"called 'hellaswg'.*hellaswag"):
        plan(datasets=("hellaswg",))
    with pytest.raises(StreamlineBenchError, match="no data sets called"):
        plan(datasets=("os;import x:y",))
    with pytest.raises(StreamlineBenchError, match="Two models are called 'dense'"):
        plan(models=(ModelEntry("dense", "a"), ModelEntry("dense", "b")))
    with pytest.raises(StreamlineBenchError, match="cannot name a model"):
        ModelEntry("../dense", "a")


def test_every_recipe_gets_a_model_config(tmp_path: Path) -> None:
    names = write_configs(tmp_path)
    assert names == [f"recipe_{name}" for name in list_recipes()]
    for name in names:
        values: dict[str, Any] = {}
        exec((tmp_path / "models" / f"{name}.py").read_text(encoding="utf-8"), values)
        (entry,) = values["models"]
        recipe = load_recipe(name.removeprefix("recipe_"))
        assert entry.get("sparsity") == recipe.sparsity
        assert entry.get("recipe", "dense") == recipe.name
    assert (tmp_path / "datasets" / "streamline_paper.py").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        write_configs(tmp_path / "file")
