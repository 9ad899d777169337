"""Outputs that appear whole or not at all, also after SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streamline_bench.core import files
from streamline_bench.core.files import (
    atomic_write_bytes,
    atomic_write_text,
    staged_output,
)
from streamline_bench.errors import (
    OutputError,
)


def test_staged_output_appears_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with staged_output(output) as work:
        (work / "a").mkdir()
        (work / "a" / "x").write_text("1")
        assert work.parent == output.parent
        assert not output.exists()
    assert (output / "a" / "x").read_text() == "1"
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_nothing_stays_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_output(tmp_path / "out") as work:
        (work / "x").write_text("1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    message = r"out exists; give another --output or pass --overwrite"
    with pytest.raises(OutputError, match=message), staged_output(tmp_path / "out"):
        pytest.fail("entered")


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_keeps_the_old_until_the_new_is_whole(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    with pytest.raises(RuntimeError), staged_output(output, overwrite=True) as work:
        (work / "new").write_text("new")
        raise RuntimeError
    assert [p.name for p in output.iterdir()] == ["old"]
    with staged_output(output, overwrite=True) as work:
        (work / "new").write_text("new")
        assert (output / "old").exists()
    assert [p.name for p in output.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_is_never_overwritten_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputError, match="is not a folder"):
        staged_output(tmp_path / "out", overwrite=True).__enter__()
    assert (tmp_path / "out").read_text() == "precious"


def test_a_folder_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(OutputError, match="cannot be written"), staged_output(output) as work:
        (work / "new").write_text("new")
        output.mkdir()
        (output / "theirs").write_text("theirs")
    assert [p.name for p in output.iterdir()] == ["theirs"]


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out", Path("/proc/nowhere/out")):
        with pytest.raises(OutputError, match=r"cannot be written.*--output"):
            staged_output(place).__enter__()


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def hidden(output: Path, kind: str, process: int, machine: str | None = None) -> Path:
    """Make what a killed process would leave."""
    where = files._machine() if machine is None else machine
    leftover = output.parent / f".{output.name}.{kind}-{where}-{process}-0123abcd"
    leftover.mkdir()
    (leftover / "x").write_text("old")
    return leftover


def test_leftovers_of_dead_processes_only_are_removed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    dead = hidden(output, "partial", dead_process())
    alive = hidden(output, "partial", os.getpid())
    foreign = hidden(tmp_path / "other", "partial", dead_process())
    with staged_output(output):
        assert not dead.exists()
    assert alive.exists()
    assert foreign.exists()


@pytest.mark.parametrize("name", ["0123456789ab", ""])
@pytest.mark.parametrize("kind", ["partial", "replaced"])
def test_a_process_of_another_machine_is_left_alone_for_a_week(
    tmp_path: Path, kind: str, name: str
) -> None:
    """Its process id says nothing here; nor does one without a machine, as it was once."""
    output = tmp_path / "out"
    leftover = hidden(output, kind, dead_process(), name)
    if not name:
        leftover = leftover.rename(tmp_path / leftover.name.replace("--", "-"))
    week = 7 * 24 * 3600
    for path in (leftover, leftover / "x"):
        os.utime(path, (0, time.time() - week + 60))
    with staged_output(output) as work:
        (work / "x").write_text("new")
    assert (leftover / "x").read_text() == "old"
    os.utime(leftover, (0, time.time() - week - 60))
    with staged_output(output, overwrite=True):
        assert leftover.exists()  # what is in it is younger
    os.utime(leftover / "x", (0, time.time() - week - 60))
    with staged_output(output, overwrite=True):
        assert not leftover.exists()


def test_names_tell_machines_and_containers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    here = files._machine()
    assert here == files._machine()
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    assert files._machine.__wrapped__() != here


def test_a_folder_moved_aside_by_a_killed_overwrite_comes_back(tmp_path: Path) -> None:
    hidden(tmp_path / "out", "replaced", dead_process())
    with pytest.raises(OutputError, match="exists"):
        staged_output(tmp_path / "out").__enter__()
    assert (tmp_path / "out" / "x").read_text() == "old"


WRITER = """
import sys, time
from pathlib import Path
from streamline_bench.core.files import staged_output

output = Path(sys.argv[1])
while True:
    with staged_output(output, overwrite=True) as work:
        for i in range(20):
            (work / f"{i}").write_text("x" * 10_000)
        print("written", flush=True)
        (work / "last").write_text("whole")
"""


@pytest.mark.parametrize("attempt", range(4))
def test_kill_leaves_nothing_or_the_whole(tmp_path: Path, repository: Path, attempt: int) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(output)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(attempt):  # 0: at any moment of the first writing
        process.stdout.readline()
    time.sleep(0.003 * attempt)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    if output.exists():
        assert (output / "last").read_text() == "whole"
        assert len(list(output.iterdir())) == 21
    with staged_output(output, overwrite=True) as work:
        (work / "x").write_text("next")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (output / "x").read_text() == "next"


def test_kill_in_the_middle_leaves_no_output(tmp_path: Path, repository: Path) -> None:
    code = WRITER.replace(
        'print("written", flush=True)', 'print("written", flush=True); time.sleep(60)'
    )
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(output)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert not output.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".out.partial-{files._machine()}-{process.pid}-")


def test_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    atomic_write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    for folder in ("absent", "x"):  # the second is a file
        with pytest.raises(OutputError, match=r"cannot be written.*--output"):
            atomic_write_bytes(tmp_path / folder / "y", b"")


FILE_WRITER = """
import sys
from pathlib import Path
from streamline_bench.core.files import atomic_write_bytes

while True:
    atomic_write_bytes(Path(sys.argv[1]), b"x" * 3_000_000)
    print("written", flush=True)
"""


def test_what_a_killed_writer_of_a_file_left_goes_with_the_next_writing(
    tmp_path: Path, repository: Path
) -> None:
    path = tmp_path / "x"
    dead, alive = (
        tmp_path / f".x.partial-{files._machine()}-{process}-0123abcd"
        for process in (dead_process(), os.getpid())
    )
    for leftover in (dead, alive):
        leftover.write_bytes(b"a part")
    process = subprocess.Popen(
        [sys.executable, "-c", FILE_WRITER, str(path)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert path.read_bytes() == b"x" * 3_000_000
    atomic_write_text(path, "whole")
    assert {each.name for each in tmp_path.iterdir()} == {"x", alive.name}


def test_a_leftover_that_cannot_be_removed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user's in a folder like /tmp."""
    leftover = tmp_path / f".x.partial-{files._machine()}-{dead_process()}-0123abcd"
    leftover.write_bytes(b"a part")
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path == leftover:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    atomic_write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new"
