"""The texts that come with the bundled model, regenerable byte for byte.

``python -m bundled_model.texts`` writes both into the model's folder; ``--check`` compares
and exits 1 on a difference. Their documents are of the skills and shares at the end of training.

* ``calibration.jsonl`` is what the model is calibrated and healed with, and where
  ``calibration=auto`` finds it: documents of the training split, which share no story with the
  tasks.
* ``held_out.jsonl`` is what next-token distributions are compared on: documents of the evaluation
  split, none of whose stories the model was trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from bundled_model.language import Document, Split, draw_mixed
from bundled_model.skills import BUILDERS, weights_at

from streamline_bench.core.files import atomic_write_text
from streamline_bench.demo import model

_AFTER_TRAINING = 10**9


@dataclass(frozen=True)
class Text:
    """How a text is drawn: so many documents of a split, from a seed."""

    split: Split
    size: int
    seed: int

    def documents(self) -> list[Document]:
        """Draw the documents of the file, in its order."""
        rng = random.Random(self.seed)
        weights = weights_at(_AFTER_TRAINING)
        return [draw_mixed(BUILDERS, weights, rng, self.split) for _ in range(self.size)]

    def lines(self) -> str:
        """Return the file's content: one JSON object with ``text`` a line."""
        return "".join(json.dumps({"text": each.text}) + "\n" for each in self.documents())


TEXTS: Mapping[str, Text] = {
    "calibration.jsonl": Text("train", 2500, seed=77),
    "held_out.jsonl": Text("eval", 400, seed=78),
}
"""File name -> how it is drawn."""


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or compare them with what would be written."""
    parser = argparse.ArgumentParser(prog="python -m bundled_model.texts")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if one differs")
    check = parser.parse_args(arguments).check
    different = 0
    for name, text in TEXTS.items():
        path = model() / name
        if not check:
            atomic_write_text(path, text.lines())
            continue
        same = path.is_file() and path.read_text(encoding="utf-8") == text.lines()
        print(f"{path} is as generated" if same else f"{path} differs from what is generated")
        different += not same
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
