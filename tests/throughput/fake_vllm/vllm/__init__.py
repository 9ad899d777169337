"""Stands in for vLLM where it is not installed."""

from __future__ import annotations


class LLM:
    def __init__(self, **_: object) -> None:
        raise RuntimeError("the engine was started")
