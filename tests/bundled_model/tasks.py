"""The bundled lm-eval tasks: their documents and YAML files, regenerable byte for byte.

``python -m bundled_model.tasks`` writes them, ``--check`` compares the files on disk
with what would be written and exits 1 when they differ.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from bundled_model.language import Document, draw
from bundled_model.skills import BUILDERS, EVALUATED

from streamline_bench.core.machine.environment import resource

TASK_PREFIX = "streamline_demo"
DOCUMENTS_PER_TASK = 250
HELD_OUT_PER_TASK = 64
SEED = 20
GENERATION_SKILLS: tuple[str, ...] = ("recall",)

_HEAD = """\
task: {prefix}_{skill}
custom_dataset: !function dataset.load
dataset_kwargs:
  skill: {skill}
test_split: test
num_fewshot: 0
doc_to_text: context
"""
_MULTIPLE_CHOICE = """\
validation_split: validation
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
_GENERATION = """\
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 32
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_METADATA = """\
metadata:
  version: 1.0
"""


def record(document: Document) -> dict[str, object]:
    """The JSON record of a document's first question."""
    question = document.questions[0]
    context = f"{document.story} {question.prompt}".strip()
    if len(question.choices) == 1:
        return {"context": context, "answer": question.answer}
    return {"context": context, "choices": list(question.choices), "gold": question.gold}


@cache
def documents(skill: str) -> tuple[Document, ...]:
    """The evaluated documents of a skill, no story twice."""
    rng = random.Random(f"{TASK_PREFIX}/{skill}/{SEED}")
    chosen: dict[str, Document] = {}
    while len(chosen) < DOCUMENTS_PER_TASK:
        document = draw(BUILDERS[skill], rng, "eval")
        chosen.setdefault(document.story, document)
    return tuple(chosen.values())


@cache
def held_out(skill: str) -> tuple[Document, ...]:
    """Documents of a skill that are never scored; none of their stories is scored, either."""
    rng = random.Random(f"{TASK_PREFIX}/{skill}/{SEED}/held out")
    scored = {document.story for document in documents(skill)}
    chosen: dict[str, Document] = {}
    while len(chosen) < HELD_OUT_PER_TASK:
        document = draw(BUILDERS[skill], rng, "eval")
        if document.story not in scored:
            chosen.setdefault(document.story, document)
    return tuple(chosen.values())


def _lines(drawn: Iterable[Document]) -> str:
    return "".join(json.dumps(record(document)) + "\n" for document in drawn)


def _group(name: str, skills: list[str], metric: str) -> str:
    members = "".join(f"  - {TASK_PREFIX}_{skill}\n" for skill in skills)
    aggregate = f"aggregate_metric_list:\n  - metric: {metric}\n    weight_by_size: true\n"
    return f"group: {name}\ntask:\n{members}{aggregate}{_METADATA}"


def files() -> dict[str, str]:
    """Every generated file of the task folder: relative path to content."""
    written: dict[str, str] = {}
    for skill in EVALUATED:
        written[f"data/{skill}.jsonl"] = _lines(documents(skill))
        if skill not in GENERATION_SKILLS:
            written[f"data/held_out/{skill}.jsonl"] = _lines(held_out(skill))
        kind = _GENERATION if skill in GENERATION_SKILLS else _MULTIPLE_CHOICE
        head = _HEAD.format(prefix=TASK_PREFIX, skill=skill)
        written[f"{TASK_PREFIX}_{skill}.yaml"] = head + kind + _METADATA
    choice = [skill for skill in EVALUATED if skill not in GENERATION_SKILLS]
    written[f"_{TASK_PREFIX}.yaml"] = _group(TASK_PREFIX, choice, "acc")
    written[f"_{TASK_PREFIX}_generation.yaml"] = _group(
        f"{TASK_PREFIX}_generation", list(GENERATION_SKILLS), "exact_match"
    )
    return written


def default_folder() -> Path:
    """Where the bundled tasks lie, in a checkout and in an installed wheel."""
    return resource("tasks") / "lm_eval" / "bundled"


def differing(folder: Path) -> list[str]:
    """The generated files that are missing from ``folder`` or differ from it."""
    wrong = []
    for name, content in files().items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content.encode():
            wrong.append(name)
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Write or check the task folder."""
    parser = argparse.ArgumentParser(prog="python -m bundled_model.tasks", description=__doc__)
    parser.add_argument("--folder", type=Path, default=default_folder())
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args(arguments)
    if options.check:
        wrong = differing(options.folder)
        print(f"differs: {', '.join(wrong)}" if wrong else "the task files are up to date")
        return 1 if wrong else 0
    for name, content in files().items():
        path = options.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
