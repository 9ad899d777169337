"""A method carried out in several steps, each on the model that the steps before left."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from streamline_bench.core.architecture import depth_of
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.machine.ranks import current
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.core.surgery import of_layers
from streamline_bench.methods.base import Compressed, Compression, Method, write_compressed
from streamline_bench.methods.tools.layer_removal import size_plan
from streamline_bench.methods.tools.selection import cuts_of
from streamline_bench.methods.tools.shared_scan import SIMILARITY_FILE
from streamline_bench.modeling.loading import SourceModel

log = logging.getLogger(__name__)

CURVE_FILE = "training_curve.jsonl"
"""What was measured while a replacement was trained, in a checkpoint's folder."""

_GROWING = ("step", "tokens", "seconds")  # throughout a training


@dataclass(frozen=True)
class Step(Compression):
    """A compression of the model that earlier steps left; texts are those of the first.

    Attributes:
        origin: the compression of the source.
        read: tokens that were read before, by what they were asked for.
    """

    origin: Compression | None = None
    read: dict[str, CalibrationTokens] = field(default_factory=dict)

    def tokens(self, spec: CalibrationSpec) -> CalibrationTokens:
        """Return what the compression of the source reads."""
        asked = spec.model_dump_json()
        if asked not in self.read:
            assert self.origin is not None
            self.read[asked] = self.origin.tokens(spec)
        return self.read[asked]


def step_on(
    work: Compression, result: Compressed, folder: Path, read: dict[str, CalibrationTokens]
) -> Step:
    """Write what earlier steps left, from the tensors of the source, and return the next step.

    Args:
        result: with names of ``work.reader``.
        folder: part of the scratch folder; an earlier attempt's model in it goes.
        read: tokens read so far.

    Raises:
        OutputError: the folder cannot be written.
    """

    def write() -> None:
        shutil.rmtree(folder / "model", ignore_errors=True)
        (folder / "work").mkdir(parents=True, exist_ok=True)
        (folder / "model").mkdir()
        write_compressed(folder / "model", work.reader, result, progress=False)

    current().first(write)
    source = SourceModel(folder / "model", work.source.trust_remote_code, progress=False)
    return _step(work, read, source=source, work=folder / "work", scans=None, states=None)


def _step(origin: Compression, read: dict[str, CalibrationTokens], **changed: Any) -> Step:
    fields = {each.name: getattr(origin, each.name) for each in dataclasses.fields(Compression)}
    return Step(**{**fields, **changed}, origin=origin, read=read)


def compress_in_steps(
    method: Method,
    work: Compression,
    parts: Sequence[int],
    parameters: Mapping[str, Any],
    new: int = 0,
) -> Compressed:
    """Let a method remove so many layers in each of several steps.

    The result is that of as many compressions, each of the model that the one before wrote. An
    interrupted one finds the trainings of its earlier steps done.

    Args:
        method: it removes layers, and puts others in their place or nothing.
        parts: how many layers fewer each step leaves.
        parameters: of each step.
        new: layers that it puts in the place of each run of removed ones.

    Returns:
        The last step's config and tensors, named as in the source. ``chosen`` names the layers of
        the source, of every step as well; what else a step chose is in its model's own numbers.
    """
    left = list(range(depth_of(work.config)))  # layers of the source
    read: dict[str, CalibrationTokens] = {}
    results: list[Compressed] = []
    chosen: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        step, folder = _step(work, read), work.work / f"step-{number + 1}"
        if results:
            step = step_on(work, results[-1], folder, read)
        changed = {"sparsity": None, "n_layers": part, "parameters": dict(parameters)}
        recipe = work.recipe.model_copy(update=changed)
        step = dataclasses.replace(step, recipe=recipe)
        log.info("step %d of %d: %d layers fewer", number + 1, len(parts), part)
        found = method.compress(step)
        for each in (step, work):
            each.release_model()
        current().first(partial(shutil.rmtree, folder / "model", ignore_errors=True))
        removed = found.chosen["removed_layers"]
        gone = {layer for cut in cuts_of(removed) for layer in cut[new:]}
        of_source = [left[layer] for layer in removed]
        chosen.append({"layers": len(left), **found.chosen, "removed_layers": of_source})
        left = [origin for layer, origin in enumerate(left) if layer not in gone]
        results.append(_on_source(results[-1], found) if results else found)
    return _together(work, results, chosen, left)


def _on_source(before: Compressed, found: Compressed) -> Compressed:
    """Return a step's result with the names of the source, which the step before has."""
    names = {new: before.names[old] for new, old in found.names.items() if old in before.names}
    copied = {new: before.tensors[old] for new, old in found.names.items() if new not in names}
    return dataclasses.replace(found, names=names, tensors={**copied, **found.tensors})


def _together(
    work: Compression,
    results: Sequence[Compressed],
    chosen: Sequence[Mapping[str, Any]],
    left: Sequence[int],
) -> Compressed:
    """Return the last result, with the facts of all."""
    first, last = results[0], results[-1]
    plan = size_plan(work)
    gone = [layer for layer in range(plan.num_layers) if layer not in left]
    removed = {layer for step in chosen for layer in step["removed_layers"]}
    facts = {
        "removed_layers": sorted(removed), "iterations": chosen,
        "size": asdict(of_layers(plan, work.reader, gone)),
    }  # fmt: skip
    artefacts = dict(last.artefacts)
    if SIMILARITY_FILE in first.artefacts:
        artefacts[SIMILARITY_FILE] = first.artefacts[SIMILARITY_FILE]
    trainings = [result.training for result in results if result.training is not None]
    if CURVE_FILE in artefacts:
        artefacts[CURVE_FILE] = _curve([result.artefacts[CURVE_FILE] for result in results])
    return dataclasses.replace(
        last,
        chosen=facts,
        calibration=first.calibration,
        training=_summary(trainings) if trainings else None,
        artefacts=artefacts,
    )


def _summary(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sums = {
        name: sum(each[name] for each in trainings)
        for name in ("steps", "tokens", "seconds")
        if name in trainings[0]
    }
    same = {name: trainings[0][name] for name in ("objective", "kind")}
    return {**same, **sums, "iterations": list(trainings)}


def _curve(curves: Sequence[str]) -> str:
    """Return the curves of trainings one after the other, as one; rows are JSON lines."""
    rows: list[dict[str, Any]] = []
    for curve in curves:
        begin = {name: rows[-1][name] for name in _GROWING} if rows else dict.fromkeys(_GROWING, 0)
        for line in curve.splitlines():
            row = json.loads(line)
            rows.append({**row, **{name: row[name] + begin[name] for name in _GROWING}})
    return "".join(json.dumps(row) + "\n" for row in rows)
