"""Walking order and legs, by playing walks on made-up stacks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamline_bench.harness.trunk.stack import Stack, Step, legs_of, solo_reason, walks_of


def stack(names: str, root: str = "r") -> Stack:
    return Stack({"family": root}, tuple(Step(i, False, name) for i, name in enumerate(names)))


@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=9))
def test_every_walk_finds_its_states_and_runs_each_beginning_once(names: list[str]) -> None:
    stacks = {str(number): stack(each) for number, each in enumerate(names)}
    run: list[str] = []
    for labels in walks_of(stacks):
        states: dict[int, str] = {}
        for leg in legs_of(labels, stacks):
            whole = names[int(leg.label)]
            for boundary in [b for b in states if b > leg.start]:
                del states[boundary]
            state = states[leg.start] if leg.start else ""
            assert state == whole[: leg.start]
            for boundary in range(leg.start + 1, len(whole) + 1):
                state += whole[boundary - 1]
                run.append(state)
                if boundary in leg.keep:
                    states[boundary] = state
    beginnings = {each[:end] for each in names for end in range(1, len(each) + 1)}
    assert sorted(run) == sorted(beginnings)


def test_a_dense_model_and_dropped_blocks() -> None:
    stacks = {
        "dense": stack("abcdef"),
        "early": stack("abef"),
        "late": stack("abcdf"),
        "last": stack("abcd"),
    }
    (order,) = walks_of(stacks)
    assert order == ["last", "dense", "late", "early"]
    starts = {leg.label: leg.start for leg in legs_of(order, stacks)}
    assert starts == {"last": 0, "dense": 4, "late": 4, "early": 2}
    keeps = {leg.label: set(leg.keep) for leg in legs_of(order, stacks)}
    assert keeps == {"last": {2, 4}, "dense": set(), "late": set(), "early": set()}


def test_models_that_begin_otherwise_are_told_apart() -> None:
    stacks = {"dense": stack("abc"), "other": stack("abc", root="x"), "first": stack("bc")}
    assert walks_of(stacks) == [["dense"], ["other"], ["first"]]
    assert solo_reason("other", "dense", stacks).endswith("its family is x, not r")
    assert "its first layer differs" in solo_reason("first", "dense", stacks)
    assert "first layer" in solo_reason("dense", "dense", stacks)
    assert "no other model" in solo_reason("dense", "dense", {"dense": stack("a")})
