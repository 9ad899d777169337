"""Which predictions a path means, at every level of OpenCompass' folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from streamline_bench.errors import SamplesError
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.readers.opencompass_folder import engine_behind, find_predictions


@pytest.fixture
def work(opencompass_files: Any, tmp_path: Path) -> Path:
    """A work folder with two runs of a model, of the same questions."""
    for time, seed in (("20260101_120000", 1), ("20260102_120000", 2)):
        run = tmp_path / "outputs" / time
        folder = run / "predictions" / "tiny"
        opencompass_files.write(folder, "arc", opencompass_files.ppl(5, seed=seed))
        opencompass_files.write_config(run, "tiny", {"arc": 1})
    (tmp_path / "outputs" / "20260103_120000").mkdir()  # began, wrote nothing
    return tmp_path / "outputs"


def test_any_level_is_understood(work: Path) -> None:
    run = work / "20260102_120000"
    model = run / "predictions" / "tiny"
    for path in (work, run, run / "predictions", model, model / "arc.json"):
        found = find_predictions(path)
        assert found is not None and found.folder == model, path
        assert found.timestamp == "20260102_120000" and set(found.sets) == {"arc"}


def test_the_same_questions_twice_count_once_and_that_is_said(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = load_samples(work)
    assert found.info.timestamp == "20260102_120000"
    alone = load_samples(work / "20260102_120000")
    pd.testing.assert_frame_equal(found.frame, alone.frame)
    assert not alone.info.left_out
    assert "arc" in found.info.left_out["the run 20260101_120000"]
    assert "20260101_120000" in caplog.text


def test_one_run_can_be_named(work: Path) -> None:
    older = load_samples(work, timestamp="20260101_120000")
    assert older.info.timestamp == "20260101_120000" and not older.info.left_out
    with pytest.raises(SamplesError, match=r"2001.*20260101_120000"):
        load_samples(work, timestamp="2001")


def earlier(opencompass_files: Any, work: Path, *, config: str | None = "some/model") -> Path:
    """The earlier run asked another data set, of a model at this path."""
    run = work / "20260101_120000"
    (run / "predictions" / "tiny" / "arc.json").unlink()
    opencompass_files.write(run / "predictions" / "tiny", "piqa", opencompass_files.ppl(4, seed=3))
    path = opencompass_files.write_config(run, "tiny", {"piqa": 1})
    if config is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace("some/model", config))
    return run


def test_a_run_made_data_set_by_data_set_is_one_run(opencompass_files: Any, work: Path) -> None:
    parts = [load_samples(earlier(opencompass_files, work)),
             load_samples(work / "20260102_120000")]  # fmt: skip
    joined = load_samples(work)
    assert joined.tasks == ("arc", "piqa") and not joined.info.left_out
    for part in parts:
        (task,) = part.tasks
        own = joined.frame[joined.frame["task"] == task].reset_index(drop=True)
        pd.testing.assert_frame_equal(own, part.frame)
        assert joined.info.files[task] == part.info.files[task]
    assert not joined.info.missing


@pytest.mark.parametrize(("config", "named"), [("other/model", "path"), (None, "config")])
def test_another_model_is_left_out_by_name(
    opencompass_files: Any, work: Path, config: str | None, named: str
) -> None:
    earlier(opencompass_files, work, config=config)
    found = load_samples(work)
    assert found.tasks == ("arc",)
    assert named in found.info.left_out["the run 20260101_120000"]


def test_runs_that_contradict_each_other_are_refused(opencompass_files: Any, work: Path) -> None:
    config = next((work / "20260101_120000" / "configs").iterdir())
    config.write_text(config.read_text().replace("some/model", "other/model"))
    with pytest.raises(SamplesError, match=r"20260101_120000.*arc.*path.*give one run"):
        load_samples(work)
    config.write_text(config.read_text().replace("other/model", "some/model"))
    folder = work / "20260101_120000" / "predictions" / "tiny"
    opencompass_files.write(folder, "arc", opencompass_files.ppl(6, seed=1))
    with pytest.raises(SamplesError, match=r"20260101_120000.*questions.*arc"):
        load_samples(work)
    config.unlink()
    with pytest.raises(SamplesError, match=r"20260101_120000.*arc.*config"):
        load_samples(work)


def test_batch_size_does_not_part_runs(opencompass_files: Any, work: Path) -> None:
    run = earlier(opencompass_files, work)
    config = next((run / "configs").iterdir())
    config.write_text(config.read_text().replace("batch_size=4", "batch_size=64"))
    assert load_samples(work).tasks == ("arc", "piqa")


def test_models_of_other_runs_are_models_too(opencompass_files: Any, work: Path) -> None:
    folder = work / "20260101_120000" / "predictions" / "other"
    opencompass_files.write(folder, "arc", opencompass_files.ppl(5, seed=3))
    with pytest.raises(SamplesError, match=r"several models .*other'.*tiny'"):
        load_samples(work)


def test_configs_of_one_run_are_joined(opencompass_files: Any, work: Path) -> None:
    """Continuing a run (-r) writes another config, with what was asked then only."""
    run = work / "20260102_120000"
    once = opencompass_files.gen(3, seed=1, golds=["A"] * 3)
    opencompass_files.write(run / "predictions" / "tiny", "gsm", once + once)
    later = run / "configs" / "20260109_120000_7.py"
    later.write_text("datasets = [dict(abbr='gsm', n=2)]\n")
    found = load_samples(run)
    assert found.tasks == ("arc", "gsm")
    assert set(found.frame["filter"]) == {"none", "repetition 1", "repetition 2"}
    later.write_text("models = [dict(abbr='tiny', path='other/model')]\n")
    with pytest.raises(SamplesError, match=r"20260109.*tiny.*batch_size|20260109.*tiny.*path"):
        load_samples(run)
    later.write_text("datasets = [dict(abbr='arc', n=5)]\n")
    with pytest.raises(SamplesError, match=r"20260109.*arc.* n,"):
        load_samples(run)


def test_a_folder_of_prediction_files_only(opencompass_files: Any, tmp_path: Path) -> None:
    opencompass_files.write(tmp_path / "dense", "arc", opencompass_files.ppl(5, seed=1))
    samples = load_samples(tmp_path / "dense")
    assert samples.info.model == "dense" and samples.info.timestamp is None


def test_several_models_must_be_named(opencompass_files: Any, work: Path) -> None:
    folder = work / "20260102_120000" / "predictions" / "other"
    opencompass_files.write(folder, "arc", opencompass_files.ppl(5, seed=3))
    with pytest.raises(SamplesError, match=r"several models.*other', .*tiny'"):
        load_samples(work)


def test_one_file_is_one_data_set(opencompass_files: Any, work: Path) -> None:
    folder = work / "20260102_120000" / "predictions" / "tiny"
    opencompass_files.write(folder, "piqa", opencompass_files.ppl(5, seed=3))
    assert load_samples(folder / "arc.json").tasks == ("arc",)
    assert load_samples(folder).tasks == ("arc", "piqa")


def test_a_missing_part_is_named(opencompass_files: Any, work: Path) -> None:
    folder = work / "20260102_120000" / "predictions" / "tiny"
    opencompass_files.write(folder, "piqa", opencompass_files.ppl(9, seed=3), parts=3)
    (folder / "piqa_1.json").unlink()
    opencompass_files.write_config(work / "20260102_120000", "tiny", {"arc": 1, "piqa": 1})
    with pytest.raises(SamplesError, match=r"piqa_1\.json.*missing.* 2"):
        load_samples(folder)


def test_an_unfinished_part_is_named(opencompass_files: Any, work: Path) -> None:
    folder = work / "20260102_120000" / "predictions" / "tiny"
    opencompass_files.write(folder, "gsm", opencompass_files.ppl(9, seed=3), parts=2)
    (folder / "gsm_1.json").rename(folder / "tmp_gsm_1.jsonl")
    with pytest.raises(SamplesError, match=r"gsm_1\.json.*missing"):
        load_samples(folder)


def test_whole_file_counts_before_parts(opencompass_files: Any, work: Path) -> None:
    """OpenCompass evaluates the whole file, if it is there."""
    folder = work / "20260102_120000" / "predictions" / "tiny"
    opencompass_files.write(folder, "arc", opencompass_files.ppl(5, seed=7), parts=2)
    found = load_samples(folder)
    assert found.tasks == ("arc",) and len(found.frame) == 5
    assert set(found.info.left_out) == {"arc_0.json", "arc_1.json"}


def test_data_sets_whose_names_end_in_a_number(opencompass_files: Any, work: Path) -> None:
    folder = work / "20260102_120000" / "predictions" / "tiny"
    for name in ("bbh_0", "bbh_1", "math_500"):
        opencompass_files.write(folder, name, opencompass_files.ppl(5, seed=7))
    config = {"arc": 1, "bbh_0": 1, "bbh_1": 1, "math_500": 1}
    opencompass_files.write_config(work / "20260102_120000", "tiny", config)
    assert load_samples(folder).tasks == ("arc", "bbh_0", "bbh_1", "math_500")


def test_unfinished_data_sets_are_told(opencompass_files: Any, work: Path) -> None:
    run = work / "20260102_120000"
    opencompass_files.write_config(run, "tiny", {"arc": 1, "race": 1})
    (run / "predictions" / "tiny" / "tmp_gsm.jsonl").write_text("")
    missing = load_samples(run).info.missing
    assert set(missing) == {"gsm", "race"}
    assert "race.json" in missing["race"]


def test_nothing_was_predicted(work: Path) -> None:
    model = work / "20260102_120000" / "predictions" / "tiny"
    (model / "arc.json").unlink()
    with pytest.raises(SamplesError, match="no predictions"):
        load_samples(work)
    model.rmdir()
    with pytest.raises(SamplesError, match=r"no predictions.*logs"):
        load_samples(work)


def test_other_folders_are_left_to_other_readers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": {}}')
    assert find_predictions(tmp_path) is None
    assert find_predictions(tmp_path / "config.json") is None


def test_lm_eval_into_a_folder_called_predictions(lm_eval_outputs: Path, tmp_path: Path) -> None:
    shutil.copytree(lm_eval_outputs / "dense", tmp_path / "predictions")
    for path in (tmp_path, tmp_path / "predictions"):
        assert load_samples(path, progress=False).info.engine == "lm-eval"


def test_a_models_folder_in_a_run_is_taken_whatever_its_files_say(work: Path) -> None:
    """Files that are not predictions are named there; elsewhere the folder is left alone."""
    folder = next(each for each in work.rglob("predictions/*") if each.is_dir())
    for file in folder.iterdir():
        file.unlink()
    (folder / "arc.json").write_text('{"a": {}}')
    found = find_predictions(folder)
    assert found is not None
    (work / "elsewhere").mkdir()
    shutil.copy(folder / "arc.json", work / "elsewhere")
    assert find_predictions(work / "elsewhere") is None


def test_other_json_beside_loose_predictions(opencompass_files: Any, tmp_path: Path) -> None:
    opencompass_files.write(tmp_path, "arc", opencompass_files.ppl(5, seed=1))
    (tmp_path / "notes.json").write_text('{"by": "me"}')
    assert load_samples(tmp_path).tasks == ("arc",)


def test_config_is_read_as_data(opencompass_files: Any, work: Path) -> None:
    run = work / "20260102_120000"
    path = next((run / "configs").iterdir())
    path.write_text(path.read_text() + "import os\nos.remove('x')\nmodels[0]['y'] = 1\n")
    info = load_samples(run).info
    assert info.config["type"] == "opencompass.models.HuggingFaceBaseModel"
    assert info.computed_by == {"arc": "transformers"}


@pytest.mark.parametrize(
    ("kind", "computed_by"),
    [
        ("opencompass.models.HuggingFacewithChatTemplate", "transformers"),
        ("opencompass.models.VLLMwithChatTemplate", "vLLM"),
        ("opencompass.models.turbomind.TurboMindModel", "TurboMindModel"),
        ("streamline_bench.opencompass.StreamlineModel", "transformers"),
        ("streamline_bench.opencompass.StreamlineChatModel", "transformers"),
        ("streamline_bench.opencompass.StreamlineVLLM", "vLLM"),
        ("streamline_bench.opencompass.StreamlineVLLMChat", "vLLM"),
    ],
)
def test_what_is_behind_a_model_class(kind: str, computed_by: str) -> None:
    assert engine_behind(kind) == computed_by


@pytest.mark.parametrize(
    "content",
    [b"models = [\n", b"\0", b"\xff", b"x = " + b"(" * 9000, b"x = " + b"-" * 9000 + b"1"],
)
def test_a_config_that_is_no_python_is_one_sentence(work: Path, content: bytes) -> None:
    path = next((work / "20260102_120000" / "configs").iterdir())
    path.write_bytes(content)
    with pytest.raises(SamplesError, match=path.name):
        load_samples(work)
