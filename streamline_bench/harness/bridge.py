"""Makes our models and tasks known to harness versions that do not discover them.

lm-eval 0.4.13 reads a fixed table of models and its own folder of tasks; later versions read the
entry-point groups ``lm_eval.models`` and, as it is proposed, ``lm_eval.tasks``, which this package
declares as well. Each of the two is left to a harness that reads it. A ``.pth`` line of the wheel
calls :func:`install` at every interpreter start but those of ``streamline-bench``, whose commands
call :func:`register` where they run the harness. So nothing here may import anything that is not
imported by then: a finder is put in front of the others and waits for the harness's modules. Once
``lm_eval.models`` has run, lazy ``"module:Class"`` strings are added to its registry; once
``lm_eval.tasks.manager`` has, its ``TaskManager`` also looks into our folder. When the harness's
command imports its evaluator, its arguments are known and nothing heavy is imported yet: wrong
arguments of our models are refused there, half a minute of processor time earlier.
"""

from __future__ import annotations

import os
import sys

MODEL_NAME = "streamline"
MODELS = {
    MODEL_NAME: "streamline_bench.harness.lm:StreamlineLM",
    "streamline-vllm": "streamline_bench.harness.vllm_lm:StreamlineVLLM",
}
"""Name in the harness -> where the class is."""

_MODELS, _TASKS = "lm_eval.models", "lm_eval.tasks.manager"
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
    """Finds the watched modules as the finders behind it do, and wraps their loaders."""

    def __init__(self) -> None:
        self._watched = {_MODELS, _TASKS}

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name == _EVALUATOR:
            _check_command()
        if name not in self._watched:
            return None
        self._watched.discard(name)
        if not self._watched:
            sys.meta_path[:] = [finder for finder in sys.meta_path if id(finder) != id(self)]
        for finder in [finder for finder in sys.meta_path if id(finder) != id(self)]:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def install() -> None:
    """Watch for the harness's modules; act at once on those that are imported already."""
    there = [sys.modules[name] for name in (_MODELS, _TASKS) if name in sys.modules]
    for module in there:
        _after(module)
    watching = any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path)
    if len(there) < 2 and not watching:
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]


def register() -> None:
    """Import the harness's models and add ours, whatever the harness discovers by itself."""
    import lm_eval.models

    _add(lm_eval.models)


def refuse_wrong(model: object, arguments: object) -> None:
    """End the process with a sentence and exit code 2 if one of our models has wrong arguments."""
    if model not in MODELS or not isinstance(arguments, dict):
        return
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
    # The harness must start even if this package is broken; it then does not know what is ours.
    tasks = getattr(module, "__name__", None) == _TASKS
    try:
        if tasks:
            if not _reads_entry_points(module):
                _add_tasks(module)
        elif not _discovers_models(module):
            _add(module)
    except Exception as error:
        what = "tasks" if tasks else "models"
        sys.stderr.write(f"streamline-bench could not register its lm-eval {what}: {error}\n")


def _add(module: object) -> None:
    from lm_eval.api.registry import model_registry

    mapping = getattr(module, "MODEL_MAPPING", None)
    for name, target in MODELS.items():
        if name in model_registry:
            continue
        if isinstance(mapping, dict):
            mapping.setdefault(name, target)
        model_registry.register(name, target=target)


def _add_tasks(module: object) -> None:
    """Let every ``TaskManager`` look into our folder too, before those that it is given."""
    import functools
    import inspect

    manager = module.TaskManager  # type: ignore[attr-defined]
    stock = manager.__init__
    signature = inspect.signature(stock)
    if "include_path" not in signature.parameters or hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def with_ours(*arguments: object, **options: object) -> None:
        given = signature.bind(*arguments, **options)
        given.arguments["include_path"] = _with_our_folder(given.arguments.get("include_path"))
        stock(*given.args, **given.kwargs)

    manager.__init__ = with_ours


def _with_our_folder(given: object) -> list[object]:
    from streamline_bench.core.machine.environment import resource

    ours = resource("tasks") / "lm_eval"
    theirs = list(given) if isinstance(given, list | tuple) else [given] if given else []
    there = [os.path.realpath(str(folder)) for folder in theirs]
    return theirs if os.path.realpath(ours) in there else [ours, *theirs]


def _discovers_models(module: object) -> bool:
    """Whether this harness reads the entry points of models itself (then it needs no help)."""
    from lm_eval.api import registry

    return _reads_entry_points(registry) or _reads_entry_points(module)


def _reads_entry_points(module: object) -> bool:
    with open(str(module.__file__), encoding="utf-8") as source:  # type: ignore[attr-defined]  # noqa: PTH123
        return "entry_points(" in source.read()
