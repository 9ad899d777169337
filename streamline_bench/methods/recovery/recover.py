"""Recovery after any method: the compressed model is trained before it is published.

What the method made is first written to the work folder, as a checkpoint, and loaded from there:
so the training sees the very weights that would have been published without it, and an interrupted
recovery does not compress again. Tensors that the training leaves alone are copied byte by byte.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_bench.core.architecture import Architecture, architecture_of, sequence_limit
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import LazyTensors, layers_prefix
from streamline_bench.core.files import atomic_write_text
from streamline_bench.core.machine.ranks import current
from streamline_bench.core.recipe.schema import RecoverySpec
from streamline_bench.core.training.sharding import is_sharded
from streamline_bench.errors import ArchitectureError, NumericsError, library_errors
from streamline_bench.methods.base import Compressed, Compression, Method, write_compressed

if TYPE_CHECKING:
    from torch import Tensor

    from streamline_bench.core.data.calibration import CalibrationTokens
    from streamline_bench.core.training import TrainingResult
    from streamline_bench.core.training.distillation import TeacherLogits

RECOVERY_VERSION = 1
"""Part of the cache key of recipes with a recovery; raised when the same recovery gives other
weights than before."""


def recovery_version(spec: RecoverySpec, dtype: str) -> int:
    """Return the version for a kind and a dtype: ``partial`` computes frozen parts in it."""
    return RECOVERY_VERSION + (spec.kind == "partial" and dtype != "float32")


log = logging.getLogger(__name__)

_HELD = 2
"""Experts are written one after the other, gate, up and down of each: parts of two weights."""

_FACTS = ("layers_after", "chosen", "calibration", "training")


def compress_and_recover(
    job: Compression, method: Method, spec: RecoverySpec
) -> tuple[CheckpointReader, Compressed]:
    """Compress, train the result, and return it with the checkpoint that has its tensors.

    Raises:
        StreamlineBenchError: one of its kinds, with one sentence for the user.
    """
    from streamline_bench.methods.recovery.training import choose_parameters, train_recovery
    from streamline_bench.modeling.loading import load_model

    _refuse_unstored(job, spec)
    reader, facts = _compressed(job, method)
    tokens = _tokens(job, spec)
    log.info("recovery (%s): %d sequences of %s", spec.kind, len(tokens), tokens.source)
    dense = _dense(job, spec, tokens)
    # What is not trained may be in less than full precision, unless it is spread.
    frozen = spec.kind == "lora" or (spec.kind == "partial" and not is_sharded())
    dtype = job.dtype if frozen else None
    model = load_model(
        reader.folder,
        device="cpu" if is_sharded() else job.device,  # from where it is divided
        dtype=dtype,
        trust_remote_code=job.source.trust_remote_code,
    )
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    trainable = choose_parameters(model, spec, job.recipe.seed, at_once=job.at_once)
    untied = tied and not model.config.tie_word_embeddings
    stored = StoredForm(reader, model, trainable.weights, untied)
    result = train_recovery(
        model,
        trainable,
        spec,
        tokens,
        job.work / "recovery",
        seed=job.recipe.seed,
        device=job.device,
        weights_sha256=reader.fingerprint(progress=job.progress),
        dense=dense,
        at_once=job.at_once,
        progress=job.progress,
    )
    ties = {"tied": tied and not untied, "untied_embeddings": untied}
    summary = {**result.summary, **ties, "data": tokens.summary()}
    return reader, _recovered(reader, facts, result, stored, summary, untied)


def _refuse_unstored(job: Compression, spec: RecoverySpec) -> None:
    """Refuse, before anything costly, to train experts in a form that cannot be written back.

    Raises:
        ArchitectureError: no tensor of the checkpoint is the weight to train, or a part of it.
    """
    family = architecture_of(job.config)
    if (
        not family.experts
        or spec.kind == "lora"
        or (spec.kind == "partial" and not spec.last_layers)
    ):
        return
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(job.config)
    within = f"{family.layers}."
    weights = tuple(name for name, _ in model.named_parameters() if name.startswith(within))
    StoredForm(job.reader, model, weights, untied=False)


def _compressed(job: Compression, method: Method) -> tuple[CheckpointReader, dict[str, Any]]:
    """Compress into the work folder, or take up what an interrupted attempt left there."""
    folder, described = job.work / "compressed", job.work / "compressed.json"
    first = current().first

    def compress_alone() -> None:
        _write(method.compress(job), job, folder, described)

    if not first(described.is_file):
        if job.recipe.trains_replacement:  # which all processes share
            result = method.compress(job)
            first(lambda: _write(result, job, folder, described))
            del result
        else:
            first(compress_alone)
        job.release_model()
        gc.collect()
    facts = first(lambda: json.loads(described.read_text(encoding="utf-8")))
    return CheckpointReader(folder), facts


def _write(result: Compressed, job: Compression, folder: Path, described: Path) -> None:
    """Write what the method made into the work folder."""
    job.release_model()
    gc.collect()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_compressed(folder, job.reader, result, progress=job.progress)
    facts = {name: getattr(result, name) for name in _FACTS}
    facts["artefacts"] = sorted(result.artefacts)
    # Written last, so that it vouches for the folder.
    atomic_write_text(described, json.dumps(facts))


def _tokens(job: Compression, spec: RecoverySpec) -> CalibrationTokens:
    data = job.recipe.recovery_data or spec.training.data
    if data.form != "instruction":
        tokens = job.tokens(data)
        job.release_model()  # which may have written them
        return tokens
    from streamline_bench.methods.recovery.instruction_data import load_instructions

    return load_instructions(
        data,
        job.tokenizer,
        train_on_inputs=spec.train_on_inputs,
        model_folder=job.folder,
        max_length=sequence_limit(job.config),
        progress=job.progress,
    )


def _dense(
    job: Compression, spec: RecoverySpec, tokens: CalibrationTokens
) -> Sequence[TeacherLogits]:
    """Let the dense model run over the sequences, for ``kd``, before the result is loaded."""
    if spec.training.objective != "kd":
        return ()
    import torch

    from streamline_bench.core.training.distillation import teacher_logits
    from streamline_bench.core.training.trainer import key_of

    sets = tokens.split(spec.training.validation_share, job.recipe.seed)
    weights = job.reader.fingerprint(progress=job.progress)
    key = key_of(weights=weights, dtype=job.dtype, device=job.device.partition(":")[0])
    given = teacher_logits(
        job.work, key, job.model, sets, spec.training.kd, device=torch.device(job.device),
        progress=job.progress,
    )  # fmt: skip
    job.release_model()
    gc.collect()
    return given


def _recovered(
    reader: CheckpointReader,
    facts: Mapping[str, Any],
    result: TrainingResult,
    stored: StoredForm,
    summary: Mapping[str, Any],
    untied: bool,
) -> Compressed:
    from streamline_bench.modeling.loading import stored_overrides

    tensors = LazyTensors(
        stored.names, lambda name: _as_stored(reader, name, stored.tensor(name, result.state))
    )
    config = {**reader.config, **stored_overrides(str(reader.folder))}
    if untied:
        config["tie_word_embeddings"] = False
    family = architecture_of(reader.config)
    # A head that shares trained embeddings must not stay behind as it was.
    shared = {_spelled(family, f"{family.lm_head}.weight")} if summary["tied"] else set()
    names = _copied_names(reader, untied)
    artefacts = {
        name: (reader.folder / name).read_text(encoding="utf-8") for name in facts["artefacts"]
    }
    artefacts["recovery_curve.jsonl"] = "".join(json.dumps(row) + "\n" for row in result.curve)
    return Compressed(
        config=config,
        names={new: old for new, old in names.items() if new not in {*tensors, *shared}},
        tensors=tensors, layers_after=facts["layers_after"], chosen=facts["chosen"],
        calibration=facts["calibration"],
        training={**(facts["training"] or {}), "recovery": dict(summary)}, artefacts=artefacts,
    )  # fmt: skip


def _copied_names(reader: CheckpointReader, untied: bool) -> dict[str, str]:
    """Return new name -> old name of all tensors.

    A checkpoint without the base's name in its tensors has no place for a head: with a head of its
    own, all its tensors get their full names.
    """
    family = architecture_of(reader.config)
    own = (family.layers, family.stored_path(family.layers))
    bare = layers_prefix(reader, family) not in own
    prefix = f"{family.base}." if untied and bare else ""
    return {prefix + name: name for name in reader.names}


class StoredForm:
    """In which tensors a checkpoint stores trained weights of a model.

    A weight has the name that it has in the model, or the family's older spelling; experts that
    the model holds in one tensor may be stored one by one. They are written back as they were read
    (transformers' own conversion, backwards).

    Args:
        model: the weights' model, as transformers loads it; may be on the meta device.
        weights: names in the model.

    Raises:
        ArchitectureError: the checkpoint stores a weight in another form.
    """

    def __init__(
        self, reader: CheckpointReader, model: Any, weights: tuple[str, ...], untied: bool
    ) -> None:
        self._model = model
        self._weights: dict[str, str] = {}  # name in the checkpoint -> name in the model
        self._parts: dict[str, str] = {}  # the same -> transformers' spelling, where it is a part
        self._converted_last: dict[str, dict[str, Tensor]] = {}
        family = architecture_of(reader.config)
        known = set(_copied_names(reader, untied))
        if untied:
            known.add(_spelled(family, f"{family.lm_head}.weight"))
        # LoRA keeps the weight that it adapts in a module of its own.
        shapes = {k.replace(".base_layer.", "."): v for k, v in model.named_parameters()}
        for name in weights:
            match = _match(family, name, known)
            if match is not None:
                self._weights[match] = name
                continue
            for part in self._converted(name, shapes[name].detach().to("meta")):
                match = _match(family, part, known)
                if match is None:
                    raise _unstored(name)
                self._weights[match], self._parts[match] = name, part

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the checkpoint of all tensors that the training changes."""
        return tuple(self._weights)

    def tensor(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        """Return one of them; ``state`` has name in the model -> trained weight."""
        weight = self._weights[name]
        if name not in self._parts:
            return state[weight]
        if weight not in self._converted_last:
            while len(self._converted_last) >= _HELD:
                del self._converted_last[next(iter(self._converted_last))]
            self._converted_last[weight] = self._converted(weight, state[weight])
        return self._converted_last[weight][self._parts[name]]

    def _converted(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        what = f"Weight '{name}' in the form of the checkpoint"
        with library_errors(what, kind=ArchitectureError):
            parts: dict[str, Tensor] = revert_weight_conversion(self._model, {name: weight})
        return parts


def _match(family: Architecture, name: str, known: Collection[str]) -> str | None:
    spellings = (name, _spelled(family, name), name.removeprefix(f"{family.base}."))
    return next((spelling for spelling in spellings if spelling in known), None)


def _unstored(name: str) -> ArchitectureError:
    return ArchitectureError(
        f"The checkpoint does not store '{name}' as the model has it, so that it cannot be "
        "trained; choose another kind of recovery, or other targets."
    )


def _spelled(family: Architecture, name: str) -> str:
    """Return a tensor's name in checkpoints of the family."""
    for path, stored in family.stored_as.items():
        if name.startswith(f"{path}."):
            return stored + name[len(path) :]
    return name


def _as_stored(reader: CheckpointReader, name: str, weight: Tensor) -> Tensor:
    """Cast a trained weight to the dtype in which the checkpoint stores it, and check it."""
    family = architecture_of(reader.config)
    # A head that was untied has no entry yet: it is stored as the embeddings are.
    spellings = (name, name.removeprefix(f"{family.base}."), reader.embeddings_name)
    source = next(spelling for spelling in spellings if spelling in reader.names)
    cast = weight.to(reader.tensor(source).dtype).contiguous()
    if not bool(cast.isfinite().all()):
        raise NumericsError(
            f"The recovered weight '{name}' is not finite as {reader.entry(source).dtype}; lower "
            "recovery.training.lr."
        )
    return cast
