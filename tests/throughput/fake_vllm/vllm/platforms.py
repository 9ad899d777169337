"""The platform that ``FAKE_VLLM_PLATFORM`` names; a processor without it."""

from __future__ import annotations

import os


class Platform:
    device_type = os.environ.get("FAKE_VLLM_PLATFORM", "cpu")

    def is_cpu(self) -> bool:
        return self.device_type == "cpu"


current_platform = Platform()
