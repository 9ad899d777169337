"""A checkpoint as a sequence of steps, each named by its content; which models walk together.

Two models share their first steps as far as these names agree: the same tensor bytes in the same
order under the same configuration. Names of checkpoints, manifests and recipes play no part.

In the order of a depth-first walk through the trie of their steps, every model's longest beginning
in common with any model before it is the one in common with the model right before it. So a stack
of hidden states, one for each boundary where a later model sets out, is all there is to keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamline_bench.core.architecture import Architecture, architecture_of
from streamline_bench.core.checkpoint.folder import tokenizer_files
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.modeling.attachments import BEFORE_FIRST
from streamline_bench.modeling.loading import load_config

_NO_PART = {
    "_commit_hash", "_name_or_path", "architectures", "host_model_type", "model_type",
    "transformers_version", "use_cache",
    "attachments",  # named in the steps they belong to
    "layer_widths",  # seen in the shapes of tensors
    "removed_sublayers",  # seen in the names of tensors
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One thing that a model does to its hidden states.

    Attributes:
        layer: index of the decoder layer it belongs to.
        attachment: the network behind that layer, not the layer itself.
        name: SHA-256 (hex) of its tensors and of what the config says about it.
    """

    layer: int
    attachment: bool
    name: str


@dataclass(frozen=True)
class Stack:
    """A model from its first layer to its last, without final norm and LM head.

    Attributes:
        root: what must agree for anything to be shared, by aspect: family, config, tokenizer,
            embeddings.
        steps: in the order they run.
    """

    root: Mapping[str, str]
    steps: tuple[Step, ...]

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return sum(not step.attachment for step in self.steps)

    def layers_below(self, boundary: int) -> int:
        """Number of decoder layers among the first ``boundary`` steps."""
        return sum(not step.attachment for step in self.steps[:boundary])


@dataclass(frozen=True)
class Leg:
    """One model's part of a walk.

    Attributes:
        start: boundary it sets out from: that many of its steps were run by others.
        keep: boundaries above ``start`` where later models set out.
    """

    label: str
    start: int
    keep: frozenset[int]


def read_stack(
    folder: Path,
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Stack:
    """Read the names of a checkpoint's steps; tensor digests come from the user's cache.

    Args:
        dtype: that the weights will be loaded in; None or ``auto``: the one the config names.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ArchitectureError: the family is not supported.
    """
    reader = CheckpointReader(folder)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    row = architecture_of(config)
    entries = {k: v for k, v in config.to_dict().items() if v is not None}
    outside, of_layer = _sorted_tensors(reader, row, progress)
    root = {
        "family": row.model_type,
        **_root_config(entries, row, dtype),
        **_tokenizer(folder),
        **{f"tensor {name}": json.dumps(value) for name, value in sorted(outside.items())},
    }
    steps = []
    for layer in range(int(entries[row.depth_key])):
        steps += _steps(layer, of_layer[layer], entries, row)
    return Stack(root, tuple(steps))


def root_difference(stack: Stack, other: Stack) -> str | None:
    """Say in which respect ``stack`` can share nothing with ``other``; None if it can."""
    for key in [*other.root, *stack.root]:
        mine, theirs = stack.root.get(key), other.root.get(key)
        if mine == theirs:
            continue
        if key.startswith(("tensor", "tokenizer")):
            return f"its {key} differs"
        return f"its {key} is {mine}, not {theirs}"
    return None


def _sorted_tensors(
    reader: CheckpointReader, row: Architecture, progress: bool
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Part the tensors into those before the layers and those of each; norm and head left out."""
    digests = reader.tensor_digests(progress)
    inner = re.escape(row.layers.rpartition(".")[2])
    pattern = re.compile(rf"(?:^|\.){inner}\.(\d+)\.")
    last = row.final_norm, row.lm_head, row.stored_as.get(row.lm_head, row.lm_head)
    ends = tuple(f"{_short(path, row)}." for path in last)
    outside: dict[str, Any] = {}
    of_layer: dict[int, dict[str, Any]] = defaultdict(dict)
    for name, entry in reader.stored_entries.items():
        value = [entry.dtype, list(entry.shape), digests[name]]
        found = pattern.search(name)
        if name.endswith(row.buffers):
            continue
        if found:
            of_layer[int(found[1])][name[found.end() :]] = value
        elif not _short(name, row).startswith(ends):
            outside[_short(name, row)] = value
    return outside, of_layer


def _short(name: str, row: Architecture) -> str:
    return name.removeprefix(f"{row.base}.")  # checkpoints of the bare model lack it


def _root_config(
    entries: Mapping[str, Any], row: Architecture, dtype: str | None
) -> dict[str, str]:
    by_layer = {
        row.depth_key,
        row.extra_layers,
        *row.layer_lists,
        *row.index_lists,
        *row.prefix_counts,
        *row.periods,
    }
    dropped = _NO_PART | by_layer | (set() if dtype in (None, "auto") else {"dtype"})
    return {
        f"config entry {key}": json.dumps(value, sort_keys=True, default=str)
        for key, value in sorted(entries.items())
        if key not in dropped
    }


def tokenizer_sha256(folder: Path) -> str:
    """Return a SHA-256 (hex) of the files that decide how a model's text becomes tokens."""
    return hashlib.sha256(json.dumps(_tokenizer(folder), sort_keys=True).encode()).hexdigest()


def _tokenizer(folder: Path) -> dict[str, str]:
    found = {}
    for path in tokenizer_files(folder):
        data = path.read_bytes()
        if path.suffix == ".json":
            # Saved by another version, it may be spaced or ordered otherwise.
            with contextlib.suppress(ValueError):
                data = json.dumps(json.loads(data), sort_keys=True).encode()
        found[f"tokenizer file {path.name}"] = hashlib.sha256(data).hexdigest()
    return found


def _steps(
    layer: int, tensors: Mapping[str, Any], entries: Mapping[str, Any], row: Architecture
) -> list[Step]:
    places = {int(a["after_layer"]): a for a in entries.get("attachments") or []}
    prelude = places.get(BEFORE_FIRST) if layer == 0 else None
    own = {k: v for k, v in tensors.items() if not k.startswith("attachment.")}
    steps = [Step(layer, False, _name(own, prelude, _about(layer, entries, row)))]
    if layer in places:
        network = {k: v for k, v in tensors.items() if k.startswith("attachment.")}
        steps.append(Step(layer, True, _name(network, places[layer], None)))
    return steps


def _about(layer: int, entries: Mapping[str, Any], row: Architecture) -> dict[str, Any]:
    """What the config says about one layer alone.

    Lists that stand for a period are left out: which kind of layer it is shows in its tensors.
    """
    about: dict[str, Any] = {}
    for key in row.layer_lists:
        about[key] = entries[key][layer] if entries.get(key) else None
    for key in set(row.index_lists) - set(row.periods.values()):
        about[key] = layer in (entries.get(key) or ())
    for key in row.prefix_counts:
        about[key] = layer < int(entries.get(key) or 0)
    return about


def _name(tensors: Mapping[str, Any], network: Any, about: Any) -> str:
    kind = None if network is None else [network["kind"], network["intermediate_size"]]
    payload = json.dumps([sorted(tensors.items()), kind, about], sort_keys=True, default=str)
    return hashlib.sha256(payload.encode()).hexdigest()


def walks_of(stacks: Mapping[str, Stack]) -> list[list[str]]:
    """Group labels whose models have the same first step, each group in walking order.

    Groups come in the order of ``stacks``; a group of one shares nothing.
    """
    groups: dict[object, list[str]] = {}
    for label, stack in stacks.items():
        first = stack.steps[0].name if stack.steps else ""
        groups.setdefault((tuple(sorted(stack.root.items())), first), []).append(label)
    return [_walking_order(labels, stacks) for labels in groups.values()]


def legs_of(labels: Sequence[str], stacks: Mapping[str, Stack]) -> list[Leg]:
    """Return the legs of models in walking order (any part of one is in walking order, too)."""
    starts = [0]
    for before, label in itertools.pairwise(labels):
        starts.append(_in_common(stacks[before], stacks[label]))
    legs = []
    for number, label in enumerate(labels):
        lowest = len(stacks[label].steps)
        keep = set()
        for later in starts[number + 1 :]:
            if later <= lowest:
                lowest = later
                keep.add(later)
        legs.append(Leg(label, starts[number], frozenset(b for b in keep if b > starts[number])))
    return legs


def solo_reason(label: str, dense: str, stacks: Mapping[str, Stack]) -> str:
    """Say why a model shares no layer with another one, compared with the dense model."""
    if len(stacks) == 1:
        return "no other model has to be scored"
    if label == dense or dense not in stacks:
        return "no other model has the same first layer"
    difference = root_difference(stacks[label], stacks[dense]) or "its first layer differs"
    return f"it shares no layer with '{dense}': {difference}"


def _walking_order(labels: Sequence[str], stacks: Mapping[str, Stack]) -> list[str]:
    seen: dict[str, int] = {}
    for label in labels:
        for step in stacks[label].steps:
            seen.setdefault(step.name, len(seen))
    return sorted(labels, key=lambda label: [seen[step.name] for step in stacks[label].steps])


def _in_common(first: Stack, second: Stack) -> int:
    count = 0
    for one, other in zip(first.steps, second.steps, strict=False):
        if (one.name, one.layer, one.attachment) != (other.name, other.layer, other.attachment):
            break
        count += 1
    return count
