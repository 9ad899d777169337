"""Every error that a user can cause, in one hierarchy.

::

    StreamlineBenchError
    ├── RecipeError              unknown name or key, value out of range
    ├── ArchitectureError        a model family or feature that cannot be handled
    ├── CheckpointError          a model folder that is missing, damaged or unsafe
    ├── CalibrationError         calibration text that is missing, empty or too short
    ├── SparsityError            a sparsity or layer count that cannot be reached
    ├── NumericsError            NaN or infinity in weights, activations or losses
    ├── OutputError              an output that exists already or cannot be written
    ├── SamplesError             samples that cannot be read
    │   └── ComparisonError      two runs that must not be compared
    ├── ThroughputError          a speed measurement that cannot be made or read
    ├── EvaluationError          the harness, or another job of a comparison, failed
    │   └── OpenCompassError     OpenCompass did not finish what it was asked
    ├── ClusterError             a Ray cluster that cannot be reached or is too small
    ├── CacheError               a cache entry or lock that cannot be used
    ├── MissingDependencyError   an optional package that is not installed
    └── InstallationError        files of this package that are missing

Each message is one sentence that says what was wrong, with the value, and what to do next.
The command line prints the message and exits with code 2.
"""

from __future__ import annotations

__all__ = [
    "ArchitectureError",
    "CacheError",
    "CalibrationError",
    "CheckpointError",
    "ClusterError",
    "ComparisonError",
    "EvaluationError",
    "InstallationError",
    "MissingDependencyError",
    "NumericsError",
    "OpenCompassError",
    "OutputError",
    "RecipeError",
    "SamplesError",
    "SparsityError",
    "StreamlineBenchError",
    "ThroughputError",
]


class StreamlineBenchError(Exception):
    """Base of every error raised on purpose by streamline-bench."""


class RecipeError(StreamlineBenchError):
    """A recipe has an unknown name or key, or a value out of range."""


class ArchitectureError(StreamlineBenchError):
    """A model family, or a feature of a model, is not supported."""


class CheckpointError(StreamlineBenchError):
    """A model folder is missing, damaged or unsafe to read."""


class CalibrationError(StreamlineBenchError):
    """Calibration text is missing, empty or too short."""


class SparsityError(StreamlineBenchError):
    """A sparsity or number of layers cannot be reached for this model."""


class NumericsError(StreamlineBenchError):
    """NaN or infinity was found in weights, activations or losses."""


class OutputError(StreamlineBenchError):
    """An output exists already or cannot be written."""


class SamplesError(StreamlineBenchError):
    """Samples of an evaluation cannot be read."""


class ComparisonError(SamplesError):
    """Two runs differ in what they were asked, so that they must not be compared."""


class ThroughputError(StreamlineBenchError):
    """A measurement of speed cannot be made as asked, or its record cannot be read."""


class EvaluationError(StreamlineBenchError):
    """The harness ended with an error, or with output that is not whole."""


class OpenCompassError(EvaluationError):
    """OpenCompass did not finish what it was asked."""


class ClusterError(StreamlineBenchError):
    """A Ray cluster cannot be reached, or cannot give what a job asks for."""


class CacheError(StreamlineBenchError):
    """A cache entry or its lock cannot be used."""


class MissingDependencyError(StreamlineBenchError):
    """An optional package is needed and not installed."""


class InstallationError(StreamlineBenchError):
    """Files that belong to this package are missing."""
