"""Scoring choices together gives the predictions file of OpenCompass's own inferencer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.opencompass,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("opencompass"),
]


def questions() -> Any:
    from datasets import Dataset, DatasetDict

    def row(number: int) -> dict[str, Any]:
        context = " ".join(f"w{(number * 7 + i) % 90}" for i in range(3 + number % 5))
        return {"q": context, "a": f"w{number}", "b": f"w{number + 1} w3", "gold": number % 2}

    split = Dataset.from_list([row(number) for number in range(14)])
    return DatasetDict({"train": split, "test": split})


def predictions(inferencer_class: Any, model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    from opencompass.openicl import DatasetReader
    from opencompass.openicl.icl_prompt_template import PromptTemplate
    from opencompass.openicl.icl_retriever import FixKRetriever

    template = PromptTemplate({0: "</E>{q} {a}", 1: "</E>{q} {b}"}, ice_token="</E>")
    data = type("Data", (), {"reader": DatasetReader(questions(), ["q", "a", "b"], "gold")})
    data.train, data.test = data.reader.dataset["train"], data.reader.dataset["test"]
    inferencer = inferencer_class(model=model, batch_size=5, max_seq_len=30, **options)
    returned = inferencer.inference(
        FixKRetriever(data, fix_id_list=[0, 1, 2]),
        ice_template=template,
        prompt_template=template,
        output_json_filepath=str(folder),
        output_json_filename="found.json",
    )
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    assert returned == [entry["prediction"] for entry in found.values()]
    assert inferencer.model is model
    return found  # type: ignore[no-any-return]


def test_predictions_are_the_same(
    make_tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opencompass.openicl.icl_inferencer import PPLInferencer

    from streamline_bench.opencompass import StreamlineModel
    from streamline_bench.opencompass.inferencers import SharedPrefixPPLInferencer

    folder = make_tiny_model("llama", num_hidden_layers=2)
    model = StreamlineModel(path=str(folder), device="cpu", dtype="float32")
    stock = predictions(PPLInferencer, model, tmp_path / "stock")
    sizes: list[int] = []
    real = model.get_ppl
    monkeypatch.setattr(
        model, "get_ppl", lambda texts, mask=None: sizes.append(len(texts)) or real(texts, mask)
    )
    ours = predictions(SharedPrefixPPLInferencer, model, tmp_path / "ours")
    assert sum(sizes) == 28 and max(sizes) == 5
    assert list(ours) == list(stock)
    for key, entry in stock.items():
        for label in ("label: 0", "label: 1"):
            for field in ("PPL", "BPB"):
                assert ours[key][label].pop(field) == pytest.approx(
                    entry[label].pop(field), abs=1e-5
                )
        assert ours[key] == entry
    # Some prompts were too long for three examples: the lists were shortened, in both alike.
    assert len({entry["in-context examples"] for entry in stock.values()}) >= 1


def test_another_model_gets_the_stock_inferencer(tmp_path: Path) -> None:
    from opencompass.models.base import BaseModel
    from opencompass.openicl.icl_inferencer import PPLInferencer

    from streamline_bench.opencompass.inferencers import SharedPrefixPPLInferencer

    class Counting(BaseModel):  # type: ignore[misc]
        calls = 0

        def get_token_len(self, prompt: str) -> int:
            return len(prompt.split())

        def get_ppl(self, inputs: list[str], mask_length: Any = None) -> Any:
            import numpy as np

            self.calls += 1
            return np.array([float(len(text)) for text in inputs])

    model = Counting(path="x")
    ours = predictions(SharedPrefixPPLInferencer, model, tmp_path / "ours")
    calls = model.calls
    assert predictions(PPLInferencer, model, tmp_path / "stock") == ours
    assert model.calls == 2 * calls
