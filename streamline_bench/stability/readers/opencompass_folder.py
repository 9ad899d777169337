"""Finds the predictions that a path means in the folders of OpenCompass.

::

    <work>/<time>/configs/*.py
    <work>/<time>/predictions/<model>/<data set>.json      or <data set>_0.json, _1.json, ...
    <work>/<time>/results/<model>/<data set>.json          or the same in parts

Any of these levels may be given, or a folder that holds prediction files only. Of a work folder,
all runs of one model with the same settings are found.

The whole config of a run lies in ``configs`` as Python source. It is read as data: nothing in it is
executed, and anything but a literal or ``dict(...)`` is None.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamline_bench.errors import SamplesError, few

_RUN = re.compile(r"^\d{8}_\d{6}$")
_PART = re.compile(r"^(?P<name>.+)_(?P<part>[0-9]{1,9})$")
_BEGINNING = re.compile(rb'^\s*\{\s*"\d+"\s*:\s*\{')

_OF_TRANSFORMERS = ("HuggingFace", "ModelScope", "StreamlineModel", "StreamlineChatModel")
_OF_VLLM = ("VLLM", "StreamlineVLLM")
"""How the names of OpenCompass' and our model classes begin, by what computes their answers."""

_NO_SETTINGS = frozenset({"batch_size", "run_cfg", "max_workers"})
"""Keys of a model's config that decide speed or place, and no answer."""


def engine_behind(kind: str) -> str:
    """transformers, vLLM, or the name of another model class of OpenCompass (``package.Class``)."""
    name = kind.rsplit(".", 1)[-1]
    if name.startswith(_OF_TRANSFORMERS):
        return "transformers"
    return "vLLM" if name.startswith(_OF_VLLM) else name


@dataclass(frozen=True)
class DumpedConfig:
    """The parts of a run's configs that its predictions do not repeat.

    Attributes:
        repetitions: data set -> how many times each question was asked (``n`` of its config).
        models: model abbreviation -> the model's config, literals only.
    """

    repetitions: Mapping[str, int] = field(default_factory=dict)
    models: Mapping[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """Where the answers to one data set lie.

    Attributes:
        files: its file, or the files of its parts in order.
        results: its evaluation, or those of its parts in order; empty where there is none.
        repetitions: how many times each question was asked; None where no config says.
    """

    files: tuple[Path, ...]
    results: tuple[Path, ...] = ()
    repetitions: int | None = None


@dataclass(frozen=True)
class Predictions:
    """The predictions of one model in one run.

    Attributes:
        folder: the folder with the prediction files; its name is the model's abbreviation.
        sets: data set -> its files.
        missing: data set -> why it has no file although the run was to make it.
        left_out: file or run -> why it is not read.
        timestamp: ``YYYYmmdd_HHMMSS`` of the run, where the folders tell.
        settings: the model's config, literals only; None where there is no config.
        older: the model's earlier runs in the same work folder, the newest first.
    """

    folder: Path
    sets: Mapping[str, DataSet]
    missing: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    timestamp: str | None = None
    settings: Mapping[str, Any] | None = None
    older: tuple[Predictions, ...] = ()

    @property
    def model(self) -> str:
        """The model's abbreviation."""
        return self.folder.name

    @property
    def computed_by(self) -> str | None:
        """What computed the answers, by the model's class; None where there is no config."""
        kind = (self.settings or {}).get("type")
        return engine_behind(kind) if isinstance(kind, str) else None

    def difference(self, other: Predictions) -> str | None:
        """The first setting of the model that differs, with both values; None if none does."""
        here, there = self.settings or {}, other.settings or {}
        for key in sorted({*here, *there} - _NO_SETTINGS):
            if here.get(key) != there.get(key):
                return f"{key} is {there.get(key)!r:.80} there, {here.get(key)!r:.80} here"
        return None


def find_predictions(path: Path, timestamp: str | None = None) -> Predictions | None:
    """Return the predictions that ``path`` means; None if this is not OpenCompass output.

    Args:
        timestamp: of a work folder, find this run only.

    Raises:
        SamplesError: the folder holds the predictions of several models, none at all, not those of
            ``timestamp``, or a part of a data set is missing.
    """
    if path.is_file():
        return _one_file(path) if _looks_like_predictions(path) else None
    for folder in (path, path / "predictions"):
        if folder.name == "predictions" and folder.is_dir() and not _of_lm_eval(folder):
            return _collect(_only_model([folder]))
    if roots := _runs(path, timestamp):
        model = _only_model(roots)
        newest, *older = [root / model.name for root in roots]
        earlier = tuple(_collect(each) for each in older if any(each.glob("*.json")))
        return replace(_collect(newest), older=earlier)
    in_a_run = path.parent.name == "predictions" and not _of_lm_eval(path.parent)
    looks = (in_a_run or _looks_like_predictions(file) for file in path.glob("*.json"))
    return _collect(path) if any(looks) else None


def _runs(path: Path, timestamp: str | None) -> list[Path]:
    """The folders ``predictions`` of a work folder's runs, the newest first."""
    found = (folder.parent for folder in path.glob("*/predictions") if folder.is_dir())
    runs = sorted(folder for folder in found if _RUN.match(folder.name))
    chosen = [run / "predictions" for run in reversed(runs) if timestamp in (None, run.name)]
    if runs and not chosen:
        times = ", ".join(run.name for run in runs)
        raise SamplesError(f"'{path}' has no OpenCompass run of {timestamp}; it has: {times}.")
    return chosen


def _of_lm_eval(folder: Path) -> bool:
    """Whether an output folder of lm-eval happens to be called so."""
    return any(folder.glob("*/results_*.json")) or any(folder.glob("results_*.json"))


def _only_model(roots: list[Path]) -> Path:
    """The newest folder of the one model of which there are predictions."""
    models = {part.name: part for root in reversed(roots) for part in root.iterdir()
              if part.is_dir()}  # fmt: skip
    if not models:
        raise SamplesError(
            f"'{roots[0]}' holds no predictions; see the run's logs (OpenCompass ends with exit "
            "code 0 even when its tasks failed)."
        )
    if len(models) > 1:
        names = few([f"'{model}'" for model in sorted(models.values())])
        hold = "holds" if len(roots) == 1 else "and the runs beside it hold"
        raise SamplesError(
            f"'{roots[0]}' {hold} predictions of several models ({names}); name one of them."
        )
    return next(iter(models.values()))


def _collect(folder: Path) -> Predictions:
    run = folder.parent.parent if folder.parent.name == "predictions" else None
    config = read_dumped_config(run) if run else None
    repetitions = config.repetitions if config else {}
    files, left_out = _files(folder, set(repetitions), all_json=run is not None)
    interrupted = _interrupted(folder, files)
    missing = {
        name: f"there is no '{folder / name}.json', OpenCompass did not finish it"
        for name in sorted({*repetitions, *interrupted} - set(files))
    }
    if not files:
        first = next(iter(missing.values()), "it has no prediction file")
        raise SamplesError(
            f"'{folder}' holds no predictions ({first}); see the run's logs, then run it again "
            "with -r."
        )
    results: dict[str, tuple[Path, ...]] = {}
    if run and (evaluated := run / "results" / folder.name).is_dir():
        results, unread = _files(evaluated, set(files), all_json=True)
        left_out |= {f"results/{name}": reason for name, reason in unread.items()}
    return Predictions(
        folder=folder,
        sets={
            name: DataSet(paths, results.get(name, ()), repetitions.get(name))
            for name, paths in files.items()
        },
        missing=missing,
        left_out=left_out,
        timestamp=run.name if run and _RUN.match(run.name) else None,
        settings=config.models.get(folder.name) if config else None,
    )


def _one_file(path: Path) -> Predictions:
    whole = _collect(path.parent)
    for name, found in whole.sets.items():
        if path in found.files:
            return replace(whole, sets={name: found}, missing={}, left_out={})
    raise SamplesError(
        f"'{path}' is a part of a data set of which '{path.parent}' holds the whole; give that."
    )


def _files(
    folder: Path, known: set[str], *, all_json: bool
) -> tuple[dict[str, tuple[Path, ...]], dict[str, str]]:
    """Whole files and, where there is none, parts in order (as OpenCompass itself reads them).

    In a run's own folder every JSON file counts; elsewhere others may lie beside.

    Returns:
        Data set -> files; parts that are not read -> why.
    """
    found = sorted(folder.glob("*.json"))
    stems = {file.stem: file for file in found if all_json or _looks_like_predictions(file)}
    files: dict[str, tuple[Path, ...]] = {}
    left_out: dict[str, str] = {}
    for stem, file in stems.items():
        match = _PART.match(stem)
        if match is None or stem in known or not _is_part(match["name"], stems, known):
            files[stem] = (file,)
        elif match["name"] in stems:
            left_out[file.name] = f"'{match['name']}.json' holds the whole data set"
        elif match["name"] not in files:
            files[match["name"]] = _parts(folder, match["name"], stems)
    return dict(sorted(files.items())), left_out


def _is_part(name: str, stems: Mapping[str, Path], known: set[str]) -> bool:
    """Whether ``name`` followed by a number is a part, and not a data set that is called so."""
    return name in known or name in stems or {f"{name}_0", f"{name}_1"} <= set(stems)


def _parts(folder: Path, name: str, stems: Mapping[str, Path]) -> tuple[Path, ...]:
    parts = filter(None, map(_PART.match, stems))
    numbers = sorted(int(match["part"]) for match in parts if match["name"] == name)
    for expected, number in enumerate(numbers):
        if number != expected or f"{name}_{number}" not in stems:
            raise SamplesError(
                f"'{folder / name}_{expected}.json' is missing, though there is a part {number}; "
                "run OpenCompass again with -r to make it."
            )
    return tuple(stems[f"{name}_{number}"] for number in numbers)


def _interrupted(folder: Path, files: Mapping[str, tuple[Path, ...]]) -> set[str]:
    """Data sets whose generation was cut off: their temporary file is still there.

    Raises:
        SamplesError: it is a part of a data set whose other parts are there.
    """
    names = {file.stem.removeprefix("tmp_") for file in folder.glob("tmp_*.jsonl")}
    names = {name for name in names if not (folder / f"{name}.json").exists()}
    for name in sorted(names):
        match = _PART.match(name)
        if match and (match["name"] in files or f"{match['name']}_0" in files):
            raise SamplesError(
                f"'{folder / name}.json' is missing, only its unfinished 'tmp_{name}.jsonl' is "
                "there; run OpenCompass again with -r to finish it."
            )
    return names


def _looks_like_predictions(path: Path) -> bool:
    with path.open("rb") as stream:
        return _BEGINNING.match(stream.read(4096)) is not None


def read_dumped_config(run: Path) -> DumpedConfig | None:
    """What the configs of a run say together: each time it is continued, one is added.

    Returns:
        None where the run has no config.

    Raises:
        SamplesError: a file is not Python source, or the configs contradict each other, so that
            nobody can know by which of them the predictions were made.
    """
    files = sorted((run / "configs").glob("*.py"))
    repetitions: dict[str, int] = {}
    models: dict[str, dict[str, Any]] = {}
    for file in files:
        values = _assignments(file)
        for entry in _entries(values.get("datasets")):
            name, count = str(entry["abbr"]), entry.get("n")
            count = count if isinstance(count, int) and count > 0 else 1
            if repetitions.setdefault(name, count) != count:
                raise _contradiction(file, f"data set '{name}'", "n")
        for entry in _entries(values.get("models")):
            before = models.setdefault(str(entry["abbr"]), entry)
            for key in sorted({*before, *entry} - _NO_SETTINGS):
                if before.get(key) != entry.get(key):
                    raise _contradiction(file, f"model '{entry['abbr']}'", key)
    return DumpedConfig(repetitions, models) if files else None


def _contradiction(file: Path, what: str, key: str) -> SamplesError:
    return SamplesError(
        f"{file} and an earlier config beside it give {what} another {key}, so that the "
        "predictions may be of either; run OpenCompass again in a new folder, or remove the config "
        "that does not belong to them."
    )


def _assignments(file: Path) -> dict[str, Any]:
    try:
        tree = ast.parse(file.read_bytes())
        return {
            target.id: _literal(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SamplesError(
            f"{file} is not a config that OpenCompass wrote ({error}); remove it or run again."
        ) from None


def _entries(value: Any) -> Iterator[dict[str, Any]]:
    """Dictionaries with a name, in lists of any depth."""
    if isinstance(value, dict) and value.get("abbr"):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _entries(part)


def _literal(node: ast.expr | None) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {item.arg: _literal(item.value) for item in node.keywords if item.arg}
    if isinstance(node, ast.Dict):
        return {
            str(_literal(key)): _literal(value)
            for key, value in zip(node.keys, node.values, strict=True)
        }
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(part) for part in node.elts]
    try:
        value = ast.literal_eval(node) if node is not None else None
    except (ValueError, TypeError):
        return None
    return value if isinstance(value, bool | int | float | str) else None
