"""The platform that ``FAKE_VLLM_PLATFORM`` names; a processor without it.

With ``FAKE_CLOCK_JUMP``, the clock of the process that imports this is ahead by so many seconds
more with every look at it.
"""

from __future__ import annotations

import itertools
import os
import time


class Platform:
    device_type = os.environ.get("FAKE_VLLM_PLATFORM", "cpu")

    def is_cpu(self) -> bool:
        return self.device_type == "cpu"


current_platform = Platform()

if "FAKE_CLOCK_JUMP" in os.environ:
    looks, jump, real = itertools.count(), float(os.environ["FAKE_CLOCK_JUMP"]), time.time
    time.time = lambda: real() + jump * next(looks)
