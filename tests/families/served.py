"""Does vLLM answer as transformers does, dense and pruned? Adds a column to ``families.json``.

    python tests/families/served.py [--types llama,jamba] [--work FOLDER]

In the environment of ``tox -e vllm``. For every causal LM that vLLM's registry serves, a small
random model with heads of 32 and its copy without two layers are served in float32 on the CPU, and
their greedy tokens are compared with transformers'. A cell is ``same``, or says why it is not:
``not served`` with the engine's message, ``other`` where the dense model has other tokens already,
``wrong`` where only the pruned one has. Finished model types are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from families import matrix  # noqa: E402

TOKENS = 8
WIDER = 4
"""Heads of 32 instead of 8: the least that the engine has."""
KINDS = ("dense", "last_layers")


def make(model_type: str, work: Path) -> None:
    """Save the model and its pruned copy, and what transformers generates with each."""
    try:
        dense = matrix.tiny_folder(model_type, work / model_type / "dense", WIDER)
        matrix._compress(dense, "last_layers", work / model_type / "last_layers")
        expected: Any = {kind: _tokens(work / model_type / kind) for kind in KINDS}
    except Exception as error:
        expected = {"error": matrix._line(error)}
    (work / model_type / "expected.json").write_text(json.dumps(expected))


def _tokens(folder: Path) -> list[list[int]]:
    model, _ = matrix._load(folder)
    ids = matrix._ids()
    found = model.generate(
        ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, max_new_tokens=TOKENS,
        min_new_tokens=TOKENS, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    tokens: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return tokens


def serve(model_type: str, work: Path) -> dict[str, Any]:
    """Return the engine's answers by kind, from a process of its own."""
    folder = work / model_type
    jobs = {
        "prompts": matrix._ids().tolist(),
        "tokens": TOKENS,
        "models": {kind: {"model": str(folder / kind)} for kind in KINDS},
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = ROOT / "tests" / "modeling" / "vllm" / "serve_models.py"
    with (folder / "engine.log").open("w") as log:
        try:
            subprocess.run(
                [sys.executable, str(script), str(folder / "jobs.json"), str(folder / "answers")],
                stdout=log, stderr=log, timeout=600, check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"dense": {"error": "the engine took over 600 s"}}
    answers: dict[str, Any] = {}
    if (folder / "answers").exists():
        answers = json.loads((folder / "answers").read_text())
    return answers


def verdict(expected: dict[str, Any], answers: dict[str, Any]) -> str:
    """Return the cell of one model type."""
    if "error" in expected:
        return f"not tried: {expected['error']}"
    ended = {"error": "the engine's process ended"}
    found = {kind: answers.get(kind, ended) for kind in KINDS}
    if "error" in found["dense"]:
        return f"not served: {' '.join(found['dense']['error'].split())[:400]}"
    if found["dense"]["tokens"] != expected["dense"]:
        return "other: tokens of the dense model"
    if "error" in found["last_layers"]:
        return f"wrong: {' '.join(found['last_layers']['error'].split())[:400]}"
    return "same" if found["last_layers"]["tokens"] == expected["last_layers"] else "wrong: tokens"


def main() -> int:
    """Fill the column; the exit code is 1 where a pruned model is served wrongly."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--types", help="model types, by commas; all that vLLM serves unless given")
    parser.add_argument("--work", type=Path, help="folder that keeps finished model types")
    asked = parser.parse_args()

    import streamline_bench.compression
    import streamline_bench.harness.lm  # noqa: F401 - imported once, before the forks
    from streamline_bench.modeling.vllm.stock_routes import ask_registry

    known = ask_registry()
    named = asked.types.split(",") if asked.types else None
    types = named or [name for name, route in known["routes"].items() if route != "none"]
    work = asked.work or Path(tempfile.mkdtemp())
    context, cells = multiprocessing.get_context("fork"), {}
    for model_type in types:
        cell = work / model_type / "cell.json"
        if not cell.exists():
            (work / model_type).mkdir(parents=True, exist_ok=True)
            maker = context.Process(target=make, args=(model_type, work))
            maker.start()
            maker.join()
            path = work / model_type / "expected.json"
            lost = {"error": "the process ended"}
            expected = json.loads(path.read_text()) if path.exists() else lost
            answers = {} if "error" in expected else serve(model_type, work)
            cell.write_text(json.dumps(verdict(expected, answers)))
        cells[model_type] = json.loads(cell.read_text())
        print(f"{model_type}: {cells[model_type]}", flush=True)
    payload = json.loads(matrix.COMMITTED.read_text("utf-8"))
    before = payload.get("served", {}).get("cells", {})
    payload["served"] = {"vllm": known["vllm"], "cells": dict(sorted({**before, **cells}.items()))}
    matrix.write(payload)
    return int(any(cell.startswith("wrong") for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
