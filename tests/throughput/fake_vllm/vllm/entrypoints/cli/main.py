"""``vllm serve`` and ``vllm bench serve`` in miniature, for the file ``behaviour.json``.

Keys of the server: ``taken`` (how many times the port is in use), ``exit`` (code at once),
``never_ready``, ``out_of_memory``. Of the client: ``bench_exit`` (code), ``bench_hang``,
``requests_fail``, ``kills_server_at`` (number of the run, from 1, before which the server dies).

Of the simulated engine: ``step`` (seconds per token of one request alone, by default 0.01 per 4
layers), ``knee`` (as many requests in flight take twice as long), ``slow_start`` (so many requests
take twice as long), ``itls`` (left out), ``starts`` (factor of the speed of each start of the
server, in turn).
"""

from __future__ import annotations

import http.server
import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any


def option(name: str, default: str = "") -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        text = b'vllm:cache_config_info{block_size="128",num_gpu_blocks="6"} 1.0\n'
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"" if self.path == "/health" else text)

    def log_message(self, *arguments: object) -> None:
        pass


def serve() -> None:
    folder = Path(sys.argv[2])
    behaviour = json.loads((folder / "behaviour.json").read_text())
    note_start(folder)
    (folder / "pids.json").write_text(json.dumps([os.getpid(), os.getppid()]))
    if len((folder / "ports.txt").read_text().split()) <= behaviour.get("taken", 0):
        sys.exit("OSError: [Errno 98] Address already in use")
    if behaviour.get("out_of_memory"):
        sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.")
    if "exit" in behaviour:
        sys.exit(behaviour["exit"])
    if behaviour.get("never_ready"):
        time.sleep(600)
    print("INFO Model loading took 2.50 GiB memory and 1.0 seconds")
    print("INFO Initial free memory 9 GiB, reserved 0.75 GiB memory for KV Cache", flush=True)
    address = (option("--host"), int(option("--port")))
    http.server.HTTPServer(address, Handler).serve_forever()


def note_start(folder: Path) -> None:
    with (folder / "ports.txt").open("a") as file:
        file.write(option("--port") + "\n")
    with (folder.parent / "starts.txt").open("a") as file:
        file.write(folder.name + "\n")
    (folder / "serve.json").write_text(json.dumps(sys.argv))


def answer(folder: Path) -> dict[str, Any]:
    """What the client finds; it is noted that it ran."""
    behaviour = json.loads((folder / "behaviour.json").read_text())
    with (folder / "bench.jsonl").open("a") as file:
        file.write(json.dumps(sys.argv) + "\n")
    return simulated(folder, behaviour)


def bench() -> None:
    folder = Path(option("--tokenizer"))
    behaviour = json.loads((folder / "behaviour.json").read_text())
    result = answer(folder)
    number = len((folder / "bench.jsonl").read_text().splitlines())
    if behaviour.get("bench_hang"):
        time.sleep(600)
    if "bench_exit" in behaviour:
        sys.exit(behaviour["bench_exit"])
    if number == behaviour.get("kills_server_at"):
        os.kill(json.loads((folder / "pids.json").read_text())[0], signal.SIGKILL)
        time.sleep(0.2)
        behaviour["requests_fail"] = int(option("--num-prompts"))
    if behaviour.get("requests_fail"):
        result["failed"] = behaviour["requests_fail"]
        result["errors"] = ["", "Traceback\nClientConnectorError: Cannot connect to host"]
    Path(option("--result-dir"), option("--result-filename")).write_text(json.dumps(result))


def simulated(folder: Path, behaviour: dict[str, Any]) -> dict[str, Any]:
    """Requests in flight share the engine; of a rate, each waits for the one before it."""
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    started = len((folder / "ports.txt").read_text().split())
    speeds = behaviour.get("starts", [1.0])
    step = behaviour.get("step", 0.01 * layers / 4) / speeds[(started - 1) % len(speeds)]
    count, tokens = int(option("--num-prompts")), int(option("--random-output-len", "4"))
    chance = random.Random(option("--seed"))
    rate, users = option("--request-rate"), int(option("--max-concurrency", "0"))
    in_flight = users or (count if rate == "inf" else 1)
    each = step * (1 + in_flight / behaviour.get("knee", 8))
    starts, ttfts, itls = [], [], []
    clocks = [0.0] * in_flight
    free = arrival = 0.0
    for index in range(count):
        slow = 2.0 if index < behaviour.get("slow_start", 0) else 1.0
        times = [slow * each * chance.uniform(0.95, 1.05) for _ in range(tokens)]
        if rate == "inf":
            user = min(range(in_flight), key=clocks.__getitem__)
            begin, wait = clocks[user], 0.0
            clocks[user] += sum(times) + 1e-6 * (1 + user)
        else:
            even = option("--burstiness") == "inf"
            arrival += 1 / float(rate) if even else chance.expovariate(float(rate))
            begin, wait = arrival, max(0.0, free - arrival)
            free = max(free, arrival) + sum(times)
        starts.append(1000 + begin)
        ttfts.append(wait + times[0])
        itls.append(times[1:])
    order = sorted(range(count), key=lambda index: chance.random())  # as they end, not as sent
    lists = {"start_times": starts, "ttfts": ttfts, "itls": itls,
             "input_lens": [int(option("--random-input-len", "7"))] * count,
             "output_lens": [tokens] * count, "errors": [""] * count}  # fmt: skip
    shuffled = {name: [values[index] for index in order] for name, values in lists.items()}
    limits = dict(part.split(":") for part in goodput_limits())
    good = sum(
        ttft <= float(limits.get("ttft", "inf")) / 1000
        and sum(gaps) / max(1, len(gaps)) <= float(limits.get("tpot", "inf")) / 1000
        for ttft, gaps in zip(ttfts, itls, strict=True)
    )
    duration = max(s + t + sum(g) for s, t, g in zip(starts, ttfts, itls, strict=True)) - 1000
    return {"failed": 0, "completed": count, "duration": duration, **shuffled,
            "request_goodput": good / duration if limits else None,
            **({"itls": None} if "itls" in behaviour else {})}  # fmt: skip


def goodput_limits() -> list[str]:
    if "--goodput" not in sys.argv:
        return []
    rest = sys.argv[sys.argv.index("--goodput") + 1 :]
    return list(itertools.takewhile(lambda part: not part.startswith("--"), rest))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        bench()
