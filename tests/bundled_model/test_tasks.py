"""The bundled tasks: the committed files are what the generator writes, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundled_model.language import split_of
from bundled_model.skills import EVALUATED
from bundled_model.stream import encode
from bundled_model.tasks import (
    DOCUMENTS_PER_TASK,
    GENERATION_SKILLS,
    HELD_OUT_PER_TASK,
    default_folder,
    documents,
    files,
    held_out,
    main,
)


def _rows(skill: str) -> list[dict[str, object]]:
    text = (default_folder() / "data" / f"{skill}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_committed_files_regenerate_byte_for_byte() -> None:
    assert main(["--check"]) == 0


def test_no_file_is_left_over() -> None:
    folder = default_folder()
    present = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    written_by_hand = {"dataset.py"}
    stray = {name for name in present - set(files()) - written_by_hand if "__pycache__" not in name}
    assert stray == set()


def test_check_names_the_file_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--folder", str(tmp_path)])
    assert main(["--folder", str(tmp_path), "--check"]) == 0
    (tmp_path / "data" / "order.jsonl").write_text("")
    assert main(["--folder", str(tmp_path), "--check"]) == 1
    assert "data/order.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("skill", EVALUATED)
def test_documents_are_held_out_and_distinct(skill: str) -> None:
    drawn = documents(skill)
    assert len(drawn) == DOCUMENTS_PER_TASK == len(_rows(skill))
    assert {split_of(document.story) for document in drawn} == {"eval"}
    assert len({document.story for document in drawn}) == len(drawn)


@pytest.mark.parametrize("skill", sorted({*EVALUATED} - {*GENERATION_SKILLS}))
def test_what_layers_are_chosen_by_is_neither_scored_nor_trained_on(skill: str) -> None:
    stories = {document.story for document in held_out(skill)}
    assert len(stories) == HELD_OUT_PER_TASK
    assert stories.isdisjoint(document.story for document in documents(skill))
    assert {split_of(story) for story in stories} == {"eval"}


def test_some_choices_have_several_tokens_and_some_one() -> None:
    lengths = {
        skill: max(len(encode(str(choice))) for row in _rows(skill) for choice in row["choices"])
        for skill in EVALUATED
        if skill not in GENERATION_SKILLS
    }
    assert sum(length > 1 for length in lengths.values()) >= 3
    assert sum(length == 1 for length in lengths.values()) >= 3


def test_attributes_hides_the_answer_in_a_long_context() -> None:
    lengths = [len(encode(str(row["context"]))) for row in _rows("attributes")]
    assert min(lengths) >= 55
    assert sum(length >= 60 for length in lengths) > len(lengths) / 2
