"""What a process sets up for a GPU (simulated here), and how it leaves the other ranks."""

import pytest
import torch

from nanolib.config import MachineConfig
from nanolib.rundir import Run
from nanolib.runtime import Runtime
from nanolib.stages import worker


def test_cudnn_attention_is_off_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    precision, allowed = (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    try:
        runtime = Runtime.start(MachineConfig(device="cuda", threads=1))
        assert runtime.device == torch.device("cuda", 0) and runtime.dtype == torch.bfloat16
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(allowed)


@pytest.mark.parametrize("failing", [False, True])
def test_a_rank_that_failed_does_not_wait_for_the_others(failing, monkeypatch):
    """Leaving the group waits for every rank's messages; at exit it is given up instead."""
    closed = []

    def report(context):
        if failing:
            raise RuntimeError("this rank alone")
        return {}

    monkeypatch.setattr(Runtime, "close", lambda runtime: closed.append(True))
    monkeypatch.setitem(worker.WORK, "report", report)
    if failing:
        with pytest.raises(RuntimeError, match="this rank alone"):
            worker.work("report", Run.open("smoke"))
    else:
        worker.work("report", Run.open("smoke"))
    assert closed == [True] * (not failing)
