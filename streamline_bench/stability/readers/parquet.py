"""The samples table as a Parquet file: one file, metadata included, written atomically."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from streamline_bench.core.files.staging import atomic_write_bytes
from streamline_bench.errors import SamplesError
from streamline_bench.stability.samples import COLUMNS, RunInfo, Samples, parse_info

__all__ = ["read_samples", "write_samples"]

_METADATA_KEY = b"streamline_bench.samples"

_ARROW: dict[str, pa.DataType] = {
    **{name: pa.string() for name in COLUMNS},
    "doc_id": pa.int64(),
    "choices": pa.list_(pa.string()),
    "loglikelihoods": pa.list_(pa.float64()),
    "lengths": pa.list_(pa.int64()),
    "byte_lengths": pa.list_(pa.int64()),
    "mean_nll": pa.list_(pa.float64()),
    "prediction": pa.int64(),
    "prediction_norm": pa.int64(),
    "gold": pa.int64(),
    "correct": pa.bool_(),
    "correct_norm": pa.bool_(),
    "metrics": pa.map_(pa.string(), pa.float64()),
}


def write_samples(samples: Samples, path: Path) -> None:
    """Write the table; a reader sees the old file or the new one.

    Raises:
        OutputError: the folder is missing or not writable.
    """
    arrays = [pa.array(_plain(samples.frame[name]), type=_ARROW[name]) for name in COLUMNS]
    table = pa.Table.from_arrays(arrays, names=list(COLUMNS))
    table = table.replace_schema_metadata(
        {_METADATA_KEY: samples.info.model_dump_json().encode("utf-8")}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    atomic_write_bytes(path, sink.getvalue().to_pybytes())


def read_samples(path: Path) -> Samples:
    """Read a file of :func:`write_samples`.

    Raises:
        SamplesError: the file is damaged or of another kind.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise SamplesError(f"'{path}' is not a readable Parquet file: {error}") from None
    metadata = table.schema.metadata or {}
    if set(COLUMNS) - set(table.column_names) == {"cluster"}:  # written before there were clusters
        table = table.append_column("cluster", pa.nulls(len(table), pa.string()))
    if _METADATA_KEY not in metadata or set(table.column_names) != set(COLUMNS):
        raise SamplesError(f"'{path}' is not a samples table; give a file that Samples.save wrote.")
    info: RunInfo = parse_info(metadata[_METADATA_KEY], str(path))
    columns = {name: table.column(name).to_pylist() for name in COLUMNS}
    columns["metrics"] = [dict(pairs or ()) for pairs in columns["metrics"]]
    frame = pd.DataFrame(
        {name: pd.Series(columns[name], dtype=dtype) for name, dtype in COLUMNS.items()}
    )
    return Samples(frame, info)


def _plain(column: pd.Series[Any]) -> list[Any]:
    return [_none_if_missing(value) for value in column.tolist()]


def _none_if_missing(value: Any) -> Any:
    if value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return list(value.items()) if isinstance(value, dict) else value
