"""Real benchmark files through OpenCompass's own data set classes, dense against pruned.

``python opencompass_real_data.py DATA MODEL TEXT OUTPUT [--limit N] [--n-layers N]``, where DATA
holds ``c3_test.jsonl``, ``cmmlu_test.jsonl``, ``piqa_val.jsonl``, ``hellaswag_val.jsonl`` and
``boolq.jsonl`` (``query, choices, gold``), MODEL is a model folder and TEXT a file to calibrate on.
The files are written in the layout that OpenCompass's classes read, and evaluated by its own
configs; then the stability of each benchmark is printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUBJECTS = ("agronomy", "anatomy", "college_law", "elementary_mathematics", "virology")

SUBSET = f"""from mmengine.config import read_base

with read_base():
    from opencompass.configs.datasets.cmmlu.cmmlu_ppl import cmmlu_datasets

subset_datasets = [x for x in cmmlu_datasets if x["abbr"][6:] in {SUBJECTS!r}]
"""


def rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def write_lines(path: Path, entries: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in entries)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_c3(source: Path, data: Path) -> None:
    entries = []
    for number, row in enumerate(rows(source / "c3_test.jsonl")):
        choices = row["choices"]
        if len(set(choices)) != len(choices):
            continue  # The class finds the answer by its text.
        question = {"question": row["query"], "choice": choices, "answer": choices[row["gold"]]}
        entries.append([[row["passage"]], [question], str(number)])
    target = data / "CLUE" / "C3" / "dev_0.json"
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def write_piqa(source: Path, data: Path) -> None:
    questions, labels = [], []
    for number, row in enumerate(rows(source / "piqa_val.jsonl")):
        first, second = row["choices"]
        questions.append({"id": number, "goal": row["query"], "sol1": first, "sol2": second})
        labels.append(str(row["gold"]))
    for split in ("train", "dev"):  # No train file is at hand, and none is used.
        write_lines(data / "piqa" / f"{split}.jsonl", questions)
        write_lines(data / "piqa" / f"{split}-labels.lst", labels)


def write_hellaswag(source: Path, data: Path) -> None:
    write_lines(data / "hellaswag" / "hellaswag.jsonl", list(rows(source / "hellaswag_val.jsonl")))


def write_boolq(source: Path, data: Path) -> None:
    entries = []
    for row in rows(source / "boolq.jsonl"):
        passage, question = row["query"].rsplit("\nQuestion: ", 1)
        yes = row["choices"][row["gold"]].strip().lower() == "yes"
        entries.append(
            {
                "passage": passage.removeprefix("Passage: "),
                "question": question.split("\n")[0].removesuffix("?"),
                "label": "true" if yes else "false",
            }
        )
    write_lines(data / "SuperGLUE" / "BoolQ" / "val.jsonl", entries)


def write_cmmlu(source: Path, data: Path) -> None:
    for subject in SUBJECTS:
        table = [
            [str(number), row["query"], *row["choices"], "ABCD"[row["gold"]]]
            for number, row in enumerate(rows(source / "cmmlu_test.jsonl"))
            if row["subject"] == subject
        ]
        # No dev file is at hand: the first five test questions serve as examples.
        for split, part in (("dev", table[:5]), ("test", table[5:])):
            target = data / "cmmlu" / split / f"{subject}.csv"
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("w", encoding="utf-8", newline="") as stream:
                csv.writer(stream).writerows([list("iQABCDa"), *part])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "model", "text", "output"):
        parser.add_argument(name, type=lambda value: Path(value).absolute())
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--n-layers", type=int, default=1)
    parser.add_argument("--max-seq-len", type=int, default=512)
    arguments = parser.parse_args()
    place = arguments.output
    place.mkdir(parents=True)
    for write in (write_c3, write_piqa, write_hellaswag, write_boolq, write_cmmlu):
        write(arguments.data, place / "data")
    subset = place / "site" / "cmmlu_subset"
    subset.mkdir(parents=True)
    (subset / "__init__.py").touch()
    (subset / "config.py").write_text(SUBSET)
    command = [
        sys.executable, "-m", "streamline_bench.cli.main", "opencompass", str(arguments.model),
        "--recipes", "dense,streamline_none", "--n-layers", str(arguments.n_layers),
        "--set", f"calibration={arguments.text}",
        "--datasets", "piqa,hellaswag,boolq,c3,cmmlu_subset.config:subset_datasets",
        # With it, OpenCompass leaves out examples that do not fit, instead of cutting them.
        "--max-seq-len", str(arguments.max_seq_len),
        "--limit", str(arguments.limit), "--in-process", "-o", str(place / "run"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(place / "site")}
    subprocess.run(command, cwd=place, env=environment, check=True)
    print((place / "run" / "leaderboard.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
