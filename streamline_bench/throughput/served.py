"""The part of ``throughput.json`` that is about served models.

``ttft``: time to first token; ``tpot``: time per output token after it; ``itl``: between tokens as
they arrive; ``e2el``: from request to last token. Times are milliseconds.
"""

from __future__ import annotations

from typing import Literal

from streamline_bench.throughput.figures import Latency, Ratio, Recorded

Status = Literal["ok", "failed"]


class ServedPass(Recorded):
    """One run of the client: one load, in one block.

    Rates are of the window from the first counted request to the last one that was sent, while the
    load is steady; of requests sent all at once, of the whole run.

    Attributes:
        requests: those that count; ``warmup`` were sent before them.
        ttft, tpot, itl, e2el: means over the counted requests.
        first_half: latency per output token, first half of the counted requests / second half; 1
            if the load was steady. None for requests sent all at once.
        backlog: by how many requests in flight the window ended with more than it began with, as a
            share of those that arrived in it. None where requests wait for earlier ones.
        good: share of the requests that kept the objective; None without one.
        client_goodput: good requests per second of the whole run, by the client itself.
    """

    block: int
    requests: int
    warmup: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    ttft: float
    tpot: float | None
    itl: float | None
    e2el: float
    first_half: float | None = None
    backlog: float | None = None
    good: float | None = None
    client_goodput: float | None = None

    @property
    def goodput(self) -> float | None:
        """Requests per second that kept the objective."""
        return None if self.good is None else self.good * self.requests_per_second


class ServingPoint(Recorded):
    """One model at one load.

    Attributes:
        request_rate: requests per second; infinite where each is sent as soon as there is room.
        concurrency: requests in flight at any time; None where a rate is given.
        completed: requests that count, of all blocks.
        seconds: of their windows together.
        requests_per_second, output_tokens_per_second, total_tokens_per_second: means over blocks.
        throughput_ratio: output tokens per second, model / dense.
        goodput: requests per second that kept the objective.
        goodput_ratio: model / dense; None where either has a block without any.
        first_half: see :class:`ServedPass`; an interval that excludes 1 says that the warm-up was
            too short, or that the latencies grew.
        saturated: why more load gives no more output; None while it does, or where unknown.
    """

    request_rate: float
    concurrency: int | None = None
    status: Status
    reason: str | None = None
    notes: tuple[str, ...] = ()
    completed: int = 0
    seconds: float | None = None
    requests_per_second: float | None = None
    output_tokens_per_second: float | None = None
    total_tokens_per_second: float | None = None
    throughput_ratio: Ratio | None = None
    goodput: float | None = None
    goodput_ratio: Ratio | None = None
    good: float | None = None
    first_half: Ratio | None = None
    saturated: str | None = None
    ttft: Latency | None = None
    tpot: Latency | None = None
    itl: Latency | None = None
    e2el: Latency | None = None
    passes: tuple[ServedPass, ...] = ()

    @property
    def described(self) -> str:
        """The load: ``4 per second``, ``8 in flight``, ``all at once``."""
        if self.request_rate == float("inf"):
            return "all at once" if self.concurrency is None else f"{self.concurrency} in flight"
        return f"{self.request_rate:g} per second"


class Probe(Recorded):
    """One load that a search tried."""

    block: int
    level: float
    holds: bool
    good: float
    broke: str | None = None


class Sustained(Recorded):
    """The highest load at which a model kept the objective.

    Attributes:
        by: what was raised: requests in flight, or requests per second.
        level: geometric mean over blocks; None where a block found none.
        levels: of every block; 0 where even the lowest load broke the objective.
        goodput: good requests per second at that load, mean over blocks.
        ratio: level, model / dense: how many more users on the same card.
        goodput_ratio: likewise.
        limit: what broke at the next higher load (``tpot``, ``saturated``), by block, or that
            the search ended at the most that it tries.
        probes: every load that was tried.
    """

    by: Literal["concurrency", "rate"]
    status: Status
    reason: str | None = None
    level: float | None = None
    levels: tuple[float, ...] = ()
    goodput: float | None = None
    goodputs: tuple[float, ...] = ()
    ratio: Ratio | None = None
    goodput_ratio: Ratio | None = None
    limit: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()


class MemorySplit(Recorded):
    """What the server took, by its own log; None for what it did not say."""

    weights_bytes: int | None = None
    kv_cache_bytes: int | None = None
    activations_bytes: int | None = None
