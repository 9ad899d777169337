"""Makes our ``lm_eval --model`` names known to harness versions without plug-in discovery.

lm-eval 0.4.13 reads a fixed table of models; later versions read the entry-point group
``lm_eval.models``, which this package declares as well. A ``.pth`` line of the wheel calls
:func:`install` at every interpreter start but those of ``streamline-bench``, whose commands call
:func:`register` where they run the harness. So nothing here may import anything that is not
imported by then: a finder is put in front of the others, waits for ``lm_eval.models`` and, once
that has run, adds lazy ``"module:Class"`` strings to its registry. When the harness's command
imports its evaluator, its arguments are known and nothing heavy is imported yet: wrong arguments of
our models are refused there, half a minute of processor time earlier.
"""

from __future__ import annotations

import sys

MODEL_NAME = "streamline"
MODELS = {
    MODEL_NAME: "streamline_bench.harness.lm:StreamlineLM",
    "streamline-vllm": "streamline_bench.harness.vllm_lm:StreamlineVLLM",
}
"""Name in the harness -> where the class is."""

_WATCHED = "lm_eval.models"
_EVALUATOR, _COMMAND = "lm_eval.evaluator", "lm_eval._cli.run"


class _Loader:
    """Runs the module's own loader, then registers."""

    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def create_module(self, spec: object) -> object:
        return self._inner.create_module(spec)  # type: ignore[attr-defined]

    def exec_module(self, module: object) -> None:
        self._inner.exec_module(module)  # type: ignore[attr-defined]
        _after(module)


class _Finder:
    """Finds ``lm_eval.models`` as the finders behind it do, and wraps its loader."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name == _EVALUATOR:
            _check_command()
        if name != _WATCHED:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if id(finder) != id(self)]
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def install() -> None:
    """Watch for the import of ``lm_eval.models``; register at once if it is imported already."""
    module = sys.modules.get(_WATCHED)
    if module is not None:
        _after(module)
    elif not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]


def register() -> None:
    """Import the harness's models and add ours, whatever the harness discovers by itself."""
    import lm_eval.models

    _add(lm_eval.models)


def refuse_wrong(model: object, arguments: object) -> None:
    """End the process with a sentence and exit code 2 if one of our models has wrong arguments."""
    if model not in MODELS or not isinstance(arguments, dict):
        return
    import os

    from streamline_bench.core.machine.environment import printable
    from streamline_bench.errors import StreamlineBenchError
    from streamline_bench.harness.arguments import check_arguments

    try:
        check_arguments(str(model), arguments)
    except StreamlineBenchError as error:
        if os.environ.get("STREAMLINE_BENCH_TRACEBACK"):
            raise
        sys.stderr.write(f"streamline-bench: {printable(error)}\n")
        raise SystemExit(2) from None


def _check_command() -> None:
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != _COMMAND:
        frame = frame.f_back  # type: ignore[assignment]
    config = None if frame is None else frame.f_locals.get("cfg")
    if config is not None:
        # Of another version of the harness this may know nothing; the model itself checks again.
        refuse_wrong(getattr(config, "model", None), getattr(config, "model_args", None))


def _after(module: object) -> None:
    # The harness must start even if this package is broken; it then does not know the model.
    try:
        if not _discovers_plugins():
            _add(module)
    except Exception as error:
        sys.stderr.write(f"streamline-bench could not register its lm-eval models: {error}\n")


def _add(module: object) -> None:
    from lm_eval.api.registry import model_registry

    mapping = getattr(module, "MODEL_MAPPING", None)
    for name, target in MODELS.items():
        if name in model_registry:
            continue
        if isinstance(mapping, dict):
            mapping.setdefault(name, target)
        model_registry.register(name, target=target)


def _discovers_plugins() -> bool:
    """Whether this harness reads the entry-point group itself (then it needs no help)."""
    from lm_eval.api import registry

    for module in (registry, sys.modules[_WATCHED]):
        with open(str(module.__file__), encoding="utf-8") as source:  # noqa: PTH123
            if "entry_points(" in source.read():
                return True
    return False
