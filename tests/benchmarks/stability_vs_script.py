"""Stability of two evaluations beside the script that LLM-Streamline's authors published.

    git clone https://github.com/RUCKBReasoning/LLM-Streamline REFERENCE
    python tests/benchmarks/stability_vs_script.py --script REFERENCE/calculate_stability.py \
        RUN/dense/eval RUN/shortgpt/eval

of lm-eval (two rows of a run folder, with samples), or two ``predictions/MODEL`` of OpenCompass,
not in parts. The script's function is called as it is, with the labels of each data set, and must
give what our mode ``reference_script`` gives, to the last digit. Beside them stand the paper's
equation and the plain share of equal verdicts. Of the script nothing is kept here.

The script reads OpenCompass's files. Of lm-eval, such files are written from the samples, in the
order of the documents: a choice's "PPL" is its negative log-likelihood per UTF-8 byte, which the
spread is of by default. Its arithmetic needs equally many choices in every question of a data set;
others are named and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.comparison import Comparison, TaskComparison
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.settings import Settings

Script = Callable[[str, str, list[str]], float]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("dense", type=Path, help="folder of an evaluation")
    parser.add_argument("pruned", type=Path)
    options = parser.parse_args(arguments)
    script = published(options.script)
    theirs_mode = compared(options, Settings(mode="reference_script", draws=100))
    paper = {task.task: task for task in compared(options, Settings()).tasks}
    print("| data set | n | script | ours, its arithmetic | same | paper's equation | agreement |")
    print("|---|---:|---:|---:|---|---:|---:|")
    lines, different = [], 0
    for task in theirs_mode.tasks:
        if task.stability is None:
            continue
        theirs = by_script(script, task.task, options.dense, options.pruned)
        if theirs is None:
            print(f"| {task.task} | {task.n} | another number of choices in some questions |")
            continue
        same = theirs == task.stability.value
        different += not same
        lines.append(line(task, paper[task.task], theirs))
        print(
            f"| {task.task} | {task.n} | {theirs:.17f} | {task.stability.value:.17f} | "
            f"{'yes' if same else 'NO'} | {lines[-1][1]:.4f} | {lines[-1][2]:.4f} |"
        )
    if not lines:
        parser.error("no data set has choices, equally many in every question")
    means = [sum(column) / len(lines) for column in zip(*lines, strict=True)]
    print("| mean | | {:.4f} | | | {:.4f} | {:.4f} |".format(*means))
    return 1 if different else 0


def published(path: Path) -> Script:
    spec = importlib.util.spec_from_file_location("published_script", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found: Script = script.calculate_stability
    return found


def compared(options: argparse.Namespace, settings: Settings) -> Comparison:
    runs = [load_samples(path, progress=False) for path in (options.dense, options.pruned)]
    return compare_answers(*runs, common_only=True, settings=settings)


def line(task: TaskComparison, paper: TaskComparison, theirs: float) -> tuple[float, float, float]:
    assert paper.stability is not None  # there is one wherever the script's arithmetic has one
    return theirs, paper.stability.value, task.agreement.value


def by_script(script: Script, task: str, dense: Path, pruned: Path) -> float | None:
    """What the script says of a task; None where its questions differ in the number of choices."""
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for name, folder in (("pruned", pruned), ("dense", dense)):
            file = folder / f"{task}.json"  # of OpenCompass
            if not file.exists():
                file = Path(scratch) / f"{name}.json"
                file.write_text(json.dumps(predictions(folder, task)), encoding="utf-8")
            files.append(file)
        found = [labels(one) for one in json.loads(files[1].read_text(encoding="utf-8")).values()]
        if any(one != found[0] for one in found):
            return None
        return float(script(str(files[0]), str(files[1]), found[0]))


def labels(prediction: dict[str, Any]) -> list[str]:
    return [key.removeprefix("label: ") for key in prediction if key.startswith("label: ")]


def predictions(folder: Path, task: str) -> dict[str, Any]:
    """The answers of lm-eval in the layout of OpenCompass, read from its own files."""
    files = list(folder.rglob(f"samples_{task}_2*.jsonl"))
    results = list(folder.rglob("results_*.json"))
    if len(files) != 1 or len(results) != 1:
        raise SystemExit(f"{folder} has {len(files)} files with samples of {task}, not one")
    config = json.loads(results[0].read_text(encoding="utf-8"))["configs"][task]
    delimiter = config.get("target_delimiter", " ")
    samples = [json.loads(text) for text in files[0].read_text(encoding="utf-8").splitlines()]
    samples = [each for each in samples if each["filter"] == samples[0]["filter"]]
    samples.sort(key=lambda each: each["doc_id"])
    return {str(number): prediction(each, delimiter) for number, each in enumerate(samples)}


def prediction(sample: dict[str, Any], delimiter: str) -> dict[str, Any]:
    likelihoods = [float(answer[0]) for answer in sample["filtered_resps"]]
    asked = [sample["arguments"][f"gen_args_{k}"]["arg_1"] for k in range(len(likelihoods))]
    if all(text.startswith(delimiter) for text in asked):
        asked = [text[len(delimiter) :] for text in asked]
    best = likelihoods.index(max(likelihoods))
    # A target may be a text that all choices end with; then the verdict says whether it is right.
    target = str(sample["target"])
    gold = int(target) if target.isdigit() else best if sample["acc"] else None
    if (best == gold) != bool(sample["acc"]):
        raise SystemExit(f"Document {sample['doc_id']} is not judged by its largest likelihood")
    sizes = [max(len(text.encode("utf-8")), 1) for text in asked]
    spread = {f"label: {k}": {"PPL": -likelihoods[k] / sizes[k]} for k in range(len(sizes))}
    return {"prediction": str(best), "gold": str(gold), **spread}


if __name__ == "__main__":
    sys.exit(main())
