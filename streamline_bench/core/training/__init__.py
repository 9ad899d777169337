"""Training of the replacement networks.

``training`` is the entrance; ``teacher`` and ``student`` say how hidden states are made and used
(``trainee``: what else the same loop can train),
``objectives`` what is minimised, ``plan`` and ``schedule`` in which order and at which rate,
``loop`` does the steps, ``state`` makes it resumable, ``sources`` caches activations.
"""

from __future__ import annotations

from streamline_bench.core.training.checks import QUIRKS
from streamline_bench.core.training.presets import TRAINING_PRESETS, training_preset
from streamline_bench.core.training.trainer import TrainingResult, train_replacement

__all__ = ["QUIRKS", "TRAINING_PRESETS", "TrainingResult", "train_replacement", "training_preset"]
