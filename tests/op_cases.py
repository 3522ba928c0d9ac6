"""What the tests of all native ops share: element types, hypothesis settings, devices to run on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import Tensor

import emulated_ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

drawn = settings(max_examples=60)


# --- Devices ----------------------------------------------------------------------------------
# Each runs an op on the CPU tensors given, and returns CPU tensors.


def on_cpu(op, *args):
    return op(*args)


def composite(op, *args):
    """Runs what a device without a kernel of ours runs."""
    return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.XPU), *args)


def emulated(op, *args):
    """Runs the CUDA kernels on the host, threads in ascending order."""
    return emulated_ops.run(op, *args, backward=False)


def emulated_backward(op, *args):
    """The same with the threads in descending order."""
    return emulated_ops.run(op, *args, backward=True)


def on_gpu(op, *args):
    storages: dict[int, torch.UntypedStorage] = {}  # what shares memory here does so there
    moved = [to_gpu(a, storages) if isinstance(a, Tensor) else a for a in args]
    results = op(*moved)
    for arg, on_device, declared in zip(args, moved, op._schema.arguments, strict=True):
        if declared.alias_info is not None and declared.alias_info.is_write:
            arg.copy_(on_device)
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, results)


def to_gpu(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """With the same strides, and whatever lies between the elements."""
    own = tensor.untyped_storage()
    storage = storages.setdefault(own.data_ptr(), own.cuda())
    like = torch.empty(0, dtype=tensor.dtype, device="cuda")
    return like.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


GPUS = [on_gpu] if torch.cuda.is_available() else []
CUDA = [emulated, emulated_backward, *GPUS]

every_device = pytest.mark.parametrize("run", [on_cpu, composite, *CUDA])
# Kernels of ours promise more than composites of torch's ops, such as equal bits.
our_kernels = pytest.mark.parametrize("run", [on_cpu, *CUDA])
# For what would take long under emulation.
fast_kernels = pytest.mark.parametrize("run", [on_cpu, *GPUS])
# The CPU has errors for what index tensors hold. Others cannot look without a synchronisation.
other_devices = pytest.mark.parametrize("run", [composite, *CUDA])


# --- Cases ------------------------------------------------------------------------------------


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that an op sums in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def strided(tensor: Tensor, layout: str) -> Tensor:
    """The same values as a view of something larger, NaN around them."""
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gaps":
        *outer, last = tensor.shape
        larger = tensor.new_full((*outer[:-1], 2 * outer[-1] + 1, last + 3), torch.nan)
        view = larger[..., 1::2, 2 : last + 2]
        return view.copy_(tensor)
    if layout == "strided elements":
        larger = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
        return larger[..., ::2].copy_(tensor)
    assert layout == "contiguous"
    return tensor


LAYOUTS = ["contiguous", "transposed", "gaps", "strided elements"]
