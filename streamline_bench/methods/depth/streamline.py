"""LLM-Streamline (arXiv 2403.19135): drop the block that changes the hidden states least,
and train one lightweight network to stand in for it.

The number of layers fewer in the result is what ``n_layers`` (or the sparsity solver) says. A
replacement of kind ``layer`` takes k slots of its own, so that a block of n + k layers is removed;
the feed-forward kinds are not decoder layers, so that a block of n is removed.

With a ``selection``, another method chooses the layers, and every run of removed layers gets a
replacement of its own. With ``iterations``, the layers go in as many parts: each is chosen on the
model that the parts before left, with their replacements, and replaced before the next.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, Field, model_validator

from streamline_bench.core.architecture import architecture_of, depth_of
from streamline_bench.core.checkpoint.writer import layers_prefix
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.replacement import network_parameters
from streamline_bench.core.surgery import SizePlan
from streamline_bench.core.training import TrainedCuts, train_replacements
from streamline_bench.core.training.sharding import division
from streamline_bench.errors import NumericsError, RecipeError, SparsityError
from streamline_bench.methods.base import Compressed, Compression, Size
from streamline_bench.methods.tools.layer_removal import as_stored, attached, drop_layers, size_plan
from streamline_bench.methods.tools.selection import (
    AnySelection,
    LayerSelection,
    OnSelection,
    Selected,
    cuts_of,
)
from streamline_bench.methods.tools.shared_scan import scan_once
from streamline_bench.methods.tools.sizes import whole_layers
from streamline_bench.methods.tools.steps import CURVE_FILE, compress_in_steps


class StreamlineParameters(AnySelection):
    """Parameters of the method ``streamline``.

    Attributes:
        iterations: in how many parts the layers go.
    """

    iterations: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _searched_again(self) -> StreamlineParameters:
        listed = self.selection is not None and self.selection.method == "given_layers"
        if self.iterations > 1 and (listed or self.start is not None):
            raise ValueError(
                f"iterations is {self.iterations}, and start or given_layers says which layers go, "
                "so that no later step could choose; leave one of them out"
            )
        return self

    def select(self, work: Compression, plan: SizePlan) -> Selected:
        """Return the layers to remove."""
        if self.selection is not None:
            return super().select(work, plan)
        tokens = work.tokens(work.recipe.calibration)
        similarity = scan_once(work, tokens, self.last_state)
        block = self.choose(similarity, plan.n_layers)
        scores = similarity.scores(block.n, self.metric)
        best = scores.argmax() if self.metric == "cosine" else scores.argmin()
        facts = {
            "start": block.start, "score": block.score, "metric": self.metric,
            "last_state": self.last_state, "best_start_without_guard": int(best),
        }  # fmt: skip
        return Selected(range(block.start, block.stop), facts, tokens)


class Streamline(OnSelection, LayerSelection):
    """Removal of layers with an optional trained replacement for each run of them.

    As the selection of another method it chooses layers and replaces nothing.
    """

    name = "streamline"
    parameters: ClassVar[type[BaseModel]] = StreamlineParameters
    reads = frozenset({"replacement", "training", "reference_quirks"})
    seeded = False  # but for the training of a replacement
    streamed = True

    def reads_calibration(self, parameters: Mapping[str, Any]) -> bool:
        """Whether the choice of layers does."""
        return self._selection(parameters).calibrated

    def parts(self, recipe: Recipe) -> tuple[str, str] | None:
        """The choice of layers, and the replacement with its objective."""
        options = StreamlineParameters.model_validate(recipe.parameters)
        spec, objective = recipe.replacement, recipe.training.objective
        steps = f" in {options.iterations} steps" if options.iterations > 1 else ""
        if spec.kind == "none":
            return options.words() + steps, "none"
        name = f"{spec.layers} layers" if spec.kind == "layer" and spec.layers > 1 else spec.kind
        how = "untrained" if objective == "none" else objective
        return options.words() + steps, f"{name}, {how}"

    def words(self, options: Any) -> str:
        """The choice of layers in words, whichever method makes it."""
        found: str = options.words()
        return found

    def cuts(self, options: Any) -> int | None:
        """One, of a block; else those of the method that chooses."""
        chosen = options.selection
        return 1 if chosen is None else chosen.selector.cuts(chosen.options)

    def select(self, work: Compression, options: Any, plan: SizePlan) -> Selected:
        """Return the layers that would go at once.

        Raises:
            RecipeError: they are to go in several steps.
        """
        if options.iterations > 1:
            raise RecipeError(
                f"A selection chooses all layers at once, and that of streamline has iterations "
                f"{options.iterations}; leave iterations out."
            )
        found: Selected = options.select(work, plan)
        return found

    def stock(self, recipe: Recipe) -> bool:
        """Layers are stock; feed-forward networks in their place are not."""
        return recipe.replacement.kind in ("none", "layer")

    def streams(self, recipe: Recipe) -> bool:
        """Whether no pass goes backwards through the model, or one whose weights are divided."""
        backwards = recipe.replacement.kind != "none" and recipe.training.objective in ("lm", "kd")
        return super().streams(recipe) and (not backwards or division().moments > 1)

    def sizes(self, work: Compression) -> Iterator[Size]:
        """Yield whole layers less, with a replacement for each run of removed layers."""
        spec, depth = work.recipe.replacement, depth_of(work.config)
        network = 0 if spec.kind in ("none", "layer") else network_parameters(spec, work.config)
        options = StreamlineParameters.model_validate(work.recipe.parameters)
        most = options.most(depth) - (spec.layers if spec.kind == "layer" else 0)

        def added(n: int) -> int:
            apart = min(n, depth - n + 1) if options.iterations > 1 else options.most_cuts(depth, n)
            return network * apart

        yield from whole_layers(work, options, added=added, most=most)

    def compress(self, work: Compression) -> Compressed:
        """Choose the layers, train the replacements if there are any."""
        options = StreamlineParameters.model_validate(work.recipe.parameters)
        if options.iterations > 1:
            return _iterated(self, work, options.iterations)
        replacement, new = work.recipe.replacement, _new_layers(work)
        if new:
            plan, found = options.with_new_layers(work, new)
        elif replacement.kind == "none":
            plan = size_plan(work)
            found = options.select(work, plan)
        else:
            size = network_parameters(replacement, work.config)
            plan, found = options.with_networks(work, size)
        cuts = cuts_of(found.layers)
        trained = _train(work, cuts)
        chosen = {"removed_layers": sorted(found.layers), **found.facts}
        gone = [layer for cut in cuts for layer in cut[new:]]
        result = drop_layers(work, gone, plan, chosen=chosen, tokens=found.tokens)
        return result if trained is None else _with_trained(work, cuts, result, trained)


def _iterated(method: Streamline, work: Compression, iterations: int) -> Compressed:
    """Remove the layers in parts of equal size; the first ones are larger by one where needed.

    Raises:
        RecipeError: what stands in is not a layer, which a later step could look at.
        SparsityError: there are more parts than layers to remove.
    """
    kind, total = work.recipe.replacement.kind, size_plan(work).n_layers
    if not method.stock(work.recipe):
        raise RecipeError(
            f"parameters.iterations is {iterations}, and a later step cannot choose among layers "
            f"and a network of kind '{kind}' between them; take replacement 'layer' or 'none'."
        )
    if iterations > total:
        raise SparsityError(
            f"{total} layers cannot go in {iterations} parts; lower parameters.iterations, or "
            "remove more."
        )
    share, more = divmod(total, iterations)
    parts = [share + (number < more) for number in range(iterations)]
    parameters = {key: v for key, v in work.recipe.parameters.items() if key != "iterations"}
    return compress_in_steps(method, work, parts, parameters, new=_new_layers(work))


def _new_layers(work: Compression) -> int:
    """Decoder layers that the replacement itself puts in the place of each run."""
    replacement = work.recipe.replacement
    return replacement.layers if replacement.kind == "layer" else 0


def _train(work: Compression, cuts: Sequence[range]) -> TrainedCuts | None:
    recipe = work.recipe
    if recipe.replacement.kind == "none":
        return None
    data = recipe.training.data
    if data.source == "auto":
        data = data.model_copy(update={"source": recipe.calibration.source})
    result = train_replacements(
        work.model,
        cuts,
        spec=recipe.replacement,
        training=recipe.training,
        tokens=work.tokens(data),
        work=work.work / "training",
        seed=recipe.seed,
        device=work.device,
        progress=work.progress,
        quirks=recipe.reference_quirks,
        weights_sha256=work.reader.fingerprint(progress=work.progress),
        at_once=work.at_once,
        states=work.states,
    )
    for state in result.states:
        for name, tensor in state.items():
            if not bool(tensor.isfinite().all()):
                raise NumericsError(
                    f"The trained replacement's '{name}' is not finite; lower the lr."
                )
    return result


def _with_trained(
    work: Compression, cuts: Sequence[range], result: Compressed, trained: TrainedCuts
) -> Compressed:
    """Put the trained replacements into a result that merely drops layers."""
    config, names, new = result.config, result.names, _new_layers(work)
    if new:
        names, tensors = _placed_layers(work, cuts, names, trained, new)
    else:
        config, tensors = attached(work, cuts, work.recipe.replacement, trained.states)
    curve = "".join(json.dumps(row) + "\n" for row in trained.curve)
    return dataclasses.replace(
        result,
        config=config,
        names=names,
        tensors={**result.tensors, **tensors},
        training=dict(trained.summary),
        artefacts={**result.artefacts, CURVE_FILE: curve},
    )


def _placed_layers(
    work: Compression, cuts: Sequence[range], names: Mapping[str, str], trained: TrainedCuts,
    new: int,
) -> tuple[dict[str, str], dict[str, Any]]:  # fmt: skip
    """Return the names that are still copied, and the new layers' tensors at their places."""
    prefix = layers_prefix(work.reader, architecture_of(work.config))
    replaced: list[str] = []
    tensors: dict[str, Any] = {}
    before = 0  # layers gone
    for cut, trained_state in zip(cuts, trained.states, strict=True):
        first, state = cut.start - before, {}
        for key, tensor in trained_state.items():
            index, _, rest = key.partition(".")
            state[f"{prefix}.{first + int(index)}.{rest}"] = tensor
        tensors |= as_stored(work, cut.start, state)
        replaced += [f"{prefix}.{first + index}." for index in range(new)]
        before += len(cut) - new
    # Whole layers, not name by name: a checkpoint may store experts one by one that are fused in
    # the model.
    kept = {key: old for key, old in names.items() if not key.startswith(tuple(replaced))}
    return kept, tensors
