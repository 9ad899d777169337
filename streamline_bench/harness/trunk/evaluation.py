"""Runs the harness on one model in hand and writes what its command line writes."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

from streamline_bench.core.checkpoint.folder import update_digest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.files import atomic_write_text, staged_output
from streamline_bench.errors import EvaluationError, OutputError
from streamline_bench.harness.bridge import MODEL_NAME
from streamline_bench.harness.tasks.asked_tasks import (
    Folders,
    asked_tasks,
    include_folders,
    open_index,
    without_empty,
)
from streamline_bench.harness.trunk.request import TrunkRequest

logger = logging.getLogger(__name__)

_PASSED_ON = (
    "model_args tasks num_fewshot batch_size max_batch_size device limit system_instruction "
    "apply_chat_template fewshot_as_multiturn gen_kwargs metadata samples confirm_run_unsafe_code"
).split()
"""What the harness's command hands from its configuration to ``simple_evaluate``."""

MARKER = "trunk.json"
"""File in an output that names the request it answers; written last."""


def model_arguments(request: TrunkRequest, label: str) -> dict[str, Any]:
    """Return what ``--model_args`` of a separate run would say."""
    arguments: dict[str, Any] = {"pretrained": str(request.checkpoints[label])}
    if request.dtype is not None:
        arguments["dtype"] = request.dtype
    return {**arguments, **request.model_args}


def is_done(request: TrunkRequest, label: str) -> bool:
    """Whether a label's output is there, answers this request and is whole.

    One that answers it and was damaged since is removed, to be made again.

    Raises:
        OutputError: it is there and answers another one, or is no output of a walk.
    """
    folder = request.outputs[label]
    if not folder.exists():
        return False
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        same = marker["request"] == request_digest(request, label)
        files = marker["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(
            f"Output {folder} exists and holds something else; give another output for '{label}' "
            "or delete it."
        ) from None
    if not same:
        raise OutputError(
            f"Output {folder} holds another evaluation of '{label}' (its model, tasks or options "
            "differ); give another output or delete it."
        )
    if files == _marks(folder):
        return True
    logger.warning("Output %s was changed after it was made; it is made again.", folder)
    shutil.rmtree(folder)
    return False


def left_out_of(folder: Path) -> dict[str, str]:
    """Return task -> why it was left out, of an output for which :func:`is_done` holds."""
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    return dict(marker.get("left_out") or {})


def _marks(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of every file of an output but its marker, by relative name."""
    marks = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MARKER:
            sums = hashlib.sha256()
            update_digest(sums, path)
            marks[path.relative_to(folder).as_posix()] = sums.hexdigest()
    return marks


def request_digest(request: TrunkRequest, label: str) -> str:
    """Name everything that decides what a label's output says."""
    settings = request.settings
    weights = CheckpointReader(request.checkpoints[label]).fingerprint()
    payload = json.dumps([settings, model_arguments(request, label), weights], sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()


class Evaluation:
    """Evaluations of models that are asked the same requests, which are built once.

    All models that one instance is used with must have the same tokenizer.

    Args:
        catalogue: may be shared by several instances.
    """

    def __init__(self, request: TrunkRequest, catalogue: Catalogue) -> None:
        self._request = request
        self._catalogue = catalogue
        self._tasks = SameTasks(catalogue)

    def run(self, label: str, model: Any) -> dict[str, str]:
        """Evaluate a model and publish its output folder.

        Args:
            model: a :class:`streamline_bench.harness.lm.StreamlineLM`.

        Returns:
            Task -> why it was left out.

        Raises:
            EvaluationError: a task is not known, or options contradict each other.
            OutputError: the output exists or cannot be written.
            StreamlineBenchError: the model's own errors.
        """
        with staged_output(self._request.outputs[label]) as staging:
            self._run_into(staging, label, model)
            digest = request_digest(self._request, label)
            left_out = dict(self._catalogue.left_out)
            marker = {"label": label, "request": digest, "files": _marks(staging)}
            marker_text = json.dumps({**marker, "left_out": left_out})
            atomic_write_text(staging / MARKER, marker_text + "\n")
        return left_out

    def _run_into(self, folder: Path, label: str, model: Any) -> None:
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        look_at_the_machine_once()
        config = _config(self._request, label, folder)
        try:
            config._configure()
            config.tasks = self._tasks.prepare(config, self._request.include_path)
        except ValueError as error:
            raise EvaluationError(f"The harness refuses the evaluation: {error}.") from error
        tracker = EvaluationTracker(output_path=str(folder))
        kinds = ("random", "numpy_random", "torch_random", "fewshot_random")
        seeds = dict(zip((f"{kind}_seed" for kind in kinds), config.seed, strict=True))
        results = simple_evaluate(
            model=model,
            log_samples=True,
            evaluation_tracker=tracker,
            task_manager=self._tasks,
            **{name: getattr(config, name) for name in _PASSED_ON},
            **seeds,
        )
        # The harness names a model in hand by its class; a separate run names the registered one.
        results["config"]["model"] = MODEL_NAME
        tracker.general_config_tracker.model_source = MODEL_NAME
        _save(tracker, results, folder)


def look_at_the_machine_once() -> None:
    """Keep what the harness asks PyTorch about the machine after every model, for three seconds."""
    from torch.utils import collect_env

    if not hasattr(collect_env.get_pretty_env_info, "cache_clear"):
        vars(collect_env)["get_pretty_env_info"] = cache(collect_env.get_pretty_env_info)


def _config(request: TrunkRequest, label: str, folder: Path) -> Any:
    """The harness's own configuration, as its command line would fill it."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    given = {
        "num_fewshot": request.num_fewshot,
        "max_batch_size": request.max_batch_size,
        "device": request.device,
        "limit": request.limit,
        "include_path": include_folders(request.include_path),
        "system_instruction": request.system_instruction,
        "fewshot_as_multiturn": request.fewshot_as_multiturn,
        "samples": {task: list(ids) for task, ids in request.samples.items()} or None,
    }
    return EvaluatorConfig(
        model=MODEL_NAME,
        model_args=model_arguments(request, label),
        tasks=list(request.tasks),
        batch_size=str(request.batch_size),
        log_samples=True,
        output_path=str(folder),
        apply_chat_template=request.apply_chat_template,
        gen_kwargs=dict(request.gen_kwargs),
        metadata=dict(request.metadata),
        confirm_run_unsafe_code=request.confirm_run_unsafe_code,
        seed=list(request.seed),
        **{key: value for key, value in given.items() if value is not None},
    )


def _save(tracker: Any, results: dict[str, Any], folder: Path) -> None:
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    # The tracker only logs what it could not write.
    whole = len(list(folder.rglob("results_*.json"))) == 1 and all(
        _lines(folder, task) == len(samples[task]) for task in results["configs"]
    )
    if not whole:
        raise OutputError(
            f"The results cannot be written below {folder.parent} (see the harness's log above); "
            "free some space or give another output."
        )


def _lines(folder: Path, task: str) -> int:
    stem = f"samples_{task}_"
    files = [path for path in folder.rglob("samples_*.jsonl") if path.name.startswith(stem)]
    return sum(file.read_bytes().count(b"\n") for file in files if file.name[len(stem)].isdigit())


class Catalogue:
    """The harness's index of tasks, which takes seconds to make.

    Attributes:
        left_out: task -> why it is not loaded although it was asked for.
    """

    def __init__(self) -> None:
        self.manager: Any = None
        self.names: list[Any] = []
        self.left_out: dict[str, str] = {}

    def open(self, config: Any, own: Folders) -> None:
        """Index the tasks and find those that are asked for; later calls set the model only.

        Args:
            config: a configured ``EvaluatorConfig`` of the harness.
            own: the user's folders of task files.

        Raises:
            EvaluationError: a task is not known.
        """
        arguments = dict(config.metadata)
        if self.manager is None:
            self.manager = open_index(config.tasks, own, arguments)
            self.names = asked_tasks(self.manager, config.tasks)
        # The manager copies these into every task that it loads from now on.
        self.manager.metadata.clear()
        self.manager.metadata.update(arguments)

    def load(self) -> Any:
        """Load the tasks that were found, but those without documents.

        Raises:
            EvaluationError: one cannot be loaded, or all are empty.
        """
        try:
            return self.manager.load(self.names)
        except Exception:
            self.names, left_out = without_empty(self.manager, self.names)
            if not left_out:
                raise
            self.left_out |= left_out
            return self.manager.load(self.names)


class SameTasks:
    """Stands for the harness's task manager, giving the same loaded tasks to every model.

    Requests are built for the first model and asked again of the others.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._loaded: Any = None
        self._model = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._catalogue.manager, name)

    def prepare(self, config: Any, own: Folders) -> list[Any]:
        """Get ready for a model, and return the tasks in the form :meth:`load` takes.

        Args:
            own: the user's folders of task files.

        Raises:
            EvaluationError: a task is not known.
        """
        self._model = config.metadata["pretrained"]
        self._catalogue.open(config, own)
        return self._catalogue.names

    def load(self, names: list[Any]) -> Any:
        """Return the tasks, loading them the first time.

        Raises:
            EvaluationError: this harness keeps the model's arguments elsewhere than known here.
        """
        if self._loaded is None:
            self._loaded = self._catalogue.load()
            self._require_model()
            return self._loaded
        for task in self._loaded["tasks"].values():
            task.build_all_requests = partial(_ask_again, task)
            task.config.metadata["pretrained"] = self._model
        return self._loaded

    def _require_model(self) -> None:
        """A separate run notes the model in every task; what is written must not name another."""
        for name, task in self._loaded["tasks"].items():
            noted = (getattr(task.config, "metadata", None) or {}).get("pretrained")
            if noted != self._model:
                raise EvaluationError(
                    f"This version of lm-eval notes the model '{noted}' in task '{name}' instead "
                    f"of '{self._model}'; evaluate the models one by one."
                )


def _ask_again(task: Any, **_: Any) -> None:
    """Stands for a task's ``build_all_requests``: the same requests, without answers."""
    for instance in task.instances:
        instance.resps = []
        instance.filtered_resps = {}
