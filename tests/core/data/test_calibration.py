"""Calibration tokens: exact counts, pads never counted, the same tokens from every source."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_bench.core.data import corpora, corpus_files
from streamline_bench.core.data.calibration import CalibrationTokens, load_calibration
from streamline_bench.core.data.corpora import PRESETS, CorpusPreset, open_documents
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.errors import CalibrationError

# Lengths 1 .. 12, so that blocks and documents never line up.
TEXTS = [" ".join(f"w{(7 * i + j) % 96}" for j in range(1 + i % 12)) for i in range(40)]
TOTAL = sum(len(text.split()) for text in TEXTS)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def load(word_tokenizer: Any, jsonl: Path) -> Callable[..., CalibrationTokens]:
    """Load ``jsonl`` (or another source) with the word tokenizer."""

    def run(source: Any = jsonl, *, max_length: int | None = None, **spec: Any):
        made = CalibrationSpec(source=str(source), **spec)
        return load_calibration(made, word_tokenizer, max_length=max_length, progress=False)

    return run


def rows(tokens: CalibrationTokens) -> list[tuple[int, ...]]:
    """The unpadded sequences."""
    pairs = zip(tokens.input_ids, tokens.attention_mask, strict=True)
    return [tuple(ids[mask].tolist()) for ids, mask in pairs]


def encoded(tokenizer: Any) -> list[tuple[int, ...]]:
    return [tuple(tokenizer.convert_tokens_to_ids(text.split())) for text in TEXTS]


# -- documents -------------------------------------------------------------------------------------


def test_documents_are_the_texts_in_another_order(load: Any, word_tokenizer: Any) -> None:
    tokens = load(form="documents", sequence_length=64)
    assert Counter(rows(tokens)) == Counter(encoded(word_tokenizer))
    assert rows(tokens) != encoded(word_tokenizer)
    assert tokens.num_tokens == TOTAL
    assert tokens.input_ids.dtype == torch.int64
    assert tokens.attention_mask.dtype == torch.bool


def test_documents_are_truncated_and_padded_on_the_right(load: Any, word_tokenizer: Any) -> None:
    tokens = load(form="documents", sequence_length=5)
    assert Counter(rows(tokens)) == Counter(ids[:5] for ids in encoded(word_tokenizer))
    assert tokens.input_ids.shape == (len(TEXTS), 5)
    steps = tokens.attention_mask.int().diff(dim=1)
    assert (steps <= 0).all()  # once padding has begun it does not end
    assert (tokens.input_ids[~tokens.attention_mask] == word_tokenizer.pad_token_id).all()


def test_samples_bounds_the_documents(load: Any) -> None:
    assert len(load(form="documents", samples=7)) == 7
    assert len(load(form="documents", samples=1000)) == len(TEXTS)


# -- packed ----------------------------------------------------------------------------------------


def test_packed_blocks_are_whole_documents_end_to_end(load: Any, word_tokenizer: Any) -> None:
    tokens = load(sequence_length=16)
    assert tokens.input_ids.shape == (TOTAL // 16, 16)
    assert bool(tokens.attention_mask.all())
    stream = tuple(tokens.input_ids.flatten().tolist())
    left = Counter(encoded(word_tokenizer))
    while stream:  # take the document that the stream starts with, until less than one is left
        found = [ids for ids in left if stream[: len(ids)] == ids]
        if not found:
            break
        document = max(found, key=len)
        left -= Counter([document])
        stream = stream[len(document) :]
    assert len(stream) < 12


def test_every_document_gets_the_tokenizers_own_special_tokens(jsonl: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", *(f"w{i}" for i in range(96))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>")
    tokens = load_calibration(
        CalibrationSpec(source=str(jsonl), tokens=TOTAL + len(TEXTS)), tokenizer, progress=False
    )
    assert int((tokens.input_ids == 1).sum()) == len(TEXTS)


def test_samples_bounds_the_blocks(load: Any) -> None:
    assert load(sequence_length=16, samples=3).input_ids.shape == (3, 16)
    assert len(load(sequence_length=16, samples=1000)) == TOTAL // 16


def test_a_corpus_shorter_than_one_block_gives_one_shorter_block(load: Any) -> None:
    tokens = load(sequence_length=4096)
    assert tokens.input_ids.shape == (1, TOTAL)
    assert tokens.num_tokens == TOTAL


# -- exact counts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["packed", "documents"])
@pytest.mark.parametrize("wanted", [2, 15, 16, 17, 100, TOTAL - 1, TOTAL])
def test_exactly_as_many_tokens_as_asked_for(load: Any, form: str, wanted: int) -> None:
    tokens = load(form=form, tokens=wanted, sequence_length=16)
    assert tokens.num_tokens == wanted
    assert int(tokens.attention_mask.sum()) == wanted


def test_only_the_last_packed_block_is_padded(load: Any) -> None:
    tokens = load(tokens=35, sequence_length=16)
    assert tokens.attention_mask.sum(dim=1).tolist() == [16, 16, 3]


@pytest.mark.parametrize("form", ["packed", "documents"])
def test_too_few_tokens_says_how_many_there_are(load: Any, form: str) -> None:
    with pytest.raises(CalibrationError, match=rf"{TOTAL + 1} calibration.*gives {TOTAL};"):
        load(form=form, tokens=TOTAL + 1, sequence_length=16)


def test_tokens_that_do_not_fit_into_the_samples_are_refused(load: Any) -> None:
    assert load(tokens=32, samples=2, sequence_length=16).num_tokens == 32
    with pytest.raises(CalibrationError, match="33 tokens do not fit into 2 sequences of 16"):
        load(tokens=33, samples=2, sequence_length=16)


def test_a_pad_token_that_is_a_real_token_is_counted_only_where_it_is_one(
    word_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer.backend_tokenizer, eos_token="w5"
    )
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w5 w5"}\n{"text": "w1 w5 w2 w3"}\n')
    spec = CalibrationSpec(source=str(path), form="documents")
    tokens = load_calibration(spec, tokenizer, progress=False)
    assert int((tokens.input_ids == tokenizer.eos_token_id).sum()) == 5  # three of text, two pads
    assert tokens.num_tokens == 6


# -- determinism -----------------------------------------------------------------------------------


def test_the_seed_decides_the_order(load: Any) -> None:
    first, again, other = load(seed=3, tokens=64), load(seed=3, tokens=64), load(seed=4, tokens=64)
    assert first.sha256 == again.sha256
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.sha256 != other.sha256


def test_the_hash_sees_ids_mask_and_shape() -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    mask = torch.tensor([[True, True, True, False]])
    made = [
        CalibrationTokens.from_tensors(ids),
        CalibrationTokens.from_tensors(ids, mask),
        CalibrationTokens.from_tensors(ids.view(2, 2)),
        CalibrationTokens.from_tensors(ids + 1),
    ]
    assert len({tokens.sha256 for tokens in made}) == 4
    assert [tokens.num_tokens for tokens in made] == [4, 3, 4, 4]


def test_the_models_limit_cuts_the_length_and_is_recorded(load: Any) -> None:
    cut, whole = load(sequence_length=64, max_length=16), load(sequence_length=16, max_length=64)
    assert cut.input_ids.shape[1] == 16
    assert (cut.requested_length, whole.requested_length) == (64, None)
    assert cut.summary()["requested_length"] == 64
    assert cut.sha256 == whole.sha256


# -- sources ---------------------------------------------------------------------------------------


def _write(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    path = folder / f"corpus.{kind}"
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    data = datasets.Dataset.from_dict({"text": TEXTS})
    if kind == "txt":
        path.write_text("\n \n".join(TEXTS) + "\n")
    elif kind == "nul.txt":
        path.write_text("\0".join(text.replace(" ", "\n\n") for text in TEXTS))
    elif kind == "txt.xz":
        path.write_bytes(lzma.compress("\n\n".join(TEXTS).encode()))
    elif kind == "jsonl":
        path.write_text(lines + "\n")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "saved":
        data.save_to_disk(path)
    elif kind == "saved_splits":
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(path)
    else:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        path.mkdir()
        (path / "part.jsonl").write_text(lines)
    return path


KINDS = "txt nul.txt txt.xz jsonl jsonl.gz parquet saved saved_splits folder".split()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_texts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _write(kind, tmp_path, monkeypatch)
    spec = CalibrationSpec(source=str(source), seed=1)
    texts = list(open_documents(spec))
    assert Counter(" ".join(text.split()) for text in texts) == Counter(TEXTS)
    assert texts == list(open_documents(spec))
    assert texts != list(open_documents(spec.model_copy(update={"seed": 2})))


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_text_documents_do_not_depend_on_how_the_file_is_read(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n a b\nc\n\n\n \t\n d\n\ne \n\n")
    monkeypatch.setattr(corpus_files, "_PIECE", piece)
    found = [record["text"].strip() for record in corpus_files.read_file(path)]
    assert found == ["a b\nc", "d", "e"]


def test_auto_is_the_models_own_text_where_there_is_one(
    word_tokenizer: Any, tmp_path: Path, load: Any
) -> None:
    (tmp_path / "calibration.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    own = load_calibration(CalibrationSpec(), word_tokenizer, model_folder=tmp_path, progress=False)
    assert own.num_tokens == 3
    assert own.source == str(tmp_path / "calibration.jsonl")
    assert corpora.resolve_source("auto", None) == "slimpajama"


def test_a_nested_text_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"doc": {"body": "w1 w2"}}\n')
    spec = CalibrationSpec(source=str(path), text_field="doc.body")
    assert list(open_documents(spec)) == ["w1 w2"]


def test_a_bounded_request_does_not_read_to_the_end(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "w1 w2 w3 w4"}\n' * 500 + "broken\n")
    monkeypatch.setattr(corpora, "SHUFFLE_DOCUMENTS", 8)
    assert load(path, samples=4, sequence_length=8).num_tokens == 32
    with pytest.raises(CalibrationError, match=r"Line 501 .* is not JSON"):
        load(path, sequence_length=8)


def test_the_moving_window_loses_and_repeats_nothing(
    jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "SHUFFLE_DOCUMENTS", 5)
    texts = list(open_documents(CalibrationSpec(source=str(jsonl))))
    assert Counter(texts) == Counter(TEXTS)
    assert texts != TEXTS


@pytest.mark.parametrize(("bound", "streamed"), [({"samples": 2}, True), ({}, False)])
def test_hub_data_is_streamed_when_bounded(
    load: Any, monkeypatch: pytest.MonkeyPatch, bound: dict[str, int], streamed: bool
) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def fake(**arguments: Any) -> Any:
        asked.update(arguments)
        data = datasets.Dataset.from_dict({"text": TEXTS})
        return data.to_iterable_dataset() if arguments["streaming"] else data

    monkeypatch.setattr(datasets, "load_dataset", fake)
    tokens = load("owner/corpus", subset="en", split="test", sequence_length=16, **bound)
    assert asked == {
        "path": "owner/corpus", "name": "en", "split": "test", "streaming": streamed,
    }  # fmt: skip
    assert len(tokens) == bound.get("samples", TOTAL // 16)


# -- presets ---------------------------------------------------------------------------------------


def _preset(folder: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int]) -> None:
    lines = [
        json.dumps({"text": f"{name} {i}", "meta": {"set": name}})
        for name, count in counts.items()
        for i in range(count)
    ]
    path = folder / "mixed.jsonl"
    path.write_text("\n".join(lines))
    shares = {"A": 0.6, "B": 0.2}
    made = CorpusPreset(str(path), domain_field="meta.set", domains=shares)
    monkeypatch.setitem(PRESETS, "mixed", made)


def test_a_preset_draws_its_domains_with_their_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _preset(tmp_path, monkeypatch, {"A": 2000, "B": 3000, "C": 500})
    documents = open_documents(CalibrationSpec(source="mixed", samples=1))
    drawn = Counter(next(documents).split()[0] for _ in range(2000))
    assert set(drawn) == {"A", "B"}
    assert abs(drawn["A"] / 2000 - 0.75) < 5 * (0.75 * 0.25 / 2000) ** 0.5


def test_a_domain_that_runs_out_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _preset(tmp_path, monkeypatch, {"A": 5, "B": 100})
    with caplog.at_level(logging.WARNING, "streamline_bench"):
        texts = list(open_documents(CalibrationSpec(source="mixed")))
    assert len(texts) == len(set(texts)) == 105
    assert "no more documents of domain A" in caplog.text


def test_the_papers_domain_mix() -> None:
    preset = PRESETS["slimpajama"]
    assert (preset.source, preset.split) == ("DKYoon/SlimPajama-6B", "train")
    assert preset.domains is not None
    documents_of_100_000 = {name: round(100_000 * p) for name, p in preset.domains.items()}
    assert documents_of_100_000 == {
        "RedPajamaC4": 49_200,
        "RedPajamaCommonCrawl": 12_033,
        "RedPajamaBook": 46,
        "RedPajamaArXiv": 35,
        "RedPajamaWikipedia": 3_100,
        "RedPajamaStackExchange": 1_000,
        "RedPajamaGithub": 800,
    }


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "w1"}\n{"text": \n', "Line 2 .* is not JSON"),
        ("a.jsonl", '{"text": "w1"}\n[1]\n', "Line 2 .* is not a JSON object"),
        ("a.jsonl", '{"body": "w1", "id": 3}\n', "no field 'text'; it has body, id"),
        ("a.jsonl", '{"text": 3}\n', "holds int, not text"),
        ("a.jsonl", '{"text": " "}\n\n', "holds no text"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", " \n\n\n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.txt.xz", lzma.compress(b"w1 " * 500)[:-20], "cannot be read"),
        ("a.parquet", b"PAR1 no", "cannot be read"),
    ],
)
def test_bad_files_are_named_with_what_is_wrong(
    load: Any, tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CalibrationError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", r"file missing\.txt does not exist"),
        ("no/such/folder", "source no/such/folder does not exist"),
        ("slimpajam", "Unknown calibration source 'slimpajam'; did you mean 'slimpajama'"),
        ("owner/corpus", "'owner/corpus' .* cannot be read .*; give a local file"),
        ("slimpajama", "'DKYoon/SlimPajama-6B' .* cannot be read .*; give a local file"),
    ],
)
def test_sources_that_are_not_there(load: Any, source: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load(source, samples=1)


def test_a_split_that_is_not_there(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write("saved_splits", tmp_path, monkeypatch)
    with pytest.raises(CalibrationError, match="no split 'dev'; it has train, test"):
        load(path, split="dev")


# -- CalibrationTokens -----------------------------------------------------------------------------


def test_batches_give_every_sequence_once_in_order(load: Any) -> None:
    tokens = load(form="documents")
    batches = list(tokens.batches(7))
    assert [len(ids) for ids, _ in batches] == [7] * 5 + [5]
    assert torch.equal(torch.cat([ids for ids, _ in batches]), tokens.input_ids)
    assert torch.equal(torch.cat([mask for _, mask in batches]), tokens.attention_mask)


def test_trimmed_batches_lose_padding_only(load: Any) -> None:
    tokens = load(form="documents")
    trimmed = list(tokens.batches(3, trim=True))
    assert sum(int(mask.sum()) for _, mask in trimmed) == TOTAL
    assert all(bool(mask[:, -1].any()) for _, mask in trimmed)
    assert len({ids.shape[1] for ids, _ in trimmed}) > 1


def test_split_parts_the_sequences(load: Any) -> None:
    tokens = load(form="documents")
    training, validation = tokens.split(0.2, seed=0)
    assert (len(training), len(validation)) == (32, 8)
    assert Counter(rows(training) + rows(validation)) == Counter(rows(tokens))
    assert training.num_tokens + validation.num_tokens == TOTAL
    assert tokens.split(0.2, seed=0)[1].sha256 == validation.sha256
    assert tokens.split(0.2, seed=1)[1].sha256 != validation.sha256


def test_split_leaves_something_on_both_sides() -> None:
    two = CalibrationTokens.from_tensors(torch.arange(4).view(2, 2))
    assert [len(part) for part in two.split(0.001, seed=0)] == [1, 1]
    assert [len(part) for part in two.split(0.999, seed=0)] == [1, 1]
    one = CalibrationTokens.from_tensors(torch.arange(4).view(1, 4))
    with pytest.raises(CalibrationError, match="1 sequence, too few"):
        one.split(0.5, seed=0)


def test_a_sequence_without_tokens_is_refused() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(CalibrationError, match="Sequence 1 of tensors has no tokens"):
        CalibrationTokens.from_tensors(torch.ones(2, 2), mask)


def test_instructions_are_no_calibration(load: Any) -> None:
    with pytest.raises(CalibrationError, match="give form 'packed' or 'documents'"):
        load(form="instruction")


def test_targets_are_part_of_the_content_and_never_padding() -> None:
    ids, mask = torch.ones(2, 3), torch.tensor([[True, True, True], [True, True, False]])
    targets = torch.tensor([[False, True, True], [False, False, True]])
    tokens = CalibrationTokens.from_tensors(ids, mask, target_mask=targets)
    assert tokens.target_mask is not None
    assert tokens.target_mask.tolist() == [[False, True, True], [False, False, False]]
    assert tokens.sha256 != CalibrationTokens.from_tensors(ids, mask).sha256
