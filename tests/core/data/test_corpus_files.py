"""Files that people have: every kind gives the same records, and what is not read is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner

from streamline_bench.cli.main import cli
from streamline_bench.compression.pipeline import content_key
from streamline_bench.compression.recipes import load_recipe
from streamline_bench.core.data.calibration import load_calibration
from streamline_bench.core.data.corpora import local_paths, open_documents
from streamline_bench.core.data.corpus_files import document_text, read_file
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.divergence import read_texts
from streamline_bench.errors import CalibrationError
from streamline_bench.modeling.loading import SourceModel

TEXTS = [f'w{i} w{i + 1}, "w{i + 2}"\nw{i}' for i in range(9)]
RECORDS = [{"text": text, "id": str(i)} for i, text in enumerate(TEXTS)]


def _zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": _zstd,
}  # fmt: skip


def _table(delimiter: str) -> str:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, ["text", "id"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return sink.getvalue()


CONTENT = {
    ".jsonl": "\n".join(json.dumps(record) for record in RECORDS),
    ".json": json.dumps(RECORDS, indent=4),
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".txt": "\n\n".join(TEXTS),
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", CONTENT)
def test_every_kind_gives_the_same_texts(
    tmp_path: Path, kind: str, packed: str, mark: bytes
) -> None:
    path = tmp_path / f"data{kind}{packed}"
    path.write_bytes(PACK[packed](mark + CONTENT[kind].encode()))
    assert [record["text"] for record in read_file(path)] == TEXTS
    found = list(open_documents(CalibrationSpec(source=str(path))))
    assert sorted(found) == sorted(TEXTS)


def test_several_files_and_patterns(tmp_path: Path) -> None:
    for number in range(3):
        lines = CONTENT[".jsonl"].splitlines()[3 * number : 3 * number + 3]
        (tmp_path / f"part{number}.jsonl").write_text("\n".join(lines))
    every = str(tmp_path / "part*.jsonl")
    listed = ", ".join(str(tmp_path / f"part{n}.jsonl") for n in range(3))
    assert local_paths(every) == local_paths(listed) == sorted(tmp_path.glob("*.jsonl"))
    for source in (every, listed):
        assert sorted(open_documents(CalibrationSpec(source=source))) == sorted(TEXTS)
    with pytest.raises(CalibrationError, match="No file matches"):
        list(open_documents(CalibrationSpec(source=str(tmp_path / "*.csv"))))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("DIR/a.jsonl,DIR/folder", "folder"),
        ("DIR/folder,DIR/a.jsonl", "folder"),
        ("DIR/folder*", "folder"),
        ("DIR/a.jsonl,owner/name", "owner/name"),
        ("slimpajama,DIR/a.jsonl", "slimpajama"),
        ("DIR/b*.jsonl,DIR/a.jsonl", "b*.jsonl"),
        ("DIR/a.jsonl,typo", "typo"),
        ("", "calibration source ''"),
        (" ", "calibration source ' '"),
    ],
)
def test_nothing_of_a_list_is_dropped_without_a_word(
    tmp_path: Path, source: str, named: str
) -> None:
    """A part that is not a file of text is named; none at all is not the current folder."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "w1"}))
    for name in ("folder", "folder2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"text": "w2"}))
    with pytest.raises(CalibrationError, match=re.escape(named)):
        list(open_documents(CalibrationSpec(source=source.replace("DIR", str(tmp_path)))))


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "A.CSV.GZ"])
def test_line_ends_of_tables_do_not_depend_on_the_compression(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = b'text,id\r\n"w1\r\nw2",1\r\n'
    path.write_bytes(content if name == "a.csv" else gzip.compress(content))
    assert [record["text"] for record in read_file(path)] == ["w1\r\nw2"]


def test_what_is_not_read_of_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``datasets`` reads one split of the files of one kind, without a word."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train-1.jsonl", "train-2.jsonl", "test.jsonl"):
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    (folder / "train-3.csv").write_text("text\nw1\n")
    spec = CalibrationSpec(source=str(folder))
    assert sorted(open_documents(spec)) == ["train-1.jsonl", "train-2.jsonl"]
    (said,) = [record.getMessage() for record in caplog.records if "left out" in record.msg]
    assert "test.jsonl" in said and "train-3.csv" in said and "train-1" not in said
    caplog.clear()
    both = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "held_out")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    assert list(open_documents(CalibrationSpec(source=str(tmp_path / "saved")))) == ["train"]
    assert "held_out" in caplog.text


def test_a_folder_of_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        part = pyarrow.Table.from_pylist(RECORDS[3 * number : 3 * number + 3])
        pyarrow.parquet.write_table(part, folder / f"train-0000{number}-of-00003.parquet")
    assert sorted(open_documents(CalibrationSpec(source=str(folder)))) == sorted(TEXTS)


def test_the_content_key_is_of_the_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"

    def key(source: str) -> str:
        return content_key(
            SourceModel(tiny_llama), load_recipe("shortgpt", {"calibration": source})
        )

    path.write_bytes(_zstd(b'{"text": "w1"}'))
    first, several = key(str(path)), key(str(tmp_path / "*.zst"))
    path.write_bytes(_zstd(b'{"text": "w2"}'))
    assert key(str(path)) != first
    assert key(str(tmp_path / "*.zst")) != several


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pdf", b"%PDF", [".pdf"]),
        ("a.zip", b"PK", [".zip"]),
        ("a.zst", _zstd(b"w1"), [".zst", "does not say"]),
        ("a", b"w1", ["ending"]),
        ("a.txt", "w1 w2".encode("utf-16"), ["UTF-8"]),
        ("a.jsonl.zst", b"not a frame", ["cannot be read"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "w1"}' * 99, mtime=0)[:-9], ["cannot be read"]),
        ("a.parquet", b"PAR1", ["cannot be read"]),
        ("a.json", b'{\n "data": []\n}', ["Line 1", "several lines"]),
        ("a.json", b"[1, 2]", ["Item 1", "not a JSON object"]),
        ("a.json", b'[{"text": "w1"}', ["array", "not JSON"]),
        ("a.csv", b"text,id\nw1\n", ["Line 2", "1 fields"]),
        ("a.jsonl", b"[" * 100_000, ["not JSON", "deep"]),
        ("a.jsonl", b'{"text": "w1", "n": ' + b"9" * 5000 + b"}", ["Line 1", "digits"]),
        ("a.csv", b"text,text\nw1,w2\n", ["'text' twice"]),
    ],
)
def test_what_is_not_read_is_named(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        list(open_documents(CalibrationSpec(source=str(path))))
    assert [word for word in [str(path), *words] if word not in str(caught.value)] == []
    assert "does not exist" not in str(caught.value)


def test_half_a_surrogate_pair_is_replaced_and_a_whole_one_joined(
    tmp_path: Path, word_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "scraped.jsonl"
    path.write_text('{"text": "w1 \\ud83d w2"}\n{"text": "w3 \\ud83d\\ude00"}\n')
    with caplog.at_level("WARNING", "streamline_bench"):
        texts = [record["text"] for record in read_file(path)]
    assert texts == ["w1 \ufffd w2", "w3 \U0001f600"]
    assert "Line 1" in caplog.text
    spec = CalibrationSpec(source=str(path), sequence_length=4)
    assert load_calibration(spec, word_tokenizer, progress=False).num_tokens == 4


TURNS = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2 w3"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"


@pytest.mark.parametrize("field", ["messages", "conversations", "chat"])
def test_conversations_are_written_with_the_chat_template(word_tokenizer: Any, field: str) -> None:
    turns = TURNS
    if field == "messages":
        turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    asked = "chat" if field == "chat" else "text"
    with pytest.raises(CalibrationError, match="no chat template"):
        document_text({field: turns}, asked, "a.jsonl", word_tokenizer)
    word_tokenizer.chat_template = TEMPLATE
    try:
        text = document_text({field: turns}, asked, "a.jsonl", word_tokenizer)
        with pytest.raises(CalibrationError, match="role and content"):
            document_text({field: [{"who": "w1"}]}, asked, "a.jsonl", word_tokenizer)
    finally:
        word_tokenizer.chat_template = None
    assert text == "<s><user> w1 <assistant> w2 w3 "  # this tokenizer puts no BOS in front
    with pytest.raises(CalibrationError, match="holds int"):
        document_text({"text": 3}, "text", "a.jsonl", word_tokenizer)


def test_a_conversation_with_a_turn_that_is_null_is_left_out_and_counted(
    word_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    called = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": None}]
    path = tmp_path / "tools.jsonl"
    lines = [{"messages": called}, {"conversations": TURNS}]
    path.write_text("\n".join(map(json.dumps, lines)))
    word_tokenizer.chat_template = TEMPLATE
    try:
        with caplog.at_level("WARNING", "streamline_bench"):
            (text,) = filter(None, read_texts(path, "text", word_tokenizer))
    finally:
        word_tokenizer.chat_template = None
    assert "w2 w3" in text
    assert "1 record" in caplog.text


def test_another_field_is_named_in_the_syntax_of_the_command(
    word_tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "w1"}\n')
    with pytest.raises(CalibrationError, match=r"it has body; .*--set calibration\.text_field="):
        load_calibration(CalibrationSpec(source=str(path)), word_tokenizer, progress=False)
    with pytest.raises(CalibrationError, match=r"it has body; .*: --text-field NAME"):
        list(read_texts(path))


@pytest.mark.parametrize("field", ["text", "meta.text"])
def test_records_whose_text_is_null_are_left_out_and_counted(
    word_tokenizer: Any, tmp_path: Path, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["w1 w2", None, "", "w3", None]
    path = tmp_path / "some.jsonl"
    records = [{"text": text, "meta": {"text": text}} for text in texts]
    path.write_text("\n".join(map(json.dumps, [*records, {"text": None, "meta": None}])))
    spec = CalibrationSpec(source=str(path), form="documents", text_field=field)
    with caplog.at_level("WARNING", "streamline_bench"):
        assert load_calibration(spec, word_tokenizer, progress=False).num_tokens == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"3 records of {path} left out: their text is null"
    ]
    caplog.clear()
    with caplog.at_level("WARNING", "streamline_bench"):
        assert "".join(read_texts(path, field)) == "w1 w2w3"
    assert "3 records" in caplog.text


def test_a_missing_file_from_the_command_line(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "gone.jsonl.zst"
    ended = CliRunner().invoke(
        cli, ["scan", str(tiny_llama), "--calibration", str(source), "-o", str(tmp_path / "s")]
    )
    assert ended.exit_code == 2
    assert "does not exist" in ended.output
