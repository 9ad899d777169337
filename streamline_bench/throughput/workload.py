"""What is asked of every model: how many prompts at once, how long, how often."""

from __future__ import annotations

import random
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator

from streamline_bench.core.recipe.frozen import Frozen

__all__ = ["Clock", "ServingLoad", "Workload", "prompts"]

Clock = Literal["wall", "cpu"]
"""What tokens are counted against: seconds that passed, or processor seconds that were spent."""

Positive = Annotated[int, Field(ge=1)]


class Workload(Frozen):
    """Offline batches of fixed length: every prompt and every output has exactly these tokens.

    Attributes:
        batch_sizes: sequences generated at once, one sweep point each.
        prompt_tokens, output_tokens: per sequence; the end-of-sequence token is ignored.
        rounds: measured rounds of every model at every point; models take turns.
        warmup_rounds: rounds before them, not counted.
        seed: of the prompts and of the bootstrap.
        prefix_caching: let the engine reuse keys and values of prompts it has seen.
    """

    batch_sizes: tuple[Positive, ...] = (1, 8, 32)
    prompt_tokens: Positive = 128
    output_tokens: Positive = 128
    rounds: Positive = 6
    warmup_rounds: Annotated[int, Field(ge=0)] = 1
    seed: int = 0
    prefix_caching: bool = False

    @field_validator("batch_sizes")
    @classmethod
    def _some_once(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes:
            raise ValueError("at least one batch size is needed")
        return tuple(dict.fromkeys(sizes))

    @property
    def sequence_tokens(self) -> int:
        """Prompt and output of one sequence."""
        return self.prompt_tokens + self.output_tokens


class ServingLoad(Frozen):
    """Requests sent to a running server at given rates.

    Attributes:
        request_rates: requests per second, one sweep point each; ``inf`` sends all at once.
        requests: how many are sent at each rate.
        max_concurrency: requests in flight at most; None: no limit.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    request_rates: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 4.0, float("inf"))
    requests: Positive = 32
    max_concurrency: Positive | None = None

    @property
    def described(self) -> str:
        """The load as words, equal for equal loads."""
        rates = ", ".join(f"{rate:g}" for rate in self.request_rates)
        most = "" if self.max_concurrency is None else f", at most {self.max_concurrency} in flight"
        return f"{self.requests} requests at {rates} per second{most}"


def prompts(
    count: int, length: int, vocab_size: int, seed: int, reserved: frozenset[int] = frozenset()
) -> list[list[int]]:
    """Return ``count`` different prompts of ``length`` token ids below ``vocab_size``.

    The same arguments give the same prompts in every process. ``reserved`` ids (padding, begin and
    end of sequence) are left out.

    Raises:
        ValueError: no token is left to choose from.
    """
    allowed = [token for token in range(vocab_size) if token not in reserved]
    if not allowed:
        raise ValueError(f"a vocabulary of {vocab_size} leaves no token for prompts")
    generator = random.Random(seed)
    return [generator.choices(allowed, k=length) for _ in range(count)]
