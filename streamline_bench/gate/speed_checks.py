"""Speed of one row against the reference's: only like with like.

Tokens per second are compared on the same machine only, ratios to the dense model of the same run
wherever device, engine, precision, threads and workload are the same. What one side did not note
(files of earlier versions) is taken to be the same. The interval of a change comes from the
extremes of the rounds, or of the ratio's interval, on both sides.
"""

from __future__ import annotations

from streamline_bench.gate.evidence import Evidence
from streamline_bench.gate.reference import RowReference
from streamline_bench.gate.result import Check, Quantity, Status
from streamline_bench.throughput.speed import Speed

__all__ = ["speed_checks"]

_ALIKE = (
    "device",
    "engine",
    "engine_version",
    "mode",
    "dtype",
    "clock",
    "threads",
    "batch_size",
    "prompt_tokens",
    "output_tokens",
    "request_load",
)


def speed_checks(
    run: Evidence, against: Evidence, now: RowReference, before: RowReference, tolerated: float
) -> list[Check]:
    """Check tokens per second and the ratio to dense, if the reference has them.

    Args:
        tolerated: relative loss that is none (0.05).
    """
    old, new = before.speed, now.speed
    if old is None or old.status == "failed":
        return []
    if new is None:
        return [_missing(now, "tokens/s", old, "the run has no throughput")]
    if new.status == "failed":
        return [_missing(now, "tokens/s", old, new.reason or "the measurement failed")]
    reason = _unlike(new, old)
    if reason is not None:
        return [_left_out(now, "tokens/s", reason)]
    checks = [_tokens(run, against, now, old, new, tolerated)]
    if now.is_dense or old.ratio is None:
        return checks
    if new.ratio is None:
        return [*checks, _missing(now, "speed-up", old, "the run has no ratio to dense")]
    ends = (old.ratio_low, old.ratio_high), (new.ratio_low, new.ratio_high)
    return [*checks, _check(now, "speed-up", (old.ratio, new.ratio), ends, tolerated)]


def _unlike(new: Speed, old: Speed) -> str | None:
    """Why the two speeds must not be compared."""
    for name in _ALIKE:
        here, there = getattr(new, name), getattr(old, name)
        if here is not None and there is not None and here != there:
            return f"{name.replace('_', ' ')} is {here} here, {there} there"
    return None


def _tokens(
    run: Evidence,
    against: Evidence,
    row: RowReference,
    old: Speed,
    new: Speed,
    tolerated: float,
) -> Check:
    machines = against.figures.machine, run.figures.machine
    if None in machines:
        return _left_out(row, "tokens/s", "the machine is not known on both sides")
    if machines[0] != machines[1]:
        return _left_out(row, "tokens/s", "other machine")
    if old.output_tokens_per_second is None or new.output_tokens_per_second is None:
        return _left_out(row, "tokens/s", "not measured on both sides")
    figures = old.output_tokens_per_second, new.output_tokens_per_second
    return _check(row, "tokens/s", figures, ((old.low, old.high), (new.low, new.high)), tolerated)


Ends = tuple[float | None, float | None]


def _check(
    row: RowReference,
    quantity: Quantity,
    figures: tuple[float, float],
    ends: tuple[Ends, Ends],
    tolerated: float,
) -> Check:
    old, new = figures
    (old_low, old_high), (new_low, new_high) = ends
    low = new_low / old_high - 1 if new_low is not None and old_high else None
    high = new_high / old_low - 1 if new_high is not None and old_low else None
    change = new / old - 1
    status: Status = "ok"
    if change < -tolerated:
        status = "regressed" if high is not None and high < 0 else "cannot tell"
    return Check(
        row=row.label,
        quantity=quantity,
        status=status,
        reference=old,
        value=new,
        change=change,
        low=low,
        high=high,
        how="extremes of the rounds" if quantity == "tokens/s" else "intervals of both ratios",
    )


def _left_out(row: RowReference, quantity: Quantity, reason: str) -> Check:
    return Check(row=row.label, quantity=quantity, status="not compared", reason=reason)


def _missing(row: RowReference, quantity: Quantity, old: Speed, reason: str) -> Check:
    return Check(
        row=row.label,
        quantity=quantity,
        status="missing",
        reference=old.ratio if quantity == "speed-up" else old.output_tokens_per_second,
        reason=reason,
    )
