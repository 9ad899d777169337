"""The same model and questions through lm-eval and through OpenCompass, with the same prompts.

lm-eval chooses by the summed log-probability of the choice alone, OpenCompass's PPL by the mean
over the whole prompt. With the prompt's tokens the same for all choices, the two sums differ by a
constant, so that:

- PPL times the number of tokens orders the choices as lm-eval does, always;
- PPL itself does whenever the choices of a question have equally many tokens; otherwise it divides
  by different numbers, and a longer choice is favoured (its mean is nearer the prompt's).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamline_bench.demo import model

pytestmark = [
    pytest.mark.opencompass,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("opencompass"),
]

SKILLS = ("story", "agreement")
LIMIT = 30


@pytest.fixture(scope="module")
def by_lm_eval(repository: Path) -> dict[str, list[dict[str, Any]]]:
    """Per skill, lm-eval's logged samples."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from streamline_bench.harness.lm import StreamlineLM

    folder = repository / "tasks" / "lm_eval" / "bundled"
    tasks = [f"streamline_demo_{skill}" for skill in SKILLS]
    results = lm_eval.simple_evaluate(
        StreamlineLM(str(model()), device="cpu", batch_size=16),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        limit=LIMIT,
        bootstrap_iters=0,
    )
    return {skill: results["samples"][f"streamline_demo_{skill}"] for skill in SKILLS}


@pytest.fixture(scope="module")
def by_opencompass(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, opencompass: Any
) -> dict[str, list[dict[str, Any]]]:
    """Per skill, OpenCompass's predictions, made by its own task from our config."""
    import json

    from mmengine.config import Config
    from opencompass.tasks import OpenICLInferTask

    configs = repository / "streamline_bench" / "opencompass" / "configs"
    work = tmp_path_factory.mktemp("opencompass")
    datasets = [
        each
        for each in Config.fromfile(str(configs / "bundled.py"))["bundled_ppl_datasets"]
        if each["skill"] in SKILLS
    ]
    for each in datasets:
        each["reader_cfg"]["test_range"] = f"[0:{LIMIT}]"
    [dense, _] = Config.fromfile(str(configs / "bundled_models.py"))["bundled_models"]
    task = {"models": [dense], "datasets": [datasets], "work_dir": str(work)}
    OpenICLInferTask(Config(task)).run()
    found = {}
    for skill in SKILLS:
        file = work / "predictions" / "dense" / f"streamline_demo_{skill}.json"
        entries = json.loads(file.read_text(encoding="utf-8"))
        found[skill] = [entries[str(number)] for number in range(LIMIT)]
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model())


def first_best(values: list[float]) -> int:
    return values.index(max(values))


@pytest.mark.parametrize("skill", SKILLS)
def test_sums_and_predictions_agree(
    skill: str,
    by_lm_eval: dict[str, list[dict[str, Any]]],
    by_opencompass: dict[str, list[dict[str, Any]]],
    tokenizer: Any,
) -> None:
    equal_lengths = 0
    for sample, entry in zip(by_lm_eval[skill], by_opencompass[skill], strict=True):
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        labels = [entry[f"label: {number}"] for number in range(len(theirs))]
        assert labels[0]["prompt"] == sample["arguments"][0][0] + sample["arguments"][0][1]
        counts = [len(tokenizer(label["prompt"])["input_ids"]) for label in labels]
        sums = [-label["PPL"] * count for label, count in zip(labels, counts, strict=True)]
        gaps = [ours - their for ours, their in zip(sums, theirs, strict=True)]
        assert gaps == pytest.approx([gaps[0]] * len(gaps), abs=2e-3)
        assert first_best(sums) == first_best(theirs)
        assert entry["gold"] == sample["target"]
        if len(set(counts)) == 1:
            equal_lengths += 1
            assert entry["prediction"] == first_best(theirs)
    assert equal_lengths > LIMIT / 10
