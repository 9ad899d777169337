"""The contract between streamline-bench and a compression method, and the methods by name.

A method is a class derived from :class:`Method`. It is given a :class:`Compression` (source model,
recipe, scratch folder) and hands back a :class:`Compressed` (config, copied tensors, new tensors,
facts). Writing, hashing, the manifest, the cache and any recovery are done for it.
:data:`API_VERSION` is raised when one of the three changes so that older methods would break.

:func:`get_method` finds our own methods by name, those of other packages by entry point or as
``module:Class``.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ValidationError

from streamline_bench.core.architecture import sequence_limit
from streamline_bench.core.checkpoint.folder import file_sha256
from streamline_bench.core.checkpoint.quantization import MODELOPT_NAME
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.files import atomic_write_text
from streamline_bench.core.recipe.schema import CalibrationSpec, Frozen, MethodParts, Recipe
from streamline_bench.core.recipe.validation import suggest_or_list, wrong_value
from streamline_bench.errors import RecipeError, SparsityError, first_line
from streamline_bench.modeling.loading import SourceModel
from streamline_bench.version import __version__

if TYPE_CHECKING:
    import torch

    from streamline_bench.core.data.calibration import CalibrationTokens

API_VERSION = 1
"""Version of the contract in this module."""


Pass = Literal["states", "maps", "losses", "merges", "gradients", "axes"]
"""What a pass over calibration text keeps: hidden states at all boundaries; these and the sums that
a map is fitted on; losses without a layer; states to compare merged models with; gradients of
weights; covariances of the stream."""


class NoParameters(Frozen):
    """The ``parameters`` of a method that has none."""


@dataclass(frozen=True)
class Compression:
    """What a method is given. Models, tokens and tensors are loaded when they are first used.

    Attributes:
        source: the model to compress; its folder is read only.
        recipe: the complete recipe; ``recipe.parameters`` has passed ``Method.parameters``.
        work: scratch folder, kept when the process is killed and given to the next attempt at the
            same result: files left there let it resume.
        device: torch device string for scanning and training.
        dtype: dtype of the loaded source model; ``None`` for float32.
        progress: show progress bars.
        streamed: :attr:`model` reads each layer when it runs, see :attr:`Method.streamed`.
        scans: folder of scans of this model, shared by all recipes; None: they are not shared.
        at_once: most sequences that a training computes together; None: as the recipe says.
        states: folder of hidden states that other compressions want as well, and that the first of
            them fills; None: they are not shared.
    """

    source: SourceModel
    recipe: Recipe
    work: Path
    device: str = "cpu"
    dtype: str | None = None
    progress: bool = True
    streamed: bool = False
    scans: Path | None = None
    at_once: int | None = None
    states: Path | None = None

    @property
    def folder(self) -> Path:
        """Local folder of the source checkpoint."""
        return self.source.folder

    @property
    def reader(self) -> CheckpointReader:
        """The source's tensors as they are stored, read one by one."""
        return self.source.reader

    @property
    def config(self) -> Any:
        """The source's transformers config."""
        return self.source.config

    @property
    def tokenizer(self) -> Any:
        """The source's tokenizer."""
        return self.source.tokenizer

    @cached_property
    def model(self) -> Any:
        """The source model on ``device``, in evaluation mode."""
        from streamline_bench.modeling.loading import load_model

        return load_model(
            self.folder,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.source.trust_remote_code,
            streamed=self.streamed,
        )

    def release_model(self) -> None:
        """Free the source model; a later use loads it again."""
        self.__dict__.pop("model", None)

    def tokens(self, spec: CalibrationSpec) -> CalibrationTokens:
        """Return calibration or training tokens: int64 ``[sequences, length]`` with a mask.

        Raises:
            CalibrationError: the source cannot be read or holds too little.
        """
        from streamline_bench.core.data.calibration import load_calibration
        from streamline_bench.core.data.corpora import SELF

        if spec.source == SELF:
            return self._own_tokens(spec)
        return load_calibration(
            spec,
            self.tokenizer,
            model_folder=self.folder,
            max_length=sequence_limit(self.config),
            vocabulary=self.config.vocab_size,
            progress=self.progress,
        )

    def _own_tokens(self, spec: CalibrationSpec) -> CalibrationTokens:
        """Let the source model write its own texts, once for all processes and attempts."""
        from streamline_bench.core.data.own_texts import count_of, own_tokens
        from streamline_bench.core.machine.ranks import current

        length = spec.length_within(sequence_limit(self.config))
        count_of(spec, length)  # refused before the model is loaded
        name = hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:16]
        return current().first(
            lambda: own_tokens(
                self.model, self.tokenizer, spec, self.work / f"own-texts-{name}.safetensors",
                length=length, progress=self.progress,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Compressed:
    """What a method hands back: enough to write the checkpoint and its manifest.

    Attributes:
        config: the new ``config.json`` as a mapping.
        names: new tensor name -> name in the source. These bytes are copied and never loaded.
        tensors: new or changed tensors, in the dtype to store. A mapping that makes each tensor
            on access keeps memory small.
        layers_after: decoder layers of the result.
        chosen: what the method decided (block, scores, sizes reached); JSON.
        calibration: facts about the calibration tokens, ``CalibrationTokens.summary()``.
        training: facts about the training, if there was any; JSON.
        artefacts: file name -> text, written next to the weights (similarity, training curve).
    """

    config: Mapping[str, Any]
    names: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    layers_after: int = 0
    chosen: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
    artefacts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """A size that a method reaches, known before anything is computed.

    Where a method chooses among parts of different sizes, these are the most that a result of it
    takes, whichever parts are chosen.

    Attributes:
        given: keys of a recipe, and values with which it has this size.
        parameters: of the model.
        nbytes: of its tensors as they are stored.
        cached: numbers that it caches for one token; None: not known.
        layers: of its decoder.
    """

    given: Mapping[str, Any]
    parameters: int
    nbytes: int
    cached: int | None
    layers: int


class Method(ABC):
    """A compression method: one class in one file, one recipe, one test.

    Attributes:
        name: what errors call it; the name that it is registered under.
        api: the :data:`API_VERSION` that the class is written for. A method of another package has
            to state it.
        version: part of the cache key; raise it when the same recipe gives other tensors than
            before.
        parameters: schema of ``recipe.parameters``.
        reads: which of ``replacement``, ``training`` and ``reference_quirks`` the method reads. A
            recipe that sets another one is refused.
        passes: what its passes over the calibration text keep, for the forecast of memory.
        calibrated: whether the method reads calibration text.
        keeps_stream: the residual stream keeps its basis and width. Else features of images, which
            a multimodal model puts between the embeddings, would not fit.
        removes: what it removes; a recipe that counts layers is for those that remove ``layers``.
        seeded: whether it reads ``recipe.seed``; False says that every seed gives the same.
        streamed: whether it gives the same result with a streamed ``work.model``, or needs no
            model. Layers of such a model have weights while they run, or while
            :func:`streamline_bench.core.streaming.held_layer` holds them.
    """

    name: ClassVar[str]
    api: ClassVar[int] = API_VERSION
    version: ClassVar[int] = 1
    parameters: ClassVar[type[BaseModel]] = NoParameters
    reads: ClassVar[frozenset[str]] = frozenset()
    passes: ClassVar[frozenset[Pass]] = frozenset({"states"})
    calibrated: ClassVar[bool] = True
    keeps_stream: ClassVar[bool] = True
    removes: ClassVar[str] = "layers"
    seeded: ClassVar[bool] = True
    streamed: ClassVar[bool] = False

    def reads_seed(self, parameters: Mapping[str, Any]) -> bool:
        """Whether the method itself reads the seed with these parameters."""
        return self.seeded

    def reads_calibration(self, parameters: Mapping[str, Any]) -> bool:
        """Whether the method reads calibration text with these parameters."""
        return self.calibrated

    def looked_at(self, recipe: Recipe) -> CalibrationSpec | None:
        """How much text the method's passes see, for the forecast of memory; None: no text."""
        return recipe.calibration if self.reads_calibration(recipe.parameters) else None

    def files(self, parameters: Mapping[str, Any]) -> Sequence[Path]:
        """Local files named in the parameters: their content is part of the key."""
        return ()

    def uses(self, parameters: Mapping[str, Any]) -> tuple[str, ...]:
        """Other methods whose results decide this one's: their versions are part of the key."""
        return ()

    def parts(self, recipe: Recipe) -> tuple[str, str] | None:
        """Which layers go, and what stands in for them, in words (see :class:`MethodParts`).

        None: the method cannot be divided so.
        """
        return None

    @abstractmethod
    def compress(self, work: Compression) -> Compressed:
        """Compress the source model as the recipe says.

        Raises:
            StreamlineBenchError: one of its kinds. Each is one sentence: what was wrong, with the
                value, and what to do.
        """

    def sizes(self, work: Compression) -> Iterator[Size]:
        """Yield every size that the method reaches, the largest first; no weights are read.

        The sizes in ``work.recipe`` do not count. Here: whole layers, as many as the parameters
        allow; a method that removes anything else yields its own.

        Raises:
            ArchitectureError: the method does not know this model.
            SparsityError: the method names no sizes.
        """
        if self.removes != "layers":
            raise SparsityError(
                f"Method '{self.name}' removes {self.removes} and names no sizes, so that no "
                "target can be solved for it; give it a sparsity instead."
            )
        from streamline_bench.methods.tools.sizes import whole_layers

        yield from whole_layers(work, self.parameters.model_validate(work.recipe.parameters))

    def stock(self, recipe: Recipe) -> bool:
        """Whether plain transformers loads the result, of families that have a class for it.

        Otherwise the result is of model type ``streamline``.
        """
        return True

    def streams(self, recipe: Recipe) -> bool:
        """Whether the method can carry this recipe out with a streamed model."""
        return self.streamed


def write_compressed(
    folder: Path, reader: CheckpointReader, result: Compressed, *, progress: bool = True
) -> dict[str, str]:
    """Write weights, config, tokenizer and artefacts into an existing, empty folder.

    Args:
        reader: the checkpoint in which the names of ``result.names`` are.

    Returns:
        SHA-256 (hex) of the files of weights, by name.

    Raises:
        CheckpointError: a named tensor is not in it.
        OutputError: the folder cannot be written.
    """
    from streamline_bench.core.checkpoint.writer import compose

    digests: dict[str, str] = {}
    plain = compose(
        reader, folder, config=dict(result.config), names=result.names, extra=result.tensors,
        progress=progress, digests=digests,
    )  # fmt: skip
    for name, text in result.artefacts.items():
        if plain and name == MODELOPT_NAME:
            continue
        atomic_write_text(folder / name, text)
    return digests


ENTRY_POINTS = "streamline_bench.methods"
"""Entry-point group in which other packages name their methods: ``name = "module:Class"``."""

METHODS: Mapping[str, str] = {
    "block_pruner": "depth.sublayers:BlockPruner",
    "dense": "dense:Dense",
    "expert_pruning": "experts.expert_pruning:ExpertPruning",
    "first_layers": "depth.positional:FirstLayers",
    "flap": "width.flap:FLAP",
    "given_layers": "depth.positional:GivenLayers",
    "laco": "depth.laco:LaCo",
    "last_layers": "depth.positional:LastLayers",
    "linear_patch": "maps.linear_patch:LinearPatch",
    "llm_pruner": "width.llm_pruner:LLMPruner",
    "magnitude": "depth.magnitude:Magnitude",
    "magnitude_compensation": "maps.magnitude_compensation:MagnitudeCompensation",
    "minitron": "width.minitron:Minitron",
    "random_layers": "depth.positional:RandomLayers",
    "replaceme": "maps.replaceme:ReplaceMe",
    "ridge_map": "maps.ridge_map:RidgeMap",
    "shortened_llama_ppl": "depth.shortened_llama:ShortenedLlamaPPL",
    "shortened_llama_taylor": "depth.shortened_llama:ShortenedLlamaTaylor",
    "shortgpt": "depth.shortgpt:ShortGPT",
    "sleb": "depth.sleb:SLEB",
    "slicegpt": "rotation.slicegpt:SliceGPT",
    "sliding_merge": "depth.laco:SlidingMerge",
    "streamline": "depth.streamline:Streamline",
    "sublayer_drop": "depth.sublayers:SublayerDrop",
    "tale": "depth.tale:TALE",
    "uidl": "depth.uidl:UIDL",
}
"""Our own methods: name -> ``"module:Class"``, the module below ``streamline_bench.methods``."""


@cache
def offered(group: str) -> Mapping[str, tuple[metadata.EntryPoint, ...]]:
    """Return what other packages offer in an entry-point group: name -> entry points of it."""
    found: dict[str, tuple[metadata.EntryPoint, ...]] = {}
    for entry in metadata.entry_points(group=group):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def get_method(name: str) -> Method:
    """Return an instance of a method.

    Args:
        name: one of :data:`METHODS`, which come first; a name that another package offers; or
            ``module:Class``.

    Raises:
        RecipeError: no such method, two packages offer it, or it cannot be used here.
    """
    if name in METHODS:
        module, _, attribute = METHODS[name].partition(":")
        own = importlib.import_module(f"streamline_bench.methods.{module}")
        built_in: type[Method] = getattr(own, attribute)
        return built_in()
    return _foreign_class(name, _target(name))()


def _target(name: str) -> str:
    """Return ``module:Class`` of a method that is not ours."""
    if ":" in name:
        return name
    entries = offered(ENTRY_POINTS).get(name, ())
    if not entries:
        known = sorted({*METHODS, *offered(ENTRY_POINTS)})
        raise RecipeError(f"Unknown method '{name}'{suggest_or_list(name, known)}")
    if len(entries) > 1:
        owners = " and ".join(
            f"{entry.dist.name if entry.dist else 'an unnamed package'} ({entry.value})"
            for entry in entries
        )
        raise RecipeError(
            f"Two packages offer a method '{name}': {owners}; uninstall one of them, or write "
            f"'method: {entries[0].value}' in the recipe."
        )
    return entries[0].value


def _foreign_class(name: str, target: str) -> type[Method]:
    """Import a method of another package and check that it keeps to the contract."""
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    # A stranger's module may raise anything while it is imported.
    except Exception as error:
        raise RecipeError(
            f"Method '{name}' cannot be imported: {module} ends with {type(error).__name__} "
            f"({first_line(error)}); install the package that has it, or correct the name."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)) or inspect.isabstract(found):
        raise RecipeError(
            f"Method '{name}': {module} has no class '{attribute}' that derives from "
            "streamline_bench.methods.base.Method and defines compress; correct the name."
        )
    written = (each.__dict__.get("api") for each in found.__mro__ if not _is_ours(each))
    api = found.api if _is_ours(found) else next((each for each in written if each), None)
    if api != API_VERSION:
        raise RecipeError(
            f"Method '{name}' states {f'version {api}' if api else 'no version'} of the method "
            f"contract (attribute 'api'), and streamline-bench {__version__} has version "
            f"{API_VERSION}; install a version of {module.partition('.')[0]} for it."
        )
    return found


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "streamline_bench"


def facts_of_methods(recipe: Recipe) -> dict[str, Any]:
    """Return :func:`method_facts` of a recipe's method, with those of the methods that it uses.

    Raises:
        RecipeError: as :func:`get_method`.
    """
    facts = method_facts(recipe.method)
    used = get_method(recipe.method).uses(recipe.parameters)
    return {**facts, "uses": [method_facts(name) for name in used]} if used else facts


def method_facts(name: str) -> dict[str, Any]:
    """Return who wrote a method and in which version: part of the manifest and of the cache key.

    A method of another package is also known by the version of that package and the SHA-256 of its
    source file, so that the cache does not return what an earlier state of the file made.

    Raises:
        RecipeError: as :func:`get_method`.
    """
    method = get_method(name)
    facts: dict[str, Any] = {"name": method.name, "version": method.version}
    if name in METHODS:
        return {**facts, "package": "streamline-bench"}
    kind = type(method)
    entries = offered(ENTRY_POINTS).get(name, ())
    source = inspect.getsourcefile(kind)
    facts["class"] = f"{kind.__module__}:{kind.__qualname__}"
    facts["source_sha256"] = file_sha256(Path(source)) if source else None
    package = kind.__module__.partition(".")[0]
    if entries and entries[0].dist:
        package = entries[0].dist.name
    else:
        package = next(iter(metadata.packages_distributions().get(package, ())), package)
    try:
        return {**facts, "package": package, "package_version": metadata.version(package)}
    except metadata.PackageNotFoundError:  # a module on the path that no package brought
        return {**facts, "package": package, "package_version": None}


def parts_of(recipe: Recipe) -> MethodParts | None:
    """Return a recipe in its parts; None where its method cannot be divided into them.

    Raises:
        RecipeError: as :func:`get_method`.
    """
    parts = get_method(recipe.method).parts(recipe)
    if parts is None:
        return None
    return MethodParts(selection=parts[0], patch=parts[1], healing=recipe.healing)


def in_words(name: str, options: BaseModel, leave_out: Iterable[str] = ()) -> str:
    """Return a name with the parameters that are not the schema's own, ``laco (merge 4)``.

    Args:
        leave_out: parameters that are not named.
    """
    fields = type(options).model_fields
    changed = [
        f"{key.replace('_', ' ')} {_value(getattr(options, key))}"
        for key in fields
        if key not in leave_out and getattr(options, key) != fields[key].default
    ]
    return f"{name} ({', '.join(changed)})" if changed else name


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def unread_parts(method: str) -> frozenset[str]:
    """Return the parts of a recipe that some methods read and this one does not.

    Raises:
        RecipeError: no such method.
    """
    return frozenset({"replacement", "training", "reference_quirks"}) - get_method(method).reads


def check_parameters(recipe: Recipe) -> None:
    """Validate ``recipe.parameters`` against the method's own schema.

    Raises:
        RecipeError: unknown method, unknown parameter (with a suggestion), wrong value, or a part
            that the method would ignore.
        SparsityError: it counts layers, and the method removes something else.
    """
    for part in sorted(unread_parts(recipe.method)):
        if (given := getattr(recipe, part)) != Recipe.model_fields[part].default:
            shown = (
                given.model_dump(exclude_defaults=True) if isinstance(given, BaseModel) else given
            )
            raise RecipeError(
                f"Recipe '{recipe.name}': method '{recipe.method}' does not read '{part}', which "
                f"is {shown!r}; leave it out, or take a recipe of method 'streamline'."
            )
    method = get_method(recipe.method)
    if recipe.n_layers is not None and method.removes != "layers":
        raise SparsityError(
            f"Recipe '{recipe.name}' removes {method.removes} and no layers "
            f"(n_layers={recipe.n_layers}); give it a sparsity instead."
        )
    schema = method.parameters
    try:
        schema.model_validate(recipe.parameters)
    except ValidationError as error:
        problem = wrong_value(error, schema, "parameters")
        raise RecipeError(f"Recipe '{recipe.name}' (method '{recipe.method}'): {problem}") from None
