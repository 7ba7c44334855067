"""The CUDA kernels on a CPU, by Triton's interpreter, in float32: slow, so everything is small."""

import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")  # there is none for macOS

# The interpreter is chosen by a variable when Triton is imported: a process of its own.
START = """
import torch, triton.runtime.interpreter as interpreter
from types import SimpleNamespace

original = interpreter._patch_lang_tensor

def patched(tensor, scope):  # range() over a loaded number, which numpy 2.4 refuses to convert
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

interpreter._patch_lang_tensor = patched
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=2)
torch.manual_seed(1)
from nanolib import kernels
cpu = torch.device("cpu")
"""


TRAINING = """
from torch.testing import assert_close

kernels.prove(cpu, torch.float32)
right, kernels.squared_relu_backward = kernels.squared_relu_backward, lambda *_: 1.1 * right(*_)
try:
    kernels.prove(cpu, torch.float32)
except AssertionError as error:
    print(error)
kernels.squared_relu_backward = right

x, up, down = (torch.randn(shape, requires_grad=True) for shape in ((9, 16), (24, 16), (16, 24)))
grad = torch.randn(9, 16)
plain = (x @ up.mT).relu().square() @ down.mT
fused = kernels.SquaredReLUMLP.apply(x, up, down)
assert_close(fused, plain)
for got, want in zip(*(torch.autograd.grad(y, (x, up, down), grad) for y in (fused, plain))):
    assert_close(got, want, rtol=1e-4, atol=1e-4)
"""
COMPILED = """
from torch._dynamo.utils import counters
from torch.testing import assert_close
from nanolib.config import ModelConfig
from nanolib.data.packing import Batch
from nanolib.model import GPT

model = GPT.build(ModelConfig(depth=1, aspect=16, head_dim=8, sequence_len=16), 40, cpu, 1)
with torch.no_grad():
    for weight in model.parameters():
        weight.normal_(std=0.3)
GPT.fast_kernels = lambda model, use: kernels
compiled = model.compiled_nll(backend="aot_eager")
graphs = []
for rows, length in ((2, 6), (3, 4), (4, 9), (5, 8), (6, 7), (1, 9)):  # as GRPO's do, they vary
    ids = torch.randint(40, (rows, length + 1))
    batch = Batch(inputs_BT=ids[:, :-1], targets_BT=ids[:, 1:])
    sides = []
    for nll in (model.nll, compiled):
        model.zero_grad()
        nll(batch).square().sum().backward()
        sides.append([weight.grad for weight in model.parameters()])
    for plain, fused in zip(*sides):
        assert_close(fused, plain, rtol=1e-3, atol=1e-3)
    graphs.append(counters["stats"]["unique_graphs"])
assert graphs[2] == graphs[4], graphs  # the third shape's programs serve all
print("relative error: none")
"""
WRITING = """
from torch.testing import assert_close
from nanolib.config import ModelConfig
from nanolib.decoding import Writer, prove
from nanolib.model import GPT, KVCache

kernels.PROGRAMS = 48  # parts of a row's positions: 4 in the proof
prove(cpu, torch.float32)
right, kernels.read_cache = kernels.read_cache, lambda *inputs: 1.1 * right(*inputs)
try:
    prove(cpu, torch.float32)
except AssertionError as error:
    print(error)
kernels.read_cache = right

config = ModelConfig(depth=2, aspect=16, head_dim=8, kv_heads=2, sequence_len=16)
model = GPT.build(config, 40, cpu, 1)
writer = Writer(model, torch.float64)  # a copy, not the same memory
with torch.no_grad():
    for weight in model.parameters():
        weight.normal_(std=0.3)
writer.refresh()
writer.copies = [copy.float() for copy in writer.copies]
caches = [KVCache(config, 2, 16, cpu, torch.float32) for _ in range(2)]
steps = (([5, 3], 5), (1, 1), ([3, 2], 3), (1, 1))
with torch.inference_mode():
    for lengths, width in steps:
        ids = torch.randint(40, (2, width))
        results = [part.logits(part.hidden(ids, cache)[:, 0])
                   for part, cache in zip((model, writer), caches)]
        assert_close(*results, rtol=1e-4, atol=1e-4)
        for cache in caches:
            cache.advance(lengths)
"""


@pytest.mark.parametrize(
    "code", [TRAINING, COMPILED, WRITING], ids=["training", "compiled", "writing"]
)
def test_kernels_give_the_right_numbers_and_the_proof_notices_wrong_ones(monkeypatch, code):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("relative error")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_work_on_this_gpu():
    from nanolib import decoding, kernels

    if torch.cuda.get_device_capability()[0] >= 9:  # the MLP's product needs a Hopper GPU
        kernels.prove(torch.device("cuda"))
        decoding.prove(torch.device("cuda"))
