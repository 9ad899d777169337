"""What vLLM needs to serve checkpoints of model type ``streamline``; no remote code is involved.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``).
Checkpoints of stock model types need nothing of this.
"""

from __future__ import annotations

from streamline_bench.modeling.vllm.plugin import register

__all__ = ["register"]
