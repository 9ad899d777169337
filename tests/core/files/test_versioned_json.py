"""Files with a schema version: what is wrong with them is named, with what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError, field_validator

from streamline_bench.core.files import read_json, validated
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.core.recipe.validation import first_problem, wrong_value
from streamline_bench.errors import SamplesError, first_line


class Part(Frozen):
    size: int

    @field_validator("size")
    @classmethod
    def _even(cls, size: int) -> int:
        if size % 2:
            raise ValueError(f"{size} is odd")
        return size


class Whole(Frozen):
    schema_version: int = 2
    parts: tuple[Part, ...] = ()


def check(payload: Any) -> Whole:
    return validated(Whole, payload, "a.json", newest=2, error=SamplesError, advice="make it again")


def test_what_is_good_comes_back() -> None:
    assert check({"schema_version": 1, "parts": [{"size": 4}]}).parts == (Part(size=4),)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"schema_version": 3, "new": 1}, "a.json has schema version 3, newer than 2; upgrade str"),
        ({"parts": [{"size": 2}, {"size": 3}]}, "a.json: 'parts.1.size': 3 is odd; make it again."),
        ({"parts": [{}]}, "a.json: 'parts.0.size': Field required; make it again."),
        ({"surprise": 1}, "a.json: 'surprise': Extra inputs are not permitted; make it again."),
        ([], "a.json: 'file': Input should be a valid dictionary"),
    ],
)
def test_what_is_wrong_is_named(payload: Any, message: str) -> None:
    with pytest.raises(SamplesError) as raised:
        check(payload)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SamplesError, match=r"a\.json .*look for it"):
        read_json(path, SamplesError, "look for it")


def test_the_first_problem_of_several() -> None:
    with pytest.raises(ValidationError) as raised:
        Whole.model_validate({"parts": [{"size": 1}], "other": 1})
    assert first_problem(raised.value) == "'parts.0.size': 1 is odd"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("it broke.\nand so on"), "it broke"),
        (ValueError("\n  it   broke \n"), "it broke"),
        (
            RuntimeError("Error(s) in loading X:\n\tsize mismatch"),
            "Error(s) in loading X: size mismatch",
        ),
        (KeyError(), "KeyError"),
        (ValueError("for nothing:"), "for nothing:"),
        (ValueError("w" * 300), "w" * 200 + "…"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, told: str) -> None:
    assert first_line(error) == told


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        ({"parst": []}, "unknown key 'parst'; did you mean 'parts'?"),
        ({"zzz": 1}, "unknown key 'zzz'; known: schema_version, parts."),
        (
            {"parts": [{"size": 2, "sise": 3}]},
            "unknown key 'parts.0.sise'; did you mean 'parts.0.size'?",
        ),
        ({"parts": [{"size": 1}]}, "'parts.0.size' is 1: 1 is odd."),
    ],
)
def test_a_wrong_value_is_told_in_a_sentence(payload: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Whole.model_validate(payload)
    assert wrong_value(raised.value, Whole) == told
    inside = re.sub(r"(key|mean) '", r"\1 'all.", told).replace("'parts.0", "'all.parts.0")
    assert wrong_value(raised.value, Whole, "all") == inside
