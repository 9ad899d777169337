"""The text that the bundled model is calibrated and healed with, regenerable byte for byte.

``python -m streamline_bench.demo.calibration_text`` writes ``calibration.jsonl`` into the model's
folder, where ``calibration=auto`` finds it; ``--check`` compares and exits 1 on a difference. The
documents are of the training split, of the skills and shares at the end of training, and share no
story with the tasks.
"""

from __future__ import annotations

import argparse
import json
import random
import sys

from streamline_bench.core.staging import atomic_write_text
from streamline_bench.demo import model
from streamline_bench.demo.language import Document, draw_mixed
from streamline_bench.demo.skills import BUILDERS, weights_at

__all__ = ["DOCUMENTS", "calibration_documents", "calibration_text", "main"]

DOCUMENTS = 2500
SEED = 77
FILE_NAME = "calibration.jsonl"
_AFTER_TRAINING = 10**9


def calibration_documents() -> list[Document]:
    """Draw the documents of the file, in its order."""
    rng = random.Random(SEED)
    weights = weights_at(_AFTER_TRAINING)
    return [draw_mixed(BUILDERS, weights, rng, "train") for _ in range(DOCUMENTS)]


def calibration_text() -> str:
    """Return the file's content: one JSON object with ``text`` a line."""
    drawn = calibration_documents()
    return "".join(json.dumps({"text": document.text}) + "\n" for document in drawn)


def main(arguments: list[str] | None = None) -> int:
    """Write the file, or compare it with what would be written."""
    parser = argparse.ArgumentParser(prog="python -m streamline_bench.demo.calibration_text")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if it differs")
    path = model() / FILE_NAME
    if not parser.parse_args(arguments).check:
        atomic_write_text(path, calibration_text())
        return 0
    same = path.is_file() and path.read_text(encoding="utf-8") == calibration_text()
    print(f"{path} is as generated" if same else f"{path} differs from what is generated")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
