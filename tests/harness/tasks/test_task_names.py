"""A mistyped task is refused from the text of the task files, without the harness."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from streamline_bench.errors import EvaluationError
from streamline_bench.harness.tasks.asked_tasks import (
    _stands_in,
    _texts,
    refuse_unknown,
    task_folders,
)


def test_names_of_ours_of_the_users_and_of_the_harness_are_known(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\ntag: [my_tag]\n", encoding="utf-8")
    names = ["streamline_demo", "mine", "my_tag", "piqa", "mmlu", "local_*", "./a.yaml"]
    refuse_unknown(names, task_folders(tmp_path))
    refuse_unknown([str(tmp_path)], [])  # a folder of task files


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("piqaa", "piqa"),
        ("hellaswga", "hellaswag"),
        ("piq", "piqa"),
        ("streamline_dem", "streamline_demo"),
    ],
)
def test_a_part_of_a_name_or_a_typo_is_unknown(tmp_path: Path, name: str, meant: str) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=f"'{name}'.*{meant}"):
        refuse_unknown(["streamline_demo", name], [tmp_path, *task_folders(None)])


def test_the_harness_is_not_imported() -> None:
    code = (
        "import sys\n"
        "from streamline_bench.harness.tasks.asked_tasks import refuse_unknown\n"
        "try:\n    refuse_unknown(['piqaa'], [])\n"
        "except Exception as error:\n    print(error)\n"
        "assert not {'lm_eval', 'torch', 'datasets', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "piqa" in done.stdout


@pytest.mark.slow
def test_every_name_that_the_harness_knows_stands_in_a_file() -> None:
    import lm_eval.tasks

    ours = [Path(folder) for folder in task_folders(None)]
    text = b"\n".join(_texts([Path(lm_eval.tasks.__file__).parent, *ours]))
    known = lm_eval.tasks.TaskManager().all_tasks
    assert len(known) > 1000
    words = set(re.findall(rb"[\w-]+", text))
    unsure = [name for name in known if name.encode() not in words]
    assert [name for name in unsure if not _stands_in(name, text)] == []
