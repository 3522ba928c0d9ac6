"""Float64 PyTorch of every native op, a few lines each: what the ops promise.

Nothing in the package uses this file; tests compare with it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def router_pool(hidden: Tensor, prompt_mask: Tensor, kind: str, windows: int) -> Tensor:
    """[B, T, D], [B, T] bool -> [B, F] float64."""
    return (
        torch.stack(
            [
                pool_row(row[mask].double(), kind, windows)
                for row, mask in zip(hidden, prompt_mask, strict=True)
            ]
        )
        if len(hidden)
        else hidden.new_zeros(0, features(hidden, kind, windows)).double()
    )


def features(hidden: Tensor, kind: str, windows: int) -> int:
    return hidden.shape[2] * (windows if kind == "windowed_mean" else 1)


def pool_row(tokens: Tensor, kind: str, windows: int) -> Tensor:
    """The prompt's tokens [n, D] of one row -> its features [F]."""
    n = len(tokens)
    windows = windows if kind == "windowed_mean" else 1
    if n == 0:
        return tokens.sum(0).repeat(windows)
    if kind == "last":
        return tokens[-1]
    begins = [w * n // windows for w in range(windows)]
    ends = [(w + 1) * n // windows for w in range(windows)]
    return torch.cat(
        [
            tokens[begin : max(end, begin + 1)].mean(0)
            for begin, end in zip(begins, ends, strict=True)
        ]
    )


def router_head(
    pooled: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    norm_eps: float = 0.0,
) -> Tensor:
    """[B, F] -> logit [B] float64."""
    x = pooled.double()
    if norm_eps > 0:
        x = x / (x.square().mean(1, keepdim=True) + norm_eps).sqrt()
    units = x @ weight.double().T + bias.double()  # [B, H]
    if out_weight is not None:
        units = torch.nn.functional.silu(units) @ out_weight.double().T + out_bias.double()
    return units.squeeze(1)


def kv_append(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """The storages [R, H, C, D] with tokens [R, H, T, D] at each row's slots from start on."""
    T = new_keys.shape[2]
    keys, values = keys.clone(), values.clone()
    for r, first in enumerate(start.expand(len(keys)).tolist()):
        keys[r, :, first : first + T] = new_keys[r]
        values[r, :, first : first + T] = new_values[r]
    return keys, values


def plan_rows(keep_mask: Tensor) -> tuple[Tensor, Tensor]:
    """[B, L] bool -> rows [L, B], counts [L]."""
    B, L = keep_mask.shape
    kept = [torch.nonzero(keep_mask[:, layer]).flatten() for layer in range(L)]
    rows = torch.full((L, B), -1)
    for layer, of_layer in enumerate(kept):
        rows[layer, : len(of_layer)] = of_layer
    return rows, torch.tensor([len(of_layer) for of_layer in kept], dtype=torch.int64)


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """[B, ...], [R] -> [R, ...]: zeros where a row is -1."""
    zeros = hidden.new_zeros(1, *hidden.shape[1:])
    return torch.cat([hidden, zeros])[rows]


def scatter_rows(hidden: Tensor, rows: Tensor, values: Tensor, gate: Tensor | None) -> Tensor:
    """[B, ...], [R], [R, ...], [R] -> [B, ...]: h + g (v - h) in the named rows."""
    out = list(hidden.unbind())
    for r, row in enumerate(rows.tolist()):
        if row >= 0:
            g = 1 if gate is None else gate[r]
            out[row] = (1 - g) * hidden[row] + g * values[r]
    return torch.stack(out) if out else hidden.clone()


def scatter_add_rows(hidden: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """[B, ...], [R], [R, ...] -> [B, ...]: the updates added to the rows that they name."""
    out = list(hidden.unbind())
    for r, row in enumerate(rows.tolist()):
        if row >= 0:
            out[row] = out[row] + update[r]
    return torch.stack(out) if out else hidden.clone()


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: Tensor,
    end: Tensor,
    scale: float,
    soft_cap: float,
) -> Tensor:
    """[R, Hq, D] over slots [begin, end) of [R, H, C, D] -> [R, Hq, D] float64."""
    output = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for r, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        k, v = (
            cache[r, :, first:last].double().repeat_interleave(group, 0) for cache in (keys, values)
        )  # [Hq, n, D]
        scores = scale * (k @ query[r].double().unsqueeze(2))  # [Hq, n, 1]
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        output[r] = (torch.softmax(scores, 1) * v).sum(1)
    return output
