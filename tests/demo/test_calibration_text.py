"""The bundled calibration text is regenerable and shares no story with the tasks."""

from __future__ import annotations

from streamline_bench.demo import model
from streamline_bench.demo.calibration_text import (
    DOCUMENTS,
    calibration_documents,
    calibration_text,
    main,
)
from streamline_bench.demo.skills import EVALUATED
from streamline_bench.demo.tasks import documents


def test_file_is_as_generated() -> None:
    assert main(["--check"]) == 0
    assert (model() / "calibration.jsonl").read_text(encoding="utf-8") == calibration_text()


def test_no_story_of_a_task_is_in_it() -> None:
    trained = [document.story for document in calibration_documents()]
    asked = [document.story for skill in EVALUATED for document in documents(skill)]
    assert (len(trained), len(asked)) > (DOCUMENTS - 1, 1000)
    assert set(trained).isdisjoint(asked)
