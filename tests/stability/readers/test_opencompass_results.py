"""Verdicts from OpenCompass' own evaluation, in each form it writes them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from streamline_bench.errors import SamplesError
from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.readers.opencompass_reader import Evaluation
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings

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


@pytest.mark.parametrize(("second", "counted"), [(50.0, 50.0), (60.0, None)])
def test_of_accuracies_that_differ_none_is_taken(second: float, counted: float | None) -> None:
    payload = {"accuracy": 50.0, "accuracy (4 runs average)": second}
    assert Evaluation.model_validate(payload).accuracy == counted


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


GRADES = [0.25, 1.0, 0.5, 0.0]


def graded(grades: list[float], name: str = "score", factor: float = 100.0) -> dict[str, Any]:
    """As evaluators of long contexts write it: a grade per question, their mean in per cent."""
    details = [{"pred": 3, "answer": 3, "score": grade, "steps": 7} for grade in grades]
    return {name: factor * sum(grades) / len(grades), "timeout": 1, "details": details}


def metrics(samples: Samples, task: str) -> list[dict[str, float]]:
    return samples.frame.loc[samples.frame["task"] == task, "metrics"].tolist()


def test_a_score_per_question_is_a_grade(opencompass_files: Any, run: Path) -> None:
    opencompass_files.write_results(run, "tiny", "qa", graded(GRADES, "LongBench"))
    samples = load_samples(run)
    assert metrics(samples, "qa") == [{"LongBench": grade} for grade in GRADES]
    assert verdicts(samples, "qa") == [None] * 4
    assert samples.info.higher_is_better["qa"] == {"LongBench": True}
    result = compare_answers(samples, samples, settings=Settings(draws=200))
    assert [(each.metric, each.decides) for each in result.grades] == [("LongBench", True)]


def test_numbers_that_are_not_reported_are_left_alone(opencompass_files: Any, run: Path) -> None:
    opencompass_files.write_results(run, "tiny", "qa", {**graded(GRADES), "score": 12.0})
    assert metrics(load_samples(run), "qa") == [{}] * 4


def test_right_or_wrong_by_another_name(opencompass_files: Any, run: Path) -> None:
    details = {str(i): {"prompt": "p", "is_strict_correct": right, "is_loose_correct": True}
               for i, right in enumerate(RIGHT)}  # fmt: skip
    payload = {"Prompt-level-strict": 50.0, "Prompt-level-loose": 100.0, "details": details}
    opencompass_files.write_results(run, "tiny", "qa", payload)
    samples = load_samples(run)
    assert verdicts(samples, "qa") == RIGHT
    rows = samples.frame[samples.frame["task"] == "qa"]
    assert set(rows["verdict_metric"]) == {"Prompt-level-strict"}
    assert metrics(samples, "qa")[1] == {"Prompt-level-strict": 0.0, "Prompt-level-loose": 1.0}


def test_grades_of_a_data_set_in_parts(opencompass_files: Any, run: Path) -> None:
    model = run / "predictions" / "tiny"
    (model / "qa.json").unlink()
    entries = opencompass_files.gen(4, seed=1, golds=["A"] * 4)
    opencompass_files.write(model, "qa", entries, parts=2)
    for part in (0, 1):
        payload = graded(GRADES[2 * part : 2 * part + 2])
        opencompass_files.write_results(run, "tiny", f"qa_{part}", payload)
    samples = load_samples(run)
    assert metrics(samples, "qa") == [{"score": grade} for grade in GRADES]
    assert samples.info.results["qa"]["score,none"] == pytest.approx(43.75)


def test_repetitions_of_a_question_belong_together(opencompass_files: Any, run: Path) -> None:
    source = random.Random(0)
    sides = []
    for number, share in enumerate((0.7, 0.4)):
        side = run.with_name(f"2026020{number}_120000")
        entries = opencompass_files.gen(40, seed=1, golds=["A"] * 40)
        opencompass_files.write(side / "predictions" / "tiny", "qa", entries + entries)
        details = [{"is_correct": [source.random() < share for _ in range(2)]} for _ in range(40)]
        right = sum(sum(detail["is_correct"]) for detail in details)
        payload = {"accuracy (2 runs average)": 100 * right / 80, "details": details}
        opencompass_files.write_results(side, "tiny", "qa", payload)
        sides.append((load_samples(side), [sum(d["is_correct"]) / 2 for d in details]))
    (dense, before), (pruned, now) = sides
    result = compare_answers(dense, pruned, settings=Settings(draws=2000))
    assert {task.filter for task in result.tasks} == {"repetition 1", "repetition 2"}
    (found,) = result.grades
    assert (found.filter, found.n, found.decides) == ("mean of 2 repetitions", 40, False)
    assert found.difference is not None
    assert found.difference.value == pytest.approx((sum(now) - sum(before)) / 40)


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
    with pytest.raises(SamplesError, match=r"results.tiny.arc\.json.*accuracy"):
        load_samples(run)


def test_details_of_other_predictions(opencompass_files: Any, run: Path) -> None:
    details: dict[str, Any] = {
        str(i): {"origin_prediction": "something else", "correct": True} for i in range(4)
    }
    opencompass_files.write_results(run, "tiny", "qa", {"details": details})
    with pytest.raises(SamplesError, match=r"qa\.json.*question 0"):
        load_samples(run)


def test_choices_scored_differently(opencompass_files: Any, run: Path) -> None:
    details: dict[str, Any] = {
        str(i): {"origin_prediction": {"A": {"PPL": 1.0}}, "correct": True} for i in range(4)
    }
    opencompass_files.write_results(run, "tiny", "arc", {"details": details})
    with pytest.raises(SamplesError, match=r"arc\.json.*question 0"):
        load_samples(run)


def test_truncated_predictions_are_seen_by_their_evaluation(
    opencompass_files: Any, run: Path
) -> None:
    details = [{"correct": [True]} for _ in range(6)]
    opencompass_files.write_results(run, "tiny", "qa", {"accuracy": 100.0, "details": details})
    with pytest.raises(SamplesError, match=r"6 predictions.* 4"):
        load_samples(run)


def test_parts_share_one_evaluation(opencompass_files: Any, run: Path) -> None:
    entries = opencompass_files.gen(5, seed=2, golds=["A"] * 5)
    opencompass_files.write(run / "predictions" / "tiny", "gsm", entries, parts=2)
    details = [{"correct": [number == 4]} for number in range(5)]
    opencompass_files.write_results(run, "tiny", "gsm", {"accuracy": 20.0, "details": details})
    assert verdicts(load_samples(run), "gsm") == [False] * 4 + [True]
    (run / "predictions" / "tiny" / "gsm_1.json").unlink()
    opencompass_files.write_config(run, "tiny", {"gsm": 1})
    with pytest.raises(SamplesError, match=r"5 predictions.* 3"):
        load_samples(run)


def split(opencompass_files: Any, run: Path, parts: list[Any]) -> Path:
    """A data set whose five predictions and evaluation are in two parts."""
    entries = opencompass_files.gen(5, seed=2, golds=["A"] * 5)
    opencompass_files.write(run / "predictions" / "tiny", "gsm", entries, parts=2)
    for number, payload in enumerate(parts):
        opencompass_files.write_results(run, "tiny", f"gsm_{number}", payload)
    return run


@pytest.mark.parametrize("form", ["listed", "numbered"])
def test_parts_of_an_evaluation_are_joined(opencompass_files: Any, run: Path, form: str) -> None:
    right = [True, False, False, True, True]
    details = [{"correct": [each]} for each in right]
    if form == "numbered":
        halves: list[Any] = [{str(n): {"correct": right[k + n]} for n in range(m)}
                             for k, m in ((0, 3), (3, 2))]  # fmt: skip
    else:
        halves = [details[:3], details[3:]]
    payloads = [{"accuracy": 100 / 3, "details": halves[0]},
                {"accuracy": 100.0, "details": halves[1], "seconds": 1}]  # fmt: skip
    samples = load_samples(split(opencompass_files, run, payloads))
    assert verdicts(samples, "gsm") == right
    assert samples.info.results["gsm"] == {"accuracy,none": pytest.approx(60.0)}


def test_parts_of_an_evaluation_of_whole_predictions(opencompass_files: Any, run: Path) -> None:
    details = [{"correct": [True]} for _ in range(2)]
    for number in range(2):
        payload = {"accuracy": 100.0, "details": details}
        opencompass_files.write_results(run, "tiny", f"qa_{number}", payload)
    with pytest.raises(SamplesError, match=r"qa_0\.json.*2 parts.*1 parts"):
        load_samples(run)


def test_parts_that_cannot_be_joined_are_refused(opencompass_files: Any, run: Path) -> None:
    whole = {"accuracy": 100.0, "details": [{"correct": [True]}] * 3}
    split(opencompass_files, run, [whole, {"accuracy": 100.0}])
    with pytest.raises(SamplesError, match=r"gsm_0\.json.*joined"):
        load_samples(run)
    opencompass_files.write_results(
        run, "tiny", "gsm_1", {**whole, "details": whole["details"][:1]}
    )
    with pytest.raises(SamplesError, match=r"gsm_1\.json.*1 predictions.* 2"):
        load_samples(run)


def test_a_missing_part_of_an_evaluation_is_named(opencompass_files: Any, run: Path) -> None:
    whole = {"accuracy": 100.0, "details": [{"correct": [True]}] * 3}
    split(opencompass_files, run, [whole])
    with pytest.raises(SamplesError, match=r"gsm_0\.json.*3 predictions.* 5"):
        load_samples(run)


def test_a_whole_evaluation_counts_before_its_parts(opencompass_files: Any, run: Path) -> None:
    details = [{"correct": [right]} for right in RIGHT]
    opencompass_files.write_results(run, "tiny", "qa", {"accuracy": 50.0, "details": details})
    opencompass_files.write_results(run, "tiny", "qa_0", {"accuracy": 0.0})
    samples = load_samples(run)
    assert verdicts(samples, "qa") == RIGHT
    assert "qa.json" in samples.info.left_out["results/qa_0.json"]


def test_a_grade_is_no_verdict(opencompass_files: Any, run: Path) -> None:
    details = [{"correct": grade} for grade in (1, 0.5, 0, 1.0)]
    opencompass_files.write_results(run, "tiny", "qa", {"score": 62.5, "details": details})
    assert verdicts(load_samples(run), "qa") == [None] * 4


@pytest.mark.parametrize(
    "payload",
    [
        {"accuracy": 10**400},
        {"details": "none"},
        {"details": {"٣": {}, "x": 1}},
        {"score": 1.0, "details": [{"score": 10**400}] * 4},
        {"score": 1.0, "details": [{"score": []}] * 4},
    ],
)
def test_odd_evaluations_never_break_the_reader(
    opencompass_files: Any, run: Path, payload: dict[str, Any]
) -> None:
    opencompass_files.write_results(run, "tiny", "qa", payload)
    try:
        assert verdicts(load_samples(run), "qa") == [None] * 4
    except SamplesError as error:
        assert "qa.json" in str(error)


def test_damaged_results(opencompass_files: Any, run: Path) -> None:
    path = opencompass_files.write_results(run, "tiny", "qa", {"accuracy": 1.0})
    path.write_text('{"accuracy": ')
    with pytest.raises(SamplesError, match=r"qa\.json.*truncated"):
        load_samples(run)
    path.write_text("[]")
    with pytest.raises(SamplesError, match=r"qa\.json.*evaluat"):
        load_samples(run)


def listed(repetitions: int, **fields: list[Any]) -> list[dict[str, Any]]:
    """Details as OpenCompass flattens them: every field is a list over repetitions."""
    questions = len(next(iter(fields.values()))) // repetitions
    return [
        {"example_abbr": f"qa_{question}",
         **{key: values[question::questions] for key, values in fields.items()}}
        for question in range(questions)
    ]  # fmt: skip


def test_flattened_grades(opencompass_files: Any, run: Path) -> None:
    details = listed(1, rouge1=[10.0, 30.0, 20.0, 0.0], pred=[[1, 2], [3], [4], []])
    payload = {"rouge1": 15.3, "rouge1 (mean of questions)": 15.0, "details": details}
    opencompass_files.write_results(run, "tiny", "qa", payload)
    samples = load_samples(run)
    name = "rouge1 (mean of questions)"
    assert metrics(samples, "qa") == [{name: value} for value in (10.0, 30.0, 20.0, 0.0)]
    result = compare_answers(samples, samples, settings=Settings(draws=200))
    (found,) = (each for each in result.grades if each.task == "qa")
    assert (found.metric, found.scale, found.decides) == (name, 100.0, True)
    assert "rouge1" in result.aggregate_only["qa"]


def test_code_and_mathematics(opencompass_files: Any, run: Path) -> None:
    """HumanEval says ``is_correct``, MATH ``correct``, beside numbers of other names."""
    for key, name in (("is_correct", "humaneval_pass@1"), ("correct", "accuracy")):
        details = listed(1, **{key: RIGHT, "programs": ["x"] * 4})
        opencompass_files.write_results(run, "tiny", "qa", {name: 50.0, "details": details})
        samples = load_samples(run)
        assert verdicts(samples, "qa") == RIGHT


def test_grades_of_repetitions(opencompass_files: Any, run: Path) -> None:
    entries = opencompass_files.gen(2, seed=1, golds=["A"] * 2)
    opencompass_files.write(run / "predictions" / "tiny", "qa", entries + entries)
    details = listed(2, score=[0.5, 1.0, 0.25, 0.0])
    payload = {"score (2 runs average)": 43.75, "details": details}
    opencompass_files.write_results(run, "tiny", "qa", payload)
    frame = load_samples(run).frame
    rows = frame[frame["task"] == "qa"]
    found = [(row["filter"], row["metrics"]["score"]) for _, row in rows.iterrows()]
    first, second = "repetition 1", "repetition 2"
    assert found == [(first, 0.5), (first, 1.0), (second, 0.25), (second, 0.0)]
