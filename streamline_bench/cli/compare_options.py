"""From the options of ``streamline-bench compare`` to a request and an execution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamline_bench.cli.options import parse_assignments, yaml_assignments
from streamline_bench.compression.recipes import SIZE_KEYS
from streamline_bench.core.machine.environment import is_bundled
from streamline_bench.demo.pipeline import bundled_request
from streamline_bench.errors import RecipeError
from streamline_bench.runs.execution.options import Execution
from streamline_bench.runs.planning.request import Request, RowRequest, make_request, read_request

_PLAIN = Request.model_fields.keys() - {"model", "recipes", "tasks", "overrides", "workload"}
"""Keys of a plan file whose options hold the value itself."""


def read_options(model: str | None, plan: str | None, options: Mapping[str, Any]) -> Request:
    """Lay the options over the plan file, and both over what the bundled model presets.

    Raises:
        RecipeError: something is missing or wrong.
    """
    payload = _checked(read_request(plan), plan) if plan else {}
    payload |= {key: options[key] for key in _PLAIN if options.get(key) is not None}
    if model is not None:
        payload["model"] = model
    for key in ("recipes", "tasks"):
        if options.get(key):
            payload[key] = [part.strip() for part in options[key].split(",") if part.strip()]
    if options["rows"]:
        payload["recipes"] = [*payload.get("recipes", []), *map(parse_row, options["rows"])]
    given: dict[str, Any] = dict(parse_assignments(options["assignments"]))
    own = ("sparsity", "n_layers", "calibration")
    given |= {key: options[key] for key in own if options.get(key) is not None}
    # Sizes are alternatives: one that is given replaces the plan's, whichever it was.
    replaced = set(SIZE_KEYS) if given.keys() & set(SIZE_KEYS) else set()
    planned = payload.get("set") or {}
    payload["set"] = {k: v for k, v in planned.items() if k not in replaced} | given
    if options["workload"]:
        payload["workload"] = {
            **(payload.get("workload") or {}),
            **yaml_assignments("--workload", options["workload"]),
        }
    if is_bundled(payload.get("model")):
        payload = bundled_request(payload)
    for key, what in (("model", "MODEL"), ("recipes", "--recipes"), ("tasks", "--tasks")):
        if not payload.get(key):
            raise RecipeError(f"Nothing to compare: give {what}, or a --plan that has '{key}'.")
    return make_request(payload, f"Plan {plan}" if plan else "The comparison")


def _checked(payload: dict[str, Any], plan: str) -> dict[str, Any]:
    """Refuse kinds of values that options could not be laid over."""
    for key in ("recipes", "tasks"):
        if not isinstance(payload.get(key, []), list):
            example = f"{key}: [{payload[key]}]"
            raise RecipeError(f"Plan {plan}: '{key}' must be a list, such as '{example}'.")
    for key in ("set", "workload"):
        if not isinstance(payload.get(key) or {}, dict):
            raise RecipeError(f"Plan {plan}: '{key}' must be a mapping such as '{key}: {{k: v}}'.")
    return payload


def parse_row(text: str) -> RowRequest:
    """Read ``LABEL=RECIPE`` or ``LABEL=RECIPE:KEY=VALUE,KEY=VALUE``.

    Raises:
        RecipeError: the text has another form.
    """
    label, equals, rest = text.partition("=")
    recipe, colon, assignments = rest.partition(":")
    overrides: dict[str, Any] = {}
    for each in assignments.split(",") if colon else []:
        key, separator, value = each.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"'{each}' in row '{text}' is not KEY=VALUE.")
        overrides[key.strip()] = value
    if not equals or not label or not recipe:
        raise RecipeError(f"'{text}' is not a row; write LABEL=RECIPE:KEY=VALUE,KEY=VALUE.")
    return RowRequest(recipe=recipe, label=label, overrides=overrides)


def read_execution(options: Mapping[str, Any]) -> Execution:
    """Return how to run it.

    Raises:
        RecipeError: values that cannot be.
    """
    gpus = tuple(part.strip() for part in (options["gpus"] or "").split(",") if part.strip())
    cpus, by_kind = parse_cpus(options["cpus_per_job"])
    same = "executor ray_address workers gpus_per_job retries timeout trunk".split()
    return Execution(
        gpus=gpus, cpus_per_job=cpus, cpus_by_kind=by_kind, **{key: options[key] for key in same}
    )


def parse_cpus(text: str) -> tuple[int, dict[str, int]]:
    """Read ``8`` or ``8,compress=2``: CPUs of a job, and of single kinds of jobs.

    Raises:
        RecipeError: the text has another form.
    """
    common, by_kind = 1, {}
    for part in text.split(","):
        kind, separator, number = part.rpartition("=")
        if not number.strip().isdecimal() or (separator and not kind.strip()):
            raise RecipeError(
                f"--cpus-per-job '{text}' is neither a number nor such as '8,compress=2'."
            )
        if separator:
            by_kind[kind.strip()] = int(number)
        else:
            common = int(number)
    return common, by_kind
