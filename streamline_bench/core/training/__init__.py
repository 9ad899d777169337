"""Training of the replacement networks.

``trainer`` is the entrance; ``block`` says how hidden states are made and used; ``loop`` what is
minimised, and the steps (of recoveries too); ``state`` in which order, at which rate, and how a
training resumes.
"""

from __future__ import annotations

from streamline_bench.core.training.trainer import QUIRKS, TrainingResult, train_replacement

__all__ = ["QUIRKS", "TrainingResult", "train_replacement"]
