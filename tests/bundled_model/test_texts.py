"""The bundled texts are regenerable, and each keeps to its side of the split."""

from __future__ import annotations

import pytest
from bundled_model.language import split_of
from bundled_model.skills import EVALUATED
from bundled_model.tasks import documents
from bundled_model.texts import TEXTS, main

from streamline_bench.demo import model


def test_files_are_as_generated() -> None:
    assert main(["--check"]) == 0
    for name, text in TEXTS.items():
        assert (model() / name).read_text(encoding="utf-8") == text.lines()


def test_no_story_of_a_task_is_calibrated_with() -> None:
    text = TEXTS["calibration.jsonl"]
    trained = [document.story for document in text.documents()]
    asked = [document.story for skill in EVALUATED for document in documents(skill)]
    assert (len(trained), len(asked)) > (text.size - 1, 1000)
    assert set(trained).isdisjoint(asked)


@pytest.mark.parametrize("name", TEXTS)
def test_every_story_is_of_the_texts_split(name: str) -> None:
    found = {split_of(document.story) for document in TEXTS[name].documents()}
    assert found == {TEXTS[name].split}
