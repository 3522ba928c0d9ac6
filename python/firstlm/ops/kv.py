"""Appending to the key/value cache. Kernels in csrc/kv.h."""

from __future__ import annotations

import torch
from torch import Tensor


def kv_append(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, start: Tensor
) -> None:
    """Copy the keys and values of T new tokens to their slots, in place.

    Token t of row r goes to slot start[r] + t. No autograd passes through.

    Args:
        keys: [R, H, C, D] contiguous storage of C slots; float32, bfloat16, float16 or float64.
        values: [R, H, C, D'] contiguous storage of the same type.
        new_keys: [R, H, T, D] of that type, T <= C; any strides, apart from the storage.
        new_values: [R, H, T, D'].
        start: [R] int64 on the same device, or [1] for all rows.

    Raises:
        ValueError, TypeError: a shape, layout, dtype or device that is not the above.
        IndexError: on the CPU, a start outside [0, C - T]; nothing is written then. On other
            devices such a row is left as it is, so that the host need not wait for `start`.
    """
    _append(keys, values, new_keys, new_values, start)


# Looked up once: of one token, the lookup would be a good part of the time.
_append = torch.ops.firstlm.kv_append.default


@torch.library.register_fake("firstlm::kv_append")
def _(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, start: Tensor) -> None:
    return None
