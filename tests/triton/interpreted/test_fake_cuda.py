"""What can be said of CUDA tensors without CUDA: the dispatcher picks Triton, and fake tensors know the results."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from safe_kernels import triton

OPS = [op for ops in triton.STEMS.values() for op in ops]


@pytest.mark.parametrize("op", OPS)
def test_the_dispatcher_takes_triton_for_cuda(op: str) -> None:
    table = torch._C._dispatch_dump_table(f"safe_kernels::{op}").splitlines()
    lines = {line.partition(":")[0]: line for line in table}
    assert "csrc/launch_replay/register_replayed.cpp" in lines["CUDA"] and lines["CUDA"].endswith("[kernel]")
    assert "csrc/autograd/" in lines["AutogradCUDA"]


def test_fake_cuda_tensors_trace_through_lora() -> None:
    with FakeTensorMode():
        x, base = torch.empty(6, 5, 32, device="cuda"), torch.empty(6, 5, 48, device="cuda", dtype=torch.bfloat16)
        A, B = torch.empty(4, 32, device="cuda"), torch.empty(48, 4, device="cuda")
        out, statistics = torch.ops.safe_kernels.lora(x, base, A, B, 2.0)
    assert (out.shape, out.dtype, out.device.type) == (base.shape, base.dtype, "cuda")
    assert statistics.shape == (0,)
