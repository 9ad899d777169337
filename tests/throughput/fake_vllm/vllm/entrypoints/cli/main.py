"""``vllm serve`` and ``vllm bench serve`` in miniature, for the file ``behaviour.json``.

Keys: ``taken`` (how many times the port is in use), ``exit`` (code of the server at once),
``bench_exit`` (code of the client), ``bench_hang``, ``requests_fail``.
"""

from __future__ import annotations

import http.server
import json
import os
import sys
import time
from pathlib import Path


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


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
    with (folder / "ports.txt").open("a") as file:
        file.write(option("--port") + "\n")
    (folder / "pids.json").write_text(json.dumps([os.getpid(), os.getppid()]))
    if len((folder / "ports.txt").read_text().split()) <= behaviour.get("taken", 0):
        sys.exit("OSError: [Errno 98] Address already in use")
    if "exit" in behaviour:
        sys.exit(behaviour["exit"])
    address = (option("--host"), int(option("--port")))
    http.server.HTTPServer(address, Handler).serve_forever()


def bench() -> None:
    behaviour = json.loads((Path(option("--tokenizer")) / "behaviour.json").read_text())
    if behaviour.get("bench_hang"):
        time.sleep(600)
    if "bench_exit" in behaviour:
        sys.exit(behaviour["bench_exit"])
    requests = int(option("--num-prompts"))
    result = {
        "failed": behaviour.get("requests_fail", 0),
        "completed": requests,
        "duration": 2.0,
        "request_throughput": requests / 2,
        "output_throughput": requests * int(option("--random-output-len")) / 2,
        "total_token_throughput": 99.0,
        "request_rate": option("--request-rate"),
        "ttfts": [0.1] * requests,
    }
    for place, metric in enumerate(option("--percentile-metrics").split(",")):
        result[f"mean_{metric}_ms"] = place + 0.25
        for percentile in option("--metric-percentiles").split(","):
            result[f"p{percentile}_{metric}_ms"] = place + int(percentile) / 100
    Path(option("--result-dir"), option("--result-filename")).write_text(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        bench()
