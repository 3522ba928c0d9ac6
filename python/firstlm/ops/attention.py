"""Attention of one query token a row over the key/value cache. Kernels in csrc/attention.h."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: Tensor,
    end: Tensor,
    scale: float | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    """Attend from one token of each row to slots [begin, end) of its cache.

    Left padding and sliding windows are expressed by `begin`. Query head h reads key/value head
    h // (Hq / H). Slots outside the range are not read. Scores and sums are kept in float32
    (float64 for float64). No autograd passes through.

    Args:
        query: [R, Hq, D] float32, bfloat16, float16 or float64.
        keys: [R, H, C, D] of query's type, H a divisor of Hq; a view of a cache's storage, read in
            place unless the elements of a slot lie apart.
        values: [R, H, C, D].
        begin: [R] int64 on the same device, or [1] for all rows.
        end: [R] int64, or [1].
        scale: of the scores; D ** -0.5 if None.
        soft_cap: if positive, scores become soft_cap * tanh(score / soft_cap) after the scale.

    Returns:
        [R, Hq, D] of query's type; zeros in a row where begin == end.

    Raises:
        ValueError, TypeError: a shape, dtype or device that is not the above.
        IndexError: on the CPU, slots that are not 0 <= begin <= end <= C.
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    return torch.ops.firstlm.decode_attention(query, keys, values, begin, end, scale, soft_cap)


@torch.library.register_fake("firstlm::decode_attention")
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: Tensor,
    end: Tensor,
    scale: float,
    soft_cap: float,
) -> Tensor:
    return query.new_empty(query.shape)
