"""Scoring speed of ``--model streamline`` against ``--model hf``, in one run, interleaved.

A random Llama with a vocabulary of 32,000 answers synthetic requests:

- ``choice6``, ``choice21``: four choices of about 6 / 21 tokens behind a context of their own;
- ``choice1``: four one-token choices;
- ``fewshot``: four choices of about 6 tokens behind one prefix that all questions share;
- ``rolling``: whole texts; ``generate``: greedy continuations.

For each, both classes score the same requests in turn; printed are the medians, their ratio, the
largest difference of loglikelihoods and how many questions got another choice.

    OMP_NUM_THREADS=1 python tests/benchmarks/scoring_vs_hf.py [--size 110m] [--kinds choice6 ...]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 32_000
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4},
    "15m": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8},
    "110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
}
CHOICES = 4


@dataclass(frozen=True)
class Workload:
    """Requests of one kind: questions x choices, or texts."""

    kind: str
    requests: list[Any]
    choices: int


def build_model(folder: Path, size: str) -> None:
    """Save a random Llama and a word-level tokenizer over w0, w1, ..."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    heads = SIZES[size]["hidden_size"] // 64 or 1
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **SIZES[size],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def build_workload(kind: str, questions: int, seed: int = 0) -> Workload:
    """Make requests; context lengths are drawn from 30 to 90 tokens."""
    from lm_eval.api.instance import Instance

    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        count = draw.randint(least, most)
        return " ".join(f"w{draw.randrange(VOCABULARY - 4)}" for _ in range(count))

    def instance(output: str, arguments: tuple[Any, ...]) -> Any:
        return Instance(request_type=output, doc={}, arguments=arguments, idx=0)

    if kind == "rolling":
        texts = [instance("loglikelihood_rolling", (words(100, 400),)) for _ in range(questions)]
        return Workload(kind, texts, 1)
    if kind == "generate":
        options = {"until": ["never"], "max_gen_toks": 16, "do_sample": False}
        texts = [instance("generate_until", (words(30, 90), options)) for _ in range(questions)]
        return Workload(kind, texts, 1)
    least, most = {"choice1": (1, 1), "choice21": (16, 26)}.get(kind, (3, 9))
    prefix = words(300, 300) + " " if kind == "fewshot" else ""
    requests = []
    for _ in range(questions):
        context = prefix + words(30, 90)
        requests += [
            instance("loglikelihood", (context, " " + words(least, most))) for _ in range(CHOICES)
        ]
    return Workload(kind, requests, CHOICES)


def answer(model: Any, workload: Workload) -> list[Any]:
    """Ask the model through the harness's own interface, without its progress bars."""
    method = {"rolling": "loglikelihood_rolling", "generate": "generate_until"}
    ask = getattr(model, method.get(workload.kind, "loglikelihood"))
    with contextlib.redirect_stderr(io.StringIO()):
        return list(ask(workload.requests, disable_tqdm=True))


def compare(hf: Any, ours: Any, workload: Workload, repeats: int) -> dict[str, Any]:
    """Time both in turn, alternating which goes first."""
    seconds: dict[str, list[float]] = {"hf": [], "streamline": []}
    answers: dict[str, list[Any]] = {}
    for repeat in range(repeats):
        pair = [("hf", hf), ("streamline", ours)]
        for name, model in pair if repeat % 2 == 0 else pair[::-1]:
            begin = time.process_time()
            answers[name] = answer(model, workload)
            seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "kind": workload.kind,
        "requests": len(workload.requests),
        "hf_cpu_s": round(medians["hf"], 2),
        "streamline_cpu_s": round(medians["streamline"], 2),
        "ratio": round(medians["hf"] / medians["streamline"], 2),
        **differences(answers["hf"], answers["streamline"], workload),
    }


def differences(first: list[Any], second: list[Any], workload: Workload) -> dict[str, Any]:
    """Largest difference of scores, and changed choices (or texts)."""
    if workload.kind == "generate":
        return {"changed": sum(a != b for a, b in zip(first, second, strict=True))}
    if workload.kind == "rolling":
        return {"max_delta": max(abs(a - b) for a, b in zip(first, second, strict=True))}
    largest = max(abs(a[0] - b[0]) for a, b in zip(first, second, strict=True))
    changed = 0
    for start in range(0, len(first), workload.choices):
        here = range(start, start + workload.choices)
        best = [max(here, key=lambda i, side=side: side[i][0]) for side in (first, second)]
        changed += best[0] != best[1]
    greedy = sum(a[1] != b[1] for a, b in zip(first, second, strict=True))
    return {"max_delta": largest, "changed": changed, "greedy_changed": greedy}


def load(folder: Path, hf_batch: str, our_batch: str) -> tuple[Any, Any]:
    """Load both classes from one folder, in float32 on the CPU."""
    from lm_eval.models.huggingface import HFLM

    from streamline_bench.harness.lm import StreamlineLM

    options = {"device": "cpu", "dtype": "float32"}
    hf = HFLM(pretrained=str(folder), batch_size=hf_batch, **options)
    ours = StreamlineLM(pretrained=str(folder), batch_size=our_batch, **options)
    return hf, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="15m")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hf-batch", default="16", help="batch size of --model hf")
    parser.add_argument("--our-batch", default="16", help="batch size of --model streamline")
    kinds = ["choice6", "choice21", "choice1", "fewshot", "rolling", "generate"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build_model(folder, arguments.size)
        hf, ours = load(folder, arguments.hf_batch, arguments.our_batch)
        for model in (hf, ours):
            answer(model, build_workload("choice6", 2, seed=9))  # Warm-up.
        for kind in arguments.kinds:
            questions = arguments.questions // (4 if kind == "fewshot" else 1)
            workload = build_workload(kind, max(questions, 4))
            print(json.dumps(compare(hf, ours, workload, arguments.repeats)), flush=True)


if __name__ == "__main__":
    main()
