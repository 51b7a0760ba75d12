"""Faults of the device: what a failed call means."""

import asyncio

import pytest
import torch
from scheduler_bench import Bench

from minivllm.config import make_config
from minivllm.engine.supervisor import Patience, start_engine
from minivllm.errors import DeviceLost, EngineDead, OutOfDeviceMemory
from minivllm.runner import faults
from minivllm.types import GenerateRequest, SamplingParams, StepPlan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4096.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_want_of_memory_is_told_from_other_faults(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, error: Exception
) -> None:
    monkeypatch.setattr(faults, "_lost", lambda device: None)
    with pytest.raises(OutOfDeviceMemory) as caught, faults.faults_of(device):
        raise error
    assert caught.value.__cause__ is error


def test_an_error_that_the_device_repeats_is_the_end_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the call said that met it first; and only where the device does repeat it."""
    monkeypatch.setattr(faults, "_lost", lambda device: "CUDA error: an illegal memory access was encountered")
    for error in (torch.AcceleratorError("CUDA error: unspecified launch failure"), IndexError("far from the cause")):
        with pytest.raises(DeviceLost, match="illegal memory access"), faults.faults_of(CUDA):
            raise error
    monkeypatch.setattr(faults, "_lost", lambda device: None)
    with pytest.raises(IndexError), faults.faults_of(CUDA):
        raise IndexError("a fault of the step")


def test_a_lost_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert faults._lost(CUDA) == "CUDA error: device-side assert triggered"


def test_a_lost_device_ends_the_engine_and_no_request() -> None:
    bench = Bench()
    bench.add("a", (1, 2, 3), 4)

    def lost(plan: StepPlan) -> None:
        raise DeviceLost("The device is gone.")

    bench.runner.breaks = lost
    with pytest.raises(DeviceLost):
        bench.step()
    assert bench.events == []


LOSES_ITS_DEVICE = """
import sys
from minivllm.engine.zygote import serve_steps
from minivllm.errors import DeviceLost
from minivllm.types import EngineInfo

class Engine:
    info = EngineInfo(64, 4, 64, 16, 9, 97, (), "cpu", "none", 0, 0, 0)
    has_work = False
    def add(self, request):
        self.has_work = True
    def step(self):
        raise DeviceLost("The device is gone.")
    def prepare_more(self):
        return False
    def watch(self, announce):
        pass

sys.exit(serve_steps(int(sys.argv[-1]), lambda config: Engine()))
"""


def test_the_process_says_with_its_exit_code_that_its_device_is_lost(capfd: pytest.CaptureFixture[str]) -> None:
    """And the next one goes on, until there were enough of them."""

    async def scene() -> None:
        client = await start_engine(make_config(), ("-c", LOSES_ITS_DEVICE), Patience(max_restarts=1))
        sampling = SamplingParams(max_tokens=3, seed=0)
        client.add(GenerateRequest(id="a", prompt_ids=(1, 2), sampling=sampling, arrival_s=0.0))
        with pytest.raises(EngineDead):
            await client.outputs()
        assert client.health.num_restarts == 1
        await client.close()

    asyncio.run(scene())
    assert capfd.readouterr().err.count(f"ended with exit code {DeviceLost.exit_code}\n") == 2
