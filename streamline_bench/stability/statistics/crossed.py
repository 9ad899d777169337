"""One number from several runs of a recipe: questions crossed with seeds and calibrations.

Every run answers the same questions, so that a score has the effects of its question, its seed, its
calibration text, of seed and calibration together, and of each of these with the question. The mean
over all of them varies for two reasons: other questions could have been asked, and the method could
have been run with other seeds and texts.

- **Questions.** The variance of the mean score of a question, over questions (clusters of them)
  within each task, as of one run. It holds the interactions with questions, too.
- **Method.** The mean square of the effects of seeds, of calibrations, and of both together, each
  less what questions alone would make of it: the variance, over questions, of the same effect of a
  question. These are the unbiased estimates of a crossed analysis of variance (G. W. Snedecor and
  W. G. Cochran, Statistical Methods, 8th ed., chapter 16), for tasks of any size; a negative one
  counts as 0.

The interval adds the squares of both parts' distances, each with its own quantile of Student's
distribution (G. Y. Zou and A. Donner, Statistics in Medicine 27 (2008) 1693-1702): that of the
method has Satterthwaite's degrees of freedom, one for two seeds. One Satterthwaite distribution for
the whole is too narrow where few seeds decide (87 % for 95 %). In ``coverage_of_seeds.py`` of
``tests/benchmarks`` this holds 94 to 97 %.

Two runs are the exception. The square of their one difference often falls below what questions make
of it, which says nothing about the method, so that an interval from what is left holds 91 % only.
There the whole square keeps Student's distance of one degree of freedom, and what questions make of
it, which is well known, is taken from the variance of the questions instead: 96 to 99 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from streamline_bench.errors import SamplesError
from streamline_bench.stability.comparison import VarianceParts
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.statistics import FloatArray, IntArray
from streamline_bench.stability.statistics.intervals import t_quantile

_Chosen = Callable[[FloatArray], FloatArray]
"""From scores [seeds, calibrations, n] to means or effects of every question, [rows, n]."""


@dataclass(frozen=True)
class CrossedTask:
    """Scores of one task.

    Attributes:
        scores: float64 [seeds, calibrations, n].
        clusters: int64 [n], which questions belong together; None if all stand alone.
        weights: float64 [n], of the questions in the mean; None: all the same.
    """

    scores: FloatArray
    clusters: IntArray | None = None
    weights: FloatArray | None = None


@dataclass(frozen=True)
class CrossedError:
    """Variances of a mean, each with its degrees of freedom: of questions, and of methods.

    Attributes:
        question: (variance, freedom) that the choice of questions gives.
        methods: the same of seeds and calibrations, for every recipe that the mean is of.
    """

    question: tuple[float, float]
    methods: tuple[tuple[float, float], ...] = ()

    @property
    def variance(self) -> float:
        """Of the mean."""
        return self.question[0] + sum(variance for variance, _ in self.methods)

    def half(self, confidence: float) -> float:
        """Half of the interval: every part's own distance, squares added."""
        return math.hypot(
            *(
                t_quantile(confidence, freedom) * math.sqrt(variance)
                for variance, freedom in (self.question, *self.methods)
                if variance > 0
            ),
            0.0,
        )

    def interval(self, value: float, confidence: float, method: str) -> Estimate:
        """The mean with its interval."""
        half = self.half(confidence)
        error = math.sqrt(self.variance)
        return Estimate(
            value=value, standard_error=error, low=value - half, high=value + half, method=method
        )

    def p_value(self, value: float) -> float:
        """Two-sided p of no difference: 1 - the confidence at which the interval begins at 0."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.half(middle) < abs(value) else (low, middle)
        return 1 - low if value else 1.0

    def needed(self, value: float, documents: int, confidence: float, power: float) -> int | None:
        """Documents at which ``value`` would be found; None where more of them cannot do it.

        Seeds and calibrations stay as they are; what they add to the variance stays, too.
        """
        levels = t_quantile(confidence, math.inf) + t_quantile(2 * power - 1, math.inf)
        left = (value / levels) ** 2 - (self.variance - self.question[0])
        return math.ceil(documents * self.question[0] / left) if left > 0 else None


def crossed_estimate(
    tasks: Sequence[CrossedTask], confidence: float = 0.95
) -> tuple[Estimate, VarianceParts]:
    """Mean over tasks, seeds and calibrations with its interval, and the parts of its variance.

    Raises:
        SamplesError: there is no task, or tasks have different seeds or calibrations.
    """
    runs = _runs(tasks)
    seeds, calibrations = runs.shape
    effects = _effects(tasks, runs)
    seed, calibration, both = (effects.get(name) for name in ("seed", "calibration", "both"))
    parts = VarianceParts(
        seeds=seeds,
        calibrations=calibrations,
        question=_questions(tasks, _of_run)[0] / (seeds * calibrations),
        seed=_component(seed, both, calibrations),
        calibration=_component(calibration, both, seeds),
        both=None if both is None else max(0.0, both.excess),
        limits={name: effect.upper(confidence) for name, effect in effects.items()},
    )
    name = f"Student over questions, {seeds} seeds and {calibrations} calibrations"
    error = _error(tasks, runs, effects)
    return error.interval(float(runs.mean()), confidence, name), parts


def crossed_error(tasks: Sequence[CrossedTask]) -> CrossedError:
    """What is known of the error of the mean (SamplesError: as :func:`crossed_estimate`)."""
    runs = _runs(tasks)
    return _error(tasks, runs, _effects(tasks, runs))


def _error(
    tasks: Sequence[CrossedTask], runs: FloatArray, effects: dict[str, _Effect]
) -> CrossedError:
    return _with_methods(_questions(tasks, _of_mean), [(effects, runs)])


def method_variance(tasks: Sequence[CrossedTask]) -> float:
    """Variance that seeds and calibrations give the mean, beyond what questions give it."""
    runs = _runs(tasks)
    return _method(_effects(tasks, runs), *runs.shape)[0]


def _with_methods(
    question: tuple[float, float], recipes: Sequence[tuple[dict[str, _Effect], FloatArray]]
) -> CrossedError:
    """The error of a mean of these recipes, whose questions alone give it ``question``."""
    variance, methods = question[0], []
    for effects, runs in recipes:
        if [effect.freedom for effect in effects.values()] == [1]:
            (only,) = effects.values()
            variance -= only.noise / runs.size
            methods.append((only.square / runs.size, 1.0))
        else:
            methods.append(_method(effects, *runs.shape))
    return CrossedError((max(0.0, variance), question[1]), tuple(methods))


def crossed_difference(
    first: Sequence[CrossedTask], second: Sequence[CrossedTask]
) -> tuple[float, CrossedError]:
    """Mean of ``first`` - mean of ``second`` on the same questions, and what is known of its error.

    Questions are paired. Seeds and calibrations of the two are taken for independent.
    """
    paired = [
        CrossedTask((_of_mean(one.scores) - _of_mean(two.scores))[None], one.clusters, one.weights)
        for one, two in zip(first, second, strict=True)
    ]
    recipes = [
        (_effects(tasks, runs), runs) for tasks in (first, second) for runs in [_runs(tasks)]
    ]
    value = float(recipes[0][1].mean() - recipes[1][1].mean())
    return value, _with_methods(_questions(paired, _of_mean), recipes)


def _runs(tasks: Sequence[CrossedTask]) -> FloatArray:
    """Mean over tasks of every run, float64 [seeds, calibrations]."""
    shapes = {task.scores.shape[:2] for task in tasks}
    if len(shapes) != 1:
        raise SamplesError(
            "Runs can be folded where every task has the same seeds and calibrations; these tasks "
            f"have {sorted(shapes)}."
        )
    found: FloatArray = np.mean([_mean(task, task.scores) for task in tasks], axis=0)
    return found


def _of_mean(scores: FloatArray) -> FloatArray:
    found: FloatArray = scores.mean(axis=(0, 1))[None]
    return found


def _of_run(scores: FloatArray) -> FloatArray:
    return scores.reshape(-1, scores.shape[-1])


@dataclass(frozen=True)
class _Effect:
    """Mean square of an effect, what questions alone make of it, and its degrees of freedom."""

    square: float
    noise: float
    freedom: int

    @property
    def excess(self) -> float:
        """Unbiased estimate of the effect's own variance, which may be negative."""
        return self.square - self.noise

    def upper(self, confidence: float) -> float:
        """One-sided upper limit of the effect's own variance: chi-square's, less the noise.

        What seed and text do together is left in those of seed and of text, which is cautious. So
        is that no less counts than questions alone give: runs that happen to agree more closely
        show no smaller effect.
        """
        from scipy.special import gammaincinv  # scipy.stats takes a second to import

        least = 2 * float(gammaincinv(self.freedom / 2, 1 - confidence))
        return max(self.square, self.noise) * self.freedom / least - self.noise


def _effects(tasks: Sequence[CrossedTask], runs: FloatArray) -> dict[str, _Effect]:
    """The effects that the design has, of the mean over tasks ``runs`` [seeds, calibrations]."""
    seeds, calibrations = runs.shape
    sizes = {
        "seed": seeds - 1,
        "calibration": calibrations - 1,
        "both": (seeds - 1) * (calibrations - 1),
    }
    found = {}
    for name, freedom in sizes.items():
        if freedom:
            shown = _DEVIATIONS[name](runs[..., None])
            noise, _ = _questions(tasks, _DEVIATIONS[name])
            found[name] = _Effect(float(np.square(shown).sum()) / freedom, noise / freedom, freedom)
    return found


def _of_seed(scores: FloatArray) -> FloatArray:
    found: FloatArray = scores.mean(axis=1) - scores.mean(axis=(0, 1))
    return found


def _of_calibration(scores: FloatArray) -> FloatArray:
    found: FloatArray = scores.mean(axis=0) - scores.mean(axis=(0, 1))
    return found


def _of_both(scores: FloatArray) -> FloatArray:
    found: FloatArray = (
        scores
        - scores.mean(axis=1, keepdims=True)
        - scores.mean(axis=0, keepdims=True)
        + scores.mean(axis=(0, 1))
    )
    return found.reshape(-1, scores.shape[-1])


_DEVIATIONS = {"seed": _of_seed, "calibration": _of_calibration, "both": _of_both}
"""Effect -> from [seeds, calibrations, n] to the deviations of each of its levels, [levels, n]."""


def _component(effect: _Effect | None, both: _Effect | None, others: int) -> float | None:
    """Variance between the levels of one axis; None where it has one level."""
    if effect is None:
        return None
    return max(0.0, effect.excess - (both.excess / others if both else 0.0))


def _method(effects: dict[str, _Effect], seeds: int, calibrations: int) -> tuple[float, float]:
    """Variance that the method gives the mean, and its degrees of freedom (Satterthwaite's)."""
    variance, squares, unsure = 0.0, 0.0, 0.0
    for name, runs in (("seed", seeds), ("calibration", calibrations)):
        if (effect := effects.get(name)) is not None:
            variance += effect.excess / runs
            squares += effect.square / runs
            unsure += (effect.square / runs) ** 2 / effect.freedom
    if (both := effects.get("both")) is not None:
        variance -= both.excess / (seeds * calibrations)
    return max(0.0, variance), squares**2 / unsure if unsure else math.inf


def _mean(task: CrossedTask, scores: FloatArray) -> FloatArray:
    """Weighted mean over questions, [..., n] -> [...]."""
    found: FloatArray = np.average(scores, axis=-1, weights=task.weights)
    return found


def _questions(tasks: Sequence[CrossedTask], chosen: _Chosen) -> tuple[float, float]:
    """Sum over rows of what ``chosen`` makes of the scores: variance, over questions, of the mean.

    Returns:
        That sum, and Satterthwaite's degrees of freedom over the tasks.
    """
    total, squares = 0.0, 0.0
    for task in tasks:
        values = chosen(task.scores)
        weights = np.ones(values.shape[-1]) if task.weights is None else task.weights
        deviations = weights * (values - _mean(task, values)[:, None])
        if task.clusters is not None:
            order = np.zeros((len(values), int(task.clusters.max()) + 1))
            for row, of_row in zip(order, deviations, strict=True):
                row[:] = np.bincount(task.clusters, weights=of_row, minlength=len(row))
            deviations = order
        units = deviations.shape[-1]
        if units < 2:
            continue  # one question says nothing of how questions differ
        variance = units / (units - 1) * float(np.square(deviations).sum()) / weights.sum() ** 2
        total += variance / len(tasks) ** 2
        squares += (variance / len(tasks) ** 2) ** 2 / (units - 1)
    return total, total**2 / squares if squares else math.inf
