"""Which predictions a path means, at every level of OpenCompass' folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.errors import SamplesError
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.readers.opencompass_config import read_dumped_config
from streamline_bench.stability.readers.opencompass_folder import find_predictions


@pytest.fixture
def work(opencompass_files: Any, tmp_path: Path) -> Path:
    """A work folder with two runs of a model."""
    for time, seed in (("20260101_120000", 1), ("20260102_120000", 2)):
        folder = tmp_path / "outputs" / time / "predictions" / "tiny"
        opencompass_files.write(folder, "arc", opencompass_files.ppl(5, seed=seed))
    (tmp_path / "outputs" / "20260103_120000").mkdir()  # began, wrote nothing
    return tmp_path / "outputs"


def test_any_level_is_understood(work: Path) -> None:
    run = work / "20260102_120000"
    model = run / "predictions" / "tiny"
    for path in (work, run, run / "predictions", model, model / "arc.json"):
        found = find_predictions(path)
        assert found is not None and found.folder == model, path
        assert found.timestamp == "20260102_120000" and set(found.files) == {"arc"}


def test_newest_run_unless_told(work: Path) -> None:
    assert load_samples(work).info.timestamp == "20260102_120000"
    older = load_samples(work, timestamp="20260101_120000")
    assert older.info.timestamp == "20260101_120000"
    with pytest.raises(SamplesError, match="no OpenCompass run of 2001; it has: 20260101_120000"):
        load_samples(work, timestamp="2001")


def test_a_folder_of_prediction_files_only(opencompass_files: Any, tmp_path: Path) -> None:
    opencompass_files.write(tmp_path / "dense", "arc", opencompass_files.ppl(5, seed=1))
    samples = load_samples(tmp_path / "dense")
    assert samples.info.model == "dense" and samples.info.timestamp is None


def test_several_models_must_be_named(opencompass_files: Any, work: Path) -> None:
    folder = work / "20260102_120000" / "predictions" / "other"
    opencompass_files.write(folder, "arc", opencompass_files.ppl(5, seed=3))
    with pytest.raises(SamplesError, match=r"several models \(.*other', .*tiny'\); name one"):
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
    with pytest.raises(SamplesError, match=r"piqa_1\.json' is missing, though .* part 2"):
        load_samples(folder)


def test_an_unfinished_part_is_named(opencompass_files: Any, work: Path) -> None:
    folder = work / "20260102_120000" / "predictions" / "tiny"
    opencompass_files.write(folder, "gsm", opencompass_files.ppl(9, seed=3), parts=2)
    (folder / "gsm_1.json").rename(folder / "tmp_gsm_1.jsonl")
    with pytest.raises(SamplesError, match=r"gsm_1\.json' is missing, only its unfinished"):
        load_samples(folder)


def test_whole_file_counts_before_parts(opencompass_files: Any, work: Path) -> None:
    """OpenCompass evaluates the whole file, if it is there."""
    folder = work / "20260102_120000" / "predictions" / "tiny"
    opencompass_files.write(folder, "arc", opencompass_files.ppl(5, seed=7), parts=2)
    assert load_samples(folder).tasks == ("arc",)
    assert len(load_samples(folder).frame) == 5


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
    assert "race.json', OpenCompass did not finish it" in missing["race"]


def test_nothing_was_predicted(work: Path) -> None:
    model = work / "20260102_120000" / "predictions" / "tiny"
    (model / "arc.json").unlink()
    with pytest.raises(SamplesError, match=r"holds no predictions .*no prediction file"):
        load_samples(work)
    model.rmdir()
    with pytest.raises(SamplesError, match="holds no predictions; see the run's logs"):
        load_samples(work)


def test_other_folders_are_left_to_other_readers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": {}}')
    assert find_predictions(tmp_path) is None
    assert find_predictions(tmp_path / "config.json") is None


def test_lm_eval_into_a_folder_called_predictions(lm_eval_outputs: Path, tmp_path: Path) -> None:
    shutil.copytree(lm_eval_outputs / "dense", tmp_path / "predictions")
    for path in (tmp_path, tmp_path / "predictions"):
        assert load_samples(path, progress=False).info.engine == "lm-eval"


def test_other_json_beside_loose_predictions(opencompass_files: Any, tmp_path: Path) -> None:
    opencompass_files.write(tmp_path, "arc", opencompass_files.ppl(5, seed=1))
    (tmp_path / "notes.json").write_text('{"by": "me"}')
    assert load_samples(tmp_path).tasks == ("arc",)


def test_config_is_read_as_data(opencompass_files: Any, tmp_path: Path) -> None:
    path = opencompass_files.write_config(tmp_path, "tiny", {"gsm": 4, "arc": 1})
    path.write_text(path.read_text() + "import os\nos.remove('x')\nmodels[0]['y'] = 1\n")
    config = read_dumped_config(tmp_path)
    assert config is not None
    assert dict(config.repetitions) == {"gsm": 4, "arc": 1}
    assert config.models["tiny"]["type"] == "opencompass.models.HuggingFaceBaseModel"
    assert read_dumped_config(tmp_path / "nowhere") is None
    path.write_text("models = [\n")
    with pytest.raises(SamplesError, match="not a config that OpenCompass wrote"):
        read_dumped_config(tmp_path)
