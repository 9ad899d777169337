"""Verdicts from OpenCompass' own evaluation, in each form it writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from streamline_bench.errors import SamplesError
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples

RIGHT = [True, False, True, False]


@pytest.fixture
def run(opencompass_files: Any, tmp_path: Path) -> Path:
    """A run with four generated answers and four choices, not evaluated."""
    run = tmp_path / "20260101_120000"
    model = run / "predictions" / "tiny"
    opencompass_files.write(model, "qa", opencompass_files.gen(4, seed=1, golds=["A"] * 4))
    opencompass_files.write(model, "arc", opencompass_files.ppl(4, seed=1))
    return run


def verdicts(samples: Samples, task: str) -> list[Any]:
    rows = samples.frame[samples.frame["task"] == task]
    return [None if value is pd.NA else bool(value) for value in rows["correct"]]


def test_list_of_details(opencompass_files: Any, run: Path) -> None:
    details = [{"example_abbr": f"qa_{i}", "correct": [right]} for i, right in enumerate(RIGHT)]
    payload = {"accuracy": 50.0, "details": details}
    opencompass_files.write_results(run, "tiny", "qa", payload)
    samples = load_samples(run)
    assert verdicts(samples, "qa") == RIGHT
    assert samples.info.results["qa"] == {"accuracy,none": 50.0}
    rows = samples.frame[samples.frame["task"] == "qa"]
    assert set(rows["verdict_metric"]) == {"accuracy"}


def test_details_of_repetitions(opencompass_files: Any, run: Path) -> None:
    entries = opencompass_files.gen(2, seed=1, golds=["A"] * 2)
    opencompass_files.write(run / "predictions" / "tiny", "qa", entries + entries)
    details = [{"is_correct": [True, False]}, {"is_correct": [False, False]}]
    opencompass_files.write_results(
        run, "tiny", "qa", {"accuracy (2 runs average)": 25.0, "details": details}
    )
    frame = load_samples(run).frame
    first = frame[(frame["task"] == "qa") & (frame["filter"] == "repetition 1")]
    second = frame[(frame["task"] == "qa") & (frame["filter"] == "repetition 2")]
    assert first["correct"].tolist() == [True, False]
    assert second["correct"].tolist() == [False, False]


@pytest.mark.parametrize(("accuracy", "known"), [(50.0, True), (75.0, False), (None, False)])
def test_extracted_answers_must_give_the_accuracy(
    opencompass_files: Any, run: Path, accuracy: float | None, known: bool
) -> None:
    """Without verdicts, equality is one only where it reproduces what was reported."""
    details: dict[str, Any] = {
        str(i): {"predictions": "A" if right else "B", "references": "A"}
        for i, right in enumerate(RIGHT)
    }
    payload = {"details": {"type": "GEN", **details}}
    if accuracy is not None:
        payload["accuracy"] = accuracy
    opencompass_files.write_results(run, "tiny", "qa", payload)
    assert verdicts(load_samples(run), "qa") == (RIGHT if known else [None] * 4)


def test_rouge_has_no_verdict(opencompass_files: Any, run: Path) -> None:
    opencompass_files.write_results(run, "tiny", "qa", {"rouge1": 12.5, "rougeL": 9.0})
    samples = load_samples(run)
    assert verdicts(samples, "qa") == [None] * 4
    assert samples.info.results["qa"] == {"rouge1,none": 12.5, "rougeL,none": 9.0}


def test_choices_need_no_details(opencompass_files: Any, run: Path) -> None:
    own = verdicts(load_samples(run), "arc")
    accuracy = 100 * sum(own) / 4
    opencompass_files.write_results(run, "tiny", "arc", {"accuracy": accuracy})
    assert verdicts(load_samples(run), "arc") == own


def test_evaluation_of_other_predictions(opencompass_files: Any, run: Path) -> None:
    own = verdicts(load_samples(run), "arc")
    wrong = 100 * (4 - sum(own)) / 4 if sum(own) != 2 else 75.0
    opencompass_files.write_results(run, "tiny", "arc", {"accuracy": wrong})
    with pytest.raises(SamplesError, match=r"results.tiny.arc\.json reports accuracy .* others"):
        load_samples(run)


def test_details_of_other_predictions(opencompass_files: Any, run: Path) -> None:
    details: dict[str, Any] = {
        str(i): {"origin_prediction": "something else", "correct": True} for i in range(4)
    }
    opencompass_files.write_results(run, "tiny", "qa", {"details": details})
    with pytest.raises(SamplesError, match=r"qa\.json: question 0 was judged on another"):
        load_samples(run)


def test_choices_scored_differently(opencompass_files: Any, run: Path) -> None:
    details: dict[str, Any] = {
        str(i): {"origin_prediction": {"A": {"PPL": 1.0}}, "correct": True} for i in range(4)
    }
    opencompass_files.write_results(run, "tiny", "arc", {"details": details})
    with pytest.raises(SamplesError, match=r"arc\.json: question 0 was judged on another"):
        load_samples(run)


def test_truncated_predictions_are_seen_by_their_evaluation(
    opencompass_files: Any, run: Path
) -> None:
    details = [{"correct": [True]} for _ in range(6)]
    opencompass_files.write_results(run, "tiny", "qa", {"accuracy": 100.0, "details": details})
    with pytest.raises(SamplesError, match="made from 6 predictions, beside it are 4"):
        load_samples(run)


def test_parts_share_one_evaluation(opencompass_files: Any, run: Path) -> None:
    entries = opencompass_files.gen(5, seed=2, golds=["A"] * 5)
    opencompass_files.write(run / "predictions" / "tiny", "gsm", entries, parts=2)
    details = [{"correct": [number == 4]} for number in range(5)]
    opencompass_files.write_results(run, "tiny", "gsm", {"accuracy": 20.0, "details": details})
    assert verdicts(load_samples(run), "gsm") == [False] * 4 + [True]
    (run / "predictions" / "tiny" / "gsm_1.json").unlink()
    opencompass_files.write_config(run, "tiny", {"gsm": 1})
    with pytest.raises(SamplesError, match=r"made from 5 predictions, beside it are 3"):
        load_samples(run)


def test_damaged_results(opencompass_files: Any, run: Path) -> None:
    path = opencompass_files.write_results(run, "tiny", "qa", {"accuracy": 1.0})
    path.write_text('{"accuracy": ')
    with pytest.raises(SamplesError, match=r"qa\.json is not valid JSON .*truncated"):
        load_samples(run)
    path.write_text("[]")
    with pytest.raises(SamplesError, match="not an evaluation that OpenCompass wrote"):
        load_samples(run)
