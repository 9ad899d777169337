"""Every mode of OpenCompass' predictions as rows of the samples table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import COLUMNS, Samples


def read(path: Path, **keywords: str) -> Samples:
    return load_samples(path, progress=False, **keywords)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An empty predictions folder of a model in a run."""
    folder = tmp_path / "outputs" / "20260101_120000" / "predictions" / "tiny"
    folder.mkdir(parents=True)
    return folder


def edit(file: Path, change: Any) -> None:
    payload = json.loads(file.read_text())
    payload = change(payload) or payload
    file.write_text(json.dumps(payload))


def test_ppl(opencompass_files: Any, model: Path) -> None:
    entries = opencompass_files.ppl(30, seed=1)
    opencompass_files.write(model, "arc", entries)
    samples = read(model)
    assert list(samples.frame.columns) == list(COLUMNS)
    assert samples.info.engine == "opencompass" and samples.info.timestamp == "20260101_120000"
    assert len(samples.frame) == 30
    for (_, row), entry in zip(samples.frame.iterrows(), entries, strict=True):
        nll = [entry[f"label: {label}"]["PPL"] for label in "ABCD"]
        assert row["mean_nll"] == nll
        assert row["prediction"] == int(np.argmin(nll))
        assert "ABCD"[row["gold"]] == entry["gold"] == row["target"]
        assert bool(row["correct"]) == (entry["prediction"] == entry["gold"])
        assert row["prompt"] + row["choices"][2] == entry["label: C"]["prompt"]
    assert samples.frame["loglikelihoods"].isna().all(), "a mean is not a sum"
    assert set(samples.frame["output_type"]) == {"multiple_choice"}
    assert 0 < samples.frame["correct"].mean() < 1


def test_integer_labels_in_the_order_of_the_numbers(opencompass_files: Any, model: Path) -> None:
    labels = list(range(11))
    entries = opencompass_files.ppl(20, seed=2, labels=labels)
    entries = [dict(sorted(entry.items())) for entry in entries]  # "label: 10" before "label: 2"
    opencompass_files.write(model, "many", entries)
    frame = read(model).frame
    for (_, row), entry in zip(frame.iterrows(), entries, strict=True):
        assert row["mean_nll"] == [entry[f"label: {label}"]["PPL"] for label in labels]
        assert (row["prediction"], row["gold"]) == (entry["prediction"], entry["gold"])


def test_numbers_and_their_text_are_the_same_answer(opencompass_files: Any, model: Path) -> None:
    entries = opencompass_files.ppl(12, seed=3, labels=[0, 1])
    for entry in entries:
        entry["gold"] = str(entry["gold"])
    opencompass_files.write(model, "boolq", entries)
    frame = read(model).frame
    right = [str(entry["prediction"]) == entry["gold"] for entry in entries]
    assert frame["correct"].tolist() == right and any(right)
    assert [row["same_value"] for row in frame["metrics"]] == [0.0] * 12


def test_lists_of_right_answers_and_no_answer(opencompass_files: Any, model: Path) -> None:
    golds = [["A", "B"], ["D"], None, "C"]
    opencompass_files.write(model, "wsc", opencompass_files.ppl(4, seed=4, golds=golds))
    frame = read(model).frame
    predicted = ["ABCD"[index] for index in frame["prediction"]]
    assert frame["correct"].tolist()[:2] == [predicted[0] in "AB", predicted[1] == "D"]
    assert frame["correct"].isna().tolist() == [False, False, True, False]
    assert frame["gold"].tolist()[1:] == [3, frame["gold"].iloc[2], 2]
    assert frame["gold"].isna().tolist() == [True, False, True, False]


def test_few_shot_examples_are_the_prompt_not_the_document(
    opencompass_files: Any, model: Path
) -> None:
    shots = "Question: What is 1 + 1?\nAnswer: \nB\n\n"
    opencompass_files.write(model, "two", opencompass_files.ppl(5, seed=5, examples=shots))
    opencompass_files.write(model, "zero", opencompass_files.ppl(5, seed=5))
    frame = read(model).frame
    two, zero = (frame[frame["task"] == name] for name in ("two", "zero"))
    assert two["doc_hash"].tolist() == zero["doc_hash"].tolist()
    assert not set(two["prompt_hash"]) & set(zero["prompt_hash"])
    assert two["prompt"].iloc[0].startswith(shots)


def test_examples_are_taken_off_once(opencompass_files: Any, model: Path) -> None:
    """A question that repeats the text of the examples stays another question."""
    shots = "Yes or no?\n"
    plain, repeated = (opencompass_files.ppl(1, seed=5, examples=shots) for _ in range(2))
    for label in "ABCD":
        repeated[0][f"label: {label}"]["prompt"] = shots + plain[0][f"label: {label}"]["prompt"]
    opencompass_files.write(model, "plain", plain)
    opencompass_files.write(model, "repeated", repeated)
    assert read(model).frame["doc_hash"].nunique() == 2


def test_equal_choices_are_named_by_their_labels(opencompass_files: Any, model: Path) -> None:
    entries = opencompass_files.ppl(2, seed=5)
    for label, ending in zip("ABCD", ["yes", "no", "yes", "maybe"], strict=True):
        entries[0][f"label: {label}"]["prompt"] = f"{opencompass_files.question(0)}{ending}"
    opencompass_files.write(model, "twice", entries)
    first, second = read(model).frame["choices"]
    assert list(first) == list("ABCD") == list(second)
    entries[0]["label: C"]["prompt"] = f"{opencompass_files.question(0)}never"
    opencompass_files.write(model, "once", entries)
    frame = read(model).frame
    once = frame[frame["task"] == "once"]["choices"].iloc[0]
    assert list(once) == ["yes", "no", "never", "maybe"]


def test_loglikelihood_mode(opencompass_files: Any, model: Path) -> None:
    entries = opencompass_files.ppl(10, seed=6, name="Loglikelihood")
    opencompass_files.write(model, "ll", entries)
    frame = read(model).frame
    for (_, row), entry in zip(frame.iterrows(), entries, strict=True):
        scores = [entry[f"label: {label}"]["Loglikelihood"] for label in "ABCD"]
        assert row["loglikelihoods"] == scores and row["mean_nll"] is None
        assert row["prediction"] == int(np.argmax(scores))


def test_conditional_probabilities(opencompass_files: Any, model: Path) -> None:
    entries = opencompass_files.clp(10, seed=7)
    opencompass_files.write(model, "clp", entries)
    named = [{**entry, "gold": "ABCD"[entry["gold"]]} for entry in entries]
    opencompass_files.write(model, "named", named)
    frame = read(model).frame
    for name in ("clp", "named"):
        rows = frame[frame["task"] == name]
        for (_, row), entry in zip(rows.iterrows(), entries, strict=True):
            assert np.exp(row["loglikelihoods"]) == pytest.approx(entry["prediction"])
            assert row["prediction"] == int(np.argmax(entry["prediction"]))
            assert row["gold"] == entry["gold"]
            assert bool(row["correct"]) == (row["prediction"] == entry["gold"])


def test_generation_without_evaluation_has_no_verdict(opencompass_files: Any, model: Path) -> None:
    golds = ["A", "", 0, ["a", "b"]]
    entries = opencompass_files.gen(4, seed=8, golds=golds)
    entries[3]["origin_prompt"] = [
        {"role": "HUMAN", "prompt": "first"},
        {"role": "BOT", "prompt": "second"},
    ]
    opencompass_files.write(model, "qa", entries)
    frame = read(model).frame
    assert frame["text"].tolist() == [entry["prediction"] for entry in entries]
    assert frame["correct"].isna().all()
    assert frame["target"].tolist() == ["A", "", "", '["a", "b"]']
    assert frame["prompt"].iloc[3] == "first\nsecond"
    assert set(frame["output_type"]) == {"generate_until"}


def test_parts_are_joined_in_the_order_of_their_numbers(
    opencompass_files: Any, model: Path
) -> None:
    entries = opencompass_files.ppl(47, seed=9)
    opencompass_files.write(model, "piqa", entries, parts=12)  # _10 sorts before _2
    samples = read(model)
    assert samples.tasks == ("piqa",)
    assert samples.frame["doc_id"].tolist() == list(range(47))
    found = [row[0] for row in samples.frame["mean_nll"]]
    assert found == [entry["label: A"]["PPL"] for entry in entries]


def test_repetitions_are_rows_of_the_same_question(opencompass_files: Any, model: Path) -> None:
    once = opencompass_files.gen(6, seed=10, golds=["A"] * 6)
    again = opencompass_files.gen(6, seed=11, golds=["A"] * 6)
    opencompass_files.write(model, "gsm", once + again)
    frame = read(model).frame
    assert frame["doc_id"].tolist() == [*range(6), *range(6)]
    assert frame["filter"].tolist() == ["repetition 1"] * 6 + ["repetition 2"] * 6
    assert frame["text"].tolist()[6:] == [entry["prediction"] for entry in again]


def test_repetitions_as_the_config_says(opencompass_files: Any, model: Path) -> None:
    run = model.parent.parent
    once = opencompass_files.gen(6, seed=10, golds=["A"] * 6)
    opencompass_files.write(model, "gsm", once + once[:5])
    opencompass_files.write_config(run, "tiny", {"gsm": 2})
    with pytest.raises(SamplesError, match=r"gsm\.json, question 10.*11.*2"):
        read(model)
    opencompass_files.write(model, "gsm", once + once)
    samples = read(model)
    assert set(samples.frame["filter"]) == {"repetition 1", "repetition 2"}
    assert samples.info.config["path"] == "some/model" and samples.info.config["batch_size"] == 4


def test_subjects_are_groups(opencompass_files: Any, model: Path) -> None:
    for name in ("lukaemon_mmlu_anatomy", "lukaemon_mmlu_virology", "cmmlu-art", "piqa"):
        opencompass_files.write(model, name, opencompass_files.ppl(4, seed=12))
    groups = read(model).info.groups
    assert groups == {"mmlu": ["lukaemon_mmlu_anatomy", "lukaemon_mmlu_virology"]}


def test_parquet_keeps_it(opencompass_files: Any, model: Path, tmp_path: Path) -> None:
    opencompass_files.write(model, "arc", opencompass_files.ppl(3, seed=1))
    opencompass_files.write(model, "qa", opencompass_files.gen(3, seed=1, golds=["A"] * 3))
    samples = read(model)
    samples.save(tmp_path / "s.parquet")
    again = load_samples(tmp_path / "s.parquet")
    assert again.info == samples.info and again.frame.equals(samples.frame)


def test_truncated_file_names_file_and_line(opencompass_files: Any, model: Path) -> None:
    file = opencompass_files.write(model, "arc", opencompass_files.ppl(5, seed=1))
    file.write_text(file.read_text()[:-200])
    with pytest.raises(SamplesError, match=r"arc\.json.*truncated"):
        read(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {k: v for k, v in d.items() if k != "3"}, "number 3"),
        (lambda d: {**d, "2": {**d["2"], "prediction": "E"}}, "question 2"),
        (lambda d: d["1"].pop("prediction") and None, "question 1.*prediction"),
        (lambda d: d["1"]["label: A"].pop("PPL") and None, "question 1.*PPL"),
        (lambda d: {**d, "4": {"origin_prompt": "x", "prediction": "y"}}, "question 4.*GEN.*PPL"),
        (lambda d: {**d, "4": "text"}, "number 4"),
        (lambda d: d["1"]["label: A"].update(PPL=10**400) and None, "question 1"),
        (lambda d: d["1"]["label: A"].update(PPL="low") and None, "question 1"),
        (lambda d: d["1"].update({"label: A": 3}) and None, "question 1"),
        (lambda d: d["1"].update(prediction=["A"]) and None, "question 1"),
    ],
)
def test_damaged_entries_name_the_question(
    opencompass_files: Any, model: Path, change: Any, message: str
) -> None:
    edit(opencompass_files.write(model, "arc", opencompass_files.ppl(5, seed=1)), change)
    with pytest.raises(SamplesError, match=f"arc.json.*{message}"):
        read(model)


def test_question_twice_in_a_file(opencompass_files: Any, model: Path) -> None:
    file = opencompass_files.write(model, "arc", opencompass_files.ppl(5, seed=1))
    file.write_text(file.read_text().replace('"4": {', '"3": {'))
    with pytest.raises(SamplesError, match=r"arc\.json.*'3' twice"):
        read(model)


def test_nan_names_the_choice(opencompass_files: Any, model: Path) -> None:
    entries = opencompass_files.ppl(5, seed=1)
    entries[3]["label: B"]["PPL"] = float("nan")
    opencompass_files.write(model, "arc", entries)
    with pytest.raises(NumericsError, match=r"arc\.json, question 3.*'B'.*nan"):
        read(model)


def test_real_folders(shared_folder: Path) -> None:
    """What OpenCompass itself wrote; accuracies are those of its own evaluation."""
    runs = shared_folder / "data" / "opencompass"
    if not runs.is_dir():
        pytest.skip(f"no folder {runs}")
    samples = read(runs / "20261122_014251" / "predictions" / "hfcausal")
    means = samples.frame.groupby(["task", "filter"])["correct"].mean()
    assert means["mc-ppl", "none"] == 0.2 and means["mc-ll", "none"] == 0.35
    assert means["mc-gen", "none"] == 0.25 and means["mc-clp", "none"] == 0.3
    assert means["mc-gen-n2", "repetition 2"] == 0.25
    assert samples.frame.set_index("task").loc["sum-rouge", "correct"].isna().all()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"[" * 5000, b'{"0": {"prediction": "\\ud83d"}}', b"\xff\xfe"]
)
def test_what_is_no_prediction_file_is_one_sentence(model: Path, content: bytes) -> None:
    (model / "arc.json").write_bytes(content)
    with pytest.raises(SamplesError, match=r"arc\.json"):
        read(model)


@pytest.mark.parametrize(
    "change",
    [{"prediction": [0.5, 0.5]}, {"prediction": "abcd"}, {"pred_label": 9}, {"pred_label": "x"},
     {"prediction": [0.5, 0.5, 0, "x"]}, {"gold": 9}],
)  # fmt: skip
def test_damaged_probabilities_name_the_question(
    opencompass_files: Any, model: Path, change: dict[str, Any]
) -> None:
    entries = opencompass_files.clp(3, seed=7)
    entries[1].update(change)
    opencompass_files.write(model, "clp", entries)
    if change == {"gold": 9}:  # not among the choices: a wrong answer, not a damaged file
        assert not read(model).frame["correct"].iloc[1]
        return
    with pytest.raises((NumericsError, SamplesError), match=r"clp\.json, question 1"):
        read(model)


def test_prompts_are_needed(opencompass_files: Any, model: Path) -> None:
    for name, entries, key in (
        ("clp", opencompass_files.clp(2, seed=7), "prompt"),
        ("gen", opencompass_files.gen(2, seed=7, golds=["A"] * 2), "origin_prompt"),
    ):
        del entries[1][key]
        file = opencompass_files.write(model, name, entries)
        with pytest.raises(SamplesError, match=rf"{name}\.json, question 1.*{key}"):
            read(model)
        file.unlink()
