"""Start-up and PPL scoring beside OpenCompass's own class, alternating, in one run.

``python opencompass_vs_stock.py [MODEL] [--questions N] [--batch-size N] [--repeats N]``, in an
environment with OpenCompass. The peer is ``HuggingFaceCausalLM``: under transformers 5 neither PPL
nor generation of ``HuggingFaceBaseModel`` works. It scores one text at a time, which is right; with
``batch_padding`` it pads on the left and scores the wrong tokens, which is measured as well and
marked. CPU seconds are compared, which a busy machine changes least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np


def texts_of(count: int) -> list[str]:
    """Bundled questions with four choices, as OpenCompass asks: label by label."""
    from streamline_bench.core.machine.environment import resource

    data = resource("tasks") / "lm_eval" / "bundled" / "data"
    questions = []
    for skill in ("story", "counting", "attributes", "order"):
        lines = (data / f"{skill}.jsonl").read_text(encoding="utf-8").splitlines()
        questions += [json.loads(line) for line in lines]
    questions = questions[:: max(1, len(questions) // count)][:count]
    return [f"{q['context']} {q['choices'][i]}" for i in range(4) for q in questions]


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = action()
    return time.process_time() - started, result


def ppls(model: Any, texts: list[str], batch: int) -> np.ndarray[Any, Any]:
    """All texts in the batches that PPLInferencer makes."""
    import torch

    with torch.no_grad():
        parts = [model.get_ppl(texts[i : i + batch]) for i in range(0, len(texts), batch)]
    return np.concatenate(parts)


def ppls_together(model: Any, texts: list[str], batch: int) -> np.ndarray[Any, Any]:
    """The same, the choices of a question side by side, as SharedPrefixPPLInferencer asks."""
    order = sorted(range(len(texts)), key=texts.__getitem__)
    found = np.empty(len(texts))
    found[order] = ppls(model, [texts[i] for i in order], batch)
    return found


def main() -> None:
    from streamline_bench.demo import model as bundled

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(bundled()))
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    importing, classes = seconds(import_classes)
    print(f"importing OpenCompass and ours: {importing:.1f} CPU s, paid by either")
    makers = {
        "stock": lambda: classes[0](
            path=arguments.model, model_kwargs={"torch_dtype": "torch.float"}
        ),
        "stock, batch_padding": lambda: classes[0](
            path=arguments.model, model_kwargs={"torch_dtype": "torch.float"}, batch_padding=True,
            tokenizer_kwargs={"padding_side": "left"},
        ),
        "ours": lambda: classes[1](path=arguments.model, device="cpu", dtype="float32"),
        "ours, choices together": lambda: classes[1](
            path=arguments.model, device="cpu", dtype="float32"
        ),
    }  # fmt: skip
    starts: dict[str, list[float]] = {name: [] for name in makers}
    scores: dict[str, list[float]] = {name: [] for name in makers}
    found: dict[str, Any] = {}
    texts = texts_of(arguments.questions)
    for repeat in range(arguments.repeats):
        names = list(makers) if repeat % 2 else list(makers)[::-1]
        for name in names:
            took, model = seconds(makers[name])
            starts[name].append(took)
            scored = ppls_together if "together" in name else ppls
            took, found[name] = seconds(partial(scored, model, texts, arguments.batch_size))
            scores[name].append(took)
    for name in makers:
        report(name, starts, scores, found)


def import_classes() -> tuple[Any, Any]:
    from opencompass.models import HuggingFaceCausalLM

    from streamline_bench.opencompass import StreamlineModel

    return HuggingFaceCausalLM, StreamlineModel


def report(
    name: str, starts: dict[str, list[float]], scores: dict[str, list[float]], found: dict[str, Any]
) -> None:
    choice, reference = (found[each].reshape(4, -1).argmin(axis=0) for each in (name, "stock"))
    gap = float(np.abs(found[name] - found["stock"]).max())
    ratios = [theirs / own for theirs, own in zip(scores["stock"], scores[name], strict=True)]
    print(
        f"{name}: load {statistics.median(starts[name]):.2f} s, "
        f"score {statistics.median(scores[name]):.2f} CPU s, "
        f"stock/this {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), "
        f"largest PPL gap {gap:.2g}, predictions changed {(choice != reference).sum()} of "
        f"{len(choice)}"
    )


if __name__ == "__main__":
    main()
