"""An engine that does as the file ``behaviour.json`` in a model's folder says.

Keys: ``seconds`` per batch; ``load_error``; ``exit`` (code) or ``signal`` when generating;
``out_of_memory_above`` (batch); ``load_memory`` (largest batch it can be started for);
``last_start``: number of the process that dies when it generates, the first is 1;
``tokens_missing``; ``hang``; ``hang_after`` (rounds); ``child``: start a process and write its id.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from streamline_bench.throughput.engines import Engine, EngineSettings, Loaded


class FakeEngine(Engine):
    """Takes nothing at the start but a note of its process id in the model's folder."""

    def load(self, settings: EngineSettings) -> Loaded:
        self.folder = Path(settings.model)
        self.behaviour = json.loads((self.folder / "behaviour.json").read_text())
        self.rounds = 0
        if "load_error" in self.behaviour:
            raise ValueError(self.behaviour["load_error"])
        if settings.max_batch > self.behaviour.get("load_memory", settings.max_batch):
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        processes = [os.getpid()]
        if self.behaviour.get("child"):
            command = [sys.executable, "-c", "import time; time.sleep(600)"]
            processes.append(subprocess.Popen(command, start_new_session=True).pid)
        (self.folder / "pids.json").write_text(json.dumps(processes))
        with (self.folder / "starts.txt").open("a") as file:
            file.write(f"{time.monotonic()} {os.getpid()}\n")
        print("a library that prints to stdout")
        return Loaded(vocab_size=50, reserved=[0, 1], flags={"fake": True})

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[int]:
        assert all(1 < token < 50 for prompt in prompts for token in prompt)
        with (self.folder / "batches.txt").open("a") as file:
            file.write(f"{time.monotonic()} {len(prompts)}\n")
        self.rounds += 1
        if len(prompts) > self.behaviour.get("out_of_memory_above", len(prompts)):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        started = (self.folder / "starts.txt").read_text().count("\n")
        if started == self.behaviour.get("last_start"):
            os.kill(os.getpid(), signal.SIGKILL)
        if "exit" in self.behaviour:
            print("OSError: something dreadful happened\nbye", file=sys.stderr, flush=True)
            os._exit(self.behaviour["exit"])
        if "signal" in self.behaviour:
            os.kill(os.getpid(), self.behaviour["signal"])
        if self.behaviour.get("hang") or self.rounds > self.behaviour.get("hang_after", 10**9):
            time.sleep(600)
        time.sleep(self.behaviour.get("seconds", 0.001))
        return [output_tokens - self.behaviour.get("tokens_missing", 0)] * len(prompts)


class SizedEngine(FakeEngine):
    """Takes its memory when it is loaded, as vLLM does."""

    sized_at_load = True
