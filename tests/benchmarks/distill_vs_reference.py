"""Hidden-state training beside LLM-Streamline's own trainer: same model, block, tokens, epochs.

    git clone https://github.com/RUCKBReasoning/LLM-Streamline REFERENCE
    python -m venv REF
    REF/bin/pip install torch datasets accelerate transformers==4.45.2
    python tests/benchmarks/distill_vs_reference.py --reference REFERENCE --python REF/bin/python

The reference needs the transformers version it pins, hence an environment of its own. Its function
``lightweight_model_train`` is imported from the given checkout and run as it is; only where it
would download SlimPajama and search for the block it is handed the same tokens and block as ours.
It assumes sequences of 2048 tokens; for another ``--length`` its position ids are cut accordingly.
Of it nothing is kept here.

Each trainer runs in a process of its own. Printed are training tokens per CPU-second of the whole
training (its own preparation of hidden states included), peak resident memory, both in all and
beyond the loaded model, and the loss on held-out tokens measured alike for both: the mean squared
error of the trained layer as it is deployed, inside the truncated model with a causal mask.

``--model FOLDER --text FILE`` takes a trained model and its tokens instead of a random Llama, and
``--save FOLDER`` writes the pruned models of both, to be rows of one board:

    streamline-bench compare FOLDER_OF_THE_MODEL --recipes dense --row ours=SAVED/ours \
        --row reference=SAVED/reference ...
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file

SHARE, SEED = 0.05, 0


def main() -> None:
    options = parse()
    if options.role:
        options.work = Path(options.work)
        {"ours": train_ours, "reference": train_reference}[options.role](options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.work = Path(folder)
        build(options)
        measured: dict[str, dict[str, float]] = {"ours": {}, "reference": {}}
        for role in measured:
            measured[role] = run_role(role, options)
            measured[role]["loss"] = deployed_loss(options, role)
            if options.save:
                save_pruned(options, role)
        initial = deployed_loss(options, None)
    report(options, measured, initial)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="checkout of LLM-Streamline")
    parser.add_argument("--python", default=sys.executable, help="interpreter for the reference")
    for name, default in [
        ("layers", 10), ("hidden", 256), ("vocabulary", 4096), ("length", 256), ("blocks", 320),
        ("start", 4), ("n", 3), ("batch", 8), ("accumulation", 2), ("epochs", 1),
    ]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--model", type=Path, help="Llama folder; default: a random one")
    parser.add_argument("--text", help="with --model: where its tokens come from")
    parser.add_argument("--save", type=Path, help="with --model: folder for both pruned models")
    parser.add_argument("--role", choices=["ours", "reference"], help=argparse.SUPPRESS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(options: argparse.Namespace) -> None:
    """Save the model in float32, and its tokens; without ``--model`` random ones."""
    from llama_and_tokens import llama_and_tokens

    folder = options.work / "llama"
    model, tokens = llama_and_tokens(options, options.blocks, initializer_range=0.05)
    model.save_pretrained(folder)
    # The reference's version of transformers knows the older name only.
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = model.config.rope_parameters["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    training, validation = tokens.split(SHARE, SEED)
    parts = {
        "all": tokens.input_ids,
        "training": training.input_ids,
        "validation": validation.input_ids,
    }
    save_file({name: part.contiguous() for name, part in parts.items()}, tokens_file(options))
    if options.save:
        from streamline_bench.modeling.loading import load_tokenizer

        load_tokenizer(options.model).save_pretrained(folder)


def tokens_file(options: argparse.Namespace) -> Path:
    return options.work / "tokens.safetensors"


def save_pruned(options: argparse.Namespace, role: str) -> None:
    """The model with the trained layer in place of the block, as a checkpoint."""
    model = load_model(options)
    layers = model.model.layers
    state = load_file(options.work / f"{role}.safetensors")
    layers[options.start].load_state_dict({k.removeprefix("0."): v for k, v in state.items()})
    del layers[options.start + 1 : options.start + options.n]
    model.config.num_hidden_layers = len(layers)
    model.config.layer_types = None
    model.save_pretrained(options.save / role)
    for part in options.work.glob("llama/*token*"):
        shutil.copy(part, options.save / role)


def run_role(role: str, options: argparse.Namespace) -> dict[str, float]:
    python = sys.executable if role == "ours" else options.python
    command = [python, __file__, "--role", role, "--work", str(options.work)]
    for name, value in vars(options).items():
        if name not in ("role", "work", "model", "text", "save"):
            command += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = root if role == "ours" else str(options.reference)
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    figures: dict[str, float] = json.loads((options.work / f"{role}.json").read_text())
    return figures


def load_model(options: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(options.work / "llama")


class Measurement:
    """CPU time, wall time and memory from here to :meth:`save`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path = options.work / f"{options.role}.json"
        self.before = peak_mb()
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def save(self, tokens: int) -> None:
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        figures = {
            "tokens_per_cpu_second": tokens / cpu,
            "tokens_per_second": tokens / wall,
            "peak_mb": peak_mb(),
            "added_mb": peak_mb() - self.before,
        }
        self.path.write_text(json.dumps(figures))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train_ours(options: argparse.Namespace) -> None:
    from streamline_bench.core.data.calibration import CalibrationTokens
    from streamline_bench.core.recipe.schema import ReplacementSpec, TrainingSpec
    from streamline_bench.core.training.trainer import train_replacement

    model = load_model(options)
    tokens = load_file(tokens_file(options))
    training = TrainingSpec(
        objective="mse",
        epochs=options.epochs,
        batch_size=options.batch,
        gradient_accumulation=options.accumulation,
        lr=options.lr,
        min_lr_ratio=0.25,
        warmup_ratio=0.01,
        validation_share=SHARE,
        validations=options.epochs,  # as often as the reference
    )
    measurement = Measurement(options)
    result = train_replacement(
        model,
        start=options.start,
        n=options.n,
        spec=ReplacementSpec(kind="layer"),
        training=training,
        tokens=CalibrationTokens.from_tensors(tokens["all"]),
        work=options.work / "ours",
        seed=SEED,
    )
    measurement.save(tokens["training"].numel() * options.epochs)
    save_file(dict(result.state), options.work / "ours.safetensors")


def train_reference(options: argparse.Namespace) -> None:
    import LLM_Streamline.train_lightweightnetwork as trainer
    from transformers import AutoConfig

    model = load_model(options)
    tokens = load_file(tokens_file(options))
    trainer.load_dataset = lambda *_: {"train": None}
    trainer.process_datasets = lambda *_: (rows(tokens["training"]), rows(tokens["validation"]))
    trainer.get_cosine_similarity = lambda *_: options.start
    if options.length != 2048:
        trainer.torch = ShorterPositions(options.length)
    measurement = Measurement(options)
    layer, _ = trainer.lightweight_model_train(
        model, tokenizer(options.vocabulary), "cpu", options.n, options.layers, 0, 0,
        options.batch, options.epochs, options.lr, options.lr / 4, 1e-3,
        AutoConfig.from_pretrained(options.work / "llama"), "llama", options.accumulation,
    )  # fmt: skip
    measurement.save(tokens["training"].numel() * options.epochs)
    state = {f"0.{name}": tensor.contiguous() for name, tensor in layer.state_dict().items()}
    save_file(state, options.work / "reference.safetensors")


class ShorterPositions:
    """torch, but position ids end where the sequences do."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def arange(self, start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, min(stop, self._length))


def rows(ids: torch.Tensor) -> list[dict[str, list[int]]]:
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]


def tokenizer(vocabulary: int) -> Any:
    """Only its padding is used, and nothing is padded."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary)} | {"<pad>": vocabulary}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<pad>")


def deployed_loss(options: argparse.Namespace, role: str | None) -> float:
    """Causal mean squared error on the held-out tokens; None: of the untrained layer."""
    from streamline_bench.core.data.calibration import CalibrationTokens
    from streamline_bench.core.recipe.schema import ReplacementSpec
    from streamline_bench.core.training.batch import make_batch
    from streamline_bench.core.training.block import Student, Teacher
    from streamline_bench.core.training.loop import StateObjective

    model = load_model(options).eval()
    student = Student(model, options.start, ReplacementSpec(kind="layer"), SEED)
    if role:
        student.load(load_file(options.work / f"{role}.safetensors"))
    ids = load_file(tokens_file(options))["validation"]
    tokens = CalibrationTokens.from_tensors(ids)
    source = Teacher(model, options.start, options.n, student.num_calls)
    total = 0.0
    with torch.no_grad():
        for part in torch.split(torch.arange(len(tokens)), options.batch):
            batch = make_batch(tokens, part, torch.device("cpu"))
            total += float(StateObjective(student).loss_sum(batch, source))
    return total / ids.numel()


def report(
    options: argparse.Namespace, measured: dict[str, dict[str, float]], initial: float
) -> None:
    ours, reference = measured["ours"], measured["reference"]
    print(
        f"{options.layers} layers, hidden {options.hidden}, {options.blocks} blocks of "
        f"{options.length} tokens, {options.epochs} epoch(s); block of {options.n} layers from "
        f"{options.start} -> 1 layer; one thread"
    )
    for name in ("tokens_per_cpu_second", "tokens_per_second", "peak_mb", "added_mb", "loss"):
        ratio = ours[name] / reference[name]
        print(f"{name:22} ours {ours[name]:12.5g}  reference {reference[name]:12.5g}  {ratio:.3f}x")
    print(f"{'loss, untrained':22} {initial:17.5g}")


if __name__ == "__main__":
    main()
