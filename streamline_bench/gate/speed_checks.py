"""Speed of a run against a reference, against earlier runs of the machine, or against a base.

What is compared are logarithms of figures with a standard error over blocks, in each of which every
model was started anew. Ratios to the dense model of the same blocks compare wherever engine,
precision, threads and workload are the same; tokens per second and latencies themselves on the same
machine only. Never are extremes compared: they move apart with every further round.

- A reference: Welch's test of the two figures.
- A history: the last runs of this machine say how much a figure changes from run to run, and
  Student's prediction interval whether this run is one more of them. Where figures wander rather
  than scatter (their variance is larger than that between neighbours), the interval is that of a
  local level model, which grows with the number of runs.
- A base in the same measurement: the ratio to it, with its own interval over the blocks.

p and interval are adjusted over all figures of all rows by Holm. A loss counts as a regression if
it is significant and larger than what is tolerated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from streamline_bench.gate.evidence import Reference, RowReference
from streamline_bench.gate.history import FEWEST_RUNS
from streamline_bench.gate.result import Check, Quantity, Status, Thresholds
from streamline_bench.stability.statistics.score import holm
from streamline_bench.throughput.speed import ServedFigure, Speed

_ALIKE = (
    "device engine engine_version mode dtype clock threads accelerators batch_size prompt_tokens "
    "output_tokens request_load"
).split()
"""Fields of a speed that must agree."""


Key = tuple[Quantity, str | None]
"""What must be the same to be compared: a quantity, at a load."""


@dataclass(frozen=True)
class Figure:
    """One figure of a row.

    Attributes:
        load: at which it was served; None for batches.
        error: standard error of its logarithm, over ``blocks``; None with one block.
        own: of the model itself, so that it compares on the same machine only; else a ratio.
    """

    quantity: Quantity
    load: str | None
    value: float
    error: float | None
    blocks: int
    own: bool
    lower_is_better: bool = False

    @property
    def key(self) -> Key:
        """Quantity and load."""
        return self.quantity, self.load


@dataclass(frozen=True)
class Change:
    """The logarithm of now / before, with its standard error and degrees of freedom."""

    log: float
    error: float | None
    freedom: float

    def p_value(self) -> float | None:
        """Of "nothing changed"; None without an error."""
        from scipy.special import stdtr  # scipy.stats takes a second to import

        if self.error is None:
            return None
        if self.error == 0:
            return float(self.log == 0)
        return float(2 * stdtr(self.freedom, -abs(self.log) / self.error))

    def interval(self, confidence: float, comparisons: int = 1) -> tuple[float, float] | None:
        """Ends of the interval of the logarithm; None without an error."""
        from scipy.special import stdtrit

        if self.error is None:
            return None
        half = float(stdtrit(self.freedom, 1 - (1 - confidence) / comparisons / 2)) * self.error
        return self.log - half, self.log + half


@dataclass(frozen=True)
class _Test:
    row: str
    figure: Figure
    before: float
    change: Change
    how: str


def figures(speed: Speed, *, ratios_only: bool = False) -> Iterator[Figure]:
    """Yield what is compared: tokens per second and speed-up, or all that a served model has.

    Of a served model, the ratio to dense is compared where there is one, else the figure itself.
    """
    blocks = speed.blocks or 1
    if speed.served:
        served = (_served(figure) for figure in speed.served)
        yield from (figure for figure in served if figure.value > 0)  # 0: nothing keeps the limits
    elif speed.output_tokens_per_second is not None and not ratios_only:
        value, error = speed.output_tokens_per_second, speed.error
        yield Figure("tokens/s", None, value, error, blocks, own=True)
    if speed.ratio is not None:
        yield Figure("speed-up", None, speed.ratio, speed.ratio_error, blocks, own=False)


def _served(figure: ServedFigure) -> Figure:
    ratio = figure.ratio is not None
    return Figure(
        f"{figure.metric} ratio" if ratio else figure.metric,  # type: ignore[arg-type]
        figure.load,
        figure.ratio if figure.ratio is not None else figure.value,
        figure.ratio_error if ratio else figure.error,
        figure.blocks,
        own=not ratio,
        lower_is_better=figure.lower_is_better,
    )


def against_reference(
    run: Reference, against: Reference, rows: Sequence[tuple[RowReference, RowReference]]
) -> Iterator[Check | _Test]:
    """Yield a check for what cannot be compared, and a test for what can.

    Args:
        rows: now and before.
    """
    other = _other_machine(run, against)
    for now, before in rows:
        old, new = before.speed, now.speed
        if old is None or old.status == "failed":
            continue
        known = list(_shown(old, now.is_dense))
        if new is None or new.status == "failed":
            first = next((figure.value for figure in known), None)
            yield _without(now, "tokens/s", "missing", _gone(now), first)
            continue
        reason = unlike(new, old)
        if reason is not None:
            yield _without(now, "tokens/s", "not compared", reason)
            continue
        have = {figure.key: figure for figure in _shown(new, now.is_dense)}
        for figure in known:
            found = have.get(figure.key)
            if found is None:
                gone = "no ratio to dense" if not figure.own else f"no {figure.quantity}"
                load = f" at {figure.load}" if figure.load else ""
                yield _without(
                    now, figure.quantity, "missing", f"the run has {gone}{load}", figure.value,
                    figure.load,
                )  # fmt: skip
            elif figure.own and other is not None:
                yield _without(now, figure.quantity, "not compared", other, task=figure.load)
            else:
                how = "blocks of both runs" + ("" if figure.own else ", paired to dense")
                yield _Test(now.label, found, figure.value, welch(found, figure), how)


def _shown(speed: Speed, is_dense: bool) -> Iterator[Figure]:
    """The dense model is its own measure: no ratios."""
    return (figure for figure in figures(speed) if figure.own or not is_dense)


def _other_machine(run: Reference, against: Reference) -> str | None:
    if run.machine is None or against.machine is None:
        return "the machine is not known on both sides"
    return None if run.machine == against.machine else "other machine"


def welch(now: Figure, before: Figure) -> Change:
    """The change between two runs, each with its own blocks."""
    log = math.log(now.value / before.value)
    parts = [(each.error, each.blocks - 1) for each in (now, before)]
    known = [(error, blocks) for error, blocks in parts if error is not None and blocks > 0]
    if len(known) < 2:
        return Change(log, None, 0)
    total = sum(error**2 for error, _ in known)
    spread = sum(error**4 / blocks for error, blocks in known)
    return Change(log, math.sqrt(total), total**2 / spread if spread else 1)


def against_base(rows: Sequence[RowReference], base: str) -> Iterator[Check | _Test]:
    """Yield what every other row of one measurement has of the base's speed.

    What the base has is missing where a row does not have it: a load that its server did not
    survive, a goodput of 0.
    """
    own = next((row.speed for row in rows if row.label == base), None)
    wanted = [] if own is None else [figure for figure in figures(own) if figure.own]
    for now in rows:
        if now.label == base:
            continue
        if now.speed is None or now.speed.status == "failed":
            yield _without(now, "speed-up", "missing", _gone(now))
            continue
        ratios = [figure for figure in figures(now.speed, ratios_only=True) if not figure.own]
        for figure in ratios:
            change = Change(math.log(figure.value), figure.error, figure.blocks - 1)
            yield _Test(now.label, figure, 1.0, change, f"{figure.blocks} blocks, paired")
        have = {figure.key for figure in ratios}
        alone = {figure.key for figure in figures(now.speed) if figure.own}
        for figure in wanted:
            if _ratio_of(figure, now.speed) not in have:
                yield _without_ratio(now, figure, base, alone=figure.key in alone)


def _ratio_of(figure: Figure, speed: Speed) -> Key:
    """Quantity and load of the ratio that a figure has to the same one of dense."""
    name = f"{figure.quantity} ratio" if speed.served else "speed-up"
    return name, figure.load  # type: ignore[return-value]


def _without_ratio(row: RowReference, figure: Figure, base: str, *, alone: bool) -> Check:
    """A figure of the base that a row has no ratio to.

    Args:
        alone: the row has the figure, but not in every block in which the base has it.
    """
    if alone:
        reason = f"'{base}' and the row do not both have it in every block"
        return _without(row, figure.quantity, "cannot tell", reason, task=figure.load)
    reason = f"'{base}' has it, the row has not, or 0"
    return _without(row, figure.quantity, "missing", reason, task=figure.load)


def against_history(
    rows: Sequence[RowReference], history: Sequence[Mapping[str, Speed]]
) -> Iterator[Check | _Test]:
    """Yield whether this run is one more of the machine's earlier ones.

    Args:
        history: label -> speed, of every earlier run, in order.
    """
    for now in rows:
        earlier = [run[now.label] for run in history if now.label in run]
        if now.speed is None or now.speed.status == "failed":
            if earlier:
                yield _without(now, "tokens/s", "missing", _gone(now))
            continue
        alike = [
            {figure.key: figure.value for figure in figures(old)}
            for old in earlier
            if old.status == "ok" and unlike(now.speed, old) is None
        ]
        have = {figure.key: figure for figure in _shown(now.speed, now.is_dense)}
        for quantity, load in dict.fromkeys(key for old in alike for key in old):
            if (quantity, load) not in have and _usual(alike, (quantity, load), now.is_dense):
                yield _without(now, quantity, "missing", "the run has no such figure", task=load)
        for figure in have.values():
            values = [old[figure.key] for old in alike if figure.key in old]
            if len(values) < FEWEST_RUNS:
                reason = (
                    f"{len(values)} earlier runs of this machine are alike, {FEWEST_RUNS} needed"
                )
                yield _without(now, figure.quantity, "not compared", reason, task=figure.load)
                continue
            change = predicted(figure.value, values)
            before = math.exp(math.log(figure.value) - change.log)
            yield _Test(now.label, figure, before, change, f"{len(values)} earlier runs")


def _usual(earlier: Sequence[Mapping[Key, float]], key: Key, is_dense: bool) -> bool:
    """Whether enough earlier runs have a figure that this row is compared by."""
    own = not is_dense or not (key[0] == "speed-up" or key[0].endswith(" ratio"))
    return own and sum(key in old for old in earlier) >= FEWEST_RUNS


def predicted(value: float, earlier: Sequence[float]) -> Change:
    """How far a value is from the mean of earlier ones, with the error of such a prediction.

    The level wanders by a step of variance w from run to run, and each run scatters about it with
    variance e. Of K runs, the variance is e + w (K + 1) / 6 on average, and half the mean square
    of the steps between neighbours is e + w / 2; from the two, e and w. The next run then differs
    from the mean of the K by e (1 + 1/K) + w (K + 1)(2K + 1) / (6K) on average.
    """
    logs = [math.log(each) for each in earlier]
    count = len(logs)
    whole = statistics.variance(logs)
    steps = statistics.fmean((b - a) ** 2 for a, b in pairwise(logs)) / 2
    wander = max(0.0, 6 * (whole - steps) / (count - 2))
    scatter = max(0.0, steps - wander / 2) if wander else whole
    ahead = wander * (count + 1) * (2 * count + 1) / (6 * count)
    variance = max(scatter * (1 + 1 / count) + ahead, whole * (1 + 1 / count))
    return Change(math.log(value) - statistics.fmean(logs), math.sqrt(variance), count - 1)


def speed_checks(found: Sequence[Check | _Test], allowed: Thresholds) -> list[Check]:
    """Decide every test, adjusted over all of them."""
    tests = [each for each in found if isinstance(each, _Test)]
    level = 1 - allowed.confidence
    p_values = [p for test in tests if (p := test.change.p_value()) is not None]
    adjusted = iter(holm(p_values, level))
    checks = []
    for each in found:
        if isinstance(each, Check):
            checks.append(each)
        elif each.change.error is None:
            checks.append(_checked(each, allowed, None, 1))
        else:
            checks.append(_checked(each, allowed, *next(adjusted)))
    return checks


def _checked(test: _Test, allowed: Thresholds, p_value: float | None, comparisons: int) -> Check:
    sign = -1 if test.figure.lower_is_better else 1
    log = test.change.log
    ends = test.change.interval(allowed.confidence, comparisons)
    low, high = ends if ends is not None else (None, None)
    status: Status = "ok"
    if sign * log < math.log1p(-allowed.speed):
        significant = p_value is not None and p_value < 1 - allowed.confidence
        status = "regressed" if significant else "cannot tell"
    return Check(
        row=test.row, quantity=test.figure.quantity, task=test.figure.load, status=status,
        reference=test.before, value=test.figure.value, change=math.expm1(log),
        low=None if low is None else math.expm1(low),
        high=None if high is None else math.expm1(min(high, 700.0)),
        p_value=p_value, how=test.how,
    )  # fmt: skip


def _gone(row: RowReference) -> str:
    """Why a row has no speed."""
    if row.speed is None:
        return row.failed or "the run has no throughput"
    return row.speed.reason or "the measurement failed"


def _without(
    row: RowReference,
    quantity: Quantity,
    status: Status,
    reason: str,
    figure: float | None = None,
    task: str | None = None,
) -> Check:
    return Check(
        row=row.label, quantity=quantity, task=task, status=status, reference=figure, reason=reason
    )


def unlike(new: Speed, old: Speed) -> str | None:
    """Why the two speeds must not be compared."""
    for name in _ALIKE:
        here, there = getattr(new, name), getattr(old, name)
        if here is not None and there is not None and here != there:
            return f"{name.replace('_', ' ')} is {here} here, {there} there"
    return None
