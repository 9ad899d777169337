"""Documents of the local-file tasks: jsonl files below the folder ``$STREAMLINE_BENCH_DATA``."""

from __future__ import annotations

import json
import operator
import os
import random
import re
from pathlib import Path
from typing import Any

import datasets

from streamline_bench.errors import SamplesError
from streamline_bench.harness.model_creation import user_errors

VARIABLE = "STREAMLINE_BENCH_DATA"


SCORED = 1000
"""So many first lines of a file are scored, whatever else is held out."""

HELD_OUT = 256
"""Most lines of a file that are held out."""


def load(file: str, hold_out: bool = False, **_: object) -> datasets.DatasetDict:
    """Return the lines of a file as the split ``test``; lm-eval also passes the task's metadata.

    Args:
        file: such as ``eval/piqa_val.jsonl``; looked for in the folder that the environment
            variable names, and in its subfolder ``data``.
        hold_out: lines that :func:`held_out` names are the split ``validation`` instead, which is
            not scored.

    Raises:
        SamplesError: the variable is not set, or the file is not there.
    """
    with user_errors(), _path(file).open(encoding="utf-8") as stream:
        documents = [json.loads(line) for line in stream if line.strip()]
    apart = held_out(len(documents)) if hold_out else frozenset()
    splits = {"test": [each for line, each in enumerate(documents) if line not in apart]}
    if apart:
        splits["validation"] = [documents[line] for line in sorted(apart)]
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    )


def held_out(count: int) -> frozenset[int]:
    """Return which of ``count`` lines, from 0, are held out: at most a quarter of those behind the
    first :data:`SCORED`, evenly spread."""
    behind = max(0, count - SCORED)
    held = min(HELD_OUT, behind // 4)
    return frozenset(SCORED + (2 * k + 1) * behind // (2 * held) for k in range(held))


def _path(file: str) -> Path:
    named = os.environ.get(VARIABLE)
    if not named:
        raise SamplesError(
            f"The local tasks need the environment variable {VARIABLE}: "
            f"set it to the folder that holds {file}."
        )
    for folder in (Path(named).expanduser(), Path(named).expanduser() / "data"):
        if (folder / file).is_file():
            return folder / file
    raise SamplesError(f"{VARIABLE} is {named}, where there is no {file}, nor data/{file}.")


def fill_idioms(documents: datasets.Dataset) -> datasets.Dataset:
    """CHID: split each text at its gap; a choice is an idiom with what follows it."""

    def split(document: dict[str, Any]) -> dict[str, Any]:
        before, _, after = document["content"].partition("#idiom#")
        choices = [idiom + after for idiom in document["candidates"]]
        return {"before": before, "choices": choices, "gold": document["answer"]}

    return documents.map(split)


def last_words(documents: datasets.Dataset) -> datasets.Dataset:
    """Stories up to the last word of the sentence that comes next, and four last words to choose.

    Stories whose candidates end in the same word are left out.
    """

    def split(document: dict[str, Any]) -> dict[str, Any]:
        ends = [re.findall(r"[A-Za-z']+", choice)[-1:] for choice in document["choices"]]
        words = [end[0] if end else "" for end in ends]
        right = document["choices"][document["gold"]]
        before = right[: right.rfind(words[document["gold"]])].rstrip()
        return {"text": f"{document['query']} {before}", "words": words}

    found = documents.map(split)
    return found.filter(
        lambda document: all(document["words"]) and len(set(document["words"])) == 4
    )


OPERATIONS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}


def arithmetic(count: int = 500, **_: object) -> datasets.DatasetDict:
    """Sums, differences and products of small numbers: nothing is read, the same for everyone.

    Columns: ``question``, ``answer`` and, of four ``choices``, the number ``gold`` of the right
    one.
    """
    draw = random.Random(0)
    asked: dict[str, dict[str, Any]] = {}
    while len(asked) < count + 4:
        name = draw.choice(list(OPERATIONS))
        first, second = sorted((draw.randint(2, 12), draw.randint(2, 30)), reverse=True)
        right = OPERATIONS[name](first, second)
        near = {right + step for step in (-10, -3, -2, -1, 1, 2, 3, 10) if right + step >= 0}
        choices = [right, *draw.sample(sorted(near), 3)]
        draw.shuffle(choices)
        question = f"What is {first} {name} {second}?\nAnswer:"
        asked[question] = {"question": question, "answer": str(right), "gold": choices.index(right),
                           "choices": [str(choice) for choice in choices]}  # fmt: skip
    rows = list(asked.values())
    return datasets.DatasetDict({
        "test": datasets.Dataset.from_list(rows[4:]),
        "examples": datasets.Dataset.from_list(rows[:4]),
    })  # fmt: skip


def rouge(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F1, stemmed, in percent) of one summary."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scores = RougeScorer(kinds, use_stemmer=True).score(document["summary"], results[0].strip())
    return {kind: 100 * scores[kind].fmeasure for kind in kinds}
