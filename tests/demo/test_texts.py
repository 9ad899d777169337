"""The bundled texts are regenerable, and each keeps to its side of the split."""

from __future__ import annotations

import pytest

from streamline_bench.demo import model
from streamline_bench.demo.language import split_of
from streamline_bench.demo.skills import EVALUATED
from streamline_bench.demo.tasks import documents
from streamline_bench.demo.texts import TEXTS, main


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
