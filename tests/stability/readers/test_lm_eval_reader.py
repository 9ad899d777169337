"""Reading real outputs of the stock lm_eval, and refusing damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.readers.lm_eval_reader import find_results, read_lm_eval
from streamline_bench.stability.samples import Samples


def read(path: Path, **keywords: str) -> Samples:
    return read_lm_eval(path, progress=False, **keywords)


@pytest.fixture(scope="module")
def dense(lm_eval_outputs: Path) -> Samples:
    return read(lm_eval_outputs / "dense")


@pytest.fixture
def copied(lm_eval_outputs: Path, tmp_path: Path) -> Path:
    """A copy of the dense output, to damage; returns the model's folder."""
    shutil.copytree(lm_eval_outputs / "dense", tmp_path / "out")
    return find_results(tmp_path / "out").parent


def samples_file(folder: Path, task: str) -> Path:
    return next(folder.glob(f"samples_{task}_*.jsonl"))


def edit_line(file: Path, number: int, change: Callable[[dict], None]) -> None:
    lines = file.read_text().splitlines()
    row = json.loads(lines[number])
    change(row)
    lines[number] = json.dumps(row)
    file.write_text("\n".join(lines) + "\n")


def test_any_level_of_the_output_is_understood(lm_eval_outputs: Path, dense: Samples) -> None:
    file = find_results(lm_eval_outputs / "dense")
    for path in (lm_eval_outputs / "dense", file.parent, file):
        assert read(path).info.source == dense.info.source == str(file)


def test_predictions_reproduce_the_harness_metrics(dense: Samples) -> None:
    """argmax of our columns, compared with the gold, must give lm-eval's own acc and acc_norm."""
    rows = dense.frame[dense.frame["task"] == "toy_mc"]
    assert len(rows) == 40
    for _, row in rows.iterrows():
        gold = json.loads(row["target"])
        assert row["gold"] == gold
        assert row["metrics"]["acc"] == float(row["prediction"] == gold)
        assert row["metrics"]["acc_norm"] == float(row["prediction_norm"] == gold)
        assert row["lengths"] == [len(choice) for choice in row["choices"]]
        assert row["byte_lengths"] == row["lengths"]
    assert rows["correct"].mean() == dense.info.results["toy_mc"]["acc,none"]
    assert rows["correct_norm"].mean() == dense.info.results["toy_mc"]["acc_norm,none"]
    assert len(set(rows["prediction"])) > 2, "a fixture in which nothing varies proves nothing"


def test_choices_inside_the_context(dense: Samples) -> None:
    """As in winogrande: the contexts differ, the scored ending is the same."""
    rows = dense.frame[dense.frame["task"] == "toy_fill"]
    for _, row in rows.iterrows():
        assert len(set(row["lengths"])) == 1
        first, second = row["choices"]
        assert first != second
        assert first.endswith(row["target"]) and second.endswith(row["target"])
        assert bool(row["correct"]) == (row["prediction"] == row["gold"])
    assert rows["prediction_norm"].isna().all()
    assert set(rows["gold"]) == {0, 1}


def test_other_output_types(dense: Samples) -> None:
    frame = dense.frame
    generated = frame[frame["task"] == "toy_gen"]
    assert set(generated["filter"]) == {"strict", "first"}
    assert len(generated) == 10
    assert generated["text"].str.startswith("w").all()
    assert generated["choices"].isna().all()
    assert set(generated["verdict_metric"]) == {"exact_match"}
    likelihood = frame[frame["task"] == "toy_ll"]
    assert [len(values) for values in likelihood["loglikelihoods"]] == [1] * 5
    assert likelihood["correct"].notna().all() and likelihood["prediction"].isna().all()
    rolling = frame[frame["task"] == "toy_roll"]
    assert rolling["correct"].isna().all()
    total = sum(values["word_perplexity.0"] for values in rolling["metrics"])
    words = sum(values["word_perplexity.1"] for values in rolling["metrics"])
    expected = dense.info.results["toy_roll"]["word_perplexity,none"]
    assert np.exp(-total / words) == pytest.approx(expected, rel=1e-9)


def test_metadata(dense: Samples) -> None:
    info = dense.info
    assert info.engine == "lm-eval" and info.engine_version
    assert info.task_versions["toy_mc"] == "1.0"
    assert info.n_shot["toy_mc"] == 0
    assert info.groups == {"toy_group": ["toy_mc", "toy_gen"]}
    assert "pretrained" in info.config["model_args"]
    assert info.chat_template is None and info.limit is None
    assert info.seconds is not None and info.seconds > 0


def test_newest_evaluation_unless_told(copied: Path) -> None:
    old = find_results(copied).name.removeprefix("results_").removesuffix(".json")
    for file in list(copied.iterdir()):
        shutil.copy(file, file.with_name(file.name.replace(old, "2999-01-01T00-00-00")))
    assert read(copied).info.timestamp == "2999-01-01T00-00-00"
    assert read(copied, timestamp=old).info.timestamp == old
    with pytest.raises(SamplesError, match="no evaluation of 2001"):
        read(copied, timestamp="2001-01-01T00-00-00")


def test_several_models_in_one_folder_are_ambiguous(lm_eval_outputs: Path) -> None:
    with pytest.raises(SamplesError, match=r"several models .*name one of them"):
        read(lm_eval_outputs)


def test_no_results(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(SamplesError, match=r"There is no results_<time>\.json"):
        read(tmp_path)


def test_foreign_json(copied: Path) -> None:
    find_results(copied).write_text("[]")
    with pytest.raises(SamplesError, match="not a results file of lm-eval"):
        read(copied)


def test_truncated_results(copied: Path) -> None:
    file = find_results(copied)
    file.write_text(file.read_text()[:500])
    with pytest.raises(SamplesError, match=r"line \d+: not valid JSON"):
        read(copied)


def test_missing_samples_name_the_option(copied: Path) -> None:
    samples_file(copied, "toy_mc").unlink()
    with pytest.raises(SamplesError, match=r"samples_toy_mc.* is missing.*--log_samples"):
        read(copied)


def test_cut_in_the_middle_of_a_line(copied: Path) -> None:
    file = samples_file(copied, "toy_mc")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SamplesError, match=r"toy_mc.*line 40: not valid JSON"):
        read(copied)


def test_cut_between_lines(copied: Path) -> None:
    file = samples_file(copied, "toy_mc")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(SamplesError, match=r"has 37 documents.*made from 40"):
        read(copied)


def test_rows_of_another_evaluation(copied: Path) -> None:
    edit_line(samples_file(copied, "toy_mc"), 3, lambda row: row.update(doc_hash="0" * 64))
    with pytest.raises(SamplesError, match="does not belong to its results file"):
        read(copied)


def test_missing_field_names_file_and_line(copied: Path) -> None:
    edit_line(samples_file(copied, "toy_mc"), 2, lambda row: row.pop("prompt_hash"))
    with pytest.raises(SamplesError, match="line 3: field 'prompt_hash' is missing"):
        read(copied)


def test_wrong_form_names_file_and_line(copied: Path) -> None:
    edit_line(samples_file(copied, "toy_mc"), 4, lambda row: row.update(filtered_resps=[["x"]]))
    with pytest.raises(SamplesError, match="line 5: not a sample of lm-eval's form"):
        read(copied)
    samples_file(copied, "toy_mc").write_text("[1, 2]\n")
    with pytest.raises(SamplesError, match="must be a JSON object, not list"):
        read(copied)


def test_nan_names_the_document(copied: Path) -> None:
    def poison(row: dict) -> None:
        row["filtered_resps"][1][0] = "nan"

    edit_line(samples_file(copied, "toy_mc"), 6, poison)
    with pytest.raises(NumericsError, match=r"task 'toy_mc', document 6, choice 1 .* nan"):
        read(copied)


def test_task_names_cannot_leave_the_folder(copied: Path) -> None:
    file = find_results(copied)
    payload = json.loads(file.read_text())
    payload["configs"]["../../etc"] = {}
    payload["versions"]["../../etc"] = 1
    file.write_text(json.dumps(payload))
    with pytest.raises(SamplesError, match="not a task name"):
        read(copied)
