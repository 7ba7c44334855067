"""What a process sets up for a GPU, without one."""

import torch

from nanolib.config import MachineConfig
from nanolib.runtime import Runtime


def test_no_attention_on_a_gpu_that_plans_for_every_shape(monkeypatch):
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
