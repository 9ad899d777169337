"""What teacher and student compute, against the stock model's own hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from surgery_in_memory import keep_layers
from torch import Tensor, nn

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.forward import evaluating
from streamline_bench.core.recipe.schema import ReplacementSpec
from streamline_bench.core.surgery import block_keep
from streamline_bench.core.training.batch import make_batch
from streamline_bench.core.training.block import Student, Teacher, pruned
from streamline_bench.core.training.loop import STATE_ERRORS, LmObjective, StateObjective

LAYER = ReplacementSpec(kind="layer")
START, N = 2, 3
FAMILIES = ["llama", "qwen2", "gemma3_text", "opt", "gpt2", "phi", "gpt_neox", "smollm3"]


def student_of(model: Any, spec: ReplacementSpec = LAYER, start: int = START) -> Student:
    return Student(model, start, spec, seed=3)


def run_student(model: Any, student: Student, ids: Any, mask: Any) -> torch.Tensor:
    states = Teacher(model, START, N, student.num_calls).run(ids, mask)
    return student.run(states.hidden, states.calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_the_models_own(
    random_model: Callable[..., Any], padded_tokens: Any, family: str
) -> None:
    model = random_model(family)
    ids, mask = padded_tokens.input_ids, padded_tokens.attention_mask
    states = Teacher(model, START, N, 1).run(ids, mask)
    with torch.no_grad():
        known = model(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(states.hidden[mask], known[START][mask])
    torch.testing.assert_close(states.target[mask], known[START + N][mask])


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_student_is_the_layer_it_was_copied_from(
    random_model: Callable[..., Any], padded_tokens: Any, family: str
) -> None:
    """Same masks, rotary angles and windows as inside the parent, for two layers at once."""
    model = random_model(family)
    ids, mask = padded_tokens.input_ids, padded_tokens.attention_mask
    output = run_student(
        model, student_of(model, ReplacementSpec(kind="layer", layers=2)), ids, mask
    )
    with torch.no_grad():
        known = model(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(output[mask], known[START + 2][mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_calls_equal_the_captured_ones(
    random_model: Callable[..., Any], padded_tokens: Any, family: str
) -> None:
    model = random_model(family)
    ids, mask = padded_tokens.input_ids, padded_tokens.attention_mask
    layers = list(decoder_layers(model))
    student = student_of(model, ReplacementSpec(kind="layer", layers=2))
    teacher = Teacher(model, START, N, 2)
    states = teacher.run(ids, mask)
    replayed = student.run(states.hidden, teacher.replay_calls(ids, mask))
    assert torch.equal(replayed, student.run(states.hidden, states.calls))
    assert list(decoder_layers(model)) == layers


def test_later_layers_and_head_are_never_run(teacher_model: Any, tokens: Any) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("ran behind the block")

    layers = decoder_layers(teacher_model)
    for module in (layers[START + N], teacher_model.model.norm, teacher_model.lm_head):
        module.register_forward_pre_hook(fail)
    Teacher(teacher_model, START, N, 1).run(tokens.input_ids, tokens.attention_mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_is_causal(random_model: Callable[..., Any], tokens: Any, family: str) -> None:
    model = random_model(family)
    ids, mask = tokens.input_ids[:2], tokens.attention_mask[:2]
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1).clamp(max=99) - (changed[:, -1] == 99).long() * 5
    student = student_of(model)
    before, after = (run_student(model, student, i, mask) for i in (ids, changed))
    torch.testing.assert_close(before[:, :-1], after[:, :-1], rtol=0, atol=1e-6)
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-3


def _errors(name: str, output: Tensor, target: Tensor) -> float:
    """The objectives for one token, float64 ``[d]``, from their definitions."""
    if name == "mse":
        return float(((output - target) ** 2).mean())
    if name == "relative_mse":
        return float(((output - target) ** 2).sum() / (target**2).sum())
    cosine = nn.functional.cosine_similarity(output, target, dim=0)
    return float(1 - cosine + torch.log(output.norm() / target.norm()) ** 2)


@pytest.mark.parametrize("name", STATE_ERRORS)
def test_loss_is_the_mean_over_real_tokens(
    teacher_model: Any, padded_tokens: Any, name: str
) -> None:
    ids, mask = padded_tokens.input_ids, padded_tokens.attention_mask
    student = student_of(teacher_model, ReplacementSpec(kind="ffn"))
    source = Teacher(teacher_model, START, N, 0)
    objective = StateObjective(student, STATE_ERRORS[name])
    batch = make_batch(padded_tokens, torch.arange(len(padded_tokens)), torch.device("cpu"))
    loss = float(objective.loss_sum(batch, source).detach()) / objective.terms(mask)
    wide = copy.deepcopy(teacher_model).double()
    with torch.no_grad():
        known = wide(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        output = copy.deepcopy(student.module).double()(known[START])
    errors = [
        _errors(name, output[i, t], known[START + N][i, t])
        for i in range(len(ids))
        for t in range(ids.shape[1])
        if mask[i, t]
    ]
    assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_only_the_plain_error_follows_the_size_of_a_token() -> None:
    """One token a thousand times as large as the others, and as wrong in relation to its size."""
    target = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    output = target + 0.1 * torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([1000.0, 1, 1, 1, 1])[:, None]
    for name, error in STATE_ERRORS.items():
        before, after = error(output, target), error(output * scale, target * scale)
        share = float(after[0] / after.sum())
        assert (
            share > 0.99
            if name == "mse"
            else share == pytest.approx(float(before[0] / before.sum()), rel=1e-4)
        )
    zero = torch.zeros(1, 16, requires_grad=True)
    for error in STATE_ERRORS.values():
        error(zero, torch.zeros(1, 16)).sum().backward()
        assert zero.grad is not None and bool(zero.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["layer", "ffn"])
def test_padding_does_not_influence_the_loss(
    teacher_model: Any, padded_tokens: Any, kind: str
) -> None:
    student = student_of(teacher_model, ReplacementSpec.model_validate({"kind": kind}))
    source = Teacher(teacher_model, START, N, student.num_calls)
    losses = []
    for filler in (0, 57):
        mask = padded_tokens.attention_mask
        ids = padded_tokens.input_ids.where(mask, filler)
        filled = padded_tokens.from_tensors(ids, mask)
        batch = make_batch(filled, torch.arange(len(filled)), torch.device("cpu"))
        losses.append(float(StateObjective(student).loss_sum(batch, source).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slots", [1, 2])
def test_what_training_saw_is_what_surgery_deploys(
    random_model: Callable[..., Any], padded_tokens: Any, family: str, slots: int
) -> None:
    """Boundary states and logits of the really pruned model, with trained-like weights."""
    model = random_model(family)
    ids, mask = padded_tokens.input_ids, padded_tokens.attention_mask
    student = student_of(model, ReplacementSpec(kind="layer", layers=slots))
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    seen = run_student(model, student, ids, mask)
    with pruned(model, START, N, student), torch.no_grad():
        seen_logits = model(ids, attention_mask=mask.long(), use_cache=False).logits
    deployed = copy.deepcopy(model)
    for index, module in enumerate(student.module):  # type: ignore[arg-type]
        decoder_layers(deployed)[START + index].load_state_dict(module.state_dict())
    keep_layers(deployed, block_keep(6, START + slots, N - slots))
    with torch.no_grad():
        out = deployed(ids, attention_mask=mask.long(), output_hidden_states=True)
    torch.testing.assert_close(seen[mask], out.hidden_states[START + slots][mask], **CLOSE)
    torch.testing.assert_close(seen_logits[mask], out.logits[mask], **CLOSE)


CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


def test_lm_loss_is_the_cross_entropy_of_real_tokens(
    teacher_model: Any, padded_tokens: Any
) -> None:
    ids, mask = padded_tokens.input_ids, padded_tokens.attention_mask
    student = student_of(teacher_model)
    batch = make_batch(padded_tokens, torch.arange(len(padded_tokens)), torch.device("cpu"))
    with pruned(teacher_model, START, N, student):
        objective = LmObjective(teacher_model)
        loss = float(objective.loss_sum(batch, None).detach()) / objective.terms(mask)
    cut = copy.deepcopy(teacher_model)
    keep_layers(cut, block_keep(6, START + 1, N - 1))
    with torch.no_grad():
        logprobs = cut.double()(ids, attention_mask=mask.long()).logits.log_softmax(-1)
    terms = [
        -float(logprobs[i, t - 1, ids[i, t]])
        for i in range(len(ids))
        for t in range(1, ids.shape[1])
        if mask[i, t]
    ]
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_lm_backward_stops_at_the_replacement(teacher_model: Any, tokens: Any) -> None:
    student = student_of(teacher_model)
    batch = make_batch(tokens, torch.arange(4), torch.device("cpu"))
    reached = []
    layers = decoder_layers(teacher_model)
    with evaluating(teacher_model, frozen=True), pruned(teacher_model, START, N, student):
        for index in (START - 1, START + N):
            layers[index].register_forward_hook(
                lambda layer, args, output: reached.append(output.requires_grad)
            )
        LmObjective(teacher_model).loss_sum(batch, None).backward()  # type: ignore[no-untyped-call]
    assert reached == [False, True]
    assert all(p.grad is None for p in teacher_model.parameters())
    assert all(bool(p.grad.any()) for p in student.module.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in student.module.parameters())


def test_bfloat16_parent_trains_float32_weights(teacher_model: Any, tokens: Any) -> None:
    model = teacher_model.to(torch.bfloat16)
    student = student_of(model)
    assert {p.dtype for p in student.module.parameters()} == {torch.float32}
    ids, mask = tokens.input_ids, tokens.attention_mask
    assert run_student(model, student, ids, mask).dtype == torch.float32
    with pruned(model, START, N, student):
        assert model(ids, attention_mask=mask.long()).logits.dtype == torch.bfloat16
