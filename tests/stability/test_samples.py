"""The samples table: what the reader fills, and that Parquet keeps it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest

from streamline_bench.errors import OutputError, SamplesError
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import COLUMNS, Row, RunInfo, Samples


@pytest.fixture(scope="module")
def dense(lm_eval_outputs: Path) -> Samples:
    return load_samples(lm_eval_outputs / "dense", run="dense", progress=False)


def test_columns_are_the_documented_ones(dense: Samples) -> None:
    assert list(dense.frame.columns) == list(COLUMNS)
    assert dense.tasks == ("toy_fill", "toy_gen", "toy_ll", "toy_mc", "toy_roll")
    assert set(dense.frame["run"]) == {"dense"}


def test_parquet_gives_the_same_table(dense: Samples, tmp_path: Path) -> None:
    file = tmp_path / "samples.parquet"
    dense.save(file)
    again = load_samples(file)
    pd.testing.assert_frame_equal(again.frame, dense.frame)
    assert again.info == dense.info
    assert [path.name for path in tmp_path.iterdir()] == ["samples.parquet"]
    assert set(load_samples(file, run="other").frame["run"]) == {"other"}


def test_parquet_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(file)
    with pytest.raises(SamplesError, match="samples table"):
        Samples.load(file)
    file.write_bytes(b"PAR1 but not really")
    with pytest.raises(SamplesError, match="Parquet"):
        Samples.load(file)


def test_unwritable_output_is_one_sentence(dense: Samples, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"samples.parquet"):
        dense.save(tmp_path / "missing" / "samples.parquet")


def test_no_rows_and_unknown_columns_are_errors() -> None:
    info = RunInfo(run="r", engine="lm-eval", source="here")
    with pytest.raises(SamplesError, match="no samples"):
        Samples.from_rows([], info)
    with pytest.raises(SamplesError, match="no column"):
        Samples.from_rows([{"colour": "red"}], info)


def test_missing_path_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="nowhere"):
        load_samples(tmp_path / "nowhere")


def test_parquet_of_older_releases(dense: Samples, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    file = tmp_path / "samples.parquet"
    dense.save(file)
    pq.write_table(pq.read_table(file).drop_columns(["cluster", "tokens", "unfinished"]), file)
    again = load_samples(file)
    assert again.frame["cluster"].isna().all()
    pd.testing.assert_frame_equal(again.frame, dense.frame)


def test_a_row_has_the_columns_of_the_table() -> None:
    assert {field.name for field in dataclasses.fields(Row)} == set(COLUMNS)


def test_parquet_with_a_column_of_another_type_is_refused(dense: Samples, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "samples.parquet"
    dense.save(file)
    table = pq.read_table(file)
    position = table.schema.get_field_index("doc_id")
    text = table.column("doc_id").cast(pa.string())
    pq.write_table(table.set_column(position, "doc_id", text), file)
    with pytest.raises(SamplesError, match="samples table"):
        Samples.load(file)
