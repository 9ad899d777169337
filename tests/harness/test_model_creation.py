"""What the harness's models of ours have in common, on a model without an engine."""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval.api.model import TemplateLM

from streamline_bench.errors import CacheError, RecipeError
from streamline_bench.harness import model_creation
from streamline_bench.harness.lm import StreamlineLM
from streamline_bench.harness.model_creation import CompressedModel


class Engine(TemplateLM):
    """Stands for the harness's class: refuses one argument."""

    eot_token_id = 0

    def __init__(self, recipe: str = "dense", **_: Any) -> None:
        super().__init__()
        if recipe != "dense":
            raise RecipeError(f"Unknown recipe '{recipe}'.")

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        return [len(string)]

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[Any]:
        return []

    loglikelihood_rolling = generate_until = _loglikelihood_tokens


class Model(CompressedModel, Engine):
    def _identity(self) -> str:
        return "model"


def test_made_from_a_string_and_from_a_mapping() -> None:
    assert type(Model.create_from_arg_string("recipe=dense")) is Model
    assert type(Model.create_from_arg_obj({"recipe": "dense"}, {"batch_size": 4})) is Model


def test_a_mistake_is_our_error_in_a_library_and_exit_code_2_under_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    makers = (
        lambda: Model.create_from_arg_string("recipe=x"),
        lambda: Model.create_from_arg_obj({"recipe": "x"}),
    )
    for make in makers:
        with pytest.raises(RecipeError):
            make()
    monkeypatch.setattr(model_creation, "_under_command", lambda: True)
    for make in makers:
        with pytest.raises(SystemExit) as stopped:
            make()
        assert stopped.value.code == 2
        assert capsys.readouterr().err == "streamline-bench: Unknown recipe 'x'.\n"


def test_a_cache_that_cannot_be_kept_apart_is_refused() -> None:
    class Hook:
        dbdict: dict[str, Any] = {}  # noqa: RUF012

    with pytest.raises(CacheError, match="cannot be kept apart by model"):
        Model().set_cache_hook(Hook())


def test_both_engines_go_this_way() -> None:
    assert StreamlineLM.__mro__[1] is CompressedModel
    for name in ("create_from_arg_string", "create_from_arg_obj", "set_cache_hook"):
        assert name not in vars(StreamlineLM)
