"""Trains the bundled model: ``python -m bundled_model.train --output DIR [--resume]``.

The batches depend on ``(seed, step)`` only and a checkpoint holds model, optimizer, step and
random state, so a training that was killed and resumed ends in the same weights as one that was
not (same machine, same number of threads).
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bundled_model.scoring import accuracies
from bundled_model.stream import Batch, batch_at
from bundled_model.tokenizer import save_tokenizer
from bundled_model.vocabulary import BOS, EOS, PAD, tokens

from streamline_bench.core.files import atomic_write_bytes
from streamline_bench.errors import NumericsError, OutputError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

CHECKPOINT = "checkpoint.pt"
LOG = "training_log.jsonl"
LOG_EVERY = 50
EVALUATE_EVERY = 250


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that determines the weights."""

    seed: int = 0
    steps: int = 11000
    rows: int = 8
    length: int = 128
    learning_rate: float = 4e-3
    embedding_learning_rate: float = 2e-3
    final_ratio: float = 0.02
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    answer_weight: float = 10.0
    hidden: int = 128
    intermediate: int = 256
    layers: int = 12
    heads: int = 4
    kv_heads: int = 2


def build_model(config: TrainingConfig) -> LlamaForCausalLM:
    """A freshly initialised Llama, seeded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    vocabulary = tokens()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=512,
            initializer_range=0.04,
            tie_word_embeddings=True,
            bos_token_id=vocabulary.index(BOS),
            eos_token_id=vocabulary.index(EOS),
            pad_token_id=vocabulary.index(PAD),
        )
    )


def build_optimizers(
    model: LlamaForCausalLM, config: TrainingConfig
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms.

    On this language Muon needed about half the tokens of AdamW.
    """
    import torch

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices,
        lr=config.learning_rate,
        momentum=0.95,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        others, lr=config.embedding_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    return [muon, adamw]


def schedule(step: int, config: TrainingConfig) -> float:
    """Factor of the peak learning rates: linear warm-up, then a cosine to ``final_ratio``."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def batch_loss(model: LlamaForCausalLM, batch: Batch, isolate: bool) -> torch.Tensor:
    """Weighted mean cross entropy over all tokens.

    With ``isolate`` a document sees only itself and counts positions from its BOS; without, the
    row is one stream, as calibration and few-shot prompts pack it.
    """
    import torch

    extra: dict[str, torch.Tensor] = {}
    if isolate:
        document = batch.document_ids
        visible = torch.ones(document.shape[1], document.shape[1], dtype=torch.bool).tril()
        extra["attention_mask"] = (document[:, None, :, None] == document[:, None, None]) & visible
        extra["position_ids"] = batch.position_ids
    logits = model(input_ids=batch.input_ids, use_cache=False, **extra).logits
    weights = batch.target_weights[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none"
    )
    return (losses.view_as(weights) * weights).sum() / weights.sum()


def train_step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    config: TrainingConfig,
    step: int,
) -> float:
    """One optimizer step; returns the loss, and raises when it is not finite."""
    import torch

    peaks = (config.learning_rate, config.embedding_learning_rate)
    for optimizer, peak in zip(optimizers, peaks, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * schedule(step, config)
    batch = batch_at(config.seed, step, config.rows, config.length, config.answer_weight)
    loss = batch_loss(model, batch, isolate=step % 2 == 0)
    if not math.isfinite(loss.item()):
        raise NumericsError(f"the loss is {loss.item()} at step {step}; lower the learning rate")
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint so that a kill leaves the old one or the new one."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write_bytes(path, buffer.getvalue())


def _snapshot(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    config: TrainingConfig,
    step: int,
) -> dict[str, Any]:
    import torch

    return {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "random": torch.get_rng_state(),
        "config": asdict(config),
    }


def _restore(
    path: Path,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    config: TrainingConfig,
) -> int:
    import torch

    state = torch.load(path, weights_only=True)
    if state["config"] != asdict(config):
        raise OutputError(
            f"{path} was written with {state['config']}; give the same options or a new --output"
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["random"])
    return int(state["step"])


class _Log:
    """Appends a line of progress to ``training_log.jsonl`` every few steps."""

    def __init__(self, path: Path, config: TrainingConfig, first: int) -> None:
        self.path, self.config, self.first = path, config, first
        self.began = time.monotonic()
        self.losses: list[float] = []

    def add(self, step: int, loss: float, model: LlamaForCausalLM) -> None:
        self.losses.append(loss)
        config, last = self.config, step == self.config.steps
        if step % LOG_EVERY and not last:
            return
        line: dict[str, Any] = {
            "step": step,
            "loss": round(sum(self.losses) / len(self.losses), 4),
            "tokens": step * config.rows * config.length,
        }
        if step % EVALUATE_EVERY == 0 or last:
            line["accuracy"] = accuracies(model)
        elapsed = time.monotonic() - self.began
        line["eta_s"] = round(elapsed / (step - self.first) * (config.steps - step))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.losses.clear()


def train(
    config: TrainingConfig, output: Path, *, resume: bool = False, checkpoint_every: int = 100
) -> LlamaForCausalLM:
    """Train, or go on training; the finished model lies in ``output/model``.

    Raises:
        OutputError: the checkpoint to resume from was written with another configuration.
        NumericsError: the loss is not finite.
    """
    output.mkdir(parents=True, exist_ok=True)
    model = build_model(config).train()
    optimizers = build_optimizers(model, config)
    checkpoint = output / CHECKPOINT
    first = 0
    if resume and checkpoint.exists():
        first = _restore(checkpoint, model, optimizers, config)
    log = _Log(output / LOG, config, first)
    for step in range(first, config.steps):
        loss = train_step(model, optimizers, config, step)
        log.add(step + 1, loss, model)
        if (step + 1) % checkpoint_every == 0 or step + 1 == config.steps:
            save_checkpoint(checkpoint, _snapshot(model, optimizers, config, step + 1))
    export(model, output / "model")
    return model


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the model and its tokenizer as a stock Hugging Face folder."""
    model.eval().save_pretrained(folder)
    save_tokenizer(folder)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m bundled_model.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    for field in fields(TrainingConfig):
        kind = type(field.default)
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, dest=field.name, type=kind, default=field.default)
    options = vars(parser.parse_args(arguments))
    torch.set_num_threads(options["threads"])
    config = TrainingConfig(**{field.name: options[field.name] for field in fields(TrainingConfig)})
    train(
        config,
        options["output"],
        resume=options["resume"],
        checkpoint_every=options["checkpoint_every"],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
