"""Where calibration documents come from: named presets, local files, folders and the hub.

A *source* is one string. :func:`open_documents` turns it into a seeded stream of texts without
holding the corpus in memory:

===============================  ==================================================================
source                           documents
===============================  ==================================================================
a name in :data:`PRESETS`        the preset's corpus, its domains drawn with the preset's shares
``auto``                         ``calibration.jsonl`` in the model's folder, else ``slimpajama``
a file, several with commas      see :mod:`streamline_bench.core.data.corpus_files`; read in this
between them, or a pattern       order, files of a pattern by name
a folder                         written by ``datasets.save_to_disk``, else read by
                                 ``datasets.load_dataset``
``owner/name``                   a data set of the Hugging Face hub; streamed when the number of
                                 samples or tokens is bounded
``self``                         none: the model writes them (:mod:`.own_texts`)
===============================  ==================================================================

The order is a seeded shuffle. It is uniform for folders and for files of up to
:data:`SHUFFLE_DOCUMENTS` documents; beyond that, and on streamed hub data, a window of that many
documents moves over the corpus, so that memory stays bounded.
"""

from __future__ import annotations

import glob
import itertools
import logging
import random
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamline_bench.core.data.corpus_files import (
    FILE_KINDS,
    NullTexts,
    document_text,
    file_kind,
    read_file,
    record_field,
)
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.core.recipe.validation import suggest
from streamline_bench.errors import CalibrationError, few, library_errors

_log = logging.getLogger(__name__)

SELF = "self"
"""The source of texts that the model to compress writes."""

SHUFFLE_DOCUMENTS = 65_536
_SHUFFLE_CHARACTERS = 64_000_000
_HUB_WINDOW = 4_096
_DOMAIN_QUEUE = 4_096
_ARCHIVES = (".zip", ".tar", ".tgz", ".rar", ".7z", ".gz", ".zst")
_OTHER_SOURCE = "give another calibration source"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class CorpusPreset:
    """A corpus with a name: where it is and in which proportions its domains are drawn.

    Attributes:
        source: any source but a preset.
        domain_field: field (dotted) of a record that names its domain; empty: no domains.
        domains: share of *documents* per domain; shares need not sum to one.
    """

    source: str
    split: str = "train"
    subset: str | None = None
    text_field: str = "text"
    domain_field: str = ""
    domains: Mapping[str, float] | None = None
    reference: str = ""


PRESETS: dict[str, CorpusPreset] = {
    # Shares are per document: long books and articles are divided by the length of a typical one.
    "slimpajama": CorpusPreset(
        source="DKYoon/SlimPajama-6B",
        domain_field="meta.redpajama_set_name",
        domains={
            "RedPajamaC4": 0.492,
            "RedPajamaCommonCrawl": 0.361 / 3,
            "RedPajamaBook": 0.091 / 200,
            "RedPajamaArXiv": 0.007 / 20,
            "RedPajamaWikipedia": 0.031,
            "RedPajamaStackExchange": 0.01,
            "RedPajamaGithub": 0.008,
        },
        reference="LLM-Streamline (arXiv 2403.19135), the domain mix of its released code",
    )
}


def resolve_source(source: str, model_folder: Path | None = None) -> str:
    """Return the source that ``auto`` stands for; any other source unchanged."""
    if source != "auto":
        return source
    own = model_folder / "calibration.jsonl" if model_folder is not None else None
    return str(own) if own is not None and own.is_file() else "slimpajama"


def local_paths(source: str, model_folder: Path | None = None) -> list[Path]:
    """Return the files, or the folder, that are read for a source; none where it is on the hub.

    A file need not exist: its ending alone makes it one.
    """
    source = resolve_source(source, model_folder)
    preset = PRESETS.get(source)
    return _local(source if preset is None else preset.source)


def _local(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if source.strip() and _exists(path):
        return [path]
    parts = [part.strip() for part in source.split(",") if part.strip()]
    if len(parts) > 1:  # what is not found stays in the list, so that reading names it
        return [found for part in parts for found in _local(part) or [Path(part)]]
    if glob.has_magic(source):
        return sorted(Path(found) for found in glob.glob(str(path), recursive=True))  # noqa: PTH207
    return [path] if file_kind(source) else []


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long a name
        return False


def open_documents(
    spec: CalibrationSpec, model_folder: Path | None = None, tokenizer: Any = None
) -> Iterator[str]:
    """Yield the texts of a corpus in seeded order; empty texts are left out.

    Args:
        tokenizer: whose chat template writes conversations (see :func:`.document_text`).

    Raises:
        CalibrationError: the source is missing, unknown, damaged or unreachable, or its records
            lack the text field. Raised when the first text is asked for.
    """
    source = resolve_source(spec.source, model_folder)
    if source == SELF:
        raise CalibrationError(
            "Source self stands for texts that the model to compress writes, and here texts are "
            "read; give a file, a folder or a hub id."
        )
    preset = PRESETS.get(source)
    if preset is not None:
        place = {"source": preset.source, "split": preset.split, "subset": preset.subset}
        records = _records(spec.model_copy(update=place))
        records = _mixed(records, preset, spec.seed) if preset.domains else records
        field, source = preset.text_field, preset.source
    else:
        records = open_records(spec, model_folder)
        # A text file has no fields: each document is the whole record.
        kinds = {file_kind(path) for path in _local(source)}
        field = "text" if kinds == {"text"} else spec.text_field
    nulls = NullTexts(source)
    try:
        for record in records:
            text = nulls.text(document_text(record, field, source, tokenizer))
            if text.strip():
                yield text
    finally:  # also when nobody reads on
        nulls.warn()


def open_records(
    spec: CalibrationSpec, model_folder: Path | None = None
) -> Iterator[Mapping[str, Any]]:
    """Yield the records of a corpus (not a preset), in seeded order, with all their fields.

    Raises:
        CalibrationError: the source is missing, unknown, damaged or unreachable.
    """
    return _records(spec.model_copy(update={"source": resolve_source(spec.source, model_folder)}))


def _records(spec: CalibrationSpec) -> Iterator[Mapping[str, Any]]:
    paths = _local(spec.source)
    if not paths:
        # A name that ends like an archive is a file that is not there.
        on_hub = _HUB_ID.fullmatch(spec.source) and not spec.source.endswith(_ARCHIVES)
        return _hub(spec) if on_hub else _unknown(spec.source)
    if len(paths) == 1 and paths[0].is_dir():
        return _folder(paths[0], spec)
    return _shuffled(itertools.chain.from_iterable(map(read_file, paths)), spec.seed)


def _unknown(source: str) -> Iterator[Mapping[str, Any]]:
    if glob.has_magic(source):
        raise CalibrationError(f"No file matches the calibration source '{source}'; correct it.")
    if "/" in source or "\\" in source:
        raise CalibrationError(
            f"Calibration source {source} does not exist; give a {FILE_KINDS} file, a data set "
            "folder or a hub id."
        )
    raise CalibrationError(
        f"Unknown calibration source '{source}'{suggest(source, PRESETS)} (presets: "
        f"{', '.join(sorted(PRESETS))}; else give a {FILE_KINDS} file, a folder or a hub id)."
    )


def _shuffled(records: Iterable[Mapping[str, Any]], seed: int) -> Iterator[Mapping[str, Any]]:
    """Shuffle within a window of :data:`SHUFFLE_DOCUMENTS` (fewer when they are very long)."""
    rng = random.Random(seed)
    held: list[Mapping[str, Any]] = []
    size = 0
    for record in records:
        length = _characters(record)
        if held and (len(held) >= SHUFFLE_DOCUMENTS or size + length > _SHUFFLE_CHARACTERS):
            index = rng.randrange(len(held))
            held[index], held[-1] = held[-1], held[index]
            leaving = held.pop()
            size -= _characters(leaving)
            yield leaving
        held.append(record)
        size += length
    rng.shuffle(held)
    yield from held


def _characters(record: Mapping[str, Any]) -> int:
    return sum(len(value) for value in record.values() if isinstance(value, str))


def _mixed(
    records: Iterator[Mapping[str, Any]], preset: CorpusPreset, seed: int
) -> Iterator[Mapping[str, Any]]:
    """Draw domains at random with the preset's shares; within one, keep the records' order."""
    assert preset.domains is not None
    rng = random.Random(seed)
    shares = dict(preset.domains)
    waiting: dict[str, deque[Mapping[str, Any]]] = {
        name: deque(maxlen=_DOMAIN_QUEUE) for name in shares
    }
    while shares:
        domain = rng.choices(list(shares), weights=list(shares.values()))[0]
        while not waiting[domain]:
            record = next(records, None)
            if record is None:
                break
            name = record_field(record, preset.domain_field, preset.source, _OTHER_SOURCE)
            # A full queue drops the newcomer: the draw so far must not depend on what follows.
            if name in waiting and len(waiting[name]) < _DOMAIN_QUEUE:
                waiting[name].append(record)
        if waiting[domain]:
            yield waiting[domain].popleft()
        else:
            del shares[domain]
            _log.warning("%s has no more documents of domain %s", preset.source, domain)


def _folder(path: Path, spec: CalibrationSpec) -> Iterator[Mapping[str, Any]]:

    if not ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        return _loaded(lambda split: _files_of(path, spec.subset, split), spec)
    return _loaded(lambda split: _saved(path, split), spec)


def _files_of(path: Path, subset: str | None, split: str) -> Any:
    """A folder of data files; ``datasets`` reads those of one kind and split."""
    import datasets

    builder = datasets.load_dataset_builder(str(path), name=subset)
    chosen = (builder.config.data_files or {}).get(split.partition("[")[0]) or ()
    read = {Path(file).resolve() for file in chosen}
    there = (each for each in path.rglob("*") if file_kind(each) and each.is_file())
    unread = [str(each.relative_to(path)) for each in there if each.resolve() not in read]
    _name_unread(path, split, sorted(unread))
    return datasets.load_dataset(str(path), name=subset, split=split)


def _name_unread(path: Path, split: str, unread: list[str]) -> None:
    if unread:
        _log.warning(
            "Of calibration folder %s, split '%s' is read; %s %s left out.",
            path, split, few(unread), "is" if len(unread) == 1 else "are",
        )  # fmt: skip


def _saved(path: Path, split: str) -> Any:
    import datasets

    data = datasets.load_from_disk(str(path))
    if not isinstance(data, datasets.DatasetDict):
        return data
    if split not in data:
        raise CalibrationError(
            f"Calibration folder {path} has no split '{split}'; it has {', '.join(data)}."
        )
    _name_unread(path, split, [name for name in data if name != split])
    return data[split]


def _hub(spec: CalibrationSpec) -> Iterator[Mapping[str, Any]]:
    import datasets

    bounded = spec.samples is not None or spec.tokens is not None
    return _loaded(
        datasets.load_dataset, spec, path=spec.source, name=spec.subset, streaming=bounded
    )


def _loaded(load: Any, spec: CalibrationSpec, **arguments: Any) -> Iterator[Mapping[str, Any]]:
    """Load with ``datasets`` and shuffle; every failure names the source and the way out."""
    import datasets

    with library_errors(
        f"Calibration data set '{spec.source}' (split '{spec.split}') cannot be read",
        "give a local file or folder instead, e.g. calibration=texts.jsonl",
        CalibrationError,
    ):
        data = load(split=spec.split, **arguments)
        if isinstance(data, datasets.IterableDataset):
            records = iter(data.shuffle(seed=spec.seed, buffer_size=_HUB_WINDOW))
        else:
            # Dataset.shuffle would write an index file into the user's own folder.
            order = list(range(len(data)))
            random.Random(spec.seed).shuffle(order)
            records = (data[index] for index in order)
        yield from records
