"""One million sample pairs with 10,000 bootstrap draws: how long, and against row resampling.

``python tests/benchmarks/stability_million.py [--pairs N] [--draws N] [--per-cluster N]
[--target SECONDS]``; the exit code is 1 if more seconds of processor time are spent.

Timed is all that ``compare`` does: alignment, accuracies, stability, choice divergences,
calibration, tests, intervals and the summaries. With ``--per-cluster`` questions come in clusters,
which are resampled whole.

The peer is the textbook bootstrap (draw rows with replacement, recompute), timed on a few draws and
scaled to all of them in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np
import pandas as pd

from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.samples import COLUMNS, RunInfo, Samples
from streamline_bench.stability.settings import Settings

PEER_DRAWS = 20
TARGET = 10.0


def run(name: str, pairs: int, seed: int, per_cluster: int = 0) -> Samples:
    """A samples table of ``pairs`` four-choice questions; the questions are the same for all."""
    clusters = None
    if per_cluster:
        clusters = [f"passages:{index // per_cluster}" for index in range(pairs)]
    questions, answers = np.random.default_rng(0), np.random.default_rng(seed)
    gold = questions.integers(4, size=pairs)
    scores = questions.normal(-20, 4, size=(pairs, 4)) + answers.normal(0, 2, size=(pairs, 4))
    prediction = scores.argmax(axis=1)
    ids = [f"{index:x}" for index in range(pairs)]
    values = {
        "run": name, "task": "synthetic", "task_version": "1", "output_type": "multiple_choice",
        "filter": "none", "doc_id": np.arange(pairs), "doc_hash": ids, "prompt_hash": ids,
        "target_hash": ids, "request_hash": ids, "prompt": "",
        "choices": [["a", "b", "c", "d"]] * pairs,
        "loglikelihoods": list(scores.tolist()), "lengths": [[10, 20, 30, 40]] * pairs,
        "byte_lengths": [[10, 20, 30, 40]] * pairs, "mean_nll": None, "prediction": prediction,
        "prediction_norm": None, "gold": gold, "target": "", "text": None,
        "correct": prediction == gold, "correct_norm": None, "verdict_metric": "acc",
        "metrics": None, "cluster": clusters,
    }  # fmt: skip
    index = pd.RangeIndex(pairs)
    frame = pd.DataFrame(
        {key: pd.Series(values.get(key), index=index, dtype=kind) for key, kind in COLUMNS.items()}
    )
    info = RunInfo(run=name, engine="synthetic", source=name, task_versions={"synthetic": "1"})
    return Samples(frame, info)


def peer_seconds_per_draw(pairs: int) -> float:
    """Textbook bootstrap of stability and accuracy difference over rows."""
    source = np.random.default_rng(1)
    weights, agree = np.exp(source.exponential(0.3, size=pairs)), source.random(pairs) < 0.8
    change = source.integers(-1, 2, size=pairs)
    begin = time.perf_counter()
    for _ in range(PEER_DRAWS):
        rows = source.integers(pairs, size=pairs)
        drawn = weights[rows]
        _ = (drawn * agree[rows]).sum() / drawn.sum(), change[rows].mean()
    return (time.perf_counter() - begin) / PEER_DRAWS


def missed(spent: float, target: float) -> str | None:
    """A sentence, if more time is spent than the target allows."""
    if spent <= target:
        return None
    return f"The comparison took {spent:.2f} s of processor time (target {target:g} s)."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--per-cluster", type=int, default=0)
    parser.add_argument("--target", type=float, default=TARGET, help="seconds of processor time")
    parser.add_argument("--as-json", action="store_true")
    options = parser.parse_args()
    dense, pruned = (
        run(name, options.pairs, seed, options.per_cluster)
        for seed, name in enumerate(("dense", "pruned"), start=1)
    )
    begin, cpu = time.perf_counter(), time.process_time()
    result = compare_answers(dense, pruned, settings=Settings(draws=options.draws))
    ours, cpu = time.perf_counter() - begin, time.process_time() - cpu
    peer = peer_seconds_per_draw(options.pairs) * options.draws
    report = {
        "pairs": options.pairs,
        "draws": options.draws,
        "per_cluster": options.per_cluster,
        "seconds": round(ours, 2),
        "cpu_seconds": round(cpu, 2),
        "row_resampling_seconds_extrapolated": round(peer, 1),
        "ratio": round(peer / ours, 1),
        "stability": result.micro.stability.model_dump() if result.micro.stability else None,
    }
    if options.as_json:
        print(json.dumps(report))
    else:
        for key, value in report.items():
            print(f"{key:40} {value}")
    fault = missed(cpu, options.target)
    if fault is not None:
        print(fault, file=sys.stderr)
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
