"""Every config of ours loads the way OpenCompass loads configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamline_bench.opencompass.run_plan import (
    DATASETS,
    RunPlan,
    config_text,
    entries,
    write_configs,
)

pytestmark = [
    pytest.mark.opencompass,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("opencompass"),
]


def load(path: Path) -> Any:
    from mmengine.config import Config

    return Config.fromfile(str(path), format_python_code=False)


def test_names_of_the_command_line(repository: Path) -> None:
    folder = repository / "tasks" / "opencompass"
    for path in sorted((folder / "datasets").glob("*.py")):
        found = load(path)
        assert [key for key in found if key.endswith("_datasets")], path
    for path in sorted((folder / "summarizers").glob("*.py")):
        assert load(path)["summarizer"]["dataset_abbrs"], path


def test_written_models_of_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in write_configs(tmp_path / "configs"):
        (entry,) = load(tmp_path / "configs" / "models" / f"{name}.py")["models"]
        assert f"recipe_{entry['abbr']}" == name
    folder = tmp_path / "configs" / "models"
    (pruned,) = load(folder / "recipe_streamline_ffn.py")["models"]
    assert (pruned["recipe"], pruned["sparsity"]) == ("streamline_ffn", 0.25)
    dense = folder / "recipe_dense.py"
    assert load(dense)["models"][0]["path"] == "meta-llama/Llama-2-7b-hf"
    monkeypatch.setenv("STREAMLINE_BENCH_MODEL", "/some/folder")
    assert load(dense)["models"][0]["path"] == "/some/folder"
    assert load(tmp_path / "configs" / "datasets" / "streamline_bundled.py")


def test_the_papers_benchmarks(repository: Path) -> None:
    configs = repository / "streamline_bench" / "opencompass" / "configs"
    found = load(configs / "paper.py")
    names = {each["abbr"] for each in found["paper_datasets"]}
    assert (len(found["classification_datasets"]), len(found["generation_datasets"])) == (135, 3)
    groups = load(configs / "summarizers.py")["paper_summarizer"]["summary_groups"]
    subsets = {group["name"]: group["subsets"] for group in groups}
    for line in subsets["streamline_classification"]:
        assert line in names or set(subsets[line]) <= names, line
    assert len(subsets["streamline_classification"]) == 12
    assert {name for name, _ in subsets["streamline_generation"]} <= names


def test_written_config_loads(tmp_path: Path) -> None:
    plan = RunPlan(
        models=entries("hub/model", ["dense", "streamline"], {"sparsity": 0.25}),
        # Every name but the large groups: dumping 300 data sets takes half a minute.
        datasets=tuple(
            name
            for name in DATASETS
            if name not in ("paper", "classification", "generation", "mmlu", "cmmlu")
        ),
        limit=3,
    )
    path = tmp_path / "config.py"
    path.write_text(config_text(plan), encoding="utf-8")
    found = load(path)
    assert [each["abbr"] for each in found["models"]] == ["dense", "streamline"]
    assert {each["reader_cfg"]["test_range"] for each in found["datasets"]} == {"[0:3]"}
    types = {str(each["infer_cfg"]["inferencer"]["type"]) for each in found["datasets"]}
    assert any("SharedPrefixPPLInferencer" in each for each in types)
    assert not any(each.rstrip("'>").endswith(".PPLInferencer") for each in types)
    found.dump(str(tmp_path / "dumped.py"))
    again = load(tmp_path / "dumped.py")
    assert len(again["datasets"]) == len(found["datasets"])


def test_bundled_data_set() -> None:
    from streamline_bench.errors import StreamlineBenchError
    from streamline_bench.opencompass.datasets import BundledDataset, ExactMatchEvaluator

    story = BundledDataset.load("story")
    assert set(story.column_names) == {"context", "gold", *(f"choice{i}" for i in range(4))}
    with pytest.raises(StreamlineBenchError, match="no bundled task 'stroy'"):
        BundledDataset.load("stroy")
    verdict = ExactMatchEvaluator().score([" a, b ", "a"], [["a, b"], "a, c"])
    assert verdict["score"] == 50
    assert [each["correct"] for each in verdict["details"]] == [True, False]
