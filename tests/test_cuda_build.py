"""The library as built with CUDA: it loads anywhere, and every op has its kernel."""

from __future__ import annotations

import os

import pytest
import torch

import firstlm.ops  # noqa: F401  registers them

SCHEMAS = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("firstlm::")]
# Without tensors, there is nothing to put on a device.
OPS = [s.name for s in SCHEMAS if any("Tensor" in str(a.type) for a in s.arguments)]


def has_kernel(op: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, device)


def test_every_op_has_a_cpu_kernel():
    assert OPS
    assert [op for op in OPS if not has_kernel(op, "CPU")] == []


def test_every_op_has_a_cuda_kernel_or_none_has():
    missing = [op for op in OPS if not has_kernel(op, "CUDA")]
    if os.environ.get("FIRSTLM_CUDA") == "1":
        assert missing == []
    assert missing in ([], OPS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_runs_our_kernels():
    assert has_kernel("firstlm::router_pool", "CUDA"), "rebuild firstlm with FIRSTLM_CUDA=1"
