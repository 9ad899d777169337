"""Finds the predictions that a path means in the folders of OpenCompass.

::

    <work>/<time>/configs/*.py
    <work>/<time>/predictions/<model>/<data set>.json      or <data set>_0.json, _1.json, ...
    <work>/<time>/results/<model>/<data set>.json

Any of these levels may be given, or a folder that holds prediction files only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streamline_bench.errors import SamplesError
from streamline_bench.stability.readers.opencompass_config import DumpedConfig, read_dumped_config

__all__ = ["Predictions", "find_predictions"]

_RUN = re.compile(r"^\d{8}_\d{6}$")
_PART = re.compile(r"^(?P<name>.+)_(?P<part>\d+)$")
_BEGINNING = re.compile(rb'^\s*\{\s*"\d+"\s*:\s*\{')


@dataclass(frozen=True)
class Predictions:
    """The predictions of one model in one run.

    Attributes:
        folder: the folder with the prediction files.
        files: data set -> its file, or the files of its parts in order.
        missing: data set -> why it has none although the run was to make it.
        results: data set -> file with its evaluation, where there is one.
        timestamp: ``YYYYmmdd_HHMMSS`` of the run, where the folders tell.
        config: what the run's dumped config says, where there is one.
    """

    folder: Path
    files: Mapping[str, tuple[Path, ...]]
    missing: Mapping[str, str]
    results: Mapping[str, Path]
    timestamp: str | None
    config: DumpedConfig | None

    @property
    def model(self) -> str:
        """The model's abbreviation."""
        return self.folder.name


def find_predictions(path: Path, timestamp: str | None = None) -> Predictions | None:
    """Return the predictions that ``path`` means; None if this is not OpenCompass output.

    Raises:
        SamplesError: the folder holds the predictions of several models, none at all, not those of
            ``timestamp``, or a part of a data set is missing.
    """
    if path.is_file():
        return _one_file(path) if _looks_like_predictions(path) else None
    folder = _predictions_root(path, timestamp)
    if folder is not None:
        return _collect(_only_model(folder))
    if any(_looks_like_predictions(file) for file in path.glob("*.json")):
        return _collect(path)
    return None


def _predictions_root(path: Path, timestamp: str | None) -> Path | None:
    """The folder named ``predictions`` that the path is, holds, or whose newest run holds it."""
    for folder in (path, path / "predictions"):
        if folder.name == "predictions" and folder.is_dir() and not _of_lm_eval(folder):
            return folder
    runs = sorted(
        folder
        for folder in path.iterdir()
        if _RUN.match(folder.name) and (folder / "predictions").is_dir()
    )
    if not runs:
        return None
    if timestamp is None:
        return runs[-1] / "predictions"
    for run in runs:
        if run.name == timestamp:
            return run / "predictions"
    times = ", ".join(run.name for run in runs)
    raise SamplesError(f"'{path}' has no OpenCompass run of {timestamp}; it has: {times}.")


def _of_lm_eval(folder: Path) -> bool:
    """Whether an output folder of lm-eval happens to be called so."""
    return any(folder.glob("*/results_*.json")) or any(folder.glob("results_*.json"))


def _only_model(folder: Path) -> Path:
    models = sorted(part for part in folder.iterdir() if part.is_dir())
    if not models:
        raise SamplesError(
            f"'{folder}' holds no predictions; see the run's logs (OpenCompass ends with exit code "
            "0 even when its tasks failed)."
        )
    if len(models) > 1:
        names = ", ".join(f"'{model}'" for model in models[:4])
        more = f" and {len(models) - 4} more" if len(models) > 4 else ""
        raise SamplesError(
            f"'{folder}' holds predictions of several models ({names}{more}); name one of them."
        )
    return models[0]


def _collect(folder: Path) -> Predictions:
    run = folder.parent.parent if folder.parent.name == "predictions" else None
    config = read_dumped_config(run) if run else None
    known = set(config.repetitions) if config else set()
    files = _files(folder, known, all_json=run is not None)
    interrupted = _interrupted(folder)
    _refuse_interrupted_parts(folder, interrupted, files)
    missing = {
        name: f"there is no '{folder / name}.json', OpenCompass did not finish it"
        for name in sorted({*known, *interrupted} - set(files))
    }
    if not files:
        first = next(iter(missing.values()), "it has no prediction file")
        raise SamplesError(
            f"'{folder}' holds no predictions ({first}); see the run's logs, then run it again "
            "with -r."
        )
    results = run / "results" / folder.name if run else folder
    return Predictions(
        folder=folder,
        files=files,
        missing=missing,
        results={
            name: results / f"{name}.json"
            for name in files
            if run and (results / f"{name}.json").is_file()
        },
        timestamp=run.name if run and _RUN.match(run.name) else None,
        config=config,
    )


def _one_file(path: Path) -> Predictions:
    whole = _collect(path.parent)
    for name, files in whole.files.items():
        if path in files:
            results = {name: whole.results[name]} if name in whole.results else {}
            return Predictions(
                whole.folder, {name: files}, {}, results, whole.timestamp, whole.config
            )
    raise SamplesError(
        f"'{path}' is a part of a data set of which '{path.parent}' holds the whole; give that."
    )


def _files(folder: Path, known: set[str], *, all_json: bool) -> dict[str, tuple[Path, ...]]:
    """Whole files and, where there is none, parts in order (as OpenCompass itself reads them).

    In a run's own folder every JSON file is one of predictions; elsewhere others may lie beside.
    """
    stems = {
        file.stem: file
        for file in sorted(folder.glob("*.json"))
        if all_json or _looks_like_predictions(file)
    }
    files: dict[str, tuple[Path, ...]] = {}
    for stem, file in stems.items():
        match = _PART.match(stem)
        if match is None or stem in known or not _is_part(match["name"], stems, known):
            files[stem] = (file,)
        elif match["name"] not in stems and match["name"] not in files:
            files[match["name"]] = _parts(folder, match["name"], stems)
    return dict(sorted(files.items()))


def _is_part(name: str, stems: Mapping[str, Path], known: set[str]) -> bool:
    """Whether ``name`` followed by a number is a part, and not a data set that is called so."""
    return name in known or name in stems or {f"{name}_0", f"{name}_1"} <= set(stems)


def _parts(folder: Path, name: str, stems: Mapping[str, Path]) -> tuple[Path, ...]:
    numbers = sorted(
        int(match["part"])
        for stem in stems
        if (match := _PART.match(stem)) and match["name"] == name
    )
    for expected, number in enumerate(numbers):
        if number != expected:
            raise SamplesError(
                f"'{folder / name}_{expected}.json' is missing, though there is a part {number}; "
                "run OpenCompass again with -r to make it."
            )
    return tuple(stems[f"{name}_{number}"] for number in numbers)


def _interrupted(folder: Path) -> set[str]:
    """Data sets whose generation was cut off: their temporary file is still there."""
    names = {file.stem.removeprefix("tmp_") for file in folder.glob("tmp_*.jsonl")}
    return {name for name in names if not (folder / f"{name}.json").exists()}


def _refuse_interrupted_parts(
    folder: Path, interrupted: set[str], files: Mapping[str, tuple[Path, ...]]
) -> None:
    for name in sorted(interrupted):
        match = _PART.match(name)
        if match and (match["name"] in files or f"{match['name']}_0" in files):
            raise SamplesError(
                f"'{folder / name}.json' is missing, only its unfinished 'tmp_{name}.jsonl' is "
                "there; run OpenCompass again with -r to finish it."
            )


def _looks_like_predictions(path: Path) -> bool:
    with path.open("rb") as stream:
        return _BEGINNING.match(stream.read(4096)) is not None
