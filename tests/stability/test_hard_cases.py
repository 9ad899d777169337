"""One document, equal answers, no discordant pair, nothing right: numbers or None, no crash."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.comparison import Comparison
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings

FAST = Settings(draws=300)
RIGHT, WRONG = [-1.0, -2.0], [-2.0, -1.0]
Make = Callable[..., Samples]


def result(
    questions: Make, dense: list[Any], pruned: list[Any], clusters: Any = None
) -> Comparison:
    """Two-choice questions whose right choice is the first."""
    gold = [0] * len(dense)
    found = compare_answers(
        questions("dense", {"t": (dense, gold, clusters)}),
        questions("pruned", {"t": (pruned, gold, clusters)}),
        settings=FAST,
    )
    assert Comparison.model_validate_json(found.model_dump_json()) == found
    for number in numbers(found.model_dump()):
        assert math.isfinite(number)
    return found


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield float(value)


@pytest.mark.parametrize("dense", [RIGHT, WRONG])
@pytest.mark.parametrize("pruned", [RIGHT, WRONG])
def test_one_document(questions: Make, dense: list[float], pruned: list[float]) -> None:
    found = result(questions, [dense], [pruned])
    task = found.tasks[0]
    assert task.dense.standard_error is None and task.detectable is None
    assert task.decision == found.macro.decision == found.micro.decision == "cannot tell"
    assert task.choices is not None and task.choices.kl.low is None
    assert task.difference.low < task.difference.high
    assert (task.retention is None) == (dense is WRONG)
    assert found.macro.difference.low < found.macro.difference.high


@pytest.mark.parametrize("answer", [RIGHT, WRONG])
@pytest.mark.parametrize("size", [None, 5])
def test_all_answers_equal(questions: Make, answer: list[float], size: int | None) -> None:
    """A model that answers as before on 40 questions may still have lost two points."""
    clusters = None if size is None else [f"passages:{index // size}" for index in range(40)]
    found = result(questions, [answer] * 40, [answer] * 40, clusters)
    for part in (found.tasks[0], found.macro, found.micro):
        assert part.difference.value == 0.0
        assert part.difference.low < -0.02 < 0.0 < part.difference.high
        assert part.agreement.value == 1.0 and part.agreement.low < 1.0
        assert part.stability.value == 1.0 and part.stability.low < 1.0
        assert part.decision == "cannot tell"
        assert part.detectable is not None and part.detectable > 0.02
    assert found.tasks[0].p_value == found.micro.p_value == 1.0
    assert found.tasks[0].kappa is None
    if answer is RIGHT:
        for part in (found.tasks[0], found.macro, found.micro):
            assert part.retention.low < 1.0 < part.retention.high


def test_no_discordant_pairs_among_mixed_answers(questions: Make) -> None:
    answers = [RIGHT, WRONG] * 20
    task = result(questions, answers, answers).tasks[0]
    assert task.kappa == 1.0 and task.p_value == 1.0
    assert task.retention.low < 1.0 < task.retention.high
    assert task.choices is not None and task.choices.kl.value == 0.0


def test_every_answer_flips(questions: Make) -> None:
    lost = result(questions, [RIGHT] * 40, [WRONG] * 40)
    assert lost.tasks[0].decision == lost.macro.decision == lost.micro.decision == "worse"
    assert lost.tasks[0].retention.value == 0.0 and lost.tasks[0].stability.value == 0.0
    won = result(questions, [WRONG] * 40, [RIGHT] * 40)
    assert won.tasks[0].decision == won.macro.decision == won.micro.decision == "better"
    assert won.tasks[0].retention is None and won.macro.retention is None


def test_enough_equal_answers_are_no_worse_than_the_margin(questions: Make) -> None:
    found = result(questions, [RIGHT, WRONG] * 400, [RIGHT, WRONG] * 400)
    assert found.tasks[0].decision == found.macro.decision == "no worse than margin"


def test_nan_is_an_error_that_names_run_task_and_document(questions: Make) -> None:
    with pytest.raises(NumericsError, match="Run 'pruned': Task 't', document 1, choice 0"):
        result(questions, [RIGHT] * 3, [RIGHT, [math.nan, -1.0], RIGHT])


def test_a_task_without_samples(lm_eval_outputs: Path, tmp_path: Path) -> None:
    shutil.copytree(lm_eval_outputs / "dense", tmp_path / "dense")
    results = max((tmp_path / "dense").rglob("results_*.json"))
    next(results.parent.glob("samples_toy_fill_*.jsonl")).write_text("")
    with pytest.raises(SamplesError, match=r"holds no samples: .*'toy_fill'.*--limit"):
        load_samples(tmp_path / "dense", progress=False)
    content = json.loads(results.read_text())
    content["n-samples"]["toy_fill"] = {"original": 0, "effective": 0}
    results.write_text(json.dumps(content))
    with pytest.raises(SamplesError, match=r"'toy_fill'.*--limit"):
        load_samples(tmp_path / "dense", progress=False)


def test_weights_of_thousands_of_nats_keep_their_interval(questions: Make) -> None:
    """One question outweighs all; resamples of the others' clusters must have a ratio, too."""
    n = 60
    scores = [[-10.0 - 100 * index, -9.0] for index in range(n)]
    scores[0] = [-9.0, -6000.0]
    moved = [pair[::-1] if index % 7 == 0 else pair for index, pair in enumerate(scores)]
    clusters = [f"passages:{index // 3}" for index in range(n)]
    runs = [
        questions(run, {"t": (answers, [0] * n, clusters)})
        for run, answers in (("dense", scores), ("pruned", moved))
    ]
    found = compare_answers(*runs, settings=Settings(draws=2000, quantity="nll")).tasks[0].stability
    assert all(map(math.isfinite, (found.value, found.low, found.high)))
    assert found.low <= found.value <= found.high
