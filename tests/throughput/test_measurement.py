"""Models side by side, each in its own process; what fails is a row with a reason."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.cli.tables import throughput_notes
from streamline_bench.errors import OutputError, ThroughputError
from streamline_bench.throughput import Setup, Workload, measure, measurement, read_record
from streamline_bench.throughput.measurement import log_folder, with_copy
from streamline_bench.throughput.record import ModelResult

FakeModel = Callable[..., Path]
Gone = Callable[[Path], bool]

LENGTHS: dict[str, Any] = {"blocks": 1, "prompt_tokens": 3, "output_tokens": 5}
SMALL = Workload(batch_sizes=(1, 4), rounds=3, warmup_rounds=1, **LENGTHS)
ONE = Workload(batch_sizes=(2,), rounds=2, warmup_rounds=0, **LENGTHS)
SETUP = Setup(timeout=60, start_timeout=60, clock="wall")


def measured(models: dict[str, Path], engine: str, **changes: Any) -> dict[str, ModelResult]:
    options = {"workload": ONE, "setup": SETUP, "dense": "dense", **changes}
    record = measure(models, engine=engine, progress=False, **options)
    return {model.label: model for model in record.models}


def batches(folder: Path) -> list[int]:
    lines = (folder / "batches.txt").read_text().splitlines()
    return [int(line.split()[1]) for line in lines]


def starts(folder: Path) -> list[float]:
    lines = (folder / "batches.txt").read_text().splitlines()
    return [float(line.split()[0]) for line in lines]


def test_models_take_turns_and_the_record_holds_every_round(
    fake_model: FakeModel, fake_engine: str, gone: Gone, tmp_path: Path
) -> None:
    dense, small = fake_model("dense", 4, child=True), fake_model("small", 3)
    record = measure(
        {"dense": dense, "small": small},
        dense="dense",
        engine=fake_engine,
        workload=SMALL,
        setup=SETUP,
        output=tmp_path / "out",
        progress=False,
    )
    assert read_record(tmp_path / "out") == record
    assert batches(dense) == batches(small) == [1] * 4 + [4] * 4
    order = sorted(
        [(t, "d") for t in starts(dense)] + [(t, "s") for t in starts(small)],
    )
    # The turns of the two rotate: each is first as often as it is second.
    assert "".join(name for _, name in order) in ("sddssdds" * 2, "dssddssd" * 2)
    for model in record.models:
        assert model.status == "ok" and model.reason is None
        assert [point.batch_size for point in model.points] == [1, 4]
        for point in model.points:
            assert [r.index for r in point.rounds] == [0, 1, 2]
            assert {r.output_tokens for r in point.rounds} == {5 * point.batch_size}
            assert {r.prompt_tokens for r in point.rounds} == {3 * point.batch_size}
            assert point.peak_memory_bytes and point.peak_memory_bytes > 1e6
            assert point.ratio is not None
    ideal = record.models[1].points[0].ideal
    assert ideal is not None and ideal.layers == pytest.approx(4 / 3) and 1 < ideal.ratio < 4 / 3
    assert record.models[0].points[0].ratio.value == 1.0  # type: ignore[union-attr]
    assert record.flags == {"fake": True}
    assert gone(dense) and gone(small)
    assert "a library that prints" in (tmp_path / "out" / "logs" / "00.log").read_text()


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"load_error": "model type 'x' is not known"}, r"ValueError: model type 'x'.*loading"),
        ({"exit": 3}, r"exit code 3 while generating.*: OSError: something dreadful happened"),
        ({"signal": signal.SIGSEGV}, r"signal 11 \(SIGSEGV\)"),
        ({"signal": signal.SIGKILL}, r"signal 9 \(SIGKILL\)"),
        ({"tokens_missing": 1}, r"2 sequences of 5 tokens.*2 of 4 to 4"),
    ],
)
def test_a_failure_is_a_row_and_the_others_go_on(
    behaviour: dict[str, Any], reason: str, fake_model: FakeModel, fake_engine: str
) -> None:
    models = {"dense": fake_model("dense"), "bad": fake_model("bad", **behaviour)}
    found = measured(models, fake_engine)
    assert found["dense"].status == "ok" and len(found["dense"].points[0].rounds) == 2
    assert found["bad"].status == "failed"
    assert found["bad"].reason is not None
    assert re.search(reason, found["bad"].reason), found["bad"].reason
    assert found["bad"].points[0].output_tokens_per_second is None


def test_a_hang_ends_with_its_timeout_and_leaves_no_process(
    fake_model: FakeModel, fake_engine: str, gone: Gone
) -> None:
    hanging = fake_model("hanging", hang_after=1, child=True)
    found = measured(
        {"dense": fake_model("dense"), "hanging": hanging},
        fake_engine,
        setup=SETUP.model_copy(update={"timeout": 3.0}),
    )
    assert found["hanging"].reason is not None
    assert "3 s" in found["hanging"].reason and "generating" in found["hanging"].reason
    assert len(found["hanging"].points[0].rounds) == 1  # kept, but no figure is made of it
    assert found["hanging"].points[0].ratio is None
    assert found["dense"].status == "ok"
    assert gone(hanging)


def test_a_model_killed_from_outside_while_measuring(
    fake_model: FakeModel, fake_engine: str, gone: Gone
) -> None:
    import threading

    slow = fake_model("slow", seconds=30)

    def kill() -> None:
        while not (slow / "batches.txt").exists():
            time.sleep(0.05)
        os.kill(json.loads((slow / "pids.json").read_text())[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    found = measured({"slow": slow, "dense": fake_model("dense")}, fake_engine)
    assert "signal 9" in str(found["slow"].reason)
    assert found["dense"].status == "ok"


def test_memory_that_runs_out_halves_the_batch_for_all(
    fake_model: FakeModel, fake_engine: str
) -> None:
    models = {"dense": fake_model("dense", out_of_memory_above=5), "small": fake_model("small")}
    workload = ONE.model_copy(update={"batch_sizes": (16,)})
    found = measured(models, fake_engine, workload=workload)
    assert batches(models["dense"]) == [16, 8, 4, 4]
    for model in found.values():
        (point,) = model.points
        assert (point.status, point.batch_requested, point.batch_size) == ("ok", 16, 4)
        for note, size in zip(point.notes, (16, 8), strict=True):
            assert note.startswith("dense ") and "memory" in note
            assert str(size) in note and str(size // 2) in note
    assert found["small"].points[0].ratio is not None


def test_a_model_that_cannot_hold_one_sequence_does_not_drag_the_others_down(
    fake_model: FakeModel, fake_engine: str
) -> None:
    models = {"dense": fake_model("dense"), "huge": fake_model("huge", out_of_memory_above=0)}
    found = measured(models, fake_engine)
    assert found["dense"].points[0].batch_size == 2
    assert "out of memory" in str(found["huge"].reason)


def test_memory_that_ran_out_once_does_not_explain_a_later_failure(
    fake_model: FakeModel, fake_engine: str
) -> None:
    """The log of the second process is not read for what the first one said."""
    bad = fake_model("bad", out_of_memory_above=3, exit=5)
    found = measured({"bad": bad}, fake_engine, dense=None, workload=SMALL)
    assert batches(bad) == [1]
    assert "exit code 5" in str(found["bad"].reason)
    (bad / "batches.txt").unlink()
    workload = ONE.model_copy(update={"batch_sizes": (4,)})
    found = measured({"bad": bad}, fake_engine, dense=None, workload=workload)
    assert batches(bad) == [4, 2]
    assert "exit code 5" in str(found["bad"].reason)


def test_an_engine_that_takes_memory_at_the_start_is_started_for_half(
    fake_model: FakeModel, fake_engine: str
) -> None:
    models = {"dense": fake_model("dense"), "big": fake_model("big", load_memory=2)}
    workload = ONE.model_copy(update={"batch_sizes": (1, 4)})
    found = measured(models, "fake_engine:SizedEngine", workload=workload)
    assert [p.batch_size for p in found["dense"].points] == [1, 2]
    assert "big" in found["dense"].points[1].notes[0] and "2" in found["dense"].points[1].notes[0]
    assert [all(w in note for w in ("memory", "4", "2")) for note in found["big"].notes] == [True]


def test_one_at_a_time_never_has_two_processes(fake_model: FakeModel, fake_engine: str) -> None:
    models = {"dense": fake_model("dense"), "small": fake_model("small")}
    setup = SETUP.model_copy(update={"one_at_a_time": True})
    found = measured(models, fake_engine, setup=setup)
    assert max(starts(models["dense"])) < min(starts(models["small"]))
    assert found["small"].points[0].ratio is not None


def test_models_that_do_not_fit_together_are_measured_one_at_a_time(
    fake_model: FakeModel,
    fake_engine: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Weights in float32, an embedding and four matrices a layer, and a cache for each."""
    models = {"dense": fake_model("dense", 4), "small": fake_model("small", 3)}
    needed = 4 * (2 * 50 * 8 + (4 + 3) * 4 * 8 * 8) + 2 * 1000
    setup = SETUP.model_copy(update={"kv_cache_bytes": 1000})
    for free, together in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(measurement, "free_memory", lambda device, free=free: free)
        record = measure(
            models, dense="dense", engine=fake_engine, workload=ONE, setup=setup, progress=False
        )
        assert record.interleaved is together
        assert ("one at a time" in caplog.text) is not together
        began = [starts(folder) for folder in models.values()]
        assert together or max(began[0]) < min(began[1])
        for folder in models.values():
            (folder / "batches.txt").unlink()


def test_every_models_notes_are_shown_once_in_words_of_its_group(
    fake_model: FakeModel, fake_engine: str
) -> None:
    """One at a time, a model that runs out of memory is measured with less, the others are not."""
    models = {"dense": fake_model("dense"), "big": fake_model("big", out_of_memory_above=1)}
    for alone, words in ((True, "it was"), (False, "all models")):
        setup = SETUP.model_copy(update={"one_at_a_time": alone})
        record = measure(
            models, dense="dense", engine=fake_engine, workload=ONE, setup=setup, progress=False
        )
        assert [bool(model.points[0].notes) for model in record.models] == [not alone, True]
        (shown,) = [
            line for line in throughput_notes(record).splitlines() if "out of memory" in line
        ]
        assert shown.startswith("big ") and words in shown
        for folder in models.values():
            (folder / "batches.txt").unlink()


def test_a_missing_model_is_a_failed_row(fake_model: FakeModel, fake_engine: str) -> None:
    found = measured({"dense": fake_model("dense"), "gone": Path("/no/such")}, fake_engine)
    assert "/no/such" in str(found["gone"].reason)
    assert found["dense"].status == "ok"


def test_a_sequence_longer_than_the_model_takes(fake_model: FakeModel, fake_engine: str) -> None:
    folder = fake_model("dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 7}))
    found = measured({"dense": folder}, fake_engine)
    assert all(word in str(found["dense"].reason) for word in ("7 tokens", "8", "fewer"))


def test_the_models_process_ends_when_the_measuring_one_is_killed(
    fake_model: FakeModel, fake_engine: str, gone: Gone
) -> None:
    folder = fake_model("dense", hang=True)
    code = (
        "from streamline_bench.throughput import measure\n"
        f"measure({{'dense': {str(folder)!r}}}, engine={fake_engine!r}, progress=False)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (folder / "batches.txt").exists():
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert gone(folder)


def test_wrong_requests_are_refused(fake_model: FakeModel, tmp_path: Path) -> None:
    folder = fake_model("dense")
    with pytest.raises(ThroughputError, match=r"'x'.*dense"):
        measure({"dense": folder}, dense="x")
    with pytest.raises(ThroughputError, match=r"[Nn]o model"):
        measure({})
    with pytest.raises(ThroughputError, match=r"'vlm'.*vllm"):
        measure({"dense": folder}, engine="vlm")
    with pytest.raises(ThroughputError, match=r"'hf'.*'vllm'"):
        measure({"dense": folder}, engine="vllm", mode="paper")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file.*--output"):
        measure({"dense": folder}, output=tmp_path / "file", progress=False)


def test_logs_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("00.log", "server.log"):
        (tmp_path / "logs" / name).write_text("earlier")
    with log_folder(tmp_path) as folder:
        assert [path.name for path in folder.iterdir()] == ["server.log"]


def test_the_copy_of_dense_runs_in_the_environment_of_dense() -> None:
    """With another interpreter, the noise floor held the change between the two environments."""
    workload, setup = Workload(self_check=True), Setup(pythons={"base": "/base/python"})
    models, how, copy = with_copy({"base": "a", "head": "b"}, "base", workload, setup)
    assert copy == "base (again)" and models == {"base": "a", "head": "b", copy: "a"}
    assert how.pythons == {"base": "/base/python", copy: "/base/python"}
