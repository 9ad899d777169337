"""Windows, rates and objectives of requests whose times are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.load import Level, Slo
from streamline_bench.throughput.trace import Trace, read_trace, served_pass

INF = float("inf")


def result(starts: list[float], ttft: float = 0.2, gap: float = 0.1, tokens: int = 4) -> Any:
    count = len(starts)
    return {
        "start_times": starts,
        "ttfts": [ttft] * count,
        "itls": [[gap] * (tokens - 1)] * count,
        "input_lens": [12] * count,
        "output_lens": [tokens] * count,
    }


def test_a_steady_load_has_the_rate_that_arrives() -> None:
    """One request a second, each half a second long: 4 tokens a second."""
    trace = read_trace(result([float(n) for n in range(20, 0, -1)]), warm=4)
    found = served_pass(trace, Level(1.0), 2, None)
    assert list(trace.start[:2]) == [1.0, 2.0], "by start, not as they ended"
    assert (found.block, found.requests, found.warmup, found.seconds) == (2, 16, 4, 15.0)
    assert found.requests_per_second == pytest.approx(1)
    assert found.output_tokens_per_second == pytest.approx(4)
    assert found.total_tokens_per_second == pytest.approx(16)
    assert (found.ttft, found.tpot, found.itl) == pytest.approx((200, 100, 100))
    assert found.e2el == pytest.approx(500)
    assert (found.first_half, found.backlog, found.good) == (pytest.approx(1), 0, None)


def test_a_pile_of_requests() -> None:
    """Two a second are sent, one a second ends."""
    starts = [0.5 * n for n in range(40)]
    given = result(starts)
    given["ttfts"] = [0.2 + 0.5 * n for n in range(40)]
    found = served_pass(read_trace(given, warm=8), Level(2.0), 0, None)
    assert found.backlog == pytest.approx(0.5, abs=0.1)
    assert found.first_half is not None and found.first_half < 0.7


def test_requests_sent_all_at_once_count_to_their_end() -> None:
    found = served_pass(read_trace(result([7.0] * 5), warm=0), Level(INF), 0, None)
    assert found.seconds == pytest.approx(0.5)
    assert found.output_tokens_per_second == pytest.approx(40)
    assert (found.first_half, found.backlog) == (None, None)


def test_a_chunk_may_hold_several_tokens() -> None:
    given = result([float(n) for n in range(12)], tokens=4)
    given["output_lens"] = [8] * 12
    found = served_pass(read_trace(given, warm=2), Level(1.0), 0, None)
    assert found.output_tokens_per_second == pytest.approx(8)
    assert found.tpot == pytest.approx(300 / 7) and found.itl == pytest.approx(100)


def test_the_share_of_good_requests_is_that_of_all_limits_together() -> None:
    given = result([float(n) for n in range(10)])
    given["ttfts"] = [0.2] * 4 + [0.9] * 6
    given["itls"] = [[0.1] * 3] * 6 + [[0.3] * 3] * 4
    trace = read_trace(given, warm=2)
    assert trace.good(Slo(ttft=0.5)) == pytest.approx(2 / 8)
    assert trace.good(Slo(tpot=0.2)) == pytest.approx(4 / 8)
    assert trace.good(Slo(ttft=0.5, tpot=0.2)) == pytest.approx(2 / 8)
    assert trace.good(Slo(ttft=1, tpot=1, e2el=1.3)) == pytest.approx(4 / 8)
    assert trace.broken(Slo(ttft=0.5, tpot=0.2)) == "ttft"
    single = result([0.0, 1.0], tokens=1)
    single["itls"] = [[], []]
    assert read_trace(single, 0).good(Slo(tpot=0.001)) == 1, "vLLM's client counts 0 for it, too"


def test_values_name_their_request() -> None:
    given = result([0.0, 1.0, 2.0])
    given["output_lens"], given["itls"] = [4, 1, 4], [[0.1] * 3, [], [0.2] * 3]
    trace = read_trace(given, warm=1)
    values, requests = trace.values("itl")
    assert list(values) == pytest.approx([200] * 3) and list(requests) == [2] * 3
    assert list(trace.values("tpot")[1]) == [2], "one token has no time after it"
    assert isinstance(trace, Trace) and len(trace.values("ttft")[0]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"itls": None}, "itls"),
        ({"ttfts": [0.1]}, "requests"),
        ({"ttfts": [-5.0, 0.1]}, "clock"),
        ({"itls": [[-0.1], [0.1]]}, "clock"),
        ({"ttfts": [float("nan"), 0.1]}, "clock"),
    ],
)
def test_impossible_results(changes: dict[str, Any], message: str) -> None:
    given = {**result([0.0, 1.0], tokens=2), **changes}
    with pytest.raises(ThroughputError, match=message):
        read_trace(given, warm=0)
    assert np.isfinite(read_trace(result([0.0, 1.0]), 0).e2el).all()
