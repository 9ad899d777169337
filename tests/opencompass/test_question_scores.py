"""Stock evaluators of OpenCompass, question by question, as our reader sees what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.opencompass,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("opencompass"),
]

SAID = ["the cat sat on the mat", "a dog", "nothing of it", "the answer is \\boxed{4}"]
RIGHT = ["the cat is on a mat", "a dog", "rain falls", "4"]


def evaluated(kind: str, references: list[Any], n: int = 1, **more: Any) -> dict[str, Any]:
    """What an evaluation task writes for these predictions."""
    from datasets import Dataset

    from streamline_bench.opencompass.question_scores import EachQuestion

    evaluator = EachQuestion({"type": kind, **more})
    questions = {"subdivision": ["qa"] * len(SAID), "idx": list(range(len(SAID)))}
    return evaluator.evaluate(  # type: ignore[no-any-return]
        k=1, n=n, original_dataset=Dataset.from_dict(questions), predictions=SAID,
        references=references,
    )  # fmt: skip


@pytest.fixture
def read(opencompass_files: Any, tmp_path: Path) -> Any:
    """Write an evaluation beside its predictions, and read both."""
    from streamline_bench.stability.readers.load import load_samples

    def read_it(payload: dict[str, Any]) -> Any:
        run = tmp_path / "20260101_120000"
        entries = opencompass_files.gen(len(SAID), seed=1, golds=RIGHT)
        opencompass_files.write(run / "predictions" / "tiny", "qa", entries)
        plain = {key: float(value) if key != "details" else value
                 for key, value in payload.items()}  # fmt: skip
        opencompass_files.write_results(run, "tiny", "qa", plain)
        return load_samples(run)

    return read_it


@pytest.mark.parametrize(
    ("kind", "references", "name"),
    [
        ("JiebaRougeEvaluator", RIGHT, "rouge1"),
        ("LongBenchF1Evaluator", [[each] for each in RIGHT], "score"),
    ],
)
def test_a_mean_becomes_grades(kind: str, references: list[Any], name: str, read: Any) -> None:
    whole = evaluated(kind, references)
    samples = read(whole)
    values = [metrics[name] for metrics in samples.frame["metrics"]]
    assert sum(values) / len(values) == pytest.approx(whole[name])
    assert len(set(values)) > 2 and values[1] == pytest.approx(100)
    assert samples.frame["correct"].isna().all()


def test_verdicts_of_mathematics_stay_as_they_are(read: Any) -> None:
    whole = evaluated("MATHEvaluator", RIGHT)
    samples = read(whole)
    verdicts = samples.frame["correct"].tolist()
    assert 100 * sum(verdicts) / len(verdicts) == whole["accuracy"] and any(verdicts)


def test_equal_answers_are_verdicts(read: Any) -> None:
    samples = read(evaluated("AccEvaluator", RIGHT))
    assert samples.frame["correct"].tolist() == [False, True, False, False]
