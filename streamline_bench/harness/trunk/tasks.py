"""The harness's tasks, loaded and turned into requests once for several models."""

from __future__ import annotations

from typing import Any

from streamline_bench.errors import EvaluationError
from streamline_bench.harness.tasks.empty_tasks import without_empty

__all__ = ["Catalogue", "SameTasks"]


class Catalogue:
    """The harness's index of tasks, which takes seconds to make.

    Attributes:
        left_out: task -> why it is not loaded although it was asked for.
    """

    def __init__(self) -> None:
        self.manager: Any = None
        self.names: list[Any] = []
        self.left_out: dict[str, str] = {}

    def open(self, config: Any) -> None:
        """Index the tasks and find those that are asked for; later calls set the model only.

        Args:
            config: a configured ``EvaluatorConfig`` of the harness.

        Raises:
            ValueError: a task is not known.
        """
        arguments = dict(config.metadata)
        if self.manager is None:
            self.manager = config.process_tasks(dict(arguments))
            self.names = config.tasks
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

    def prepare(self, config: Any) -> list[Any]:
        """Get ready for a model, and return the tasks in the form :meth:`load` takes.

        Raises:
            ValueError: a task is not known.
        """
        self._model = config.metadata["pretrained"]
        self._catalogue.open(config)
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
            task.build_all_requests = _Again(task)
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


class _Again:
    """Stands for a task's ``build_all_requests``: the same requests, without answers."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __call__(self, **_: Any) -> None:
        for instance in self._task.instances:
            instance.resps = []
            instance.filtered_resps = {}
