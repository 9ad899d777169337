"""Loads the documents of a bundled task from the folder beside this file, wherever that is."""

from __future__ import annotations

import json
from pathlib import Path

import datasets


def load(skill: str, **_: object) -> datasets.DatasetDict:
    """The ``test`` split of a skill; lm-eval also passes the task's metadata."""
    path = Path(__file__).resolve().parent / "data" / f"{skill}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
