"""Depth surgery on files against plain copying of the bytes it keeps, in one run.

A synthetic Llama checkpoint in shards loses a quarter of its layers. Its peer copies files that
hold exactly the bytes of the result (``shutil.copyfile``), and flushes them to disk as surgery
does. The two take turns, in alternating order; printed are medians, their ratio (target: at least
0.8 of the speed of copying), the same for processor time, which other work on the machine disturbs
less, and the peak memory of a process that does one surgery.

    python tests/benchmarks/surgery_vs_copy.py [--gigabytes 1.5] [--rounds 7] [--folder /dev/shm]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from streamline_bench.core.architecture import ARCHITECTURES
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import compose, layer_names
from streamline_bench.core.files import staged_output, sync_path
from streamline_bench.core.surgery import block_keep

LAYERS = 24
SHARDS = 4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_checkpoint(folder: Path, size: float) -> None:
    """Write random bfloat16 weights of about ``size`` bytes with the names of a Llama."""
    hidden = int((size / 2 / (LAYERS * 12)) ** 0.5) // 64 * 64
    shapes = {"model.embed_tokens.weight": [4 * hidden, hidden], "model.norm.weight": [hidden]}
    for i in range(LAYERS):
        prefix = f"model.layers.{i}"
        for name in ("gate_proj", "up_proj"):
            shapes[f"{prefix}.mlp.{name}.weight"] = [hidden * 8 // 3, hidden]
        shapes[f"{prefix}.mlp.down_proj.weight"] = [hidden, hidden * 8 // 3]
        for name in PROJECTIONS:
            shapes[f"{prefix}.self_attn.{name}.weight"] = [hidden, hidden]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = [hidden]
    names = list(shapes)
    weight_map = {name: f"model-{i * SHARDS // len(names) + 1:05d}-of-{SHARDS:05d}.safetensors"
                  for i, name in enumerate(names)}  # fmt: skip
    folder.mkdir()
    for shard in dict.fromkeys(weight_map.values()):
        write_shard(folder / shard, {n: shapes[n] for n in names if weight_map[n] == shard})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": hidden}
    (folder / "config.json").write_text(json.dumps(config))


def write_shard(path: Path, shapes: dict[str, list[int]]) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    block = random.Random(0).randbytes(1 << 24)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        while offset > 0:
            file.write(block[: min(offset, len(block))])
            offset -= len(block)
        os.fsync(file.fileno())


def surgery(source: Path, target: Path) -> None:
    """What a user's call does, from opening the checkpoint to the folder being in place."""
    reader = CheckpointReader(source)
    keep = block_keep(LAYERS, LAYERS // 2, LAYERS // 4)
    names = layer_names(reader, ARCHITECTURES["llama"], keep)
    config = {**reader.config, "num_hidden_layers": len(keep)}
    with staged_output(target) as work:
        compose(reader, work, config=config, names=names, max_shard_bytes=4e8, progress=False)


def plain_copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        sync_path(target / path.name)
    sync_path(target)


def timed(action: Callable[[Path, Path], None], source: Path, target: Path) -> tuple[float, float]:
    """Return seconds of wall and of processor time."""
    os.sync()  # nobody pays for what the other left to be written
    wall, processor = time.perf_counter(), time.process_time()
    action(source, target)
    spent = time.perf_counter() - wall, time.process_time() - processor
    shutil.rmtree(target)
    return spent


def compare(work: Path, gigabytes: float, rounds: int) -> dict[str, float]:
    source, kept = work / "source", work / "kept"
    write_checkpoint(source, gigabytes * 1e9)
    surgery(source, kept)
    size = sum(path.stat().st_size for path in kept.iterdir())
    tasks = [("surgery", surgery, source), ("copy", plain_copy, kept)]
    seconds: dict[str, list[tuple[float, float]]] = {"surgery": [], "copy": []}
    for number in range(rounds + 1):
        for name, action, folder in tasks if number % 2 else reversed(tasks):
            spent = timed(action, folder, work / "target")
            if number:  # the first round warms the page cache
                seconds[name].append(spent)
    medians = {name: statistics.median(w for w, _ in both) for name, both in seconds.items()}
    processor = {name: statistics.median(p for _, p in both) for name, both in seconds.items()}
    return {
        "source_GB": sum(p.stat().st_size for p in source.iterdir()) / 1e9,
        "written_GB": size / 1e9,
        "surgery_s": medians["surgery"],
        "copy_s": medians["copy"],
        "surgery_GB_per_s": size / 1e9 / medians["surgery"],
        "copy_GB_per_s": size / 1e9 / medians["copy"],
        "ratio_of_copy_speed": medians["copy"] / medians["surgery"],
        "surgery_processor_s": processor["surgery"],
        "copy_processor_s": processor["copy"],
        "ratio_by_processor_time": processor["copy"] / processor["surgery"],
        "peak_rss_MB": peak_memory(source, work / "target"),
    }


def peak_memory(source: Path, target: Path) -> float:
    """Peak resident memory of a fresh process doing one surgery, in MB (Linux)."""
    command = [sys.executable, __file__, "--once", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def once(source: Path, target: Path) -> None:
    surgery(source, target)
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    print(int(found[1]) / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="where to work")
    parser.add_argument("--once", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        once(*options.once)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        found = compare(Path(work), options.gigabytes, options.rounds)
    print(json.dumps({key: round(value, 3) for key, value in found.items()}, indent=2))


if __name__ == "__main__":
    main()
