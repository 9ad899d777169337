"""The model classes against OpenCompass's own, where those are right."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamline_bench.errors import (
    CheckpointError,
    MissingDependencyError,
    RecipeError,
    StreamlineBenchError,
)

pytestmark = [
    pytest.mark.opencompass,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("opencompass"),
]

TEXTS = [
    "w1 w2 w3 w4 w5 w6 w7",
    "w9 w8",
    "w1 w2 w3 w4 w50 w60 w70 w20 w21",
    "w30 <pad> w31 w32",
    "w1 w2 w3 w4 w5 w6 w8",
]


@pytest.fixture(scope="module")
def folder(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ours(folder: Path, opencompass: Any) -> Any:
    from streamline_bench.opencompass import StreamlineModel

    return StreamlineModel(path=str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def stock(folder: Path, opencompass: Any) -> Any:
    """OpenCompass's HuggingFaceCausalLM, one text at a time."""
    from opencompass.models import HuggingFaceCausalLM

    return HuggingFaceCausalLM(
        path=str(folder), max_seq_len=128, model_kwargs={"torch_dtype": "torch.float"}
    )


def test_ppl_is_that_of_the_stock_class(ours: Any, stock: Any) -> None:
    expected = stock.get_ppl(TEXTS)
    np.testing.assert_allclose(ours.get_ppl(TEXTS), expected, atol=1e-5)
    masks = [3, 1, 2, 1, 6]
    expected = np.concatenate(
        [stock.get_ppl([text], [mask]) for text, mask in zip(TEXTS, masks, strict=True)]
    )
    np.testing.assert_allclose(ours.get_ppl(TEXTS, masks), expected, atol=1e-5)


def test_loglikelihood_is_that_of_the_stock_class(ours: Any, stock: Any) -> None:
    ends = [" w7", " w8", " w20 w21", " w32", " w6 w8"]
    np.testing.assert_allclose(
        ours.get_loglikelihood(TEXTS, ends), stock.get_loglikelihood(TEXTS, ends), atol=1e-4
    )


def test_answers_are_those_of_the_stock_class(ours: Any, stock: Any) -> None:
    # A padding token inside a prompt is a token to ours; transformers would mask it.
    texts = [text for text in TEXTS if "<pad>" not in text]
    assert ours.generate(texts, max_out_len=5) == stock.generate(texts, max_out_len=5)


def test_prompts_beyond_the_limit_keep_their_end(folder: Path) -> None:
    from streamline_bench.opencompass import StreamlineModel

    short = StreamlineModel(path=str(folder), device="cpu", dtype="float32", max_seq_len=3)
    long, kept = "w5 w6 w7 w8 w9", "w7 w8 w9"
    np.testing.assert_allclose(short.get_ppl([long]), short.get_ppl([kept]), atol=1e-6)
    # Of four masked tokens two were cut off.
    np.testing.assert_allclose(short.get_ppl([long], [4]), short.get_ppl([kept], [2]), atol=1e-6)


def test_tokenwise_loss_is_that_of_the_marked_characters(ours: Any) -> None:
    text = "w1 w22 w3 w4"
    losses, counts = ours.get_ppl_tokenwise([text, text], [[(3, 6, 1)], [(4, 8, 1), (11, 12, 1)]])
    ids = ours.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprobs = ours.model(ids).logits[0].log_softmax(-1)
    each = [-float(logprobs[at - 1, ids[0, at]]) for at in range(1, 4)]
    assert counts == [1, 3]
    assert losses == pytest.approx([each[0], sum(each)], abs=1e-4)


def test_conditional_probabilities(ours: Any, tmp_path: Path) -> None:
    """CLPInferencer's own arithmetic, with what our class hands it."""
    from opencompass.openicl.icl_inferencer import CLPInferencer

    inferencer = CLPInferencer(model=ours, batch_size=8, output_json_filepath=str(tmp_path))
    choices = [ours.tokenizer.encode(word, False, False)[0] for word in ("w1", "w2", "w3")]
    together = inferencer._get_cond_prob(TEXTS, [-1] * len(TEXTS), choices)
    for text, row in zip(TEXTS, together, strict=True):
        ids = ours.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = ours.model(ids).logits[0, -1, choices]
        assert row == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)


def test_recipe_and_unknown_keys(folder: Path) -> None:
    from streamline_bench.opencompass import StreamlineModel

    pruned = StreamlineModel(path=str(folder), device="cpu", recipe="last_layers", n_layers=1)
    assert pruned.model.config.num_hidden_layers == 1
    assert pruned.source.prepared.manifest is not None
    with pytest.raises(RecipeError, match=r"'max_seq_length=5'"):
        StreamlineModel(path=str(folder), max_seq_length=5)
    with pytest.raises(StreamlineBenchError, match="tokenizer_only"):
        StreamlineModel(path=str(folder), tokenizer_only=True).get_ppl(["w1"])
    with pytest.raises(StreamlineBenchError, match="set max_out_len"):
        pruned.generate(["w1"])


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"][:3]
    save_file(weights, path, metadata={"format": "pt"})


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_cut_weights, "model.norm.weight|faulty"),
        (lambda folder: _change_config(folder, hidden_size="wide"), "hidden_size"),
        (
            lambda folder: _change_config(folder, quantization_config={"quant_method": "gptq"}),
            "gptq",
        ),
    ],
    ids=["weights of another shape", "value of another type", "quantised"],
)
def test_a_faulty_model_is_one_sentence(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    from streamline_bench.opencompass import StreamlineModel

    faulty = Path(shutil.copytree(folder, tmp_path / "faulty"))
    damage(faulty)
    with pytest.raises(StreamlineBenchError, match=named) as refused:
        StreamlineModel(path=str(faulty), device="cpu", dtype="float32").get_ppl(["w1 w2"])
    assert "\n" not in str(refused.value)


def test_chat_model(folder: Path) -> None:
    from opencompass.utils.prompt import PromptList

    from streamline_bench.opencompass import StreamlineChatModel

    arguments = {"path": str(folder), "device": "cpu", "dtype": "float32"}
    with pytest.raises(CheckpointError, match="no chat template"):
        StreamlineChatModel(**arguments).generate(["w1"], max_out_len=2)
    template = (
        "<s>{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w90{% endif %}"
    )
    chat = StreamlineChatModel(**arguments, tokenizer_kwargs={"chat_template": template})
    prompt = PromptList(
        [
            {"section": "round", "pos": "begin"},
            {"role": "HUMAN", "prompt": "w1"},
            {"role": "BOT", "prompt": "w2"},
            {"section": "round", "pos": "end"},
        ]
    )
    [asked] = chat.parse_template([prompt], mode="gen")
    [stated] = chat.parse_template([prompt], mode="ppl")
    # The line break stands before the empty system message that OpenCompass adds to the user's.
    assert chat._generation_text(asked) == "<s>user w1\n w90"
    assert chat._score_text(stated) == "<s>user w1\n assistant w2 "
    # The template wrote the special tokens already; none are added.
    assert chat._encode(["<s>user w1 w90"], 99)[0] == [
        chat.tokenizer.convert_tokens_to_ids(["<s>", "user", "w1", "w90"])
    ]
    assert chat.get_ppl([stated]).shape == (1,)
    assert len(chat.generate_from_template([prompt, prompt], max_out_len=2)) == 2


def test_missing_vllm_comes_with_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamline_bench.opencompass import StreamlineVLLM

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name)
    )
    with pytest.raises(MissingDependencyError, match=r"pip install 'streamline-bench\[vllm\]'"):
        StreamlineVLLM(path=str(folder))


def test_keys_of_the_class_are_those_that_say_nothing_of_the_checkpoint(opencompass: Any) -> None:
    import inspect

    from streamline_bench.opencompass import StreamlineModel
    from streamline_bench.opencompass.run_plan import OF_MODEL_CLASS

    parameters = set(inspect.signature(StreamlineModel).parameters)
    assert parameters == {*OF_MODEL_CLASS, "path", "model_kwargs", "overrides", "options"}


def test_a_tasks_model_is_the_checkpoint_that_the_run_reports(
    folder: Path, opencompass: Any, tmp_path: Path
) -> None:
    from streamline_bench.opencompass import StreamlineModel
    from streamline_bench.opencompass.run_plan import ModelEntry, RunPlan, source_keys
    from streamline_bench.opencompass.source import entry_source

    entry = ModelEntry("last", str(folder), "last_layers", {"n_layers": 1})
    options = {"device": "cpu", "dtype": "bfloat16", "max_seq_len": 64, "cache": str(tmp_path)}
    keys = source_keys(RunPlan((entry,), ("piqa",), options), entry)
    task = StreamlineModel(**keys, max_seq_len=64)
    assert task.source == entry_source(**keys)
    assert task.source.prepared.key is not None
