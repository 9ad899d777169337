"""Training of the replacement networks.

``trainer`` is the entrance, ``cuts`` that of several blocks; ``block`` says how hidden states are
made and used; ``loop`` what is minimised, and the steps (of recoveries too); ``state`` in which
order, at which rate, and how a training resumes.
"""

from __future__ import annotations

from streamline_bench.core.training.cuts import TrainedCuts, train_replacements
from streamline_bench.core.training.trainer import QUIRKS, TrainingResult, train_replacement

__all__ = ["QUIRKS", "TrainedCuts", "TrainingResult", "train_replacement", "train_replacements"]
