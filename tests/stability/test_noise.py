"""Noise floor: dense against dense again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from streamline_bench.errors import SamplesError
from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.noise import above_noise, flips_above, noise_floor
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings

FAST = Settings(draws=200)
TASKS = {"easy": (200, None), "hard": (120, None)}


def again(samples: Samples, label: str, scale: float, seed: int) -> Samples:
    """The same model with log-likelihoods that differ by rounding of this size."""
    source = np.random.default_rng(seed)
    frame = samples.frame.copy()
    scores = np.array(frame["loglikelihoods"].tolist())
    scores = scores + scale * source.normal(size=scores.shape)
    chosen = scores.argmax(axis=1)
    frame["loglikelihoods"] = scores.tolist()
    frame["prediction"] = chosen
    frame["correct"] = (chosen == frame["gold"].to_numpy(dtype=int)).tolist()
    frame["run"] = label
    return Samples(frame, samples.info.model_copy(update={"run": label}))


def flip_share(first: Samples, second: Samples, task: str | None = None) -> float:
    rows = slice(None) if task is None else (first.frame["task"] == task).to_numpy()
    one, other = (s.frame["correct"].to_numpy(dtype=bool)[rows] for s in (first, second))
    return float((one != other).mean())


def test_floor_is_the_mean_over_repetitions(pair: Callable[..., tuple[Samples, Samples]]) -> None:
    dense, _ = pair(TASKS)
    repeats = [again(dense, f"batch {size}", 0.3, size) for size in (4, 16)]
    floor = noise_floor(dense, repeats, settings=FAST)
    assert floor.repeats == ("batch 4", "batch 16") and floor.n == 320
    shares = [flip_share(dense, repeat) for repeat in repeats]
    assert floor.flips.value == pytest.approx(np.mean(shares)) and min(shares) > 0
    assert floor.agreement.value == pytest.approx(1 - np.mean(shares))
    by_task = {task.task: task for task in floor.tasks}
    for task in TASKS:
        expected = np.mean([flip_share(dense, repeat, task) for repeat in repeats])
        assert by_task[task].flips.value == pytest.approx(expected)
        assert by_task[task].choice_kl is not None and by_task[task].choice_kl > 0
    assert floor.macro_flips == pytest.approx(np.mean([t.flips.value for t in floor.tasks]))
    assert floor.flips.low == pytest.approx(
        proportion_confint(np.mean(shares) * 320, 320, method="wilson")[0]
    )


def test_flips_are_shown_above_it(pair: Callable[..., tuple[Samples, Samples]]) -> None:
    dense, pruned = pair(TASKS, noise=3.0)
    floor = noise_floor(dense, [again(dense, "again", 0.1, 1)], settings=FAST)
    result = above_noise(compare_answers(dense, pruned, settings=FAST), floor)
    for found, share in (
        (result.micro, flip_share(dense, pruned)),
        (result.tasks[0], flip_share(dense, pruned, "easy")),
    ):
        assert found.flips_above_noise is not None and found.noise_flips is not None
        assert found.flips_above_noise.value == pytest.approx(share - found.noise_flips)
        assert found.flips_above_noise.low > 0
    tasks = [task.flips_above_noise.value for task in result.tasks]
    assert result.macro.flips_above_noise is not None
    assert result.macro.flips_above_noise.value == pytest.approx(np.mean(tasks))


def test_another_repetition_is_not_above_the_floor(
    pair: Callable[..., tuple[Samples, Samples]],
) -> None:
    dense, _ = pair(TASKS)
    floor = noise_floor(dense, [again(dense, "a", 0.2, 1)], settings=FAST)
    other = compare_answers(dense, again(dense, "b", 0.2, 2), settings=FAST)
    excess = above_noise(other, floor).micro.flips_above_noise
    assert excess is not None and excess.low < 0 < excess.high


def test_no_flips_at_all_keep_an_interval(pair: Callable[..., tuple[Samples, Samples]]) -> None:
    dense, _ = pair(TASKS)
    floor = noise_floor(dense, [dense], settings=FAST)
    assert floor.flips.value == 0 and floor.flips.high > 0 and floor.choice_kl == 0
    excess = above_noise(
        compare_answers(dense, dense, settings=FAST), floor
    ).micro.flips_above_noise
    assert excess is not None and excess.low < 0 == excess.value < excess.high


def test_excess_covers_the_truth() -> None:
    source = np.random.default_rng(0)
    n, covered = 150, 0
    for _ in range(400):
        floor, share = source.binomial(n, [0.04, 0.15]) / n
        found = flips_above(share, floor, n, 0.95)
        covered += found.low <= 0.11 <= found.high
    assert covered / 400 > 0.93


def test_tasks_that_the_floor_does_not_know(pair: Callable[..., tuple[Samples, Samples]]) -> None:
    dense, pruned = pair(TASKS)
    floor = noise_floor(dense, [dense], tasks=["easy"], settings=FAST)
    result = above_noise(compare_answers(dense, pruned, settings=FAST), floor)
    known = {task.task: task.noise_flips for task in result.tasks}
    assert known == {"easy": 0.0, "hard": None}
    assert result.micro.flips_above_noise is None and result.macro.noise_flips is None


def test_summaries_have_the_floor_of_the_tasks_that_they_are_over(
    pair: Callable[..., tuple[Samples, Samples]],
) -> None:
    dense, pruned = pair(TASKS, noise=3.0)
    noisy = again(dense, "again", 3.0, 1)
    hard = (dense.frame["task"] == "hard").to_numpy()
    for column in ("loglikelihoods", "prediction", "correct"):
        kept = noisy.frame[column].copy()
        kept[~hard] = dense.frame[column][~hard]
        noisy.frame[column] = kept
    floor = noise_floor(dense, [noisy], settings=FAST)
    assert floor.flips.value > 0.1
    result = above_noise(compare_answers(dense, pruned, tasks=["easy"], settings=FAST), floor)
    share = flip_share(dense, pruned, "easy")
    for found in (result.tasks[0], result.micro, result.macro):
        assert found is not None and found.flips_above_noise is not None
        assert found.noise_flips == 0.0
        assert found.flips_above_noise.value == pytest.approx(share)


def test_a_task_of_one_repetition_only_is_in_the_floor(
    pair: Callable[..., tuple[Samples, Samples]],
) -> None:
    dense, _ = pair(TASKS)
    first, second = (again(dense, f"batch {size}", 0.3, size) for size in (4, 16))
    only = Samples(first.frame[first.frame["task"] == "easy"], first.info)
    floor = noise_floor(dense, [only, second], common_only=True, settings=FAST)
    shares = {task.task: task.flips.value for task in floor.tasks}
    assert list(shares) == ["easy", "hard"] and floor.n == 320
    repeats = {"easy": (first, second), "hard": (second,)}
    for task, parts in repeats.items():
        assert shares[task] == pytest.approx(np.mean([flip_share(dense, p, task) for p in parts]))
    assert floor.flips.value == pytest.approx((200 * shares["easy"] + 120 * shares["hard"]) / 320)
    assert floor.macro_flips == pytest.approx(np.mean(list(shares.values())))


def test_groups_have_the_floor_of_their_tasks(
    pair: Callable[..., tuple[Samples, Samples]],
) -> None:
    dense, pruned = pair(TASKS, noise=3.0, groups={"both": ["easy", "hard"]})
    floor = noise_floor(dense, [again(dense, "again", 0.3, 1)], settings=FAST)
    (group,) = above_noise(compare_answers(dense, pruned, settings=FAST), floor).groups
    assert group.noise_flips == pytest.approx(floor.flips.value)
    assert group.flips_above_noise is not None
    assert group.flips_above_noise.value == pytest.approx(
        flip_share(dense, pruned) - floor.flips.value
    )


def test_no_repetition(pair: Callable[..., tuple[Samples, Samples]]) -> None:
    with pytest.raises(SamplesError, match="'dense' needs at least one repetition"):
        noise_floor(pair(TASKS)[0], [])


def test_noise_of_grades(lm_eval_outputs: Path) -> None:
    dense, other = (
        load_samples(lm_eval_outputs / "graded" / name, run=name, progress=False)
        for name in ("dense", "pruned")
    )
    tasks = ["graded_summary"]
    floor = noise_floor(dense, [other], tasks=tasks, settings=FAST)
    assert (floor.flips, floor.n, floor.tasks) == (None, 0, ())
    by_metric = {grade.metric: grade for grade in floor.grades}
    before, now = (
        np.array([found["rouge1"] for found in frame.loc[frame["task"] == tasks[0], "metrics"]])
        for frame in (dense.frame, other.frame)
    )
    grade = by_metric["rouge1"]
    assert grade.moved.value == pytest.approx((before != now).mean())
    assert grade.difference == pytest.approx((now - before).mean() / 100)
    result = above_noise(compare_answers(dense, other, tasks=tasks, settings=FAST), floor)
    found = next(each for each in result.grades if each.metric == "rouge1")
    assert found.noise_moved == grade.moved.value
    assert found.moved_above_noise is not None and found.moved_above_noise.value == 0


def test_noise_of_texts(lm_eval_outputs: Path) -> None:
    dense, pruned = (
        load_samples(lm_eval_outputs / name, run=name, progress=False)
        for name in ("dense", "pruned")
    )
    alone = {"tasks": ["toy_gen"], "settings": FAST}
    result = compare_answers(dense, pruned, **alone)
    (changed,) = {1 - text.identical.value for text in result.generations}
    assert changed > 0
    floor = noise_floor(dense, [pruned, dense.relabelled("again")], **alone)
    assert [text.changed.value for text in floor.texts] == pytest.approx(
        [changed / 2] * len(result.generations)
    )
    above = above_noise(result, floor)
    for text in above.generations:
        assert text.noise_changed == pytest.approx(changed / 2)
        assert text.changed_above_noise is not None
        assert text.changed_above_noise.value == pytest.approx(changed / 2)
