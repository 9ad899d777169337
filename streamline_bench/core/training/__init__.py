"""Training of the replacement networks.

``trainer`` is the entrance; ``block`` says how hidden states are made and used, ``objectives``
what is minimised, ``schedule`` in which order and at which rate; ``loop`` does the steps (also for
recoveries), ``state`` makes it resumable.
"""

from __future__ import annotations

from streamline_bench.core.training.trainer import QUIRKS, TrainingResult, train_replacement

__all__ = ["QUIRKS", "TrainingResult", "train_replacement"]
