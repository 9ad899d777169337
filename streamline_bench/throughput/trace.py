"""The requests of one run of ``vllm bench serve``, as that client noted them, and what they show.

The first requests warm the server up and do not count. Of the others, the window from the first
start to the last one has a steady load: before it the server fills, after it the server drains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.load import Level, Slo
from streamline_bench.throughput.served import ServedPass

Floats = npt.NDArray[np.float64]
METRICS = ("ttft", "tpot", "itl", "e2el")
TRACED = ("start_times", "ttfts", "itls", "input_lens", "output_lens")
"""What the client's detailed result must hold, a value per request."""


@dataclass(frozen=True)
class Trace:
    """Requests by start; times in seconds.

    Attributes:
        start, ttft, e2el: [requests]; when each was sent, and how long it took.
        prompt_tokens, output_tokens: [requests].
        gaps: of each request, the times between its chunks of output.
        warm: so many of the first do not count.
    """

    start: Floats
    ttft: Floats
    e2el: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    gaps: tuple[Floats, ...]
    warm: int

    def values(self, metric: str) -> tuple[Floats, npt.NDArray[np.intp]]:
        """Return the counted values in milliseconds, and the request that each is of."""
        numbers = np.arange(self.warm, len(self.start))
        if metric == "itl":
            gaps = self.gaps[self.warm :]
            found = np.concatenate([np.empty(0), *gaps])
            numbers = np.repeat(numbers, [len(each) for each in gaps])
        elif metric == "tpot":
            numbers = numbers[self.output_tokens[numbers] > 1]
            found = self.per_token()[numbers]
        else:
            found = (self.ttft if metric == "ttft" else self.e2el)[numbers]
        return 1000 * found, numbers

    def per_token(self) -> Floats:
        """Seconds per output token after the first, [requests]; 0 for a single token."""
        after = self.output_tokens - 1
        times: Floats = np.where(after > 0, (self.e2el - self.ttft) / np.maximum(after, 1), 0.0)
        return times

    def good(self, slo: Slo) -> float:
        """Share of the counted requests that keep every limit."""
        return float(self._kept(slo).all(axis=0).mean())

    def broken(self, slo: Slo) -> str:
        """The limit that the most counted requests break."""
        return list(slo.limits)[int(self._kept(slo).mean(axis=1).argmin())]

    def _kept(self, slo: Slo) -> npt.NDArray[np.bool_]:
        measured = {"ttft": self.ttft, "tpot": self.per_token(), "e2el": self.e2el}
        kept = [measured[name][self.warm :] <= limit for name, limit in slo.limits.items()]
        return np.array(kept)

    def in_flight(self, moment: float) -> int:
        """Requests that were sent before, and had not ended."""
        return int(((self.start < moment) & (self.start + self.e2el > moment)).sum())


def read_trace(result: Mapping[str, Any], warm: int) -> Trace:
    """Read a detailed result of ``vllm bench serve``, all of whose requests succeeded.

    Raises:
        ThroughputError: a list is missing or has another length, or a time is impossible.
    """
    missing = [name for name in TRACED if not isinstance(result.get(name), list)]
    if missing:
        raise ThroughputError(
            f"the result of vllm bench serve has no {', '.join(missing)}; install vLLM 0.29 or "
            "newer"
        )
    start, ttft, prompt, output = (
        np.array(result[name], dtype=np.float64)
        for name in ("start_times", "ttfts", "input_lens", "output_lens")
    )
    gaps = [np.array(each, dtype=np.float64) for each in result["itls"]]
    if not len(start) == len(ttft) == len(gaps) == len(prompt) == len(output) > warm:
        raise ThroughputError(f"vllm bench serve gave {len(start)} requests; {warm} are warm-up")
    e2el = ttft + np.array([each.sum() for each in gaps])
    shortest = min((float(each.min()) for each in gaps if len(each)), default=0.0)
    if not np.isfinite(start + e2el).all() or ttft.min() <= 0 or shortest < 0:
        raise ThroughputError(
            "a latency is negative or missing: the clock jumped, or a request got no output"
        )
    order = np.argsort(start, kind="stable")
    return Trace(
        start[order], ttft[order], e2el[order], prompt[order], output[order],
        tuple(gaps[index] for index in order), warm,
    )  # fmt: skip


def served_pass(trace: Trace, level: Level, block: int, slo: Slo | None) -> ServedPass:
    """Summarise one run of the client."""
    counted = slice(trace.warm, None)
    begin, end = float(trace.start[counted][0]), float(trace.start[-1])
    steady = end > begin and (level.closed or level.rate != float("inf"))
    if not steady:
        end = float((trace.start + trace.e2el).max())
    seconds = end - begin
    ends = trace.start + trace.e2el
    rate = float(((ends > begin) & (ends <= end)).sum()) / seconds
    tokens = _tokens_within(trace, begin, end) / seconds
    per_request = trace.output_tokens[counted].mean()
    means = {name: trace.values(name)[0] for name in METRICS}
    backlog = None
    if steady and not level.closed:
        arrived = len(trace.start) - trace.warm
        backlog = (trace.in_flight(end) - trace.in_flight(begin)) / arrived
    return ServedPass(
        block=block,
        requests=len(trace.start) - trace.warm,
        warmup=trace.warm,
        seconds=seconds,
        requests_per_second=rate,
        output_tokens_per_second=tokens,
        total_tokens_per_second=tokens * (1 + trace.prompt_tokens[counted].mean() / per_request),
        **{name: float(found.mean()) if len(found) else None for name, found in means.items()},
        first_half=_first_half(trace) if steady else None,
        backlog=backlog,
        good=None if slo is None else trace.good(slo),
    )


def _tokens_within(trace: Trace, begin: float, end: float) -> float:
    """Output tokens that arrived in the window; a chunk may hold several."""
    total = 0.0
    for start, first, gaps, tokens in zip(
        trace.start, trace.ttft, trace.gaps, trace.output_tokens, strict=True
    ):
        times = start + first + np.concatenate([[0.0], np.cumsum(gaps)])
        total += ((times > begin) & (times <= end)).sum() * tokens / len(times)
    return total


def _first_half(trace: Trace) -> float | None:
    """Latency per output token of the first half of the counted requests, over the second's."""
    latency = trace.e2el[trace.warm :] / trace.output_tokens[trace.warm :]
    half = len(latency) // 2
    return float(latency[:half].mean() / latency[-half:].mean()) if half else None
