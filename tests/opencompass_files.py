"""Writes small folders as OpenCompass 0.5 does, for the tests of the reader.

Only the standard library: the tests also compute from these what they expect.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

LETTERS = ("A", "B", "C", "D")


def question(number: int) -> str:
    return f"Question: What is {number} + {number * 7 % 13}?\nAnswer: \n"


def ppl(
    count: int,
    seed: int,
    labels: Sequence[Any] = LETTERS,
    *,
    golds: Sequence[Any] | None = None,
    examples: str = "",
    name: str = "PPL",
) -> list[Entry]:
    """Entries of the PPL mode (or, with ``name="Loglikelihood"``, of LL)."""
    draw, golds = random.Random(seed), golds or gold_labels(count, labels)
    entries = []
    for number in range(count):
        scores = {label: 2.0 + 3.0 * draw.random() for label in labels}
        if name == "Loglikelihood":
            scores = {label: -score for label, score in scores.items()}
        best = min(labels, key=lambda label: scores[label] * (1 if name == "PPL" else -1))
        entry: Entry = {"in-context examples": examples}
        for label in labels:
            own = f"{question(number)}{label}"
            entry.setdefault("origin_prompt", own)
            entry[f"label: {label}"] = {
                "testing input": own,
                "prompt": examples + own,
                name: scores[label],
            }
        entries.append({**entry, "prediction": best, "gold": golds[number]})
    return entries


def gold_labels(count: int, labels: Sequence[Any]) -> list[Any]:
    """The right answers: the same whatever the model."""
    draw = random.Random(99)
    return [draw.choice(list(labels)) for _ in range(count)]


def clp(count: int, seed: int) -> list[Entry]:
    draw = random.Random(seed)
    entries = []
    for number in range(count):
        weights = [draw.random() for _ in LETTERS]
        shares = [weight / sum(weights) for weight in weights]
        entries.append(
            {
                "in-context examples": "",
                "testing input": question(number),
                "prompt": question(number),
                "choices": list(LETTERS),
                "prediction": shares,
                "pred_label": shares.index(max(shares)),
                "gold": number % 4,
            }
        )
    return entries


def gen(count: int, seed: int, golds: Sequence[Any]) -> list[Entry]:
    """Entries of the GEN mode; as there, a gold that is empty, zero or false is left out."""
    draw = random.Random(seed)
    entries = []
    for number in range(count):
        entry: Entry = {
            "origin_prompt": question(number),
            "prediction": f"I say {draw.choice(LETTERS)}",
        }
        entries.append({**entry, "gold": golds[number]} if golds[number] else entry)
    return entries


def write(folder: Path, name: str, entries: Sequence[Entry], *, parts: int = 1) -> Path:
    """Write one data set, whole or in parts whose numbers begin at 0 again."""
    folder.mkdir(parents=True, exist_ok=True)
    if parts == 1:
        return _dump(folder / f"{name}.json", entries)
    step = -(-len(entries) // parts)
    for part in range(parts):
        _dump(folder / f"{name}_{part}.json", entries[part * step : (part + 1) * step])
    return folder / f"{name}_0.json"


def _dump(path: Path, entries: Sequence[Entry]) -> Path:
    numbered = {str(number): entry for number, entry in enumerate(entries)}
    path.write_text(json.dumps(numbered, indent=4, ensure_ascii=False), encoding="utf-8")
    return path


def write_results(run: Path, model: str, name: str, payload: Mapping[str, Any]) -> Path:
    folder = run / "results" / model
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(payload), encoding="utf-8")
    return path


def write_config(run: Path, model: str, datasets: Mapping[str, int]) -> Path:
    """A dumped config: data set -> how often each question is asked."""
    listed = "".join(
        f"    dict(abbr={name!r}, n={count}, reader_cfg=dict(input_columns=['question'])),\n"
        for name, count in datasets.items()
    )
    (run / "configs").mkdir(parents=True, exist_ok=True)
    path = run / "configs" / f"{run.name}_1.py"
    path.write_text(
        f"datasets = [\n{listed}]\n"
        f"models = [\n    dict(abbr={model!r}, path='some/model', batch_size=4,\n"
        "         type='opencompass.models.HuggingFaceBaseModel'),\n]\n"
        "work_dir = './outputs'\n"
    )
    return path
