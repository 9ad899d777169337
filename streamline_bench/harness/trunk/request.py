"""What is asked of a shared walk, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from streamline_bench.core.recipe.schema import Frozen

MODEL_ARGUMENTS = frozenset(
    "add_bos_token attn_implementation chat_template_args enable_thinking max_length "
    "mixed_precision_dtype prefix_token_id softmax_dtype think_end_token truncation "
    "trust_remote_code use_fast_tokenizer".split()
)
"""Arguments of the model that may go with the checkpoint: all that keep it whole on one device."""


class TrunkRequest(Frozen):
    """Checkpoints to evaluate on the same tasks; every field has the harness's own meaning.

    Attributes:
        checkpoints: label -> model folder; the first one is the dense model.
        outputs: label -> folder that will hold ``results_*.json`` and ``samples_*.jsonl`` as
            ``--output_path`` would. It appears whole or not at all; one that is there already,
            made by the same request, is kept and its label not evaluated again.
        include_path: folders with the user's own task files, in addition to those of this package.
        journal: folder for the answers of labels whose outputs are not there yet; an interrupted
            call that is repeated goes on with them. None: answers are only kept in memory.
        model_args: further arguments of the model, as in ``--model_args``; possible are those in
            ``MODEL_ARGUMENTS``.
        seed: of random, numpy, torch and the choice of few-shot examples.
        metadata: what tasks read, in addition to the model's arguments.
        samples: task -> documents that are asked, in order.
    """

    checkpoints: dict[str, Path] = Field(min_length=1)
    outputs: dict[str, Path]
    tasks: tuple[str, ...] = Field(min_length=1)
    include_path: tuple[Path, ...] = ()
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int | str = 1
    max_batch_size: int | None = None
    device: str | None = None
    dtype: str | None = None
    model_args: dict[str, Any] = Field(default_factory=dict)
    seed: tuple[int | None, int | None, int | None, int | None] = (0, 1234, 1234, 1234)
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    samples: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    confirm_run_unsafe_code: bool = False
    journal: Path | None = None

    @field_validator("include_path", mode="before")
    @classmethod
    def _several(cls, folders: Any) -> Any:
        return [folders] if isinstance(folders, str | Path) else folders or ()

    @field_validator("model_args")
    @classmethod
    def _shareable(cls, value: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(value) - MODEL_ARGUMENTS)
        if unknown:
            raise ValueError(
                f"'{unknown[0]}' cannot be used in a shared walk; possible are: "
                f"{', '.join(sorted(MODEL_ARGUMENTS))}"
            )
        return value

    @model_validator(mode="after")
    def _one_output_each(self) -> TrunkRequest:
        if set(self.outputs) != set(self.checkpoints):
            odd = sorted(set(self.outputs) ^ set(self.checkpoints))
            raise ValueError(f"'{odd[0]}' needs both a checkpoint and an output")
        places = [path.absolute() for path in self.outputs.values()]
        if len(set(places)) != len(places):
            raise ValueError("two labels have the same output folder")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an answer, as it is hashed; later options count where they are given."""
        later = {"metadata", "samples"}
        outside = {"checkpoints", "outputs", "journal", "confirm_run_unsafe_code"}
        payload = self.model_dump(mode="json", exclude=outside)
        folders = payload["include_path"]
        payload["include_path"] = folders if len(folders) > 1 else next(iter(folders), None)
        return {key: each for key, each in payload.items() if each or key not in later}

    @property
    def dense(self) -> str:
        """Label of the dense model."""
        return next(iter(self.checkpoints))


class LabelOutcome(Frozen):
    """What became of one label.

    Attributes:
        status: ``failed`` leaves no output folder; ``reason`` says why.
        company: labels of the walk it was scored in, itself among them; empty if by itself.
        shared_layers: decoder layers that were not run for this label, because another one had.
        layers: its decoder layers.
        reason: why it failed, or why it was scored by itself; None if neither.
        reused: its output was there already.
        left_out: task -> why it was not evaluated although it was asked for.
        seconds: wall-clock time: its own, and its share of what was done for several.
    """

    status: Literal["ok", "failed"]
    company: tuple[str, ...] = ()
    shared_layers: int = 0
    layers: int = 0
    reason: str | None = None
    reused: bool = False
    left_out: dict[str, str] = Field(default_factory=dict)
    seconds: float = 0.0

    @property
    def together(self) -> bool:
        """Scored in a walk with others."""
        return len(self.company) > 1


class TrunkOutcome(Frozen):
    """What came of a request.

    Attributes:
        labels: by label, in the order of the request.
        walks: labels that were scored together, one tuple per walk, each in the order of the walk.
        per_model: kinds of requests that every model answered by itself (``generate_until``).
        seconds: wall time by stage.
    """

    labels: dict[str, LabelOutcome]
    walks: tuple[tuple[str, ...], ...] = ()
    per_model: tuple[str, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)

    @property
    def failed(self) -> dict[str, str]:
        """Label -> reason of those that failed."""
        return {k: v.reason or "" for k, v in self.labels.items() if v.status == "failed"}
