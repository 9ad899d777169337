"""``--model streamline`` against the stock class of the harness, on random models of many kinds."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from streamline_bench.core.forward import fetched
from streamline_bench.errors import NumericsError
from streamline_bench.harness.lm import StreamlineLM
from streamline_bench.harness.scoring.forward import (
    Forward,
    synthetic_row,
    target_logprobs,
    tensors_of,
)
from streamline_bench.harness.scoring.packing import Query
from streamline_bench.harness.scoring.scorer import TokenScorer, one_ahead

OPTIONS = {"device": "cpu", "dtype": "float32"}
TOLERANCE = 1e-4

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "head_dim": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 16, "head_dim": 8},
    "granite": {"logits_scaling": 3.0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "phi": {},
    "mixtral": {"num_local_experts": 4},
    "bloom": {},
}
PACKED_TO_ANY_LENGTH = {"llama", "qwen2", "granite", "opt", "gpt2", "gpt_neox", "phi", "mixtral"}
WINDOWED = {"mistral", "gemma2", "gemma3_text"}


def words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(f"w{draw.randrange(96)}" for _ in range(draw.randint(least, most)))


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def choice_requests(seed: int = 0) -> list[Instance]:
    """One-token, several-token and mixed choices, empty and overlong contexts, duplicates."""
    draw = random.Random(seed)
    pairs: list[tuple[str, str]] = []
    prefix = words(draw, 6, 6)
    for least, most in ((1, 1), (2, 6), (1, 4), (12, 20)):
        for question in range(4):
            context = (prefix + " " if question % 2 else "") + words(draw, 2, 30)
            pairs += [(context, " " + words(draw, least, most)) for _ in range(3)]
    pairs += [("", words(draw, 3, 5)), ("", words(draw, 3, 5)), pairs[0], pairs[0]]
    pairs += [(words(draw, 140, 150), " " + words(draw, 4, 6)) for _ in range(2)]
    return instances("loglikelihood", pairs)


def spread(model: Any) -> None:
    """Enlarge the weights of a random model, so that errors show in its answers."""
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)


def pair(folder: Path, **options: Any) -> tuple[HFLM, StreamlineLM]:
    models = []
    for kind in (HFLM, StreamlineLM):
        model = kind(pretrained=str(folder), **{**OPTIONS, **options})
        spread(model)
        models.append(model)
    return models[0], models[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_get_the_stock_scores(
    family: str,
    make_tiny_model: Callable[..., Path],
    word_tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = make_tiny_model(family, num_hidden_layers=3, **FAMILIES[family])
    stock, ours = pair(folder, batch_size=4, tokenizer=word_tokenizer)
    requests = choice_requests()
    with caplog.at_level(logging.INFO, logger="streamline_bench"):
        answers = ours.loglikelihood(requests, disable_tqdm=True)
    expected = stock.loglikelihood(requests, disable_tqdm=True)
    for (score, greedy), (stock_score, stock_greedy) in zip(answers, expected, strict=True):
        assert score == pytest.approx(stock_score, abs=TOLERANCE)
        assert greedy == stock_greedy
    scorer = ours._token_scorer()
    assert isinstance(scorer, TokenScorer)
    if family in PACKED_TO_ANY_LENGTH:
        assert scorer._share_up_to > 10**6
    elif family in WINDOWED:
        assert scorer._share_up_to == 16
    else:
        assert scorer._share_up_to == 0
        assert "scored one by one" in caplog.text


def test_greedy_continuations_are_recognised(make_tiny_model: Callable[..., Path]) -> None:
    stock, ours = pair(make_tiny_model("llama", num_hidden_layers=2), batch_size=3)
    draw = random.Random(3)
    requests = []
    for _ in range(6):
        context = words(draw, 3, 9)
        ids = stock.tok_encode(context)
        with torch.no_grad():
            for _ in range(3):
                ids.append(int(stock.model(torch.tensor([ids])).logits[0, -1].argmax()))
        best = stock.tok_decode(ids[-3:], skip_special_tokens=False)
        requests += [(context, " " + best), (context, " " + words(draw, 3, 3))]
    asked = instances("loglikelihood", requests)
    greedy = [flag for _, flag in ours.loglikelihood(asked, disable_tqdm=True)]
    assert greedy == [flag for _, flag in stock.loglikelihood(asked, disable_tqdm=True)]
    assert any(greedy)
    assert not all(greedy)


@pytest.mark.parametrize("batch_size", [1, 5, "auto"])
def test_rolling_and_generation_equal_the_stock_class(
    make_tiny_model: Callable[..., Path], batch_size: int | str
) -> None:
    folder = make_tiny_model("llama", num_hidden_layers=2)
    stock, _ = pair(folder, batch_size=2)
    _, ours = pair(folder, batch_size=batch_size)
    draw = random.Random(5)
    texts = [(words(draw, 1, 300),) for _ in range(7)]
    rolling = instances("loglikelihood_rolling", texts)
    expected = stock.loglikelihood_rolling(rolling, disable_tqdm=True)
    answers = ours.loglikelihood_rolling(rolling, disable_tqdm=True)
    for (text,), answer, stock_answer in zip(texts, answers, expected, strict=True):
        # The stock class adds up in float32.
        assert answer == pytest.approx(stock_answer, abs=1e-5 * len(text.split()) + TOLERANCE)
    options = {"until": ["w7"], "max_gen_toks": 8, "do_sample": False}
    asked = instances("generate_until", [(words(draw, 1, 20), options) for _ in range(7)])
    assert ours.generate_until(asked, disable_tqdm=True) == stock.generate_until(
        asked, disable_tqdm=True
    )


@pytest.mark.parametrize(
    "options",
    [{"max_length": 12}, {"add_bos_token": True}, {"prefix_token_id": 5}, {"logits_cache": False}],
    ids=str,
)
def test_options_that_change_tokens_act_as_in_the_stock_class(
    make_tiny_model: Callable[..., Path], options: dict[str, Any]
) -> None:
    stock, ours = pair(make_tiny_model("llama", num_hidden_layers=2), batch_size=4, **options)
    requests = [r for r in choice_requests(1) if len(r.args[1].split()) <= 12]
    scores = [score for score, _ in ours.loglikelihood(requests, disable_tqdm=True)]
    expected = [score for score, _ in stock.loglikelihood(requests, disable_tqdm=True)]
    assert scores == pytest.approx(expected, abs=TOLERANCE)


def test_bfloat16_differs_from_a_float32_softmax_by_its_own_rounding_only(
    make_tiny_model: Callable[..., Path],
) -> None:
    folder = make_tiny_model("llama", num_hidden_layers=2)
    precise, ours = pair(folder, dtype="bfloat16", softmax_dtype="float32", batch_size=1)
    requests = choice_requests(2)[:36]
    scores = [score for score, _ in ours.loglikelihood(requests, disable_tqdm=True)]
    expected = [score for score, _ in precise.loglikelihood(requests, disable_tqdm=True)]
    assert scores == pytest.approx(expected, abs=0.3)


def test_shared_contexts_are_computed_once(make_tiny_model: Callable[..., Path]) -> None:
    stock, ours = pair(make_tiny_model("llama", num_hidden_layers=2), batch_size=4)
    context = words(random.Random(0), 40, 40)
    requests = instances("loglikelihood", [(context, f" w{i} w{i + 1} w1") for i in range(8)])
    counts = {}
    for name, model in (("stock", stock), ("ours", ours)):
        if name == "ours":
            ours.loglikelihood(requests, disable_tqdm=True)  # Self-checks come first.
        seen: list[int] = []
        handle = model.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(args[0].numel())
        )
        model.loglikelihood(requests, disable_tqdm=True)
        handle.remove()
        counts[name] = sum(seen)
    assert counts["stock"] == 8 * 42
    assert counts["ours"] == 40 + 8 * 2


def test_a_batch_waits_for_its_answers_only(make_tiny_model: Callable[..., Path]) -> None:
    """Tensors of the meta device have no values: what asks for one fails, and names itself."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model("llama")).to("meta")
    batch = tensors_of([synthetic_row(96), synthetic_row(96)])
    logits = Forward(lambda: model, torch.device("meta"), torch.no_grad).wanted_logits(batch)
    assert logits.shape == (len(batch.wanted), model.config.vocab_size)
    scores, _ = target_logprobs(logits, batch, torch.float32)
    with pytest.raises(NotImplementedError, match="copy out of meta tensor"):  # the answers' copy
        fetched(scores)()


def four_batches(make_tiny_model: Callable[..., Path]) -> tuple[TokenScorer, list[Query]]:
    """A scorer, and queries that make four batches of at most 16 tokens, longest first."""
    ours = StreamlineLM(pretrained=str(make_tiny_model("llama", num_hidden_layers=2)), **OPTIONS)
    scorer = ours._token_scorer()
    assert scorer is not None
    lengths = (12, 11, 8, 8, 5, 5, 4)
    queries = [Query(i, list(range(i, i + size)), [7, 9]) for i, size in enumerate(lengths)]
    return scorer, queries


def test_a_batch_is_prepared_and_queued_before_the_one_before_it_is_read(
    make_tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, queries = four_batches(make_tiny_model)
    place = "streamline_bench.harness.scoring.scorer"
    with monkeypatch.context() as one_by_one:
        one_by_one.setattr(f"{place}.one_ahead", lambda starts: (start() for start in starts))
        expected = scorer.score(queries, batch_tokens=16, progress=False)
    events: list[str] = []
    tensors, ask = tensors_of, TokenScorer.ask

    def prepare(rows: Any) -> Any:
        events.append("prepare")
        return tensors(rows)

    def queue(self: TokenScorer, *batch: Any) -> Any:
        events.append("queue")
        reading = ask(self, *batch)
        return lambda: (events.append("read"), reading())[1]

    monkeypatch.setattr(f"{place}.tensors_of", prepare)
    monkeypatch.setattr(TokenScorer, "ask", queue)
    assert scorer.score(queries, batch_tokens=16, progress=False) == expected  # to the bit
    start = ["prepare", "queue"]
    assert events == [*start, *(3 * [*start, "read"]), "read"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_what_ends_a_start_comes_behind_the_answers_before_it(kind: type[BaseException]) -> None:
    def start(number: int) -> int:
        if number == 2:
            raise kind
        return number

    started = one_ahead((lambda n=n: start(n)) for n in range(4))
    assert [next(started), next(started)] == [0, 1]
    with pytest.raises(kind):
        next(started)


def test_memory_that_runs_out_while_answers_are_waited_for_loses_none(
    make_tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third batch does not fit: its halves are queued, and the later ones, in halves too."""
    scorer, queries = four_batches(make_tiny_model)
    expected = scorer.score(queries, batch_tokens=16, progress=False)
    real, shapes = scorer._forward.wanted_logits, []

    def limited(batch: Any) -> torch.Tensor:
        shapes.append(tuple(batch.ids.shape))
        if shapes[-1] == (2, 8):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return real(batch)

    monkeypatch.setattr(scorer._forward, "wanted_logits", limited)
    order: list[int] = []
    answers = scorer.score(
        queries, batch_tokens=16, progress=False, on_answer=lambda index, _: order.append(index)
    )
    assert shapes == [(1, 12), (1, 11), (2, 8), (1, 8), (1, 8), (1, 5), (1, 5), (1, 4)]
    assert order == list(range(7))
    assert [a for a, _ in answers] == pytest.approx([a for a, _ in expected], abs=TOLERANCE)


def test_running_out_of_memory_halves_the_batches(
    make_tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, ours = pair(make_tiny_model("llama", num_hidden_layers=2), batch_size=64)
    scorer = ours._token_scorer()
    assert scorer is not None
    real = scorer._forward.wanted_logits
    failures = []

    def limited(batch: Any) -> torch.Tensor:
        if batch.ids.numel() > 200:
            failures.append(batch.ids.numel())
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return real(batch)

    monkeypatch.setattr(scorer._forward, "wanted_logits", limited)
    requests = choice_requests()
    scores = [score for score, _ in ours.loglikelihood(requests, disable_tqdm=True)]
    expected = [score for score, _ in stock.loglikelihood(requests, disable_tqdm=True)]
    assert scores == pytest.approx(expected, abs=TOLERANCE)
    assert failures


def test_nan_weights_stop_with_the_request_named(make_tiny_model: Callable[..., Path]) -> None:
    _, ours = pair(make_tiny_model("llama", num_hidden_layers=2), batch_size=2)
    with torch.no_grad():
        ours.model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"request 0 .* is NaN"):
        ours.loglikelihood(instances("loglikelihood", [("w1 w2", " w3")]), disable_tqdm=True)


def test_a_model_that_hides_its_window_is_found_out(
    make_tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """No entry of the config names the window: only real rows show it, and are then refused."""
    stock, ours = pair(make_tiny_model("llama", num_hidden_layers=2), batch_size=4)
    for model in (stock, ours):
        inner = model.model.model
        original = inner.forward

        def windowed(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            mask = kwargs.get("attention_mask")
            if mask is None:
                size = kwargs["input_ids"].shape[1]
                gap = torch.arange(size)[:, None] - torch.arange(size)[None, :]
                seen = (gap >= 0) & (gap < 20)
                kwargs["attention_mask"] = torch.where(seen, 0.0, -1e9)[None, None]
            return original(*args, **kwargs)

        inner.forward = windowed
    requests = choice_requests()
    with caplog.at_level(logging.INFO, logger="streamline_bench"):
        scores = [score for score, _ in ours.loglikelihood(requests, disable_tqdm=True)]
    expected = [score for score, _ in stock.loglikelihood(requests, disable_tqdm=True)]
    assert scores == pytest.approx(expected, abs=TOLERANCE)
    assert "scored one by one" in caplog.text
