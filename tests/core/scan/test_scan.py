"""The scan against loops in float64 over the states that transformers itself returns."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from streamline_bench.core import scan as importance
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.scan import scan
from streamline_bench.core.similarity import Similarity
from streamline_bench.errors import CalibrationError, NumericsError, SparsityError

LENGTHS = (11, 3, 9, 1, 11)


@pytest.fixture(scope="session")
def tokens() -> CalibrationTokens:
    """Five sequences of different lengths, padded on the right with a real token."""
    ids = torch.randint(3, 100, (5, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(11)[None, :] < torch.tensor(LENGTHS)[:, None]
    return CalibrationTokens.from_tensors(ids.where(mask, 7), mask)


def states_one_by_one(model: Any, tokens: CalibrationTokens, last: str) -> list[np.ndarray]:
    """``[L + 1, t, d]`` of each sequence alone, unpadded, as transformers returns them."""
    # With this set to False the last of hidden_states is the state before the final norm.
    model.config.tie_last_hidden_states = last == "postnorm"
    states = []
    with torch.no_grad():
        for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True):
            found = model(ids[mask][None], output_hidden_states=True).hidden_states
            states.append(torch.cat(found).double().numpy())
    return states


def loop(states: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosine over all tokens, mean angle / pi at the last tokens: pair by pair."""
    size = len(states[0])
    cosine, angular = np.zeros((size, size)), np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            every = []
            for h in states:
                every.append([_cosine(a, b) for a, b in zip(h[i], h[j], strict=True)])
                angular[i, j] += math.acos(min(max(every[-1][-1], -1), 1)) / math.pi / len(states)
            cosine[i, j] = np.mean(np.concatenate(every))
    return cosine, angular


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_state", ["raw", "postnorm"])
def test_every_pair_equals_a_float64_loop(
    random_model: Any, variant: str, tokens: CalibrationTokens, last_state: Any
) -> None:
    # OPT with embeddings of another width projects its last state to that width.
    changes = {"word_embed_proj_dim": 32} if variant == "opt" else {}
    model = random_model(variant, **changes)
    found = scan(model, tokens, last_state=last_state, batch_size=3, progress=False)
    cosine, angular = loop(states_one_by_one(model, tokens, last_state))
    np.testing.assert_allclose(found.cosine, cosine, atol=2e-5)
    np.testing.assert_allclose(found.angular, angular, atol=2e-5)
    assert (found.num_tokens, found.num_samples) == (sum(LENGTHS), len(LENGTHS))
    assert found.last_state == last_state


def test_raw_and_postnorm_differ_at_the_last_boundary_only(
    random_model: Any, tokens: CalibrationTokens
) -> None:
    model = random_model("llama")
    raw = scan(model, tokens, progress=False).cosine
    normed = scan(model, tokens, last_state="postnorm", progress=False).cosine
    np.testing.assert_array_equal(raw[:-1, :-1], normed[:-1, :-1])
    assert np.abs(raw[:-1, -1] - normed[:-1, -1]).max() > 1e-3


@pytest.mark.parametrize("batch_size", [2, 5, 100])
def test_batches_of_different_lengths_equal_one_by_one(
    random_model: Any, tokens: CalibrationTokens, batch_size: int
) -> None:
    model = random_model("qwen2")
    single = scan(model, tokens, batch_size=1, progress=False)
    batched = scan(model, tokens, batch_size=batch_size, progress=False)
    np.testing.assert_allclose(batched.cosine, single.cosine, atol=1e-6)
    np.testing.assert_allclose(batched.angular, single.angular, atol=1e-6)


def test_what_stands_under_a_pad_does_not_matter(
    random_model: Any, tokens: CalibrationTokens
) -> None:
    model = random_model("llama")
    other = tokens.input_ids.where(tokens.attention_mask, 50)
    changed = CalibrationTokens.from_tensors(other, tokens.attention_mask)
    first, second = (scan(model, t, batch_size=5, progress=False) for t in (tokens, changed))
    np.testing.assert_array_equal(first.cosine, second.cosine)
    np.testing.assert_array_equal(first.angular, second.angular)


def test_half_precision_states_are_compared_in_float32(
    random_model: Any, tokens: CalibrationTokens
) -> None:
    model = random_model("llama").to(torch.bfloat16)
    found = scan(model, tokens, last_state="postnorm", progress=False)
    cosine, angular = loop(states_one_by_one(model, tokens, "postnorm"))
    # bfloat16 arithmetic would be off by some 1e-3.
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-6)
    np.testing.assert_allclose(found.angular, angular, atol=1e-6)


def test_the_chunk_size_does_not_matter(
    random_model: Any, tokens: CalibrationTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("llama")
    whole = scan(model, tokens, batch_size=5, progress=False)
    monkeypatch.setattr(importance, "_CHUNK_BYTES", {"cpu": 1})
    pieces = scan(model, tokens, batch_size=5, progress=False)
    np.testing.assert_allclose(pieces.cosine, whole.cosine, atol=1e-7)


def test_the_comparison_itself_is_never_rounded() -> None:
    states = torch.stack([torch.randn(2, 9, 32) for _ in range(4)])
    expected = importance._cosine_sums(states, None)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = importance._cosine_sums(states, None)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(found, expected)


def test_layers_that_return_tuples_are_read_whole() -> None:
    class Layer(nn.Module):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            return hidden.roll(1, dims=-1) * 2, None

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(20, 4)
            self.layers = nn.ModuleList([Layer(), Layer()])
            self.norm = nn.Identity()

        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> None:
            hidden = self.embed_tokens(input_ids)
            for layer in self.layers:
                hidden, _ = layer(hidden)

    class Model(nn.Module):
        config = SimpleNamespace(model_type="llama")

        def __init__(self) -> None:
            super().__init__()
            self.model = Base()

        def get_input_embeddings(self) -> nn.Embedding:
            return self.model.embed_tokens

    model = Model()
    ids = torch.arange(18).view(3, 6)
    found = scan(model, CalibrationTokens.from_tensors(ids), batch_size=3, progress=False)
    h = model.model.embed_tokens.weight[:18].detach().double()
    expected = nn.functional.cosine_similarity(h, h.roll(2, dims=-1), dim=-1).mean()
    assert found.cosine[0, 2] == pytest.approx(float(expected), abs=1e-6)


# -- what a scan leaves alone ----------------------------------------------------------------------


def test_the_model_is_left_as_it_was(random_model: Any, tokens: CalibrationTokens) -> None:
    model = random_model("llama", attention_dropout=0.5).train()
    model.model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = scan(model, tokens, progress=False)
    np.testing.assert_array_equal(first.cosine, scan(model, tokens, progress=False).cosine)
    assert model.model.layers[0].training
    assert not model.model.norm.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_the_lm_head_is_not_run(random_model: Any, tokens: CalibrationTokens) -> None:
    model = random_model("llama")
    model.lm_head = nn.Identity()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the LM head was run"))
    scan(model, tokens, progress=False)


def test_memory_does_not_grow_with_the_samples(
    random_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = set()
    add = importance._Sums.add

    def watched(self: Any, states: torch.Tensor, *rest: Any) -> None:
        storage = states.untyped_storage()
        buffers.add((storage.data_ptr(), storage.nbytes()))
        add(self, states, *rest)

    monkeypatch.setattr(importance._Sums, "add", watched)
    ids = torch.randint(3, 100, (24, 16), generator=torch.Generator().manual_seed(0))
    scan(random_model("llama"), CalibrationTokens.from_tensors(ids), batch_size=2, progress=False)
    assert [size for _, size in buffers] == [7 * 2 * 16 * 32 * 4]


# -- NaN -------------------------------------------------------------------------------------------


def test_nan_is_named_with_its_layer_and_sample(
    random_model: Any, tokens: CalibrationTokens
) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[5, 5] = math.inf
    with pytest.raises(NumericsError, match=r"of layer 3 is NaN.* sample 0, token 0"):
        scan(model, tokens, batch_size=2, progress=False)


def test_the_sample_of_a_later_batch_is_counted_from_the_start(random_model: Any) -> None:
    model = random_model("llama")
    ids = torch.arange(3, 99).view(8, 12)
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[5, 4]] = math.nan
    with pytest.raises(NumericsError, match=r"of the embeddings .* sample 5, token 4;"):
        scan(model, CalibrationTokens.from_tensors(ids), batch_size=3, progress=False)


# -- choosing a block ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant_name", ["llama", "qwen2", "gemma2", "opt-postnorm"])
def test_postnorm_picks_the_block_of_the_papers_formula(
    random_model: Any, tokens: CalibrationTokens, variant_name: str
) -> None:
    # LLM-Streamline: the largest mean over samples and tokens of 0.5 + 0.5 cos(hs[l], hs[l + m]).
    model = random_model(variant_name)
    ids = tokens.input_ids[:, :3][tokens.attention_mask[:, :3].all(dim=1)]
    even = CalibrationTokens.from_tensors(ids)
    states = states_one_by_one(model, even, "postnorm")
    found = scan(model, even, last_state="postnorm", progress=False)
    for m in range(1, 6):
        sums = np.zeros(7 - m)
        for h in states:
            for start in range(7 - m):
                pairs = zip(h[start], h[start + m], strict=True)
                sums[start] += np.mean([0.5 + 0.5 * _cosine(a, b) for a, b in pairs])
        block = found.best_block(m)
        assert block.start == int(sums.argmax())
        assert 0.5 + 0.5 * block.score == pytest.approx(sums.max() / len(states), abs=1e-6)


def test_angular_picks_the_least_distance_of_the_last_tokens(
    random_model: Any, tokens: CalibrationTokens
) -> None:
    model = random_model("llama")
    found = scan(model, tokens, progress=False)
    _, angular = loop(states_one_by_one(model, tokens, "raw"))
    for n in range(1, 6):
        distances = [angular[start, start + n] for start in range(7 - n)]
        assert found.best_block(n, "angular").start == int(np.argmin(distances))


@pytest.fixture
def made() -> Similarity:
    """Five layers; layer 0 looks the most redundant, layer 4 the next."""
    positions = np.array([0.0, 0.1, 1.0, 1.8, 2.5, 2.7])
    angle = np.abs(positions[:, None] - positions[None, :])
    return Similarity(np.cos(angle), angle / np.pi, 100, 4)


@pytest.mark.parametrize("metric", ["cosine", "angular"])
def test_protected_ends(made: Similarity, metric: Any) -> None:
    assert made.best_block(1, metric).start == 0
    assert made.best_block(1, metric, allow_first_layer=False).start == 4
    guarded = made.best_block(1, metric, allow_first_layer=False, allow_last_layer=False)
    assert guarded.start == 3
    assert guarded.score == pytest.approx(np.cos(0.7) if metric == "cosine" else 0.7 / np.pi)
    assert guarded.stop == 4


def test_a_block_with_layer_0_is_flagged(
    made: Similarity, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "streamline_bench"):
        assert not made.best_block(1, allow_first_layer=False).contains_first_layer
        assert not caplog.records
        assert made.best_block(1).contains_first_layer
    assert "contains layer 0" in caplog.text


@pytest.mark.parametrize("n", [0, -1, 6])
def test_impossible_sizes_are_refused(made: Similarity, n: int) -> None:
    with pytest.raises(SparsityError, match=f"{n} layers.* 5"):
        made.best_block(n)


def test_no_block_left_between_protected_ends(made: Similarity) -> None:
    assert made.best_block(5).start == 0
    with pytest.raises(SparsityError, match="No block of 5 of 5 layers"):
        made.best_block(5, allow_first_layer=False)
    with pytest.raises(SparsityError, match="No block of 4 of 5 layers"):
        made.best_block(4, allow_first_layer=False, allow_last_layer=False)


def test_the_table_ranks_each_size_by_itself(made: Similarity) -> None:
    table = made.table()
    assert len(table) == 5 + 4 + 3 + 2
    for n in range(1, 5):
        rows = table[table["n"] == n]
        assert sorted(rows["rank_cosine"]) == sorted(rows["rank_angular"])
        for metric in ("cosine", "angular"):
            first = rows[rows[f"rank_{metric}"] == 1].iloc[0]
            assert first["start"] == made.best_block(n, metric).start
            assert first[metric] == made.best_block(n, metric).score
    assert table["contains_first_layer"].tolist() == (table["start"] == 0).tolist()
    assert made.table(2).equals(table[table["n"] == 2].reset_index(drop=True))


def test_block_influence_is_the_distance_across_each_layer(made: Similarity) -> None:
    steps = np.diff([0.0, 0.1, 1.0, 1.8, 2.5, 2.7])
    np.testing.assert_allclose(made.block_influence, 1 - np.cos(steps), atol=1e-15)


def test_unknown_metric(made: Similarity) -> None:
    with pytest.raises(CalibrationError, match="Unknown metric 'euclid'"):
        made.best_block(1, "euclid")  # type: ignore[arg-type]


# -- saving ----------------------------------------------------------------------------------------


def test_saved_numbers_come_back_exactly(
    random_model: Any, tokens: CalibrationTokens, tmp_path: Path
) -> None:
    found = scan(random_model("llama"), tokens, last_state="postnorm", progress=False)
    found.save(tmp_path / "similarity.json")
    again = Similarity.load(tmp_path / "similarity.json")
    np.testing.assert_array_equal(again.cosine, found.cosine)
    np.testing.assert_array_equal(again.angular, found.angular)
    assert again.last_state == "postnorm"
    assert (again.num_tokens, again.num_samples) == (found.num_tokens, found.num_samples)
    assert again.details == found.details
    assert again.details["calibration"]["sha256"] == tokens.sha256
    assert json.loads((tmp_path / "similarity.json").read_text())["schema_version"] == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:50],
        lambda text: text.replace('"schema_version": 1', '"schema_version": 9'),
        lambda text: text.replace('"angular"', '"angle"'),
        lambda text: text.replace('"num_layers": 5', '"num_layers": 7'),
        lambda text: "[]",
    ],
)
def test_a_file_that_is_no_similarity_is_refused(
    made: Similarity, tmp_path: Path, spoil: Callable[[str], str]
) -> None:
    path = tmp_path / "similarity.json"
    made.save(path)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(CalibrationError, match="run the scan again"):
        Similarity.load(path)


def test_a_trained_model(shared_folder: Path) -> None:
    """The block that costs least when it is removed (measured apart) is the block chosen."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from streamline_bench.core.data.calibration import load_calibration
    from streamline_bench.core.recipe.schema import CalibrationSpec

    folder = shared_folder / "models" / "stories260K"
    text = shared_folder / "data" / "text" / "tinystories_valid.txt"
    spec = CalibrationSpec(source=str(text), samples=8)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = load_calibration(spec, tokenizer, max_length=512, progress=False)
    found = scan(AutoModelForCausalLM.from_pretrained(folder), loaded, progress=False)
    assert [found.best_block(n).start for n in (1, 2)] == [2, 2]
