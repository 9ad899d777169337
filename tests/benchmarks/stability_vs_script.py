"""Stability of two OpenCompass runs beside the script that LLM-Streamline's authors published.

    git clone https://github.com/RUCKBReasoning/LLM-Streamline REFERENCE
    python tests/benchmarks/stability_vs_script.py --script REFERENCE/calculate_stability.py \
        RUN/predictions/dense RUN/predictions/pruned

The script's function is called as it is, with the labels of each data set, and must give what our
mode ``reference_script`` gives, to the last digit. Beside them stand the paper's equation and the
plain share of equal verdicts. Of the script nothing is kept here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.comparison import Comparison
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.settings import Settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("dense", type=Path, help="folder of prediction files, not in parts")
    parser.add_argument("pruned", type=Path)
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("published_script", options.script)
    if spec is None or spec.loader is None:
        parser.error(f"{options.script} is not a Python file")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    theirs_mode = compared(options, Settings(mode="reference_script", draws=100))
    paper = {task.task: task for task in compared(options, Settings()).tasks}
    print(f"{'data set':32} {'script':>20} {'ours':>20}  same  paper   agreement")
    different = 0
    for task in theirs_mode.tasks:
        own, of_paper = task.stability, paper[task.task].stability
        if own is None or of_paper is None:
            continue
        files = [str(folder / f"{task.task}.json") for folder in (options.pruned, options.dense)]
        theirs = float(script.calculate_stability(*files, labels(Path(files[1]))))
        same = theirs == own.value
        different += not same
        print(
            f"{task.task:32} {theirs:20.17f} {own.value:20.17f}  {'yes' if same else 'NO':4}  "
            f"{of_paper.value:.4f}  {task.agreement.value:.4f}"
        )
    return 1 if different else 0


def compared(options: argparse.Namespace, settings: Settings) -> Comparison:
    runs = [load_samples(path, progress=False) for path in (options.dense, options.pruned)]
    return compare_answers(*runs, common_only=True, settings=settings)


def labels(path: Path) -> list[str]:
    first = json.loads(path.read_text(encoding="utf-8"))["0"]
    return [key.removeprefix("label: ") for key in first if key.startswith("label: ")]


if __name__ == "__main__":
    sys.exit(main())
