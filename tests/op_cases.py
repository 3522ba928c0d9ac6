"""What the tests of all native ops share: element types, hypothesis settings, other devices."""

from __future__ import annotations

import torch
from hypothesis import settings
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

drawn = settings(max_examples=60, deadline=None)


def composite(op, *args):
    """Runs what a device without a kernel of ours runs, on the CPU tensors given."""
    return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.XPU), *args)


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
