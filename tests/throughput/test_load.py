"""What is sent to a server, and what is refused before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.load import MOST_CONCURRENCY, Level, ServingLoad, Slo, read_prompts

INF = float("inf")


def test_an_objective_is_read_and_written() -> None:
    slo = Slo.parse("ttft=0.5, tpot=50ms,p=90")
    assert (slo.limits, slo.p) == ({"ttft": 0.5, "tpot": 0.05}, 90)
    assert Slo.parse(slo.described) == slo
    assert Slo.parse("e2el=2s").p == 95


@pytest.mark.parametrize(
    "text",
    ["", "p=95", "tpot", "tpot=", "itl=5ms", "tpot=5ms,tpot=6ms", "tpot=5 h", "p=95ms,tpot=1s",
     "tpot=0", "tpot=1s,p=101", "ttft=1.2.3s"],
)  # fmt: skip
def test_what_is_no_objective(text: str) -> None:
    with pytest.raises(ThroughputError, match="objective"):
        Slo.parse(text)


def test_levels_and_how_many_requests_they_take() -> None:
    load = ServingLoad(request_rates=(2.0, INF), concurrencies=(4, 64), requests=40)
    assert load.levels == (Level(2.0), Level(INF), Level(INF, 4), Level(INF, 64))
    assert [load.counts(level, 16) for level in load.levels] == [
        (10, 40), (0, 40), (10, 40), (128, 128)
    ]  # fmt: skip
    assert load.most == 64
    given = load.model_copy(update={"warmup_requests": 3, "max_concurrency": 100})
    assert given.counts(Level(2.0), 16) == (3, 40) and given.most == 100
    assert [level.closed for level in load.levels] == [False, False, True, True]


@pytest.mark.parametrize(
    ("objective", "seconds"),
    [
        ("ttft=1,tpot=0.5", 1 + 16 * 0.5),
        ("ttft=1,tpot=0.5,e2el=4", 4.0),
        ("e2el=4", 4.0),
        ("tpot=0.5", 8.0),
    ],
)
def test_at_a_rate_twice_as_many_requests_come_first_as_are_in_flight(
    objective: str, seconds: float
) -> None:
    """In a steady server that just keeps the objective, by Little's law."""
    load = ServingLoad(slo=Slo.parse(objective), search="rate", requests=16)
    in_flight = 5.0 * seconds
    assert load.counts(Level(5.0), 16) == (2 * in_flight, 2 * in_flight)
    assert load.counts(Level(0.01), 16) == (8, 16)
    assert load.counts(Level(5.0, 3), 16) == (8, 16), "three may be in flight"
    assert load.counts(Level(1e6), 16) == (2 * MOST_CONCURRENCY, 2 * MOST_CONCURRENCY)


def test_rates_by_default_only_where_no_other_load_is_asked_for() -> None:
    assert ServingLoad().request_rates == (1.0, 4.0, INF)
    assert ServingLoad(concurrencies=(4,)).levels == (Level(INF, 4),)
    searched = ServingLoad.model_validate({"slo": "tpot=50ms,p=90"})
    assert searched.levels == () and searched.slo == Slo(tpot=0.05, p=90)
    both = ServingLoad(request_rates=(2.0,), concurrencies=(4,))
    assert ServingLoad.model_validate_json(both.model_dump_json()) == both


def test_loads_that_make_no_sense() -> None:
    slo = Slo(tpot=1)
    assert ServingLoad(request_rates=(), slo=slo).levels == ()
    for wrong in (
        {"request_rates": ()},
        {"output_lengths": "data"},
        {"prompts": "a.jsonl", "prefix_tokens": 2},
        {"concurrencies": (0,)},
        {"request_rates": (0.0,)},
    ):
        with pytest.raises(ValidationError):
            ServingLoad.model_validate(wrong)


def test_equal_loads_have_equal_words() -> None:
    load = ServingLoad(request_rates=(1.0, INF), requests=8)
    assert load.described == "8 requests at 1, inf per second"
    changes = (
        {"concurrencies": (4,)}, {"arrivals": "constant"}, {"slo": Slo(tpot=1)},
        {"prefix_tokens": 3}, {"prompts": "x.jsonl"}, {"max_concurrency": 2},
    )  # fmt: skip
    words = {load.model_copy(update=change).described for change in changes}
    assert len(words) == len(changes) and load.described not in words


def test_options_are_those_that_have_an_effect() -> None:
    users = ServingLoad(concurrencies=(4,), max_concurrency=8).options
    assert (users["--arrivals"], users["--max-concurrency"]) == (None, None)
    found = ServingLoad(slo=Slo(tpot=1), search="rate", max_concurrency=8).options
    assert (found["--arrivals"], found["--max-concurrency"]) == ("poisson", 8)
    assert ServingLoad(request_rates=(2.0,)).options["--arrivals"] == "poisson"


def test_prompts_of_a_file_are_checked_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    load = ServingLoad(prompts=str(file), output_lengths="data")
    file.write_text("".join(
        json.dumps({"prompt": prompt, "output_tokens": tokens}) + "\n"
        for prompt, tokens in (("a" * 50, 3), ("\u00e9" * 30, 8))
    ))  # fmt: skip
    found = read_prompts(load, 128)
    assert found is not None and (found.prompts, found.tokens) == (2, 68)
    fixed = read_prompts(load.model_copy(update={"output_lengths": "fixed"}), 128)
    assert fixed is not None and fixed.tokens == 60 + 128
    assert read_prompts(ServingLoad(), 128) is None
    file.write_text('{"prompt": "a\u2028b", "output_tokens": 2}\n\n', encoding="utf-8")
    odd = read_prompts(load, 128)
    assert odd is not None and (odd.prompts, odd.tokens) == (1, 5 + 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "hold no line"),
        ('{"prompt": "a"}', "output_tokens"),
        ('{"prompt": "a", "output_tokens": 3}\n{"text": "b"}', "Line 2"),
        ("not json", "Line 1"),
        ('{"prompt": "a", "output_tokens": 0}', "above 0"),
        ('{"prompt": "a", "output_tokens": true}', "above 0"),
        ("\n\n", "hold no line"),
    ],
)
def test_prompts_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(ThroughputError, match=message):
        read_prompts(ServingLoad(prompts=str(file), output_lengths="data"), 128)
    for name in ("p.txt", "missing.jsonl"):
        with pytest.raises(ThroughputError, match=name):
            read_prompts(ServingLoad(prompts=str(tmp_path / name)), 128)
