"""The processes of one launch, as its environment variables name them."""

from __future__ import annotations

import pytest

from streamline_bench.core.machine import ranks
from streamline_bench.errors import MissingDependencyError, RecipeError


@pytest.mark.parametrize("rank", ["2", "", "x"])
def test_processes_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(RecipeError, match=r"WORLD_SIZE=2, RANK=.*torchrun"):
        ranks.launched()


def test_one_gpu_is_not_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=r"cuda:1; give device cuda"):
        ranks.own_device("cuda:1")
    assert ranks.own_device("cpu") == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(RecipeError, match=r"processors only, and the device is cuda"):
        ranks.start_group("cuda")


def test_one_process_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks.joined("cpu") as one:
        assert (one.rank, one.count, one.main) == (0, 1, True)
        assert one.first(lambda: 3) == one.in_turn(lambda: 3) == 3
        assert one.sum_of([1.5]) == [1.5]
    said: list[str] = []
    ranks.say_once(lambda: said.append("a sentence"))
    assert said == ["a sentence"]


def test_a_missing_deepspeed_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(ranks, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r"pip install 'streamline-bench\[deepspeed\]'"
    ):
        ranks.start_group("cpu")
