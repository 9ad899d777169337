"""Damaged files of every kind: a reader answers, or says in one sentence what is wrong.

A short search that is the same every time; tests/fuzz/fuzz_readers.py searches for as long as one
likes. ``findings/`` holds what that found (relative path -> content); each stays mended.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from fuzz.mutations import damaged
from fuzz.readers import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamline_bench.errors import StreamlineBenchError

FINDINGS = sorted((Path(__file__).parent / "findings").glob("*.json"))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", TARGETS)
def test_valid_folders_are_read(name: str, tmp_path: Path) -> None:
    for number, files in enumerate(TARGETS[name].seeds):
        try:
            TARGETS[name].read(write(tmp_path / str(number), dict(files)))
        except StreamlineBenchError as error:
            pytest.fail(f"a valid folder is refused: {error}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_folders_are_read_or_refused_in_words(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    refused = []

    @settings(
        max_examples=40,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def search(seed: int) -> None:
        chance = Random(seed)
        files = damaged(chance.choice(TARGETS[name].seeds), chance)
        try:
            TARGETS[name].read(write(tmp_path_factory.mktemp("damaged") / "folder", files))
        except StreamlineBenchError as error:
            refused.append(str(error))

    search()
    assert refused, "nothing was damaged enough to be refused"
    assert all(message.strip() for message in refused)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("finding", FINDINGS, ids=lambda path: path.stem)
def test_findings_stay_mended(finding: Path, tmp_path: Path) -> None:
    files = json.loads(finding.read_text())
    folder = write(tmp_path / "folder", {k: v.encode("latin-1") for k, v in files.items()})
    with pytest.raises(StreamlineBenchError):
        TARGETS[finding.stem.split("-")[0]].read(folder)
