"""Fabricated run folders: lm-eval outputs of any size, checkpoints with all their artefacts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TIME = "2026-01-02T03-04-05.600000"
Question = Mapping[str, Any]
"""question, choices, gold, loglikelihoods; or question, answer, text for generation."""


def sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sample(index: int, question: Question) -> dict[str, Any]:
    prompt = str(question["question"])
    line = {
        "doc_id": index,
        "doc": {"question": prompt},
        "doc_hash": sha(f"{index}{prompt}"),
        "prompt_hash": sha(prompt),
        "filter": "none",
    }
    if "choices" in question:
        scores = list(question["loglikelihoods"])
        best = int(np.argmax(scores))
        target = str(question["gold"])
        return line | {
            "target": target,
            "target_hash": sha(target),
            "arguments": {
                f"gen_args_{j}": {"arg_0": prompt, "arg_1": f" {choice}"}
                for j, choice in enumerate(question["choices"])
            },
            "filtered_resps": [[str(score), "False"] for score in scores],
            "metrics": ["acc"],
            "acc": float(best == question["gold"]),
        }
    target = str(question["answer"])
    return line | {
        "target": target,
        "target_hash": sha(target),
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {"until": ["\n"]}}},
        "filtered_resps": [question["text"]],
        "metrics": ["exact_match"],
        "exact_match": float(question["text"] == target),
    }


def write_evaluation(
    folder: Path, tasks: Mapping[str, Sequence[Question]], **results_fields: Any
) -> None:
    """Write ``folder/model/results_*.json`` and its samples, whole and consistent."""
    target = folder / "model"
    target.mkdir(parents=True)
    results: dict[str, Any] = {
        "results": {}, "configs": {}, "versions": {}, "n-shot": {}, "n-samples": {},
        "task_hashes": {}, "group_subtasks": {}, "config": {"model_args": {"pretrained": "m"}},
        "lm_eval_version": "0.4.13", "model_name": "m", "total_evaluation_time_seconds": "12.5",
    }  # fmt: skip
    for name, questions in tasks.items():
        lines = [sample(index, question) for index, question in enumerate(questions)]
        kind = "multiple_choice" if "choices" in questions[0] else "generate_until"
        hashes = "".join(x["doc_hash"] + x["prompt_hash"] + x["target_hash"] for x in lines)
        results["results"][name] = {"alias": name}
        results["configs"][name] = {"task": name, "output_type": kind, "target_delimiter": " "}
        results["versions"][name] = 1.0
        results["n-shot"][name] = 0
        results["n-samples"][name] = {"original": len(lines), "effective": len(lines)}
        results["task_hashes"][name] = sha(hashes)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (target / f"samples_{name}_{TIME}.jsonl").write_text(text, encoding="utf-8")
    (target / f"results_{TIME}.json").write_text(json.dumps({**results, **results_fields}))


def write_checkpoint(folder: Path, **changes: Any) -> None:
    """Write streamline.json, similarity.json and training_curve.jsonl of a 12-layer model."""
    import torch

    from streamline_bench.core.checkpoint.folder import Manifest, Source, write_manifest
    from streamline_bench.core.data.calibration import CalibrationTokens
    from streamline_bench.core.similarity import Similarity

    folder.mkdir(parents=True)
    tokens = CalibrationTokens.from_tensors(torch.arange(65536).reshape(128, 512))
    source = np.random.default_rng(0)
    place = np.cumsum(np.r_[0, source.uniform(0.05, 0.3, size=12)])
    angle = np.abs(place[:, None] - place[None, :]) / 2
    Similarity(np.cos(angle), angle / np.pi, 4096, 32, "raw", {}).save(folder / "similarity.json")
    curve = [
        {"step": step, "lr": 1e-3, "train_loss": 0.9 / (1 + step / 60) + 0.05,
         "val_loss": 0.8 / (1 + step / 60) + 0.06, "tokens": step * 512, "seconds": step / 9}
        for step in range(0, 801, 80)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in curve)
    (folder / "training_curve.jsonl").write_text(text)
    fields: dict[str, Any] = {
        "source": Source(name="bundled", weights_sha256="ab" * 32),
        "recipe": {"title": "LLM-Streamline, one layer", "method": "streamline",
                   "cost": "recovered", "replacement": {"kind": "layer"}},
        "chosen": {"start": 6, "removed_layers": [6, 7, 8], "score": 0.97},
        "parameters_before": 3_120_000, "parameters_after": 2_400_000,
        "layers_before": 12, "layers_after": 10,
        "sparsity_requested": 0.25, "sparsity_reached": 0.231,
        "calibration": tokens.summary(),
        "training": {"best_step": 800}, "versions": {"torch": "2.13.0"},
        "seconds": {"compress": 71.2},
    }  # fmt: skip
    write_manifest(folder, Manifest(**{**fields, **changes}))


def questions(size: int, skill: float, seed: int, noise: float) -> list[dict[str, Any]]:
    """Four-choice questions; every seed is another model answering the same ones."""
    asked, answers = np.random.default_rng(size), np.random.default_rng(seed)
    made = []
    for index in range(size):
        gold = int(asked.integers(4))
        scores = asked.normal(-9, 1.5, size=4) + answers.normal(0, noise, size=4)
        scores[gold] += skill
        words = [f"the {colour} {thing}" for colour, thing in zip(
            asked.permutation(["red", "green", "blue", "grey"]),
            asked.permutation(["hare", "lantern", "boat", "bridge"]), strict=True)]  # fmt: skip
        made.append(
            {"question": f"Tom saw something behind the mill. It was number {index}. It was",
             "choices": words, "gold": gold, "loglikelihoods": scores.round(6).tolist()}
        )  # fmt: skip
    return made


@pytest.fixture(scope="session")
def parts_named() -> Callable[[str], dict[str, Any]]:
    """Return a function: a row's group, perplexity, generation and text parts under one name."""

    def parts(name: str) -> dict[str, Any]:
        estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "method": name}
        flips = {"right_to_wrong": 3, "wrong_to_right": 1, "wrong_to_other_wrong": None}
        group = {
            "group": f"group {name}", "tasks": [name, f"{name} 2"], "n": 20, "dense": estimate,
            "pruned": estimate, "difference": estimate, "agreement": estimate, "flips": flips,
            "clusters": {"kind": name, "count": 2, "largest": 10}, "p_value": 0.5, "p_holm": 0.5,
            "p_method": name, "decision": "cannot tell", "macro_dense": 0.5, "macro_pruned": 0.5,
        }  # fmt: skip
        perplexity = {
            "task": f"perplexity {name}", "filter": name, "unit": "word", "n": 20,
            "units": 400.0, "dense": 9.5, "pruned": 12.5, "ratio": estimate,
            "nats_per_unit": estimate,
        }  # fmt: skip
        generation = {
            "task": f"generation {name}", "filter": name, "n": 20,
            "identical": estimate, "first_word": 2.0, "first_character": 9.0, "shared": 0.25,
            "dense_words": 8.0, "pruned_words": 9.0, "exact_match": estimate,
        }  # fmt: skip
        divergence = {
            "documents": 5, "windows": 6, "tokens": 700, "window": 128, "kl": estimate,
            "same_top": estimate, "dense_perplexity": 5.5, "pruned_perplexity": 7.5,
            "nats_per_token": estimate,
        }  # fmt: skip
        return {"groups": [group], "perplexities": [perplexity], "generations": [generation],
                "divergence": divergence}  # fmt: skip

    return parts


@pytest.fixture(scope="session")
def make_run() -> Callable[[Path], Path]:
    """Return a function that fills a run folder: dense, none, layer (with checkpoints)."""
    from streamline_bench.report.run_file import RunFile, RunRow, write_run_file

    def make(folder: Path) -> Path:
        rows = []
        for number, (label, skill, noise) in enumerate(
            (("dense", 4.0, 0.1), ("none", 1.6, 1.6), ("layer", 3.0, 0.8))
        ):
            tasks: dict[str, list[dict[str, Any]]] = {
                name: questions(size, skill + bonus, number, noise)
                for name, size, bonus in (("colours", 120, 0.0), ("places", 90, 1.0))
            }
            tasks["stories"] = [
                {
                    "question": f"Once {i}",
                    "answer": "upon",
                    "text": "upon" if i % (4 - number) else "a",
                }
                for i in range(30)
            ]
            write_evaluation(folder / label / "eval", tasks)
            if number:
                write_checkpoint(folder / label / "checkpoint")
            rows.append(
                RunRow(
                    label=label,
                    eval=f"{label}/eval",
                    checkpoint=f"{label}/checkpoint" if number else None,
                    seconds={"evaluate": 12.5},
                )
            )
        write_run_file(
            folder,
            RunFile(dense="dense", rows=rows, commands=["lm_eval --model streamline --tasks demo"]),
        )
        return folder

    return make


@pytest.fixture(scope="session")
def sized() -> dict[str, Any]:
    """A board of three recipes at two sizes, ``none`` and ``map`` behind one selection."""
    nobody = {"results_file": None, "model": None, "engine": None}

    def row(group: str, size: float, right: float, kl: float, removed: float) -> dict[str, Any]:
        estimate = {"value": right, "standard_error": 0.02}
        change = {"value": right - 0.8, "low": right - 0.85, "high": right - 0.75}
        flips = {"right_to_wrong": 9, "wrong_to_right": 1, "wrong_to_other_wrong": None}
        overall = {
            "difference": change, "margin": 0.02, "decision": "worse", "tasks": 1, "n": 100,
            "stability_tasks": 1, "dense": {"value": 0.8}, "pruned": estimate, "flips": flips,
            "agreement": {"value": 0.9}, "stability": {"value": 1 - size, "low": 0.4, "high": 0.9},
        }  # fmt: skip
        text = {
            "documents": 5, "windows": 6, "tokens": 700, "window": 128, "same_top": {"value": 0.5},
            "kl": {"value": kl, "low": kl - 0.1, "high": kl + 0.1}, "dense_perplexity": 5.5,
            "pruned_perplexity": 7.5, "nats_per_token": {"value": kl},
        }  # fmt: skip
        number = {"model": "Llama-2-7B", "metric": "piqa", "source": "its paper"}
        return {
            "label": f"{group}-{size}", "is_dense": False, "group": group,
            "axes": {"sparsity": size}, "cost": "calibrated",
            "parameters": round(1000 * (1 - removed)), "bytes": round(2000 * (1 - removed)),
            "sparsity_requested": size, "sparsity_reached": removed,
            "accuracy_macro": estimate, "accuracy_micro": estimate, "macro": overall,
            "micro": overall, "tasks": [], "divergence": text,
            "published": [{**number, "value": 61.0, "sparsity": 0.24},
                          {**number, "value": 40.0, "sparsity": 0.6}],
            "provenance": {**nobody, "recipe": {
                "overridden": {"samples": [50, 64], "seed": [0, int(4 * size)]}}},
        }  # fmt: skip

    rows = [
        row("none", 0.25, 0.6, 1.0, 0.25), row("none", 0.5, 0.4, 3.0, 0.5),
        row("map", 0.25, 0.7, 0.6, 0.26), row("map", 0.5, 0.45, 2.0, 0.495),
        row("slice", 0.25, 0.69, 0.5, 0.25), row("slice", 0.5, 0.5, 2.5, 0.5),
    ]  # fmt: skip
    missing = dict.fromkeys(("group", "cost", "macro", "micro", "divergence",
                             "sparsity_requested", "sparsity_reached"))  # fmt: skip
    dense = {**rows[0], **missing, "label": "dense", "is_dense": True, "axes": {}, "bytes": 2000,
             "parameters": 1000, "accuracy_macro": {"value": 0.8, "standard_error": 0.01},
             "published": [], "provenance": nobody}  # fmt: skip

    def test(first: str, second: str, p: float) -> dict[str, Any]:
        return {"first": first, "second": second, "n": 100, "discordance": 0.2, "p_value": p,
                "p_holm": p, "p_method": "score", "needed": 400,
                "difference": {"value": 0.01, "low": -0.02, "high": 0.04}}  # fmt: skip

    contests = [
        {"cost": "calibrated", "removed": [size, size], "accuracy": right,
         "entries": [f"{name}-{size}" for name in order],
         "tests": [test(f"{order[0]}-{size}", f"{name}-{size}", p)
                   for name, p in zip(order[1:], ps, strict=True)]}
        for size, right, order, ps in (
            (0.5, 0.5, ("slice", "map", "none"), (0.01, 0.001)),
            (0.25, 0.7, ("map", "slice", "none"), (0.4, 0.01)),
        )
    ]  # fmt: skip
    return {
        "title": "Sizes", "dense": "dense", "rows": [dense, *rows], "contests": contests,
        "method": {"mode": "paper", "ddof": 1, "quantity": "nll_per_byte", "verdict": "correct",
                   "confidence": 0.95, "draws": 10, "seed": 0, "margin": 0.02},
        "versions": {"streamline-bench": "0"},
        "commands": [f"streamline-bench compress m --output run/{one['label']}/checkpoint"
                     for one in rows] + ["lm_eval --model hf"],
    }  # fmt: skip
