"""Every error that a user can cause, in one hierarchy.

::

    StreamlineBenchError
    ├── RecipeError              unknown name or key, value out of range
    ├── ArchitectureError        a model family or feature that cannot be handled
    ├── CheckpointError          a model folder that is missing, damaged or unsafe
    ├── CalibrationError         calibration text that is missing, empty or too short
    ├── SparsityError            a sparsity or layer count that is out of reach
    ├── NumericsError            NaN or infinity in weights, activations or losses
    ├── OutputError              an output that exists already or cannot be written
    ├── SamplesError             samples that cannot be read
    │   └── ComparisonError      two runs that must not be compared
    ├── ThroughputError          a speed measurement that cannot be made or read
    ├── EvaluationError          the harness, or another job of a comparison, failed
    │   └── OpenCompassError     OpenCompass did not finish its tasks
    ├── ClusterError             a Ray cluster that cannot be reached or is too small
    ├── CacheError               a cache entry or lock that cannot be used
    ├── ResourceError            memory that ran out
    ├── MissingDependencyError   an optional package that is not installed
    └── InstallationError        files of this package that are missing

Each message is one sentence that says what was wrong, with the value, and what to do next.
The command line prints the message and exits with code 2.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_LIBRARIES = frozenset(
    "accelerate datasets huggingface_hub jinja2 numpy peft pyarrow safetensors tokenizers torch "
    "transformers".split()
)


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
    """Two runs answered different requests, so that they must not be compared."""


class ThroughputError(StreamlineBenchError):
    """A measurement of speed cannot be made as asked, or its record cannot be read."""


class EvaluationError(StreamlineBenchError):
    """The harness ended with an error, or with output that is not whole."""


class OpenCompassError(EvaluationError):
    """OpenCompass did not finish its tasks."""


class ClusterError(StreamlineBenchError):
    """A Ray cluster cannot be reached, or is too small for a job."""


class CacheError(StreamlineBenchError):
    """A cache entry or its lock cannot be used."""


class ResourceError(StreamlineBenchError):
    """Memory ran out, on the device or in the machine."""


class MissingDependencyError(StreamlineBenchError):
    """An optional package is needed and not installed."""


class InstallationError(StreamlineBenchError):
    """Files that belong to this package are missing."""


@contextmanager
def library_errors(
    what: str = "", advice: str = "", kind: type[StreamlineBenchError] = StreamlineBenchError
) -> Iterator[None]:
    """Turn whatever a library raises inside into one sentence; our own errors pass.

    Args:
        what: what could not be done, and with which file or option: every exception becomes a
            sentence about it. Without it only exceptions of libraries do: the others are mistakes
            of this package and keep their traceback.
        advice: what to do about it.
        kind: of the error.

    Raises:
        ResourceError: memory ran out.
        MissingDependencyError: a package is not installed.
        StreamlineBenchError: of ``kind``.
    """
    try:
        yield
    except StreamlineBenchError:
        raise
    except Exception as error:
        library = _library_of(error)
        if not (what or library or out_of_memory(error)):
            raise
        subject = what or f"A call of {library} failed"
        if out_of_memory(error):
            raise ResourceError(
                f"{what or 'The work cannot go on'}: memory ran out ({first_line(error)}); use a "
                "smaller batch, shorter sequences, dtype bfloat16 or another device."
            ) from error
        if isinstance(error, ImportError):
            raise MissingDependencyError(
                f"{subject}, because a package is missing ({first_line(error)}); install it."
            ) from error
        remedy = advice or "set STREAMLINE_BENCH_TRACEBACK=1 to see where"
        raise kind(f"{subject} ({first_line(error)}); {remedy}.") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or in the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def few(names: Sequence[str], most: int = 4, separator: str = ", ") -> str:
    """Return the first names and the number of the others: ``a, b, c, d and 3 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def first_line(error: object, most: int = 200) -> str:
    """Return what an exception says in its first line; its type where it says nothing.

    A line that ends with a colon says nothing without the next one.

    Args:
        most: characters.

    Returns:
        Without a full stop.
    """
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines()]
    said = lines[0] if lines else type(error).__name__
    if said.endswith(":") and len(lines) > 1:
        said = f"{said} {lines[1]}"
    return said.rstrip(".") if len(said) <= most else f"{said[:most].rstrip()}…"


def _library_of(error: BaseException) -> str:
    """Return the library that raised an exception, by its class or its innermost frame."""
    modules = [type(error).__module__]
    frames = list(traceback.walk_tb(error.__traceback__))
    modules += [str(frame.f_globals.get("__name__", "")) for frame, _ in frames[-1:]]
    roots = [module.partition(".")[0] for module in modules]
    return next((root for root in roots if root in _LIBRARIES), "")
