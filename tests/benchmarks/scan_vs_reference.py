"""The importance scan beside that of LLM-Streamline's own repository, on the same model and tokens.

    git clone https://github.com/RUCKBReasoning/LLM-Streamline REFERENCE
    python tests/benchmarks/scan_vs_reference.py --reference REFERENCE

The reference answers one block size per run, ours all of them: both ratios are printed. Its
function is imported from the given checkout and called unchanged; of it nothing is kept here.
Both must choose the same block. Times are taken in turn: processor time on one thread, or with
``--device cuda`` wall time, the moves of the model to the device and back included in both, as
the reference makes them itself.

``--model FOLDER --text FILE`` scans a trained model on its own tokens. The similarities that the
reference prints, with four decimals, are compared for every block of n layers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from llama_and_tokens import llama_and_tokens

from streamline_bench.core.scan import scan


def reference_scan(checkout: Path) -> Callable[..., int]:
    """The reference's function that picks the first layer of the block."""
    path = checkout / "LLM_Streamline" / "get_cosine.py"
    specification = importlib.util.spec_from_file_location("reference_get_cosine", path)
    if specification is None or specification.loader is None or not path.is_file():
        raise SystemExit(f"{path} is not there; give a checkout of LLM-Streamline")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.get_cosine_similarity


def timed(work: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True)
    for name, default in [
        ("layers", 8), ("hidden", 256), ("vocabulary", 8192), ("length", 2048),
        ("samples", 2), ("n", 2), ("repeats", 5),
    ]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", type=Path, help="Llama folder; default: a random one")
    parser.add_argument("--text", help="with --model: where its tokens come from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    reference = reference_scan(options.reference)
    model, tokens = llama_and_tokens(options, options.samples, initializer_range=0.05)
    model.to(getattr(torch, options.dtype))
    # It wants more sequences than it looks at; one more is never run.
    rows = [*tokens.input_ids.tolist(), tokens.input_ids[0].tolist()]

    class Sequences:
        """The first sequences only, whatever the reference draws: both see the same tokens."""

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": rows[index]}

    def theirs(n: int = options.n) -> int:
        # Its draw of sequences follows torch's seed; search one that leaves the extra row out.
        torch.manual_seed(next(s for s in range(10_000) if _draw(s, len(rows), options.samples)))
        return reference(model, Sequences(), options.samples, options.device, n, options.layers)

    def similarity() -> Any:
        moved = model.to(options.device)
        measured = scan(moved, tokens, last_state="postnorm", progress=False)
        model.cpu()
        return measured

    def ours() -> int:
        return similarity().best_block(options.n).start

    def theirs_for_every_n() -> None:
        for n in range(1, options.layers):
            theirs(n)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        chosen = {theirs()}
    measured = similarity()
    chosen.add(measured.best_block(options.n).start)
    # The reference maps a cosine c to (1 + c) / 2.
    found = re.findall(r"between hidden_states \d+ and .* is (-?[\d.]+)$", printed.getvalue(), re.M)
    differences = [
        abs(2 * float(given) - 1 - float(own))
        for given, own in zip(found, measured.scores(options.n), strict=True)
    ]
    turns = [
        (timed(theirs, options.device)[0], timed(ours, options.device)[0])
        for _ in range(options.repeats)
    ]
    ratios = sorted(a / b for a, b in turns)
    middle = [statistics.median(column) for column in zip(*turns, strict=True)]
    print(f"same block: {len(chosen) == 1} (first layer {sorted(chosen)})")
    print(f"cosines of {len(found)} blocks: largest difference {max(differences):.1e} (as printed)")
    print(f"reference, n = {options.n}: {middle[0]:.3f} s; ours, every n: {middle[1]:.3f} s")
    print(
        f"reference / ours, one n: {statistics.median(ratios):.2f} "
        f"(range {ratios[0]:.2f} to {ratios[-1]:.2f}, {len(turns)} turns)"
    )
    every = timed(theirs_for_every_n, options.device)[0] / timed(ours, options.device)[0]
    print(f"reference / ours, every n from 1 to {options.layers - 1}: {every:.1f} (one turn)")


def _draw(seed: int, rows: int, samples: int) -> bool:
    torch.manual_seed(seed)
    return rows - 1 not in torch.randperm(rows)[:samples].tolist()


if __name__ == "__main__":
    main()
