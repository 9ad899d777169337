"""Readings of time, energy and memory, some of which a test machine may not have."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import psutil
import pytest
from pydantic import ValidationError

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput import Setup, measure
from streamline_bench.throughput.engines import EngineSettings
from streamline_bench.throughput.engines.vllm import VLLMEngine
from streamline_bench.throughput.meters import PeakMemory, Stopwatch, open_device, visible_device
from streamline_bench.throughput.sweep import process_environment


def test_visible_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [visible_device(name) for name in ("cuda", "cuda:0", "cuda:2")] == ["0", "0", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert [visible_device(name) for name in ("cuda", "cuda:1")] == ["3", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,-1,6")
    assert visible_device("cuda:1") == "5"


@pytest.mark.parametrize(
    ("listed", "device", "message"),
    [
        ("0", "cuda:1", "'cuda:1'.*CUDA_VISIBLE_DEVICES='0'.*1 device"),
        ("3,-1,5", "cuda:1", "'cuda:1'.*CUDA_VISIBLE_DEVICES='3,-1,5'.*1 device"),
        ("", "cuda", "'cuda'.*CUDA_VISIBLE_DEVICES=''.*0 devices"),
        ("-1", "cuda", "CUDA_VISIBLE_DEVICES='-1'.*0 devices"),
    ],
)
def test_a_device_that_is_not_visible_is_refused(
    listed: str, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    with pytest.raises(ThroughputError, match=message):
        visible_device(device)
    with pytest.raises(ThroughputError, match=message):
        measure({"dense": "nowhere"}, setup=Setup(device=device), progress=False)


def test_a_models_process_sees_its_own_accelerator_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    setup = Setup(device="cuda:1")
    settings = EngineSettings(model="m", device=setup.process_device, sequence_tokens=1)
    given = process_environment(VLLMEngine.environment(settings), settings, setup.visible_device)
    assert given["CUDA_VISIBLE_DEVICES"] == "GPU-abc" and settings.device == "cuda"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in given
    on_cpu = EngineSettings(model="m", sequence_tokens=1, threads=3)
    given = process_environment(VLLMEngine.environment(on_cpu), on_cpu, Setup().visible_device)
    assert "CUDA_VISIBLE_DEVICES" not in given and given["OMP_NUM_THREADS"] == "3"
    assert given["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


class FakeNVML(types.ModuleType):
    """Two processes on the device; energy rises by 1500 mJ a reading."""

    class NVMLError(Exception):
        pass

    millijoules = 0

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        if index:
            raise self.NVMLError("Invalid Argument")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        self.millijoules += 1500
        return self.millijoules

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[object]:  # noqa: N802
        held = {os.getpid(): 7_000, 1: 90_000}
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in held.items()]


def test_energy_and_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML("pynvml"))
    device, remark = open_device("0")
    assert device is not None and "NVML" in remark
    assert Stopwatch(device).read().energy_joules == 1.5
    with PeakMemory(os.getpid(), device) as peak:
        pass
    assert peak.bytes == 7_000  # that of other processes does not count
    missing, remark = open_device("1")
    assert missing is None and "Invalid Argument" in remark


def test_without_a_driver_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNVML("pynvml")

    def no_driver() -> None:
        raise FakeNVML.NVMLError("Driver Not Loaded")

    monkeypatch.setattr(library, "nvmlInit", no_driver)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    device, remark = open_device("0")
    assert device is None and "Driver Not Loaded" in remark


def test_a_stopwatch_counts_the_work_of_running_children() -> None:
    burn = "import time\nend = time.process_time() + 30\nwhile time.process_time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", burn]) as child:
        watch = Stopwatch()
        before = sum(psutil.Process(child.pid).cpu_times()[:2])
        while sum(psutil.Process(child.pid).cpu_times()[:2]) < before + 0.3:
            pass
        reading = watch.read()
        child.kill()
    assert reading.cpu_seconds >= 0.25
    assert reading.energy_joules is None


def test_peak_memory_sees_children_and_what_is_given_back() -> None:
    code = "data = bytearray(60_000_000); print('ready', flush=True); input(); del data; input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        with PeakMemory(os.getpid()) as peak:
            while peak.bytes is None:
                pass
            child.stdin.write(b"\n")
            child.stdin.flush()
        held = peak.bytes
        child.kill()
    assert held is not None
    assert held > psutil.Process().memory_info().rss + 50_000_000


def test_a_model_on_several_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc,7,8")
    setup = Setup(device="cuda:1", tensor_parallel=2)
    assert setup.visible_device == "GPU-abc,7"
    assert Setup(device="cuda", gpus=(3, 0), tensor_parallel=2).visible_device == "8,3"
    for wrong in (
        {"device": "cpu", "tensor_parallel": 2},
        {"device": "cuda", "gpus": (0, 1, 2), "tensor_parallel": 2},
        {"device": "cuda", "gpus": (2, 3)},  # the second would be idle, and counted
        {"device": "cuda", "gpus": (0, 0), "tensor_parallel": 2},
    ):
        with pytest.raises(ValidationError):
            Setup.model_validate(wrong)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML("pynvml"))
    device, _ = open_device("0,0")
    assert device is not None
    assert Stopwatch(device).read().energy_joules == 6.0, "1.5 more with each of 4 readings"
    assert device.memory_bytes([os.getpid()]) == 14_000
