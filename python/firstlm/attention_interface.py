"""Decode attention inside transformers: `attn_implementation="firstlm"`.

Importing this module registers the name. A decode step on the CPU runs `ops.decode_attention` over
the cache's views; everything else runs as "sdpa", or eagerly where scores have a soft cap.

The slots that a row's one query sees are found once a step, where transformers builds the mask, and
travel in its place through the layers: `[B, 1, 1, 2]` int64, first slot and the one after the last.
Their rows can be selected as a mask's. Where no mask is needed there is None, as with "sdpa". Only
models whose attention goes through transformers' interface may be loaded so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from firstlm import ops

NAME = "firstlm"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def slots_or_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """What "firstlm" builds for `sdpa_mask`'s arguments: slots if a step allows, else its mask."""
    mask = sdpa_mask(*args, **kwargs)
    if mask is None or torch.compiler.is_compiling():
        return mask
    is_shared_by_heads = mask.shape[1] == 1
    is_one_query = mask.shape[2] == 1
    return _slots(mask) if is_shared_by_heads and is_one_query and mask.is_cpu else mask


def _slots(mask: Tensor) -> Tensor:
    """[B, 1, 1, C] bool -> [B, 1, 1, 2], or the mask itself if what a row sees has holes."""
    count = mask.sum(-1, keepdim=True)
    begin = mask.to(torch.uint8).argmax(-1, keepdim=True)  # 0 where nothing is seen
    slots = torch.cat([begin, begin + count], -1)
    return slots if torch.equal(_mask(slots, mask.shape[-1]), mask) else mask


def _is_slots(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int64


def _mask(slots: Tensor, num_slots: int) -> Tensor:
    """[B, 1, 1, 2] -> [B, 1, 1, C] bool."""
    begin, end = slots.split(1, -1)
    place = torch.arange(num_slots, device=slots.device)
    return (place >= begin) & (place < end)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' AttentionInterface has it.

    Args:
        module: the attention module.
        query: `[B, Hq, T, D]`.
        key, value: `[B, H, C, D]`.
        attention_mask: what `slots_or_mask` built, None, or a mask of the caller's `[B, 1, T, C]`.
        dropout: of the attention weights.
        scaling: of the scores; D ** -0.5 if None.
        softcap: scores become softcap * tanh(score / softcap).
        **kwargs: handed to transformers' sdpa function.

    Returns:
        `[B, T, Hq, D]`, and None for the attention weights.

    Raises:
        ValueError: attention sinks, which neither this nor "sdpa" has.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError(
            'attn_implementation="firstlm" has no attention sinks (s_aux); load with "eager"'
        )
    if dropout == 0 and _decodes(query, key, value, attention_mask, kwargs):
        begin, end = _begin_and_end(attention_mask, key)
        output = ops.decode_attention(
            query.squeeze(2), key, value, begin, end, scaling, softcap or 0.0
        )
        return output.unsqueeze(1), None
    if attention_mask is not None and _is_slots(attention_mask):
        attention_mask = _mask(attention_mask, key.shape[2])
    if softcap:
        output = _capped_attention(query, key, value, attention_mask, dropout, scaling, softcap)
        return output.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _decodes(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether decode_attention computes what is asked for."""
    if query.shape[2] != 1 or query.device.type != "cpu" or query.dtype not in _DTYPES:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return False
    if any(kwargs.get(name) is not None for name in ("position_bias", "cache")):
        return False
    return (
        (attention_mask is None or _is_slots(attention_mask))
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape
        and query.shape[0] == key.shape[0]
        and query.shape[3] == key.shape[3]
    )


def _begin_and_end(slots: Tensor | None, key: Tensor) -> tuple[Tensor, Tensor]:
    """[B] or [1] each."""
    if slots is None:
        return torch.zeros(1, dtype=torch.int64), torch.full((1,), key.shape[2])
    begin, end = slots.reshape(-1, 2).unbind(1)
    return begin, end


def _capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """[B, Hq, T, D]: attention with a soft cap, which torch's has not, in torch's operators."""
    B, Hq, T, D = query.shape
    H, C = key.shape[1:3]
    grouped = query.reshape(B, H, Hq // H * T, D)
    scores = (grouped @ key.transpose(2, 3)).view(B, Hq, T, C)
    scores = scores * (D**-0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None and T > 1:
        mask = torch.ones(T, C, dtype=torch.bool, device=query.device).tril(C - T)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    accumulate = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=accumulate).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout)
    return (weights.view(B, H, Hq // H * T, C) @ value).view(B, Hq, T, value.shape[3])


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, slots_or_mask)
