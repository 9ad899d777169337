"""Reading real outputs of the stock lm_eval, and refusing damaged ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.readers.lm_eval_reader import _Results, read_lm_eval
from streamline_bench.stability.readers.load import load_samples
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
    return max((tmp_path / "out").rglob("results_*.json")).parent


def samples_file(folder: Path, task: str) -> Path:
    return next(folder.glob(f"samples_{task}*.jsonl"))


def edit_line(file: Path, number: int, change: Callable[[dict], None]) -> None:
    lines = file.read_text().splitlines()
    row = json.loads(lines[number])
    change(row)
    lines[number] = json.dumps(row)
    file.write_text("\n".join(lines) + "\n")


def test_any_level_of_the_output_is_understood(lm_eval_outputs: Path, dense: Samples) -> None:
    file = max((lm_eval_outputs / "dense").rglob("results_*.json"))
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


OLD = "2020-01-01T00-00-00"


def evaluate_again(
    folder: Path, tasks: tuple[str, ...], change: Callable[[dict], None] = lambda results: None
) -> Path:
    """Put an older evaluation of some tasks beside the one that is there; its results file."""
    newest = max(folder.rglob("results_*.json"))
    time = newest.name.removeprefix("results_").removesuffix(".json")
    results = json.loads(newest.read_text())
    results["configs"] = {task: results["configs"][task] for task in tasks}
    change(results)
    older = newest.with_name(f"results_{OLD}.json")
    older.write_text(json.dumps(results))
    for task in tasks:
        file = newest.with_name(f"samples_{task}_{time}.jsonl")
        shutil.copy(file, file.with_name(f"samples_{task}_{OLD}.jsonl"))
    return older


def keep_only(folder: Path, tasks: tuple[str, ...]) -> None:
    """The newest evaluation asked these tasks only."""
    newest = max(folder.rglob("results_*.json"))
    results = json.loads(newest.read_text())
    results["configs"] = {task: results["configs"][task] for task in tasks}
    newest.write_text(json.dumps(results))


def test_a_run_made_task_by_task_is_one_run(copied: Path, dense: Samples) -> None:
    evaluate_again(copied, ("toy_fill", "toy_ll"))
    keep_only(copied, ("toy_mc", "toy_gen", "toy_roll"))
    joined = read(copied)
    assert joined.tasks == dense.tasks and not joined.info.left_out
    assert set(joined.info.data) == set(dense.tasks), "each task's data, of either evaluation"
    assert joined.info.data == dense.info.data
    left, right = (
        each.frame.drop(columns="run").sort_values(["task", "filter", "doc_id"], ignore_index=True)
        for each in (joined, dense)
    )
    pd.testing.assert_frame_equal(left, right)
    assert joined.info.n_shot == dense.info.n_shot
    assert joined.info.task_hashes == dense.info.task_hashes
    assert joined.info.results == dense.info.results
    assert joined.info.seconds == pytest.approx(2 * dense.info.seconds)
    assert OLD in joined.info.files["toy_fill"] and OLD not in joined.info.files["toy_mc"]


def test_the_same_questions_twice_count_once_and_that_is_said(
    copied: Path, dense: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    older = evaluate_again(copied, ("toy_fill", "toy_ll"))
    edit_line(
        samples_file(copied, f"toy_fill_{OLD}"), 0, lambda row: row.update(acc=1.0 - row["acc"])
    )
    keep_only(copied, ("toy_fill", "toy_mc"))
    found = load_samples(copied, progress=False)
    assert found.tasks == ("toy_fill", "toy_ll", "toy_mc")
    pick = lambda samples: samples.frame.set_index("task").loc["toy_fill", "correct"].tolist()  # noqa: E731
    assert pick(found) == pick(dense), "the newest counts"
    assert list(found.info.left_out) == [older.name]
    assert "toy_fill" in found.info.left_out[older.name]
    assert older.name in caplog.text and "toy_fill" in caplog.text


def test_one_evaluation_can_be_named(copied: Path) -> None:
    older = evaluate_again(copied, ("toy_fill",))
    assert read(copied, timestamp=OLD).tasks == read(older).tasks == ("toy_fill",)
    with pytest.raises(SamplesError, match=f"2001.*{OLD}"):
        read(copied, timestamp="2001-01-01T00-00-00")


def other_hash(results: dict) -> None:
    results["task_hashes"]["toy_fill"] = "0" * 64


def other_limit(results: dict) -> None:
    results["config"]["limit"] = 4.0


def other_model(results: dict) -> None:
    results["config"]["model_args"] = "pretrained=another"


def other_shots(results: dict) -> None:
    results["n-shot"]["toy_fill"] = 5


@pytest.mark.parametrize(
    ("change", "named"),
    [(other_hash, "toy_fill"), (other_shots, "toy_fill.*0 and 5"), (other_limit, "limit"),
     (other_model, "model_args")],
)  # fmt: skip
def test_evaluations_that_contradict_each_other_are_refused(
    copied: Path, change: Callable[[dict], None], named: str
) -> None:
    older = evaluate_again(copied, ("toy_fill",), change)
    with pytest.raises(SamplesError, match=rf"{older.name}.*contradict.*{named}.*give one"):
        read(copied)
    assert "toy_fill" in read(max(copied.rglob("results_*.json"))).tasks, (
        "a file that is named is read alone"
    )


def test_other_settings_of_another_task_are_left_out_by_name(copied: Path) -> None:
    older = evaluate_again(copied, ("toy_fill",), other_limit)
    keep_only(copied, ("toy_mc",))
    found = read(copied)
    assert found.tasks == ("toy_mc",)
    assert "limit" in found.info.left_out[older.name] and "4.0" in found.info.left_out[older.name]


def test_another_model_is_never_left_out_silently(copied: Path) -> None:
    evaluate_again(copied, ("toy_fill",), other_model)
    keep_only(copied, ("toy_mc",))
    with pytest.raises(SamplesError, match=r"contradict.*model_args"):
        read(copied)


def test_batch_size_and_device_do_not_part_a_run(copied: Path) -> None:
    def other(results: dict) -> None:
        results["config"] |= {"batch_size": "1", "batch_sizes": [1], "device": "cuda"}

    evaluate_again(copied, ("toy_fill",), other)
    keep_only(copied, ("toy_mc",))
    assert read(copied).tasks == ("toy_fill", "toy_mc")


def test_an_evaluation_without_samples_is_left_out_by_name(copied: Path) -> None:
    older = evaluate_again(copied, ("toy_fill",))
    next(copied.glob(f"samples_toy_fill_{OLD}.jsonl")).unlink()
    assert read(copied).info.left_out == {older.name: "no samples were logged"}


def test_the_newest_with_samples_counts(copied: Path) -> None:
    evaluate_again(copied, ("toy_fill",))
    newest = max(copied.rglob("results_*.json"))
    for file in copied.glob("samples_*.jsonl"):
        if OLD not in file.name:
            file.unlink()
    found = read(copied)
    assert found.tasks == ("toy_fill",)
    assert found.info.left_out == {newest.name: "no samples were logged"}


def into_a_folder_of_its_own(folder: Path) -> Path:
    """Move the older evaluation to where ``--output_path out/other`` would have put it."""
    own = folder.parents[1] / "other" / folder.name
    own.mkdir(parents=True)
    for file in folder.glob(f"*_{OLD}.json*"):
        shutil.move(file, own)
    return own


def test_tasks_in_folders_of_their_own_are_one_run(copied: Path, tmp_path: Path) -> None:
    evaluate_again(copied, ("toy_fill", "toy_ll"))
    keep_only(copied, ("toy_mc",))
    into_a_folder_of_its_own(copied)
    assert read(tmp_path).tasks == ("toy_fill", "toy_ll", "toy_mc")


def test_a_task_in_two_folders_is_refused(copied: Path, tmp_path: Path) -> None:
    evaluate_again(copied, ("toy_fill",))
    own = into_a_folder_of_its_own(copied)
    with pytest.raises(SamplesError, match=rf"contradict.*{own}|{own}.*contradict.*toy_fill"):
        read(tmp_path)


def test_other_settings_in_a_folder_of_its_own_are_named_with_it(
    copied: Path, tmp_path: Path
) -> None:
    evaluate_again(copied, ("toy_fill",), other_limit)
    keep_only(copied, ("toy_mc",))
    own = into_a_folder_of_its_own(copied)
    (name,) = read(tmp_path).info.left_out
    assert str(tmp_path / name).startswith(str(own))


def older_version(folder: Path, *, filters: bool = True) -> None:
    """As lm-eval wrote before 0.4.5: lines name no filter, single tasks are groups."""
    file = max(folder.rglob("results_*.json"))
    results = json.loads(file.read_text())
    results["group_subtasks"] |= {"toy_mc": [], "toy_ll": ["toy_ll"]}
    if not filters:
        del results["configs"]["toy_gen"]["filter_list"]
    file.write_text(json.dumps(results))
    for samples in folder.glob("samples_*.jsonl"):
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        rows = [{k: v for k, v in line.items() if k != "filter"} for line in lines]
        samples.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_filters_without_names_are_those_of_the_task(copied: Path, dense: Samples) -> None:
    older_version(copied)
    found = read(copied)
    assert found.info.groups == dense.info.groups == {"toy_group": ["toy_mc", "toy_gen"]}
    columns = ["task", "filter", "doc_id", "text", "correct"]
    pd.testing.assert_frame_equal(found.frame[columns], dense.frame[columns])


def test_filters_that_nothing_names_are_refused(copied: Path) -> None:
    older_version(copied, filters=False)
    with pytest.raises(SamplesError, match=r"toy_gen.*filter.*newer lm-eval"):
        read(copied)


def rename_task(folder: Path, name: str, file_name: str | None) -> None:
    file = max(folder.rglob("results_*.json"))
    text = file.read_text().replace('"toy_ll"', json.dumps(name))
    file.write_text(text)
    samples = samples_file(folder, "toy_ll")
    if file_name is None:
        samples.unlink()
    else:
        samples.rename(samples.with_name(samples.name.replace("toy_ll", file_name)))


def test_names_that_the_harness_made_plain(copied: Path) -> None:
    rename_task(copied, "leader:board/ll", "leader_board_ll")
    assert "leader:board/ll" in read(copied).tasks


@pytest.mark.parametrize("name", ["a" * 300, "é" * 120, "nul\0", "a/b"])
def test_names_that_no_file_can_have(copied: Path, name: str) -> None:
    rename_task(copied, name, None)
    with pytest.raises(SamplesError, match=r"(?s)task .*(short|log_samples)"):
        read(copied)


@pytest.mark.parametrize(
    ("key", "value"),
    [("task_hashes", {"toy_mc": 3}), ("configs", {"toy_mc": []}), ("versions", []),
     ("configs", {"toy_mc": {"metric_list": [["acc"]]}}), ("n-samples", {"toy_mc": 4}),
     ("group_subtasks", {"g": "toy_mc"}), ("chat_template", {}), ("results", {"toy_mc": 1}),
     ("total_evaluation_time_seconds", "soon"), ("n-shot", {"toy_mc": []}), ("config", "x"),
     ("config", {"limit": 10**400})],
)  # fmt: skip
def test_a_damaged_results_file_is_one_sentence(copied: Path, key: str, value: object) -> None:
    file = max(copied.rglob("results_*.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(SamplesError, match=re.escape(str(file))):
        read(copied)


def test_several_models_in_one_folder_are_ambiguous(lm_eval_outputs: Path) -> None:
    with pytest.raises(SamplesError, match="several models"):
        read(lm_eval_outputs)


def test_no_results(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(SamplesError, match="no results_<time>"):
        read(tmp_path)


def test_a_file_of_samples_is_not_an_evaluation(copied: Path) -> None:
    with pytest.raises(SamplesError, match=r"samples_toy_mc.*results_<time>"):
        read(samples_file(copied, "toy_mc"))


def test_foreign_json(copied: Path) -> None:
    max(copied.rglob("results_*.json")).write_text("[]")
    with pytest.raises(SamplesError, match="not a results file"):
        read(copied)


def test_truncated_results(copied: Path) -> None:
    file = max(copied.rglob("results_*.json"))
    file.write_text(file.read_text()[:500])
    with pytest.raises(SamplesError, match=r"cannot be read .*line"):
        read(copied)


def test_missing_samples_name_the_option(copied: Path) -> None:
    samples_file(copied, "toy_mc").unlink()
    with pytest.raises(SamplesError, match=r"toy_mc.*--log_samples"):
        read(copied)


def test_cut_in_the_middle_of_a_line(copied: Path) -> None:
    file = samples_file(copied, "toy_mc")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SamplesError, match=r"toy_mc.*line 40"):
        read(copied)


def test_cut_between_lines(copied: Path) -> None:
    file = samples_file(copied, "toy_mc")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(SamplesError, match=r"toy_mc.*37.*40"):
        read(copied)


def test_rows_of_another_evaluation(copied: Path) -> None:
    edit_line(samples_file(copied, "toy_mc"), 3, lambda row: row.update(doc_hash="0" * 64))
    with pytest.raises(SamplesError, match=r"toy_mc.*hash"):
        read(copied)


def test_missing_field_names_file_and_line(copied: Path) -> None:
    edit_line(samples_file(copied, "toy_mc"), 2, lambda row: row.pop("prompt_hash"))
    with pytest.raises(SamplesError, match=r"line 3.*prompt_hash"):
        read(copied)


def test_wrong_form_names_file_and_line(copied: Path) -> None:
    edit_line(samples_file(copied, "toy_mc"), 4, lambda row: row.update(filtered_resps=[["x"]]))
    with pytest.raises(SamplesError, match="line 5"):
        read(copied)
    samples_file(copied, "toy_mc").write_text("[1, 2]\n")
    with pytest.raises(SamplesError, match="line 1"):
        read(copied)


def test_nan_names_the_document(copied: Path) -> None:
    def poison(row: dict) -> None:
        row["filtered_resps"][1][0] = "nan"

    edit_line(samples_file(copied, "toy_mc"), 6, poison)
    with pytest.raises(NumericsError, match=r"toy_mc.*document 6, choice 1.*nan"):
        read(copied)


def test_task_names_cannot_leave_the_folder(copied: Path) -> None:
    file = max(copied.rglob("results_*.json"))
    payload = json.loads(file.read_text())
    payload["configs"]["../../etc"] = {}
    payload["versions"]["../../etc"] = 1
    file.write_text(json.dumps(payload))
    with pytest.raises(SamplesError, match="etc"):
        read(copied)


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", "AMD EPYC 7"), (None, "AMD EPYC 7"), ("cuda:0", "2 x NVIDIA H200")],
)
def test_the_machine_is_what_the_model_ran_on(device: str | None, expected: str) -> None:
    environment = (
        "PyTorch version: 2\nGPU 0: NVIDIA H200\nGPU 1: NVIDIA H200\n\nCPU:\n"
        "Model name:                AMD EPYC 7\nVersions of relevant libraries:"
    )
    empty: dict[str, Any] = {"results": {}, "configs": {}, "versions": {}, "n-shot": {}}
    given = {**empty, "config": {"device": device}, "pretty_env_info": environment}
    assert _Results.model_validate(given).machine == expected
    assert _Results.model_validate(empty).machine is None
