"""What our models of the harness have in common, whichever engine runs them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

from lm_eval.api.model import LM

from streamline_bench.harness.boundary import share_log, user_errors
from streamline_bench.harness.identity import separate_cache

__all__ = ["CompressedModel"]

Made = TypeVar("Made", bound="CompressedModel")


class CompressedModel(LM):  # type: ignore[misc]
    """Goes in front of the harness's class: a user's mistake ends its command with a sentence."""

    @classmethod
    def create_from_arg_string(
        cls: type[Made], arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Made:
        """Create the model from ``key=value,...``; see the class."""
        share_log()
        with user_errors():
            return super().create_from_arg_string(arg_string, additional_config)  # type: ignore[no-any-return]

    @classmethod
    def create_from_arg_obj(
        cls: type[Made], arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Made:
        """Create the model from a mapping; see the class."""
        share_log()
        with user_errors():
            return super().create_from_arg_obj(arg_dict, additional_config)  # type: ignore[no-any-return]

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Accept a response cache, kept apart by model (see :mod:`.identity`)."""
        with user_errors():
            separate_cache(cache_hook.dbdict, self._identity())
        super().set_cache_hook(cache_hook)

    @abstractmethod
    def _identity(self) -> str:
        """Name of what decides the answers, for caches."""
