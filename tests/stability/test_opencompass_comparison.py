"""Two OpenCompass runs compared: the paper's equation, the published script, and refusals."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.errors import ComparisonError, SamplesError
from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.comparison import Comparison
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.settings import Settings

FAST = Settings(draws=200)
SCRIPT = Settings(draws=200, mode="reference_script")

LABELS: dict[str, tuple[Any, ...]] = {
    "piqa": (0, 1),
    "C3": (0, 1, 2, 3),
    "commonsense_qa": ("A", "B", "C", "D", "E"),
    "cmnli": ("contradiction", "entailment", "neutral"),
    "chid-test": (0, 1, 2, 3, 4, 5, 6),
    "lukaemon_mmlu_anatomy": ("A", "B", "C", "D"),
    "lukaemon_mmlu_virology": ("A", "B", "C", "D"),
    "cmmlu-art": ("A", "B", "C", "D"),
    "cmmlu-law": ("A", "B", "C", "D"),
}
"""Data sets and labels that the published script knows."""

SCRIPT_FIGURES = {
    "piqa": 0.6035845497149581,
    "C3": 0.5965677408198635,
    "commonsense_qa": 0.6652209781732029,
    "cmnli": 0.5218647433150446,
    "chid-test": 0.690369719251954,
    "lukaemon_mmlu_anatomy": 0.6554584382480692,
    "lukaemon_mmlu_virology": 0.6793411328367517,
    "cmmlu-art": 0.6651985189098372,
    "cmmlu-law": 0.6520135702956787,
}

SCRIPT_AVERAGES = {"mmlu": 0.6673997855424104, "cmmlu": 0.658606044602758}
"""What the published script gives for the two folders of ``runs`` (numpy 2.4)."""


@pytest.fixture(scope="module")
def runs(opencompass_files: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a dense and of a pruned model, as the published script expects them."""
    root = tmp_path_factory.mktemp("runs")
    for seed, model in enumerate(("dense", "pruned"), start=1):
        for number, (name, labels) in enumerate(LABELS.items()):
            entries = opencompass_files.ppl(40 + 17 * number, seed=seed, labels=labels)
            opencompass_files.write(root / model, name, entries)
    return root / "dense", root / "pruned"


def compared(runs: tuple[Path, Path], settings: Settings = FAST, **keywords: Any) -> Comparison:
    dense, pruned = (
        load_samples(path, run=name, progress=False)
        for path, name in zip(runs, ("dense", "pruned"), strict=True)
    )
    return compare_answers(dense, pruned, settings=settings, **keywords)


def stabilities(result: Comparison) -> dict[str, float]:
    return {task.task: task.stability.value for task in result.tasks if task.stability}


def test_the_papers_equation_in_a_loop(runs: tuple[Path, Path]) -> None:
    """Equations 5 and 6 over the files themselves, without our table."""
    found = compared(runs)
    assert found.quantity == "mean_token_nll"
    assert set(stabilities(found)) == set(LABELS)
    for name, labels in LABELS.items():
        dense, pruned = (json.loads((run / f"{name}.json").read_text()) for run in runs)
        total = agreeing = 0.0
        for key, entry in dense.items():
            weight = math.exp(statistics.stdev(entry[f"label: {x}"]["PPL"] for x in labels))
            other = pruned[key]
            same = (entry["prediction"] == entry["gold"]) == (other["prediction"] == other["gold"])
            total, agreeing = total + weight, agreeing + weight * same
        assert stabilities(found)[name] == pytest.approx(agreeing / total, rel=1e-12)


def test_the_published_scripts_figures(runs: tuple[Path, Path]) -> None:
    found = stabilities(compared(runs, SCRIPT))
    assert found == pytest.approx(SCRIPT_FIGURES, rel=1e-14)
    assert found != pytest.approx(stabilities(compared(runs)), abs=1e-3)


@pytest.fixture(scope="module")
def script() -> Any:
    """The published script itself, where the environment says it is."""
    path = os.environ.get("STREAMLINE_BENCH_REFERENCE_SCRIPT")
    if not path:
        pytest.skip("set STREAMLINE_BENCH_REFERENCE_SCRIPT to LLM-Streamline's script to run it")
    spec = importlib.util.spec_from_file_location("published_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_beside_the_published_script(runs: tuple[Path, Path], script: Any) -> None:
    found = stabilities(compared(runs, SCRIPT))
    dense, pruned = runs
    for name, labels in LABELS.items():
        file = f"{name}.json"
        theirs = script.calculate_stability(str(pruned / file), str(dense / file), labels)
        assert found[name] == float(theirs), name


def test_beside_the_published_script_on_answers_of_another_type(
    opencompass_files: Any, tmp_path: Path, script: Any
) -> None:
    golds = [str(label) for label in opencompass_files.gold_labels(60, (0, 1))]
    for seed, name in enumerate(("dense", "pruned")):
        entries = opencompass_files.ppl(60, seed=seed, labels=(0, 1), golds=golds)
        opencompass_files.write(tmp_path / name, "piqa", entries)
    pair = (tmp_path / "dense", tmp_path / "pruned")
    files = [str(folder / "piqa.json") for folder in reversed(pair)]
    found = compared(pair, SCRIPT).tasks[0]
    assert found.stability is not None
    assert found.stability.value == float(script.calculate_stability(*files, (0, 1)))
    assert found.agreement.value == 1.0, "to the script, all answers are wrong"
    assert compared(pair).tasks[0].agreement.value < 1.0


def test_subjects_are_averaged_macro_and_micro(runs: tuple[Path, Path]) -> None:
    found = {group.group: group for group in compared(runs, SCRIPT).groups}
    assert set(found) == {"mmlu", "cmmlu"}
    for name, average in SCRIPT_AVERAGES.items():
        assert found[name].macro_stability is not None and found[name].stability is None
        assert found[name].macro_stability.value == pytest.approx(average, rel=1e-14)
    result = compared(runs)
    group = next(group for group in result.groups if group.group == "mmlu")
    tasks = [task for task in result.tasks if task.task in group.tasks]
    assert group.macro_pruned == pytest.approx(statistics.mean(t.pruned.value for t in tasks))
    assert group.macro_stability is not None and group.stability is not None
    values = [task.stability.value for task in tasks if task.stability]
    assert group.macro_stability.value == pytest.approx(statistics.mean(values))
    total = agreeing = 0.0
    for name in group.tasks:
        dense, pruned = (json.loads((run / f"{name}.json").read_text()) for run in runs)
        for key, entry in dense.items():
            weight = math.exp(statistics.stdev(entry[f"label: {x}"]["PPL"] for x in "ABCD"))
            right, right_now = (e["prediction"] == e["gold"] for e in (entry, pruned[key]))
            total, agreeing = total + weight, agreeing + weight * (right == right_now)
    assert group.stability.value == pytest.approx(agreeing / total, rel=1e-12)
    assert group.stability.low < group.stability.value < group.stability.high


def test_mixed_quantities_are_not_averaged(
    opencompass_files: Any, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    for seed, folder in enumerate(("dense", "pruned")):
        opencompass_files.write(tmp_path / folder, "arc", opencompass_files.ppl(9, seed=seed))
        entries = opencompass_files.ppl(9, seed=seed, name="Loglikelihood")
        opencompass_files.write(tmp_path / folder, "ll", entries)
        opencompass_files.write(tmp_path / folder, "clp", opencompass_files.clp(9, seed=seed))
    pair = (tmp_path / "dense", tmp_path / "pruned")
    with pytest.raises(SamplesError, match="mean_token_nll of 'arc', nll of 'll'"):
        compared(pair)
    assert compared(pair, tasks=["ll"]).quantity == "nll"
    both = compared(pair, tasks=["arc", "clp"])
    assert both.quantity == "mean_token_nll" and len(stabilities(both)) == 2


@pytest.fixture
def pair(opencompass_files: Any, tmp_path: Path) -> Callable[[list[Any], list[Any]], Any]:
    """Return a function that writes two data sets and compares them."""

    def write(dense: list[Any], pruned: list[Any]) -> Comparison:
        opencompass_files.write(tmp_path / "dense", "arc", dense)
        opencompass_files.write(tmp_path / "pruned", "arc", pruned)
        return compared((tmp_path / "dense", tmp_path / "pruned"))

    return write


def test_reordered_questions(opencompass_files: Any, pair: Any) -> None:
    entries = opencompass_files.ppl(10, seed=1)
    swapped = [*entries[:4], entries[5], entries[4], *entries[6:]]
    with pytest.raises(
        ComparisonError,
        match=r"document 4: the order of the documents differs.*'.*What is 4 .*What is 5 .*"
        r"2 of 10 rows differ; files .*dense.arc\.json and .*pruned.arc\.json",
    ):
        pair(entries, swapped)


def test_duplicated_question(opencompass_files: Any, pair: Any) -> None:
    entries = opencompass_files.ppl(10, seed=1)
    with pytest.raises(ComparisonError, match=r"document 6: the document differs .*1 of 10 rows"):
        pair(entries, [*entries[:6], entries[5], *entries[7:]])
    with pytest.raises(
        ComparisonError, match=r"10 documents .* and 11 .*first difference is document 6; files"
    ):
        pair(entries, [*entries[:6], entries[5], *entries[6:]])


def test_truncated_run(opencompass_files: Any, pair: Any) -> None:
    entries = opencompass_files.ppl(10, seed=1)
    with pytest.raises(ComparisonError, match=r"10 documents .* and 7 .*the first 7 are the same"):
        pair(entries, entries[:7])


def test_other_shots_and_other_golds(opencompass_files: Any, pair: Any) -> None:
    entries = opencompass_files.ppl(10, seed=1)
    shots = opencompass_files.ppl(10, seed=1, examples="Question: 1 + 1?\nAnswer: 2\n")
    with pytest.raises(ComparisonError, match=r"document 0: the prompt differs .*few-shot"):
        pair(entries, shots)
    golds = [*opencompass_files.gold_labels(10, "ABCD")[:9], "E"]
    with pytest.raises(ComparisonError, match="document 9: the expected answer differs"):
        pair(entries, opencompass_files.ppl(10, seed=2, golds=golds))


def test_other_data_sets(opencompass_files: Any, runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "20260101_120000" / "predictions" / "tiny"
    opencompass_files.write(folder, "piqa", opencompass_files.ppl(40, seed=2, labels=(0, 1)))
    opencompass_files.write_config(folder.parent.parent, "tiny", {"piqa": 1, "C3": 1})
    (tmp_path / "dense").mkdir()
    for name in ("piqa", "C3"):
        (tmp_path / "dense" / f"{name}.json").write_bytes((runs[0] / f"{name}.json").read_bytes())
    pair = (tmp_path / "dense", folder)
    with pytest.raises(
        ComparisonError, match=r"Only run 'dense' has task 'C3' \(there is no '.*C3\.json'"
    ):
        compared(pair)
    result = compared(pair, common_only=True)
    assert [task.task for task in result.tasks] == ["piqa"]
    assert "did not finish" in result.not_compared["C3"]


def test_engines_are_not_mixed(runs: tuple[Path, Path], lm_eval_outputs: Path) -> None:
    with pytest.raises(ComparisonError, match=r"differ in engine: .* of opencompass, .*lm-eval"):
        compared((runs[0], lm_eval_outputs / "dense"))


def test_two_engines_meet_only_where_it_is_allowed(opencompass_files: Any, tmp_path: Path) -> None:
    for seed, kind in enumerate(("HuggingFaceBaseModel", "VLLM", "HuggingFaceBaseModel")):
        run = tmp_path / str(seed) / "20260101_120000"
        entries = opencompass_files.ppl(20, seed=seed)
        opencompass_files.write(run / "predictions" / "tiny", "arc", entries)
        config = opencompass_files.write_config(run, "tiny", {"arc": 1})
        config.write_text(config.read_text().replace("HuggingFaceBaseModel", kind))
    dense, served, pruned = (load_samples(tmp_path / str(seed)) for seed in range(3))
    with pytest.raises(ComparisonError, match=r"'arc'.*by transformers.*by vLLM.*--across-engines"):
        compare_answers(dense, served, settings=FAST)
    assert compare_answers(dense, served, across_engines=True, settings=FAST).tasks
    assert compare_answers(dense, pruned, settings=FAST).tasks
