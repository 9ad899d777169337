"""From a request to files: what the harness's own command writes for each model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.errors import EvaluationError, OutputError
from streamline_bench.harness.trunk.evaluation import MARKER, Evaluation
from streamline_bench.harness.trunk.request import TrunkRequest
from streamline_bench.harness.trunk.score import score_together
from streamline_bench.stability.align import align
from streamline_bench.stability.readers.lm_eval_reader import read_lm_eval

_INDICES: dict[tuple[str, ...], Any] = {}
ALL = ("trunk_group", "trunk_rolling", "trunk_generation")
OFTEN_OTHER = {
    "date",
    "git_hash",
    "pretty_env_info",
    "total_evaluation_time_seconds",
    "upper_git_hash",
}


@pytest.fixture(autouse=True)
def _one_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's index of its own thousands of tasks is made once for all tests."""
    from lm_eval.tasks.manager import TaskIndex

    real = TaskIndex.build

    def build(paths: list[Path]) -> Any:
        key = tuple(str(path) for path in paths)
        if key not in _INDICES:
            _INDICES[key] = real(paths)
        return _INDICES[key]

    monkeypatch.setattr(TaskIndex, "build", staticmethod(build))


@pytest.fixture(scope="module")
def checkpoints(
    make_tiny_model: Callable[..., Path], make_variant: Callable[..., Path]
) -> dict[str, Path]:
    dense = make_tiny_model("llama", num_hidden_layers=5)
    return {
        "dense": dense,
        "dropped": make_variant(dense, [0, 1, 4]),
        "network": make_variant(dense, [0, 1, 2, 4], attach=(2, "swiglu_res")),
    }


@pytest.fixture
def ask(trunk_tasks: Path, tmp_path: Path) -> Callable[..., TrunkRequest]:
    """Return a function that makes a request; outputs go below ``tmp_path / "out"``."""

    def make(checkpoints: Mapping[str, Path], **options: Any) -> TrunkRequest:
        return TrunkRequest(
            checkpoints=dict(checkpoints),
            outputs={label: tmp_path / "out" / label for label in checkpoints},
            **{
                "tasks": ("trunk_group",),
                "include_path": trunk_tasks,
                "batch_size": 4,
                "device": "cpu",
                "dtype": "float32",
                **options,
            },
        )

    return make


def separate_run(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tasks: Path, output: Path, *more: str
) -> None:
    """The stock command line, in this process."""
    from lm_eval.__main__ import cli_evaluate

    from streamline_bench.harness.bridge import register

    register()
    arguments = [
        "lm_eval", "run",
        "--model", "streamline",
        "--model_args", f"pretrained={checkpoint},dtype=float32",
        "--include_path", str(tasks),
        "--tasks", ",".join(ALL),
        "--batch_size", "4",
        "--device", "cpu",
        "--log_samples",
        "--output_path", str(output),
        *more,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    cli_evaluate()


def files(folder: Path) -> dict[str, Path]:
    """Files without the time in their names."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {f"{p.parent.name}/{p.name.rsplit('_', 1)[0]}{p.suffix}": p for p in found}


def same_files(first: Path, second: Path) -> None:
    ours, theirs = files(first), files(second)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 5
    for name, path in ours.items():
        if path.suffix == ".jsonl":
            assert path.read_bytes() == theirs[name].read_bytes(), name
            continue
        results = [json.loads(each.read_text()) for each in (path, theirs[name])]
        kept = [{k: v for k, v in each.items() if k not in OFTEN_OTHER} for each in results]
        assert kept[0] == kept[1]
        assert list(results[0]) == list(results[1])


def test_files_are_those_of_separate_runs_of_the_stock_command(
    checkpoints: dict[str, Path],
    trunk_tasks: Path,
    ask: Callable[..., TrunkRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = ask(
        checkpoints,
        tasks=ALL,
        limit=8,
        num_fewshot=2,
        gen_kwargs={"max_gen_toks": 3},
        seed=(1, 2, 3, 4),
    )
    outcome = score_together(request, progress=False)
    more = "--limit 8 --num_fewshot 2 --gen_kwargs max_gen_toks=3 --seed 1,2,3,4".split()
    for label, checkpoint in checkpoints.items():
        output = tmp_path / "separate" / label
        separate_run(monkeypatch, checkpoint, trunk_tasks, output, *more)
        same_files(request.outputs[label], output)
    assert outcome.walks == (("dense", "dropped", "network"),) or outcome.walks == (
        ("dense", "network", "dropped"),
    )
    assert outcome.per_model == ("generate_until",)
    assert {k: v.shared_layers for k, v in outcome.labels.items()} == {
        "dense": 0,
        "dropped": 2,
        "network": 3,
    }
    assert all(each.status == "ok" and each.together for each in outcome.labels.values())
    pairs = align(read_lm_eval(request.outputs["dense"]), read_lm_eval(request.outputs["network"]))
    assert len(pairs.dense) == 4 * 8


def test_pytorch_looks_at_the_machine_once_for_all_models(
    checkpoints: dict[str, Path], ask: Callable[..., TrunkRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import collect_env

    looks = iter(["the machine", "looked at again"])
    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: next(looks))
    request = ask(checkpoints, limit=2)
    score_together(request, progress=False)
    for output in request.outputs.values():
        (results,) = output.rglob("results_*.json")
        assert json.loads(results.read_text())["pretty_env_info"] == "the machine"


def test_models_that_share_nothing_are_scored_alone_and_it_is_said_why(
    checkpoints: dict[str, Path],
    make_tiny_model: Callable[..., Path],
    make_variant: Callable[..., Path],
    ask: Callable[..., TrunkRequest],
) -> None:
    from streamline_bench.harness.lm import StreamlineLM

    def first_layer(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight.mul_(2)

    dense = checkpoints["dense"]
    request = ask(
        {
            **checkpoints,
            "narrow": make_tiny_model("llama", num_hidden_layers=2, intermediate_size=40),
            "first": make_variant(dense, [0, 1], edit=first_layer),
            "family": make_tiny_model("bloom", num_hidden_layers=2),
        },
        limit=3,
    )
    outcome = score_together(request, progress=False)
    assert [len(walk) for walk in outcome.walks] == [3]
    reasons = {label: each.reason for label, each in outcome.labels.items() if not each.together}
    assert set(reasons) == {"narrow", "first", "family"}
    assert "config entry intermediate_size is 40, not 48" in str(reasons["narrow"])
    assert "its first layer differs" in str(reasons["first"])
    assert "bloom" in str(reasons["family"])
    for label in ("narrow", "family"):
        (file,) = request.outputs[label].rglob("samples_trunk_choice_*.jsonl")
        row = json.loads(file.read_text().splitlines()[0])
        pairs = [(a["arg_0"], a["arg_1"]) for a in row["arguments"].values()]
        model = StreamlineLM(str(request.checkpoints[label]), device="cpu", batch_size=4)
        from lm_eval.api.instance import Instance

        answers = model.loglikelihood(
            [Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True
        )
        given = [float(answer[0]) for answer in row["filtered_resps"]]
        assert given == pytest.approx([score for score, _ in answers], abs=1e-4)


def test_a_label_that_fails_leaves_the_others_alone(
    checkpoints: dict[str, Path],
    make_variant: Callable[..., Path],
    ask: Callable[..., TrunkRequest],
    tmp_path: Path,
) -> None:
    def damage(model: Any) -> None:
        model.model.layers[2].mlp.up_proj.weight.fill_(float("nan"))

    broken = Path(shutil.copytree(checkpoints["dropped"], tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"12345678")
    unloadable = Path(shutil.copytree(checkpoints["dropped"], tmp_path / "unloadable"))
    (unloadable / "tokenizer.json").unlink()
    request = ask(
        {
            **checkpoints,
            "nan": make_variant(checkpoints["dense"], [0, 1, 2], edit=damage),
            "broken": broken,
            "unloadable": unloadable,
            "absent": tmp_path / "absent",
        },
        limit=2,
    )
    outcome = score_together(request, progress=False)
    assert set(outcome.failed) == {"nan", "broken", "unloadable", "absent"}
    assert "is NaN" in outcome.failed["nan"]
    assert "model.safetensors" in outcome.failed["broken"]
    assert "okenizer" in outcome.failed["unloadable"]
    assert "absent" in outcome.failed["absent"]
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == sorted(checkpoints)


def test_an_interrupted_call_is_continued_and_nothing_done_twice(
    checkpoints: dict[str, Path],
    ask: Callable[..., TrunkRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = ask(checkpoints, limit=2)
    real = Evaluation.run

    def interrupted(self: Evaluation, label: str, model: Any) -> dict[str, str]:
        if label == "dropped":
            raise KeyboardInterrupt
        return real(self, label, model)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score_together(request, progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dense"]
    before = (tmp_path / "out" / "dense" / MARKER).stat().st_mtime_ns
    outcome = score_together(request, progress=False)
    assert {label: each.reused for label, each in outcome.labels.items()} == {
        "dense": True,
        "dropped": False,
        "network": False,
    }
    assert outcome.walks == (("dropped", "network"),) or outcome.walks == (("network", "dropped"),)
    assert (tmp_path / "out" / "dense" / MARKER).stat().st_mtime_ns == before
    monkeypatch.setattr(Evaluation, "run", None)
    assert all(each.reused for each in score_together(request, progress=False).labels.values())


def test_outputs_of_another_request_are_not_touched(
    checkpoints: dict[str, Path], ask: Callable[..., TrunkRequest], tmp_path: Path
) -> None:
    foreign = tmp_path / "out" / "dropped"
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="dropped"):
        score_together(ask(checkpoints), progress=False)
    shutil.rmtree(foreign)
    dense = {"dense": checkpoints["dense"]}
    outcome = score_together(ask(dense, limit=2), progress=False)
    assert "no other model" in str(outcome.labels["dense"].reason)
    with pytest.raises(OutputError, match=r"holds another evaluation of 'dense'"):
        score_together(ask(dense, limit=3), progress=False)


def test_an_unknown_task_and_contradicting_options_are_the_requests_fault(
    checkpoints: dict[str, Path],
    ask: Callable[..., TrunkRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(EvaluationError, match="trunk_nothing"):
        score_together(ask(checkpoints, tasks=("trunk_nothing",)), progress=False)
    with pytest.raises(EvaluationError, match="fewshot_as_multiturn"):
        score_together(ask(checkpoints, fewshot_as_multiturn=True), progress=False)
    for name, number in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, number)
    with pytest.raises(EvaluationError, match=r"2 were started.*torchrun"):
        score_together(ask(checkpoints), progress=False)
    assert not list((tmp_path / "out").glob("*"))


def test_files_that_could_not_be_written_are_noticed(
    checkpoints: dict[str, Path],
    ask: Callable[..., TrunkRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.loggers import EvaluationTracker

    # The harness's tracker logs a full disk and goes on.
    monkeypatch.setattr(EvaluationTracker, "save_results_samples", lambda *_, **__: None)
    with pytest.raises(OutputError, match="cannot be written"):
        score_together(ask(checkpoints, limit=2), progress=False)
    assert not list((tmp_path / "out").glob("*"))


def test_a_checkpoint_that_is_absent_leaves_the_others_alone(
    checkpoints: dict[str, Path], ask: Callable[..., TrunkRequest], tmp_path: Path
) -> None:
    labels = {**checkpoints, "absent": tmp_path / "absent"}
    request = ask(labels, limit=2)
    outcome = score_together(request, progress=False)
    assert list(outcome.failed) == ["absent"] and "absent" in outcome.failed["absent"]
    assert read_lm_eval(request.outputs["dropped"]).tasks
