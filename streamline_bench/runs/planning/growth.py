"""A run folder grows: what a command asks for is laid over what the folder has.

Every result is named by its content, so that more rows, tasks, seeds or sizes leave those that are
there untouched. Refused is what would make them untrue: another model, other data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.errors import few
from streamline_bench.runs.planning.plan import Evaluation, ModelPlan, Plan, PlanRow


def grown(there: Plan | None, here: Plan) -> Plan:
    """Return the plan of a command with the folders and questions of the plan that is there.

    A row keeps the folder in which the same content was made, whatever it is called now. A label
    that stands for something else now gets a folder of its own.
    """
    if there is None:
        return here.model_copy(update={"asked": here.questions})
    known = [*there.rows, *there.others]
    rows = tuple(_placed(here.rows, known))
    places = {row.place for row in rows}
    return here.model_copy(
        update={
            "rows": rows,
            "others": tuple(row for row in known if row.place not in places),
            "asked": _asked(there, here),
            "task_data": {**there.task_data, **here.task_data},
        }
    )


def _placed(rows: Iterable[PlanRow], known: Iterable[PlanRow]) -> Iterator[PlanRow]:
    known = list(known)
    taken = {row.place.lower() for row in known}
    used: set[str] = set()
    for row in rows:
        # Several rows may have one content; best is the folder of the same label.
        same = [each.place for each in known if each.key == row.key and each.place not in used]
        place = next(iter(sorted(same, key=lambda each: each != row.label)), None)
        if place is None:
            place = row.label
            if place.lower() in taken or place in used:
                place = f"{row.label}-{row.key[:8]}"
        used.add(place)
        yield row.model_copy(update={"folder": None if place == row.label else place})


def _asked(there: Plan, here: Plan) -> tuple[Evaluation, ...]:
    asked = [*there.questions]
    for evaluation in here.evaluations:
        same = [each for each in there.questions if each.settings == evaluation.settings]
        known = {task for each in same for task in each.tasks}
        new = [task for task in evaluation.tasks if task not in known]
        asked += [evaluation.only(new)] if new else []
    return tuple(asked)


def conflicts(there: Plan, here: Plan) -> list[str]:
    """Return what of a command would make results that are there untrue, each in a few words."""
    return [
        *_other_models(there, here),
        *_other_tasks(there, here),
        *_other_engines(there, here),
        *_other_text(there, here),
        *_other_versions(there, here),
        *_other_data(there, here),
    ]


def _models(plan: Plan) -> list[ModelPlan]:
    known = [row for row in (*plan.rows, *plan.others) if not row.checkpoint]
    return [plan.source(row) for row in known]


def _other_models(there: Plan, here: Plan) -> Iterator[str]:
    old = {model.weights_sha256: model for model in _models(there)}
    new = {model.weights_sha256: model for model in _models(here)}
    changed = [
        model.name
        for digest, model in new.items()
        if digest not in old and any(model.name == each.name for each in old.values())
    ]
    for name in dict.fromkeys(changed):
        yield f"the weights of {name} are others now"
    if not changed and not old.keys() & new.keys():
        yield f"its model is {there.model}, and {here.model} is another one"
    files = {each.name: each.weights_sha256 for each in _checkpoints((*there.rows, *there.others))}
    for model in _checkpoints(here.rows):
        if files.get(model.name, model.weights_sha256) != model.weights_sha256:
            yield f"the weights of {model.name} are others now"


def _checkpoints(rows: Iterable[PlanRow]) -> list[ModelPlan]:
    return [row.model for row in rows if row.checkpoint and row.model is not None]


def _other_tasks(there: Plan, here: Plan) -> Iterator[str]:
    both = [task for task in here.task_data if task in there.task_data]
    changed = [task for task in both if there.task_data[task] != here.task_data[task]]
    old, new = there.evaluation, here.evaluation
    # A run of an earlier version has one hash over everything.
    one_hash = not there.task_data and old.tasks == new.tasks
    if one_hash and old.tasks_sha256 != new.tasks_sha256:
        changed = list(old.tasks)
    if changed:
        yield f"the files of {few(changed)}, or the data they name, are others now"


def _other_engines(there: Plan, here: Plan) -> Iterator[str]:
    """Two engines answer a question differently, and a folder has one answer to each."""
    before = {task: each for each in there.questions for task in each.tasks}
    for evaluation in here.evaluations:
        name = _engine(evaluation)
        both = [task for task in evaluation.tasks if task in before]
        changed = {task: old for task in both if (old := _engine(before[task])) != name}
        if changed:
            olds = few(list(dict.fromkeys(changed.values())))
            yield f"{few(list(changed))}: the answers there are {olds}'s, and {name} is asked now"


def _engine(evaluation: Evaluation) -> str:
    name = {"hf": "transformers", "vllm": "vLLM"}[evaluation.engine]
    return f"{name} {evaluation.engine_version}" if evaluation.engine_version else name


def _other_text(there: Plan, here: Plan) -> Iterator[str]:
    if there.text is None or here.text is None or there.text.file != here.text.file:
        return
    if there.text.sha256 != here.text.sha256:
        yield f"the text {here.text.file} is another one now"


def _other_versions(there: Plan, here: Plan) -> Iterator[str]:
    for name in sorted(there.versions.keys() | here.versions.keys()):
        old, new = (plan.versions.get(name, "missing") for plan in (there, here))
        if old != new:
            yield f"its results were made with {name} {old}, and {new} is installed now"


def _other_data(there: Plan, here: Plan) -> Iterator[str]:
    """The same recipe for the same model gives another checkpoint: what it reads has changed."""
    if (there.device.split(":")[0], there.dtype) != (here.device.split(":")[0], here.dtype):
        return
    known = {
        (row.label, there.source(row).weights_sha256): row
        for row in (*there.rows, *there.others)
        if row.recipe
    }
    for row in here.rows:
        old = known.get((row.label, here.source(row).weights_sha256))
        if old is None or not row.recipe or old.key == row.key:
            continue
        before, now = (Recipe.model_validate(each.recipe) for each in (old, row))
        if before.content_hash() == now.content_hash():
            yield (
                f"row {row.label}: its calibration data changed, or this version of "
                "streamline-bench computes it in another way"
            )
