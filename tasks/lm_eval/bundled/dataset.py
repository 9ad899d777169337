"""Loads the documents of a bundled task from the folder beside this file, wherever that is."""

from __future__ import annotations

import json
from pathlib import Path

import datasets


def load(skill: str, **_: object) -> datasets.DatasetDict:
    """The splits of a skill; lm-eval also passes the task's metadata.

    ``test`` is scored; ``validation``, of tasks with choices, is there to choose layers by.
    """
    data = Path(__file__).resolve().parent / "data"
    files = {"test": data / f"{skill}.jsonl", "validation": data / "held_out" / f"{skill}.jsonl"}
    splits = {name: _rows(path) for name, path in files.items() if path.is_file()}
    return datasets.DatasetDict(splits)


def _rows(path: Path) -> datasets.Dataset:
    lines = path.read_text(encoding="utf-8").splitlines()
    return datasets.Dataset.from_list([json.loads(line) for line in lines])
