"""The schema of a recipe: what is removed, what stands in for it, on which tokens it is trained.

A recipe is a frozen pydantic model. It comes from a YAML file in ``baselines/``, from a user's own
file, or from ``--model_args``; unknown keys are errors that suggest the nearest known one.
:meth:`Recipe.content_hash` names it in the cache, together with the hashes of weights and tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from streamline_bench.core.recipe.presets import with_preset
from streamline_bench.core.recipe.validation import wrong_value
from streamline_bench.errors import RecipeError

ReplacementKind = Literal["none", "layer", "ffn", "swiglu", "ffn_res", "swiglu_res", "linear"]
"""``none`` drops the block; ``layer`` puts k copies of its first layers in its place; the others
are feed-forward networks: ``ffn``/``swiglu`` as in the paper (bare: no norm, no residual),
``*_res`` pre-norm with residual and zero-initialised output, ``linear`` one affine map."""


class Frozen(BaseModel):
    """Immutable; a key that the schema does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CalibrationSpec(Frozen):
    """Which tokens a model is looked at, or trained, with.

    ``source`` is a preset (``slimpajama``), a file (``.txt``, ``.jsonl``, ``.parquet``), a folder
    saved with ``datasets.save_to_disk``, a hub id, or ``auto``: the file ``calibration.jsonl`` in
    the model's own folder if there is one, else ``slimpajama``. Several files are separated by
    commas or named by a pattern (``texts/*.jsonl.zst``). The form ``instruction`` is for a
    recovery: records with ``instruction``, ``input`` (may be empty) and ``output``. ``self``: the
    model to compress writes the texts, as many as ``samples`` or ``tokens`` say.

    ``packing`` says what a packed sequence begins with where the tokenizer puts a BOS token in
    front of texts: ``bos``: each one with BOS, as the model has seen texts in its training;
    ``stream``: with the token that follows the cut, as in most reference implementations.
    """

    source: str = "auto"
    split: str = "train"
    subset: str | None = None
    text_field: str = "text"
    form: Literal["packed", "documents", "instruction"] = "packed"
    packing: Literal["bos", "stream"] = "bos"
    sequence_length: int = Field(2048, ge=2)
    samples: int | None = Field(None, ge=1, description="at most this many sequences")
    tokens: int | None = Field(None, ge=2, description="exactly this many tokens")
    seed: int = 0

    def length_within(self, positions: int | None) -> int:
        """Tokens of a sequence for a model with so many positions; None: with any number."""
        return min(self.sequence_length, positions or self.sequence_length)


class ReplacementSpec(Frozen):
    """The lightweight network that stands in for the removed block."""

    kind: ReplacementKind = "none"
    layers: int = Field(1, ge=1, description="layers put in, for kind 'layer'")
    intermediate_size: int | None = Field(None, ge=1, description="None: the paper's size")


class DistillationSpec(Frozen):
    """How logits of the dense model are compared with, for objective ``kd``."""

    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(64, ge=1, description="tokens of each position; all others are one")


class TrainingSpec(Frozen):
    """How a replacement is trained (LLM-Streamline, arXiv 2403.19135, equation 4 and its release).

    In a recipe file ``preset: paper_mse``, ``paper_lm`` or ``paper_memory_efficient`` stands for
    the paper's values; the defaults here scale to the data at hand.
    ``lr='auto'`` is 2e-4 x sqrt(4096 / hidden_size), at most 2e-3: the paper's rate at its width.
    """

    objective: Literal["none", "mse", "relative_mse", "cosine", "lm", "kd"] = Field(
        "none",
        description="mse: the paper's; relative_mse: each token's squared error over its own "
        "squared norm; cosine: 1 - cosine plus the squared difference of the log norms; lm: the "
        "loss of the next token; kd: its divergence from the dense model's distribution",
    )
    data: CalibrationSpec = CalibrationSpec()
    epochs: int = Field(1, ge=1)
    min_steps: int = Field(0, ge=0, description="epochs are added until there are as many steps")
    batch_size: int = Field(8, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    lr: float | Literal["auto"] = "auto"
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    warmup_steps: int | None = Field(None, ge=0, description="in place of warmup_ratio")
    decay: Literal["cosine", "linear"] = "cosine"
    weight_decay: float = Field(1e-3, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(5.0, gt=0)
    autocast: Literal["auto", "none", "bf16"] = Field(
        "auto", description="auto: bf16 where a GPU computes in half precision, none elsewhere"
    )
    validation_share: float = Field(0.05, gt=0, lt=1)
    validations: int = Field(10, ge=1, description="how often the validation loss is taken")
    cache_gb: float = Field(16.0, ge=0, description="budget of the activation cache")
    checkpoint_every: int = Field(200, ge=1, description="optimizer steps between checkpoints")
    gradient_checkpointing: bool = Field(
        False, description="recompute layers in the backward pass (lm, kd): less memory, slower"
    )
    kd: DistillationSpec = DistillationSpec()

    def computed_on(self, device: str, dtype: str) -> TrainingSpec:
        """Return it with ``autocast`` decided.

        Args:
            device: torch device that computes.
            dtype: torch's name of the dtype of the weights in memory; in float32, what is trained
                is computed in float32, too.
        """
        if self.autocast != "auto":
            return self
        half = device.startswith("cuda") and dtype in ("bfloat16", "float16")
        return self.model_copy(update={"autocast": "bf16" if half else "none"})

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSpec:
        if self.gradient_checkpointing and self.objective not in ("lm", "kd"):
            raise ValueError(
                "gradient_checkpointing is for objectives 'lm' and 'kd', whose gradients go "
                "through the layers"
            )
        return self

    @model_serializer(mode="wrap")
    def _only_what_counts(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        payload: dict[str, Any] = serialize(self)
        if self.objective != "kd":
            payload.pop("kd", None)
        if not self.gradient_checkpointing:
            payload.pop("gradient_checkpointing", None)
        return payload


ProjectionRole = Literal["q", "k", "v", "o", "gate", "up", "down"]
"""A projection of a decoder layer in any family; fused ones count for each part."""


class RecoverySpec(Frozen):
    """A training of the compressed model, after any method, with the loss of the next token.

    ``lora`` trains low-rank updates of projections and merges them into the weights; ``partial``
    the LM head, the final norm and the last layers; ``full`` all weights. ``preset`` names values
    from the literature (:mod:`~streamline_bench.core.recipe.presets`); values given with it win.

    Attributes:
        rank, alpha, dropout, targets: of ``lora``; updates are scaled by ``alpha / rank``.
        last_layers: of ``partial``: how many of the last layers are trained too.
        head: of ``partial``, where the LM head and the embeddings share a matrix: ``tied`` trains
            it for both, ``untied`` gives the head a copy, which makes the model larger by it;
            ``frozen`` trains no head, shared or not.
        train_on_inputs: with form ``instruction``, put the loss on the prompt as well.
        training: steps and rates; ``training.data`` is what is trained on, its source ``auto``
            being the recipe's calibration source.
    """

    kind: Literal["lora", "partial", "full"]
    preset: str | None = None
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: tuple[ProjectionRole, ...] = Field(get_args(ProjectionRole), min_length=1)
    last_layers: int = Field(3, ge=0)
    head: Literal["tied", "untied", "frozen"] = "tied"
    train_on_inputs: bool = False
    training: TrainingSpec = TrainingSpec(objective="lm")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, payload: Any) -> Any:
        if not isinstance(payload, Mapping):
            return payload
        filled = with_preset(payload)
        if isinstance(filled.get("targets"), str):  # of a command line
            filled["targets"] = filled["targets"].split(",")
        training = filled.get("training", {})
        if isinstance(training, Mapping):
            filled["training"] = {"objective": "lm", **training}
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> RecoverySpec:
        if self.training.objective not in ("lm", "kd"):
            raise ValueError("a recovery is trained with objective 'lm' or 'kd'")
        return self


class PublishedResult(Frozen):
    """A number from the literature that a report shows next to ours.

    ``value`` is in ``unit``: "%" unless the metric is a perplexity, then "perplexity";
    ``sparsity`` is the share of parameters that ``model`` lost. ``selection`` is what
    ``parameters.selection`` says where the number belongs to the recipe with another selection
    than its own.
    """

    model: str
    metric: str
    value: float
    unit: str = Field("%", min_length=1)
    sparsity: float | None = None
    selection: str | dict[str, Any] | None = None
    source: str

    @model_validator(mode="before")
    @classmethod
    def _default_unit(cls, payload: Any) -> Any:
        if isinstance(payload, Mapping) and "perplexity" in str(payload.get("metric")).lower():
            return {"unit": "perplexity", **payload}
        return payload


class MethodParts(Frozen):
    """A recipe in three parts, in words; equal words mean the same.

    Attributes:
        selection: which layers go.
        patch: what stands in for them at every cut; ``none`` for nothing.
        healing: how the result is trained; ``none`` for not at all.
    """

    selection: str
    patch: str
    healing: str


class Recipe(Frozen):
    """One row of a leaderboard: a method with everything that decides its result.

    Attributes:
        method: name of a method, or ``module:Class``.
        unpublished: why no published number is listed.
        mixtures_only: it removes experts, so that groups of recipes for any model leave it out.
        paper_settings: the size, data and steps are a paper's own, not ones that suit any model.
        overridden: what a caller changed: dotted key -> (the recipe's own value, the given one).
            Written when a recipe is loaded, not in recipe files.
    """

    name: str
    title: str = ""
    paper: str | None = None
    link: str | None = None
    reproduces: str | None = None
    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    sparsity: float | None = Field(None, gt=0, lt=1, description="share of parameters removed")
    n_layers: int | None = Field(None, ge=1, description="net number of layers removed")
    replacement: ReplacementSpec = ReplacementSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    training: TrainingSpec = TrainingSpec()
    recovery: RecoverySpec | None = None
    seed: int = 0
    reference_quirks: tuple[str, ...] = ()
    cost: Literal["no training", "calibrated", "recovered"] = "calibrated"
    published: tuple[PublishedResult, ...] = ()
    unpublished: str | None = None
    mixtures_only: bool = False
    paper_settings: bool = False
    overridden: dict[str, tuple[Any, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_size(self) -> Recipe:
        if self.sparsity is not None and self.n_layers is not None:
            raise ValueError("give sparsity or n_layers, not both")
        return self

    @property
    def data_sources(self) -> tuple[str, ...]:
        """The sources of all text that the recipe reads."""
        specs = [self.calibration]
        if self.replacement.kind != "none":
            specs.append(self.training.data)
        if self.recovery is not None:
            specs.append(self.recovery.training.data)
        return tuple(spec.source for spec in specs)

    @property
    def trains_replacement(self) -> bool:
        """Whether the method itself trains something."""
        return self.replacement.kind != "none" and self.training.objective != "none"

    @property
    def recovery_data(self) -> CalibrationSpec | None:
        """The data that the recovery trains on; None if there is no recovery.

        The source ``auto`` of texts stands for the calibration source.
        """
        if self.recovery is None:
            return None
        data = self.recovery.training.data
        if data.source == "auto" and data.form != "instruction":
            return data.model_copy(update={"source": self.calibration.source})
        return data

    def computed_on(self, device: str, dtype: str) -> Recipe:
        """Return it with what the machine decides (:meth:`TrainingSpec.computed_on`)."""
        update: dict[str, Any] = {}
        if self.replacement.kind != "none":  # else nothing reads it
            update["training"] = self.training.computed_on(device, dtype)
        if self.recovery is not None:
            training = self.recovery.training.computed_on(device, dtype)
            update["recovery"] = self.recovery.model_copy(update={"training": training})
        return self.model_copy(update=update)

    @property
    def healing(self) -> str:
        """How the result is trained, in words."""
        if self.recovery is None:
            return "none"
        name = self.recovery.preset or self.recovery.kind
        return f"{name}, kd" if self.recovery.training.objective == "kd" else name

    def decisive(self) -> dict[str, Any]:
        """Return everything that decides the result as JSON; titles and citations do not."""
        payload = self.model_dump(mode="json", exclude=set(_SHOWN_ONLY))
        if self.replacement.kind == "none":
            # Nothing is trained: how it would have been makes no difference.
            payload["replacement"], payload["training"] = {"kind": "none"}, None
        return payload

    def content_hash(self) -> str:
        """SHA-256 (hex) of what decides the result."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()


_SHOWN_ONLY = (
    "name title paper link reproduces published unpublished mixtures_only paper_settings "
    "cost overridden"
).split()


def parse_recipe(payload: Mapping[str, Any], origin: str) -> Recipe:
    """Validate a mapping as a recipe.

    Args:
        payload: what the YAML file or the model arguments hold.
        origin: file or option named in the error message.

    Raises:
        RecipeError: one sentence naming the first wrong key or value.
    """
    try:
        return Recipe.model_validate(payload)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {wrong_value(error, Recipe)}") from None
