"""TALE (arXiv 2510.22767): removes one layer after another. Each step removes the layer without
which the remaining model answers most questions of a task.

The paper stops when the best candidate falls below the dense model's accuracy less ``epsilon``;
here the size is asked for, and ``epsilon`` refuses one that lies beyond. The questions are of a
split that is not scored (:mod:`streamline_bench.methods.tools.task_questions`). The authors' code
lets the model generate a letter after a chat prompt; here the likeliest choice is the answer, as
the harness has it.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field, field_validator
from torch import Tensor, nn

from streamline_bench.core.architecture import sequence_limit
from streamline_bench.core.data.calibration import CalibrationTokens, require_known_tokens
from streamline_bench.core.files import atomic_write_text
from streamline_bench.core.forward import sent
from streamline_bench.core.recipe.schema import CalibrationSpec, Recipe
from streamline_bench.core.surgery import SizePlan
from streamline_bench.errors import CalibrationError, SparsityError
from streamline_bench.methods.base import Compression
from streamline_bench.methods.tools.likelihood import (
    greedy_layers,
    measured_without,
    require_finite_score,
)
from streamline_bench.methods.tools.selection import LayerSelection, ProtectedEnds, Selected
from streamline_bench.methods.tools.shared_scan import steps_once
from streamline_bench.methods.tools.task_questions import (
    SEARCHED_FILE,
    Metric,
    Question,
    Split,
    held_out_questions,
    local_files,
    named_tasks,
)

log = logging.getLogger(__name__)

_CHOICES, _TOKENS = 4, 256
"""What a question is taken for before it is read: choices, and tokens of context and choice."""


class TALEParameters(ProtectedEnds):
    """Parameters of the method ``tale``.

    Attributes:
        tasks: of the harness, with choices: names of tasks or groups, or YAML files; ``auto``: see
            :func:`.named_tasks`. The accuracy is the mean over tasks.
        split: which split is searched; None: ``validation``, or ``train`` where that is scored.
        documents: most questions of each task.
        metric: see :data:`streamline_bench.methods.tools.task_questions.Metric`.
        epsilon: most accuracy that may be lost (0.08 in the authors' code); None: no limit.
        activations_gb: most memory for the states of a batch, in 10^9 bytes.
    """

    tasks: tuple[str, ...] = Field(("auto",), min_length=1)
    split: Split | None = None
    documents: int = Field(256, ge=1)
    metric: Metric = "acc"
    epsilon: float | None = Field(None, ge=0, lt=1)
    activations_gb: float = Field(8.0, gt=0)

    @field_validator("tasks", mode="before")
    @classmethod
    def _of_a_command_line(cls, given: Any) -> Any:
        return [each for each in given.split(",") if each] if isinstance(given, str) else given


class TALE(LayerSelection):
    """Greedy removal by the accuracy on a task."""

    name = "tale"
    calibrated = False
    passes = frozenset({"losses"})
    streamed = True
    parameters: ClassVar[type[BaseModel]] = TALEParameters

    def looked_at(self, recipe: Recipe) -> CalibrationSpec:
        """About as many tokens as the questions have."""
        options = TALEParameters.model_validate(recipe.parameters)
        rows = len(options.tasks) * options.documents * _CHOICES
        return CalibrationSpec(samples=rows, sequence_length=_TOKENS)

    def files(self, parameters: Mapping[str, Any]) -> Sequence[Path]:
        """Task files that are named by their path, and their data."""
        return local_files(TALEParameters.model_validate(parameters).tasks)

    def select(self, work: Compression, options: Any, plan: SizePlan) -> Selected:
        """Remove layers greedily; a search that stopped early or at a smaller size goes on."""
        allowed = options.candidates(plan.num_layers, plan.n_layers)
        found, tasks = held_out_questions(
            named_tasks(options.tasks, work.folder), options.metric, options.documents,
            split=options.split, seed=work.recipe.seed,
        )  # fmt: skip
        exam = Exam.of(found, work, options.metric)
        hashes = sorted(question.doc_hash for question in found)
        atomic_write_text(
            work.work / SEARCHED_FILE, json.dumps({"tasks": tasks, "doc_hashes": hashes}) + "\n"
        )

        def errors(layers: Sequence[int], **rest: Any) -> dict[int, float]:
            answers = measured_without(
                work.model, exam.tokens, layers, exam.likelihoods, work=work.work,
                activations_gb=options.activations_gb, progress=work.progress, **rest,
            )  # fmt: skip
            return {layer: 1 - exam.accuracy(layer, values) for layer, values in answers.items()}

        dense = errors([plan.num_layers], description="dense model")[plan.num_layers]
        log.info("TALE: the dense model's accuracy is %.4f on %d questions", 1 - dense, len(found))

        def within(layers: Sequence[int], removed: Sequence[int], **rest: Any) -> dict[int, float]:
            after = errors(layers, removed=removed, **rest)
            least = min(after.values())
            if options.epsilon is not None and least > dense + options.epsilon + 1e-9:
                raise SparsityError(
                    f"TALE with epsilon {options.epsilon} removes {len(removed)} layers of the "
                    f"{plan.n_layers} asked for: the next one takes the accuracy from "
                    f"{1 - dense:.4f} to {1 - least:.4f}; remove fewer, raise epsilon, or leave it "
                    "out."
                )
            return after

        decided_by = [
            list(allowed), options.metric, options.epsilon, options.activations_gb, hashes,
        ]  # fmt: skip
        with steps_once(work, exam.tokens, self.name, decided_by) as record:
            steps = greedy_layers(record, allowed, plan.n_layers, within)
        removed = [step.part for step in steps]
        chosen = {
            "score": f"{options.metric}, mean over tasks",
            "tasks": tasks,
            "order": removed,
            "accuracy_dense": 1 - dense,
            "accuracy_after_step": [1 - step.loss for step in steps],
            "protected": options.protected(allowed, plan.num_layers),
        }
        return Selected(removed, chosen, exam.tokens)


@dataclass(frozen=True)
class Exam:
    """Questions as tokens: a sequence for each choice.

    Attributes:
        tokens: the sequences, longest first.
        places: the question and the choice of each.
        answers: how many of the last tokens of each are the choice's.
    """

    questions: Sequence[Question]
    metric: Metric
    tokens: CalibrationTokens
    places: Sequence[tuple[int, int]]
    answers: Sequence[int] = field(repr=False)

    @classmethod
    def of(cls, questions: Sequence[Question], work: Compression, metric: Metric) -> Exam:
        """Encode questions as the harness does; contexts too long are cut from the left.

        Raises:
            CalibrationError: the model has no embedding for a token, or a choice is too long.
        """
        names = ", ".join(dict.fromkeys(question.task for question in questions))
        limit = sequence_limit(work.config)
        rows = []
        for number, question in enumerate(questions):
            for choice, (context, continuation) in enumerate(question.requests):
                before, answer = encoded_pair(work.tokenizer, context, continuation)
                ids = [*before, *answer]
                ids = ids if limit is None else ids[-limit:]
                if not answer or len(answer) >= len(ids):
                    raise CalibrationError(
                        f"A choice of task '{question.task}' has {len(answer)} tokens behind a "
                        f"context, and the model reads {limit}; give another task."
                    )
                rows.append((ids, (number, choice), len(answer)))
        rows.sort(key=lambda row: -len(row[0]))
        largest = [max(ids) for ids, *_ in rows]
        require_known_tokens(largest, work.tokenizer, work.config.vocab_size, f"Task {names}")
        lengths = torch.tensor([len(row[0]) for row in rows])
        padded = nn.utils.rnn.pad_sequence([torch.tensor(row[0]) for row in rows], batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        tokens = CalibrationTokens.from_tensors(padded, mask, f"tasks {names}")
        return cls(questions, metric, tokens, [row[1] for row in rows], [row[2] for row in rows])

    def likelihoods(self, logits: Tensor, ids: Tensor, mask: Tensor, first: int) -> Tensor:
        """Return the log-likelihood of each sequence's choice, float32 ``[batch]``."""
        found = []
        counts = self.answers[first : first + len(ids)]
        for row, tokens, length, count in zip(
            logits, ids, mask.sum(dim=1).tolist(), counts, strict=True
        ):
            targets = sent(tokens[length - count : length], logits.device)
            predicted = row[length - count - 1 : length - 1]
            predicted = predicted.to(torch.promote_types(row.dtype, torch.float32))
            found.append(-nn.functional.cross_entropy(predicted, targets, reduction="sum"))
        return torch.stack(found)

    def accuracy(self, layer: int, values: Sequence[Tensor]) -> float:
        """Return the share of right answers without a layer, the mean over tasks.

        Raises:
            NumericsError: a likelihood is NaN or infinite.
        """
        scores: dict[int, dict[int, float]] = defaultdict(dict)
        for (number, choice), value in zip(
            self.places, torch.cat(list(values)).tolist(), strict=True
        ):
            require_finite_score(layer, value)
            length = self.questions[number].lengths[choice] if self.metric == "acc_norm" else 1
            scores[number][choice] = value / length
        right: dict[str, list[bool]] = defaultdict(list)
        for number, question in enumerate(self.questions):
            of = scores[number]
            best = max(sorted(of), key=of.__getitem__)  # of equals the first, as in the harness
            right[question.task].append(best in question.right)
        return sum(sum(each) / len(each) for each in right.values()) / len(right)


def encoded_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and of its continuation, split where the harness does."""
    beginning = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    if not context:
        answer = tokenizer.encode(continuation, add_special_tokens=False)
        return ([], answer) if answer[:1] == [beginning] else ([beginning], answer)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    known = tokenizer.bos_token and context.startswith(tokenizer.bos_token)
    special = {"add_special_tokens": False} if known else {}
    whole = tokenizer.encode(context + continuation, **special)
    before = tokenizer.encode(context, **special)
    return whole[: len(before)], whole[len(before) :]
