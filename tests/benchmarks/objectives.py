"""Which objective makes a trained layer worth its place: an ablation on a real language model.

    python tests/benchmarks/objectives.py MODEL TEXT HELD_OUT --work FOLDER [--removed 8]

One block of layers (the one of highest cosine between its ends) is replaced by one trained layer,
or by the networks of ``--kinds``. For each kind, objective, number of steps, rate and seed, the
table has, on held-out text, the token KL to the intact model, the perplexity and the share of equal
first tokens; and beside them the model without the block, and the intact one. It also says how much
of a plain squared error stands in how few tokens. The states around the block are computed once.
Finished rows are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens, load_calibration
from streamline_bench.core.forward import evaluating
from streamline_bench.core.recipe.schema import CalibrationSpec, ReplacementSpec, TrainingSpec
from streamline_bench.core.scan import scan
from streamline_bench.core.training.batch import make_batch
from streamline_bench.core.training.block import (
    LayerForm,
    Passthrough,
    Student,
    Teacher,
    pruned,
    slots,
)
from streamline_bench.core.training.trainer import train_replacement
from streamline_bench.modeling.loading import load_model, load_tokenizer

LENGTH, BATCH = 512, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--removed", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--kinds", default="layer")
    parser.add_argument("--objectives", default="mse,relative_mse,cosine")
    parser.add_argument("--epochs", default="2,6", help="a step is 8 sequences of 512 tokens")
    parser.add_argument("--rates", default="5e-4,2e-3")
    parser.add_argument("--seeds", default="0")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = (
        load_model(asked.model, device="cpu", dtype="float32"),
        load_tokenizer(asked.model),
    )
    training, held_out = (
        load_calibration(
            CalibrationSpec(source=str(path), sequence_length=LENGTH, samples=count), tokenizer,
            progress=False,
        )
        for path, count in ((asked.text, asked.sequences), (asked.held_out, 16))
    )  # fmt: skip
    rows = Rows(asked.work / "rows.jsonl")
    start = rows.of("block", lambda: {"start": chosen_block(model, training, asked.removed)})[
        "start"
    ]
    rows.of("sinks", lambda: sinks(model, training, start, asked.removed))
    rows.of("no layer", lambda: quality(model, held_out, start, asked.removed, None))
    axes = (asked.kinds, asked.seeds, asked.epochs, asked.rates, asked.objectives)
    for kind, seed, epochs, rate, objective in itertools.product(
        *(axis.split(",") for axis in axes)
    ):
        settings = {
            "objective": objective, "epochs": int(epochs), "lr": float(rate), "batch_size": BATCH,
            "validations": 2,
        }  # fmt: skip

        def trained(
            kind: Any = kind, settings: dict[str, Any] = settings, seed: int = int(seed)
        ) -> dict[str, Any]:
            spec = ReplacementSpec(kind=kind)
            result = train_replacement(
                model, start=start, n=asked.removed, spec=spec, tokens=training,
                training=TrainingSpec(**settings), work=asked.work / "training", seed=seed,
            )  # fmt: skip
            student = Student(model, start, spec, seed)
            student.load(result.state)
            facts = {key: result.summary[key] for key in ("steps", "initial_loss", "best_loss")}
            return {**facts, **quality(model, held_out, start, asked.removed, student)}

        rows.of(f"{kind} {objective} epochs={epochs} lr={rate} seed={seed}", trained)
    print(rows.markdown())


class Rows:
    """What was measured, one JSON object a line, so that a killed run goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        self._rows = {row.pop("name"): row for row in map(json.loads, lines)}

    def of(self, name: str, measure: Any) -> dict[str, Any]:
        if name not in self._rows:
            row = self._rows[name] = measure()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, **row}) + "\n")
            print(name, row, flush=True)
        return self._rows[name]

    def markdown(self) -> str:
        names = ("steps", "initial_loss", "best_loss", "kl", "perplexity", "same_first")
        lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for name, row in self._rows.items():
            if "kl" in row:
                cells = [f"{row[key]:.4g}" if key in row else "" for key in names]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def chosen_block(model: Any, tokens: CalibrationTokens, removed: int) -> int:
    part = CalibrationTokens.from_tensors(
        tokens.input_ids[:16], tokens.attention_mask[:16], tokens.source
    )
    return int(scan(model, part, batch_size=1, progress=False).best_block(removed).start)


@torch.no_grad()
def sinks(model: Any, tokens: CalibrationTokens, start: int, removed: int) -> dict[str, Any]:
    """How a plain squared error of the bare copy is spread over tokens, on eight sequences."""
    student = Student(model, start, ReplacementSpec(kind="layer"), 0)
    batch = make_batch(tokens, torch.arange(8), torch.device("cpu"))
    with evaluating(model, frozen=True):
        states = Teacher(model, start, removed, student.num_calls).states(batch)
        errors = (student.run(states.hidden, states.calls) - states.target).pow(2).mean(-1)
    sizes = states.target.pow(2).mean(-1)
    return {
        "share_of_first_tokens": float(errors[:, 0].sum() / errors.sum()),
        "mean_square_of_first_tokens": float(sizes[:, 0].mean()),
        "median_mean_square": float(sizes.median()),
    }


@torch.no_grad()
def quality(
    model: Any, tokens: CalibrationTokens, start: int, n: int, student: Student | None
) -> dict[str, float]:
    """Token KL (nats), perplexity and share of equal first tokens; None: without the block."""
    kl = loss = same = dense = 0.0
    count = 0
    for rows in torch.arange(len(tokens)).split(1):
        batch = make_batch(tokens, rows, torch.device("cpu"))
        first = _log_shares(model, batch.ids)
        with evaluating(model, frozen=True):
            second = _without(model, batch.ids, start, n, student)
        targets = batch.ids[0, 1:, None]
        kl += float((first.exp() * (first - second)).sum())
        loss -= float(second.gather(1, targets).sum())
        dense -= float(first.gather(1, targets).sum())
        same += float((first.argmax(-1) == second.argmax(-1)).sum())
        count += len(targets)
    return {
        "kl": kl / count, "perplexity": math.exp(loss / count), "same_first": same / count,
        "perplexity_of_the_intact": math.exp(dense / count), "tokens": count,
    }  # fmt: skip


def _without(model: Any, ids: Tensor, start: int, n: int, student: Student | None) -> Tensor:
    if student is not None:
        with pruned(model, start, n, student):
            return _log_shares(model, ids)
    layers = decoder_layers(model)
    form = LayerForm.of(model)
    with slots(layers, {i: Passthrough(layers[i], form) for i in range(start, start + n)}):
        return _log_shares(model, ids)


def _log_shares(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


if __name__ == "__main__":
    main()
