"""What is sent to a server: at which loads, which prompts, and what its users expect of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, field_validator, model_validator

from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.workload import Positive

Above = Annotated[float, Field(gt=0)]

MOST_CONCURRENCY = 256
"""Requests in flight that a search tries at most, where no other limit is given."""
_LIMITS = ("ttft", "tpot", "e2el")
_SECONDS = {"ms": 1e-3, "s": 1.0, "": 1.0}


class Level(NamedTuple):
    """One load: requests per second, or so many requests in flight at any time.

    Attributes:
        rate: infinite where each request is sent as soon as there is room for it.
        concurrency: most requests in flight; None: no limit.
    """

    rate: float
    concurrency: int | None = None

    @property
    def closed(self) -> bool:
        """Whether requests wait for earlier ones to end, as users do."""
        return self.rate == float("inf") and self.concurrency is not None

    @property
    def described(self) -> str:
        """For a message: ``2 requests per second``."""
        if self.closed:
            return f"{self.concurrency} requests in flight"
        most = "" if self.concurrency is None else f", at most {self.concurrency} in flight"
        rate = "all requests at once" if self.rate == float("inf") else f"{self.rate:g} requests"
        return f"{rate}{'' if self.rate == float('inf') else ' per second'}{most}"


class Slo(Frozen):
    """A service level objective: what share of the requests must keep which limits.

    Attributes:
        ttft, tpot, e2el: limits in seconds: time to first token, per output token after it, whole
            request; a request is good if it keeps all that are given.
        p: percentage of the requests that must be good.
    """

    ttft: Above | None = None
    tpot: Above | None = None
    e2el: Above | None = None
    p: Annotated[float, Field(gt=0, le=100)] = 95.0

    @model_validator(mode="after")
    def _some(self) -> Slo:
        if not self.limits:
            raise ValueError(f"an objective needs at least one of {', '.join(_LIMITS)}")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """Seconds by metric."""
        given = {name: getattr(self, name) for name in _LIMITS}
        return {name: value for name, value in given.items() if value is not None}

    def longest(self, output_tokens: int) -> float:
        """Seconds that a request may take, as far as the limits say."""
        parts = (self.ttft or 0.0) + (self.tpot or 0.0) * output_tokens
        return parts if self.e2el is None else min(self.e2el, parts or self.e2el)

    @property
    def described(self) -> str:
        """As it is given: ``ttft=500ms,tpot=50ms,p=95``."""
        limits = [f"{name}={1000 * seconds:g}ms" for name, seconds in self.limits.items()]
        return ",".join([*limits, f"p={self.p:g}"])

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read ``ttft=500ms,tpot=50ms,p=95``; a number without a unit is in seconds.

        Raises:
            ThroughputError: it is not of that form.
        """
        found: dict[str, float] = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s)?\s*", part)
            name = match[1] if match else ""
            known = name in (*_LIMITS, "p") and name not in found
            if match is None or not known or (name == "p" and match[3]):
                raise ThroughputError(
                    f"'{part}' is not part of an objective; give it as ttft=500ms,tpot=50ms,p=95 "
                    f"(limits: {', '.join(_LIMITS)})."
                )
            found[name] = float(match[2]) * (1 if name == "p" else _SECONDS[match[3] or ""])
        try:
            return cls(**found)
        except ValueError:
            raise ThroughputError(
                f"The objective '{text}' needs a limit above 0 of {', '.join(_LIMITS)}, and p "
                "above 0 and up to 100."
            ) from None


class ServingLoad(Frozen):
    """Requests sent to a running server.

    Attributes:
        request_rates: requests per second, one point each; ``inf`` sends all at once. Where none
            is given: 1, 4 and ``inf``, or none if there are concurrencies or an objective.
        arrivals: ``poisson``: at random times, as independent users do; ``constant``: evenly.
        concurrencies: requests in flight at any time, one point each, after the rates.
        requests: how many count at each point of a block; at least twice the concurrency.
        warmup_requests: sent before them at the same load, not counted; None: a quarter of
            ``requests``, at least 8, and in any case twice the concurrency.
        max_concurrency: requests in flight at most; None: no limit.
        prompts: ``random`` tokens, or a ``.jsonl`` file with ``prompt`` in each line.
        prefix_tokens: so many tokens at the start of all random prompts are the same.
        output_lengths: ``fixed``: those of the workload; ``data``: ``output_tokens`` of the file.
        slo: what to search the highest load for; also as text, see :meth:`Slo.parse`.
        search: ``concurrency`` or ``rate`` is raised in that search.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    request_rates: tuple[Above, ...] = (1.0, 4.0, float("inf"))
    arrivals: Literal["poisson", "constant"] = "poisson"
    concurrencies: tuple[Positive, ...] = ()
    requests: Positive = 32
    warmup_requests: Annotated[int, Field(ge=0)] | None = None
    max_concurrency: Positive | None = None
    prompts: str = "random"
    prefix_tokens: Annotated[int, Field(ge=0)] = 0
    output_lengths: Literal["fixed", "data"] = "fixed"
    slo: Slo | None = None
    search: Literal["concurrency", "rate"] = "concurrency"

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_asked(cls, data: Any) -> Any:
        if isinstance(data, dict) and (data.get("concurrencies") or data.get("slo")):
            return {"request_rates": (), **data}
        return data

    @field_validator("slo", mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        return Slo.parse(value) if isinstance(value, str) else value

    @field_validator("request_rates", "concurrencies")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _consistent(self) -> ServingLoad:
        if not self.levels and self.slo is None:
            raise ValueError("at least one request rate, concurrency or objective is needed")
        if self.prompts == "random" and self.output_lengths == "data":
            raise ValueError("output lengths from the data need a file of prompts")
        if self.prompts != "random" and self.prefix_tokens:
            raise ValueError("a shared prefix is of random prompts; leave it out with a file")
        return self

    @property
    def levels(self) -> tuple[Level, ...]:
        """The points to measure, in order."""
        rates = [Level(rate, self.max_concurrency) for rate in self.request_rates]
        return (*rates, *(Level(float("inf"), each) for each in self.concurrencies))

    @property
    def most(self) -> int:
        """Most requests that are in flight at once, as far as the load says."""
        known = [*self.concurrencies]
        if self.request_rates:
            known.append(self.max_concurrency or min(self.requests, MOST_CONCURRENCY))
        if self.slo is not None:
            known.append(self.max_concurrency or MOST_CONCURRENCY)
        return max(known)

    def counts(self, level: Level, output_tokens: int) -> tuple[int, int]:
        """How many requests are sent first and not counted, and how many count.

        Both are at least twice those that are in flight: at a rate, as many as come while one that
        keeps the objective is answered, but no more than may be in flight. A server that is still
        filling would look saturated.

        Args:
            output_tokens: of each request.
        """
        if level.rate == float("inf") and not level.closed:
            return 0, self.requests
        warm = max(8, self.requests // 4) if self.warmup_requests is None else self.warmup_requests
        room = 2 * (level.concurrency or 0) if level.closed else 0
        if not level.closed and self.slo is not None:
            arriving = math.ceil(2 * level.rate * self.slo.longest(output_tokens))
            room = min(arriving, 2 * (level.concurrency or MOST_CONCURRENCY))
        return max(warm, room), max(self.requests, room)

    @property
    def options(self) -> dict[str, str | int | None]:
        """The options of ``streamline-bench throughput --serve`` that ask for it."""
        rates = ",".join(f"{rate:g}" for rate in self.request_rates) or None
        file = self.prompts != "random"
        arrive = rates or (self.slo is not None and self.search == "rate")
        limited = rates or self.slo is not None
        return {
            "--request-rate": rates,
            "--concurrency": ",".join(map(str, self.concurrencies)) or None,
            "--slo": None if self.slo is None else self.slo.described,
            "--search": None if self.slo is None else self.search,
            "--arrivals": self.arrivals if arrive else None,
            "--requests": self.requests,
            "--warmup-requests": self.warmup_requests,
            "--max-concurrency": self.max_concurrency if limited else None,
            "--prompts": self.prompts if file else None,
            "--prefix-tokens": None if file else self.prefix_tokens,
        }

    @property
    def described(self) -> str:
        """The load as words, equal for equal loads."""
        parts = []
        if self.request_rates:
            rates = ", ".join(f"{rate:g}" for rate in self.request_rates)
            constant = " (constant)" if self.arrivals == "constant" else ""
            parts.append(f"{rates} per second{constant}")
        if self.concurrencies:
            parts.append(f"{', '.join(map(str, self.concurrencies))} in flight")
        if self.slo is not None:
            parts.append(f"the most {self.search} for {self.slo.described}")
        most = "" if self.max_concurrency is None else f", at most {self.max_concurrency} in flight"
        shared = f", {self.prefix_tokens} tokens shared" if self.prefix_tokens else ""
        prompts = "" if self.prompts == "random" else f", prompts of {Path(self.prompts).name}"
        lengths = ", output lengths of the file" if self.output_lengths == "data" else ""
        return f"{self.requests} requests at {'; '.join(parts)}{most}{shared}{prompts}{lengths}"


class PromptFile(NamedTuple):
    """A user's own prompts, checked.

    Attributes:
        tokens: an upper bound of a sequence's length: a token is at least one byte of the prompt.
    """

    path: Path
    prompts: int
    tokens: int


def require_own_tokens(load: ServingLoad, prompt_tokens: int) -> None:
    """Refuse a shared prefix that is as long as the whole prompt (ThroughputError)."""
    if load.prefix_tokens >= prompt_tokens:
        raise ThroughputError(
            f"The shared prefix of {load.prefix_tokens} tokens leaves nothing of the "
            f"{prompt_tokens} tokens of a prompt; give a shorter one."
        )


def read_prompts(load: ServingLoad, output_tokens: int) -> PromptFile | None:
    """Check the file of prompts before anything is started; None for random prompts.

    Raises:
        ThroughputError: it cannot be read, has too few prompts, or a line is not of the form
            ``{"prompt": "...", "output_tokens": 32}``; ``output_tokens`` only where lengths are
            of the data.
    """
    if load.prompts == "random":
        return None
    path = Path(load.prompts)
    if path.suffix != ".jsonl":
        raise ThroughputError(f"The prompts '{path}' must be 'random' or a .jsonl file.")
    try:
        # At line feeds only: U+2028 may stand in a JSON text.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ThroughputError(f"The prompts '{path}' cannot be read: {error}.") from None
    longest = [
        _longest(path, number, line, load, output_tokens)
        for number, line in enumerate(lines, 1)
        if line.strip()  # the client skips empty lines too
    ]
    if not longest:
        raise ThroughputError(f"The prompts '{path}' hold no line; give at least one prompt.")
    return PromptFile(path, len(longest), max(longest))


def _longest(path: Path, number: int, line: str, load: ServingLoad, output_tokens: int) -> int:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ThroughputError(
            f"Line {number} of '{path}' has no text 'prompt'; write one JSON object a line, such "
            'as {"prompt": "Once upon a time", "output_tokens": 32}.'
        )
    if load.output_lengths == "data":
        output_tokens = entry.get("output_tokens")
        if type(output_tokens) is not int or output_tokens < 1:
            raise ThroughputError(
                f"Line {number} of '{path}' has no number 'output_tokens' above 0; add it, or give "
                "--output-tokens for all of them."
            )
    return len(prompt.encode()) + output_tokens
