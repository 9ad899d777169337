"""Layer searches with shared lower layers beside searches that run each candidate from the bottom.

    python tests/benchmarks/search_vs_naive.py [--layers 16 --hidden 128 --rounds 5 ...]

Both sides use the same model, batches and head, and find the same layers with the same losses,
which is checked. They take turns, one thread, processor time; the medians of the ratios within
each turn are printed (above 1: sharing is faster). For LaCo there are two peers: one that copies
the model for each trial, as its authors' code does, and one that merges in place as we do.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from llama_and_tokens import llama_and_tokens
from torch import nn

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.methods.depth.merge_search import LaCoRange, LaCoSearch, Merge
from streamline_bench.methods.tools.likelihood import (
    affordable_batch,
    count_targets,
    next_token_loss,
    skip_losses,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build(options: argparse.Namespace) -> tuple[Any, CalibrationTokens]:
    model, tokens = llama_and_tokens(options, options.samples)
    return model.to(options.device), tokens


class Without:
    """The model with only some layers, weights shared; whole again afterwards."""

    def __init__(self, model: Any, removed: set[int]) -> None:
        self.model, self.removed, self.all = model, removed, model.model.layers

    def __enter__(self) -> None:
        kept = [layer for i, layer in enumerate(self.all) if i not in self.removed]
        self.model.model.layers = nn.ModuleList(kept)
        self.model.config.num_hidden_layers = len(kept)

    def __exit__(self, *error: Any) -> None:
        self.model.model.layers = self.all
        self.model.config.num_hidden_layers = len(self.all)


def naive_losses(
    model: Any, tokens: CalibrationTokens, candidates: list[int], removed: list[int]
) -> dict[int, float]:
    batch_size = affordable_batch(model, tokens, len(model.model.layers), 8.0)
    losses = {}
    for layer in candidates:
        total = 0.0
        with Without(model, {*removed, layer}), torch.no_grad():
            for ids, mask in tokens.batches(batch_size):
                logits = model(input_ids=ids.to(model.device), use_cache=False).logits
                total += next_token_loss(logits, ids, mask).item()
        losses[layer] = total / count_targets(tokens)
    return losses


def naive_sleb(model: Any, tokens: CalibrationTokens, steps: int) -> list[int]:
    removed: list[int] = []
    for _ in range(steps):
        candidates = [i for i in range(1, len(model.model.layers) - 1) if i not in removed]
        losses = naive_losses(model, tokens, candidates, removed)
        removed.append(min(losses, key=losses.__getitem__))
    return removed


def shared_sleb(model: Any, tokens: CalibrationTokens, steps: int) -> list[int]:
    removed: list[int] = []
    for _ in range(steps):
        candidates = [i for i in range(1, len(model.model.layers) - 1) if i not in removed]
        losses = skip_losses(model, tokens, candidates, removed=removed, progress=False)
        removed.append(min(losses, key=losses.__getitem__))
    return removed


def last_hidden(model: Any, tokens: CalibrationTokens) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            model.model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
            for ids, _ in tokens.batches(8)
        ]


def naive_laco(
    model: Any, tokens: CalibrationTokens, span: LaCoRange, threshold: float, most: int, *,
    copies: bool,
) -> list[Merge]:  # fmt: skip
    """LaCo by its reference rule; each trial from the bottom."""
    dense = last_hidden(model, tokens)
    depth, merges, alive = len(model.model.layers), list[Merge](), {}
    current, order = model, list(range(depth))
    assert span.highest is not None
    base = span.highest - span.layers_per_merge
    while base >= span.lowest and depth - len(order) < most:
        room = most - (depth - len(order))
        count = min(span.layers_per_merge - 1, len(order) - 1 - base, room)
        others = tuple(order[base + 1 : base + 1 + count])
        trial = copy.deepcopy(current) if copies else current
        saved = swap(trial.model.layers[base], trial.model.layers[others[-1]])
        gone = set(range(depth)) - set(order) | set(others)
        with Without(trial, gone):
            found = last_hidden(trial, tokens)
        total = sum(
            nn.functional.cosine_similarity(a.double().flatten(1), b.double().flatten(1)).sum()
            for a, b in zip(dense, found, strict=True)
        )
        cosine = float(total) / len(tokens)
        if cosine > threshold:
            current, order = trial, [i for i in order if i not in others]
            alive.setdefault(base, saved)
            merges.append(Merge(base, others, cosine))
            base = min(base - span.interval, len(order) - span.layers_per_merge)
        else:
            restore(trial.model.layers[base], saved)
            base -= 1
    if not copies:
        for index, saved in alive.items():
            restore(model.model.layers[index], saved)
    return merges


def swap(base: nn.Module, other: nn.Module) -> dict[str, torch.Tensor]:
    saved = {}
    for name, parameter in base.named_parameters():
        if name.split(".")[-2] in PROJECTIONS:
            saved[name] = parameter.data
            parameter.data = other.get_parameter(name).data
    return saved


def restore(base: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    for name, tensor in saved.items():
        base.get_parameter(name).data = tensor


def shared_laco(
    model: Any, tokens: CalibrationTokens, span: LaCoRange, threshold: float, most: int
) -> list[Merge]:
    with LaCoSearch(model, tokens, span, "reference") as search:
        return search.run(threshold, most)


def seconds(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start, result


def compare(
    name: str, shared: Callable[[], Any], naive: Callable[[], Any], options: argparse.Namespace
) -> None:
    shared(), naive()  # warm
    ratios, ours = [], []
    for turn in range(options.rounds):
        order = [("shared", shared), ("naive", naive)]
        took = {}
        for label, work in order if turn % 2 else order[::-1]:
            took[label], result = seconds(work, options.device)
            took[label + " result"] = result
        if not same(took["shared result"], took["naive result"]):
            raise SystemExit(f"{name}: the two searches disagree")
        ratios.append(took["naive"] / took["shared"])
        ours.append(took["shared"])
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(
        f"{name:32} ratio {statistics.median(ratios):.2f} ({spread}), "
        f"shared {statistics.median(ours):.2f} s",
        flush=True,
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(abs(a[key] - b[key]) <= 1e-6 * abs(b[key]) for key in b)
    if a and isinstance(a[0], Merge):
        return [(m.base, m.others) for m in a] == [(m.base, m.others) for m in b]
    return bool(a == b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (
        ("layers", 16), ("hidden", 128), ("length", 64), ("samples", 8), ("vocabulary", 1000),
        ("steps", 2), ("rounds", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokens = build(options)
    everything, n = list(range(options.layers)), options.layers // 4
    compare(
        "PPL, every layer once",
        lambda: skip_losses(model, tokens, everything, progress=False),
        lambda: naive_losses(model, tokens, everything, []),
        options,
    )
    compare(
        f"SLEB, {options.steps} steps",
        lambda: shared_sleb(model, tokens, options.steps),
        lambda: naive_sleb(model, tokens, options.steps),
        options,
    )
    span = LaCoRange(highest=options.layers)
    for label, threshold, copies in (
        ("LaCo, loose, peer copies", 0.5, True),
        ("LaCo, loose, peer in place", 0.5, False),
        ("LaCo, strict, peer copies", 0.9999, True),
        ("LaCo, strict, peer in place", 0.9999, False),
    ):
        compare(
            label,
            lambda t=threshold: shared_laco(model, tokens, span, t, n),
            lambda t=threshold, c=copies: naive_laco(model, tokens, span, t, n, copies=c),
            options,
        )


if __name__ == "__main__":
    main()
