"""Router scoring: masked pooling and the head. Kernels in csrc/router.h."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

try:
    from firstlm import _native
except ImportError:  # not built for this Python, as `firstlm.native` says to those who need it
    _native = None

PoolKind = Literal["mean", "windowed_mean", "last"]


def router_pool(
    hidden: Tensor, prompt_mask: Tensor, kind: PoolKind = "mean", windows: int = 1
) -> Tensor:
    """Pool the hidden states of each row's prompt tokens into router features.

    Masked tokens may lie anywhere (left or right padding, holes, the answer); they are not read
    and do not change a bit of the result. A row without prompt tokens gives zeros.

    Args:
        hidden: [B, T, D] float32, bfloat16, float16 or float64; any strides.
        prompt_mask: [B, T] bool, true for the prompt's tokens.
        kind: "mean" over the n prompt tokens; "windowed_mean": means over the windows
            [w * n // windows, (w + 1) * n // windows) of them, where an empty window is its
            first token; "last": the last prompt token.
        windows: number of windows W; of interest to "windowed_mean" only.

    Returns:
        [B, F] float32 (float64 for float64 input): F = W * D for "windowed_mean", else D.
        Differentiable with respect to `hidden`.

    Raises:
        ValueError, TypeError: a shape, dtype, kind or count of windows that is not the above.
    """
    return torch.ops.firstlm.router_pool.default(hidden, prompt_mask, kind, windows)


def router_pool_packed(
    hidden: Tensor, offsets: Tensor, kind: PoolKind = "mean", windows: int = 1
) -> Tensor:
    """`router_pool` of prompts that lie one after the other without padding, to the same bits.

    Args:
        hidden: [N, D] float32, bfloat16, float16 or float64; any strides.
        offsets: [B + 1] int64, rising from 0 to N: prompt b is the tokens [offsets[b],
            offsets[b + 1]). An empty one gives zeros.
        kind, windows: as in `router_pool`.

    Returns:
        [B, F] float32 (float64 for float64 input), as `router_pool`. Differentiable with respect to
        `hidden`.

    Raises:
        ValueError, TypeError: a shape, dtype, kind or count of windows that is not the above; on
            the CPU, offsets that do not rise from 0 to N.
    """
    return torch.ops.firstlm.router_pool_packed.default(hidden, offsets, kind, windows)


def router_head(
    pooled: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    norm_eps: float = 0.0,
) -> Tensor:
    """Score pooled features: one logit per sequence.

    x = pooled, or pooled / sqrt(mean(pooled²) + norm_eps) if norm_eps > 0. The linear head is
    x @ weight[0] + bias; the bottleneck head silu(x @ weight.T + bias) @ out_weight[0] + out_bias.

    Args:
        pooled: [B, F] float32 or float64; everything is accumulated in this type.
        weight: [1, F], or [H, F] for the bottleneck head. Parameters of another floating type
            are converted to that of `pooled`.
        bias: [1] or [H].
        out_weight: [1, H] for the bottleneck head.
        out_bias: [1] for the bottleneck head.
        norm_eps: added to the mean square; 0 leaves the features as they are.

    Returns:
        [B] of pooled's type, differentiable with respect to all tensors.

    Raises:
        ValueError, TypeError: a shape or dtype that is not the above.
    """
    parameters = (_as_type(p, pooled.dtype) for p in (weight, bias, out_weight, out_bias))
    return torch.ops.firstlm.router_head.default(pooled, *parameters, norm_eps)


def _as_type(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


def router_score(
    hidden: Tensor,
    prompt_mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    kind: PoolKind = "mean",
    windows: int = 1,
) -> Tensor:
    """One logit per sequence: `router_head` of `router_pool`, in one call to native code.

    Arguments, gradients and what is raised are theirs.

    Returns:
        [B] float32 (float64 for float64 states).
    """
    head = (weight, bias, out_weight, out_bias, norm_eps)
    if _is_eager(hidden):
        return _native.router_score(hidden, prompt_mask, *head, kind, windows)
    return router_head(router_pool(hidden, prompt_mask, kind, windows), *head)


def router_score_packed(
    hidden: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    kind: PoolKind = "mean",
    windows: int = 1,
) -> Tensor:
    """`router_score` of prompts that lie one after the other: of `router_pool_packed`."""
    head = (weight, bias, out_weight, out_bias, norm_eps)
    if _is_eager(hidden):
        return _native.router_score_packed(hidden, offsets, *head, kind, windows)
    return router_head(router_pool_packed(hidden, offsets, kind, windows), *head)


def _is_eager(tensor: Tensor) -> bool:
    """Whether `_native` may call the ops: torch.compile and subclasses' own __torch_function__ see
    only what torch.ops has."""
    return type(tensor) is Tensor and _native is not None and not _is_compiling()


# Looked up once: of short prompts, the lookup would be a good part of the time.
_is_compiling = torch.compiler.is_compiling


# --- Fake kernels: shapes for torch.compile and export ----------------------------------------


def _features(kind: str, windows: int) -> int:
    return windows if kind == "windowed_mean" else 1


@torch.library.register_fake("firstlm::router_pool")
def _(hidden: Tensor, prompt_mask: Tensor, kind: str, windows: int) -> Tensor:
    B, _, D = hidden.shape
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(B, _features(kind, windows) * D, dtype=dtype)


@torch.library.register_fake("firstlm::router_pool_backward")
def _(
    grad_pooled: Tensor, prompt_mask: Tensor, kind: str, windows: int, dtype: torch.dtype
) -> Tensor:
    B, T = prompt_mask.shape
    D = grad_pooled.shape[1] // _features(kind, windows)
    return grad_pooled.new_empty(B, T, D, dtype=dtype)


@torch.library.register_fake("firstlm::router_pool_packed")
def _(hidden: Tensor, offsets: Tensor, kind: str, windows: int) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    B, D = offsets.shape[0] - 1, hidden.shape[1]
    return hidden.new_empty(B, _features(kind, windows) * D, dtype=dtype)


@torch.library.register_fake("firstlm::router_pool_packed_backward")
def _(
    grad_pooled: Tensor,
    offsets: Tensor,
    kind: str,
    windows: int,
    num_tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    D = grad_pooled.shape[1] // _features(kind, windows)
    return grad_pooled.new_empty(num_tokens, D, dtype=dtype)


@torch.library.register_fake("firstlm::router_head")
def _(
    pooled: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    norm_eps: float,
) -> Tensor:
    return pooled.new_empty(pooled.shape[0])


# --- Autograd -----------------------------------------------------------------------------------


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, prompt_mask, ctx.kind, ctx.windows = inputs
    ctx.dtype = hidden.dtype
    ctx.save_for_backward(prompt_mask)


def _pool_backward(ctx: Any, grad_pooled: Tensor) -> tuple[Tensor | None, ...]:
    (prompt_mask,) = ctx.saved_tensors
    grad_hidden = torch.ops.firstlm.router_pool_backward(
        grad_pooled, prompt_mask, ctx.kind, ctx.windows, ctx.dtype
    )
    return grad_hidden, None, None, None


def _save_pool_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, prompt_mask, ctx.kind, ctx.windows, _ = inputs
    ctx.save_for_backward(prompt_mask)


def _pool_double_backward(ctx: Any, grad_grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
    # Pooling is linear, so the adjoint of its adjoint is pooling.
    (prompt_mask,) = ctx.saved_tensors
    grad = torch.ops.firstlm.router_pool(grad_grad_hidden, prompt_mask, ctx.kind, ctx.windows)
    return grad, None, None, None, None


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, offsets, ctx.kind, ctx.windows = inputs
    ctx.num_tokens, ctx.dtype = hidden.shape[0], hidden.dtype
    ctx.save_for_backward(offsets)


def _packed_backward(ctx: Any, grad_pooled: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    grad_hidden = torch.ops.firstlm.router_pool_packed_backward(
        grad_pooled, offsets, ctx.kind, ctx.windows, ctx.num_tokens, ctx.dtype
    )
    return grad_hidden, None, None, None


def _save_packed_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, offsets, ctx.kind, ctx.windows, _, _ = inputs
    ctx.save_for_backward(offsets)


def _packed_double_backward(ctx: Any, grad_grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    grad = torch.ops.firstlm.router_pool_packed(grad_grad_hidden, offsets, ctx.kind, ctx.windows)
    return grad, None, None, None, None, None


def _save_head(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.norm_eps = inputs
    ctx.save_for_backward(*tensors)


def _head_backward(ctx: Any, grad_logit: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of router_head: a few products of [B, F] with [H, F], so torch's own ops."""
    pooled, weight, bias, out_weight, _ = ctx.saved_tensors
    x = pooled  # [B, F]
    if ctx.norm_eps > 0:
        scale = torch.rsqrt(pooled.square().mean(1, keepdim=True) + ctx.norm_eps)  # [B, 1]
        x = pooled * scale

    grad_units = grad_logit.unsqueeze(1)  # [B, H], of the units before silu
    grad_out_weight = grad_out_bias = None
    if out_weight is not None:
        units = torch.addmm(bias, x, weight.t())  # [B, H]
        sigmoid = torch.sigmoid(units)
        silu = units * sigmoid
        grad_out_weight = grad_units.t() @ silu
        grad_out_bias = grad_logit.sum(0, keepdim=True)
        grad_units = grad_units * out_weight * (sigmoid + silu * (1 - sigmoid))

    grad_x = grad_units @ weight
    if ctx.norm_eps > 0:
        grad_x = scale * (grad_x - x * (grad_x * x).mean(1, keepdim=True))
    return grad_x, grad_units.t() @ x, grad_units.sum(0), grad_out_weight, grad_out_bias, None


torch.library.register_autograd("firstlm::router_pool", _pool_backward, setup_context=_save_pool)
torch.library.register_autograd(
    "firstlm::router_pool_backward", _pool_double_backward, setup_context=_save_pool_backward
)
torch.library.register_autograd(
    "firstlm::router_pool_packed", _packed_backward, setup_context=_save_packed
)
torch.library.register_autograd(
    "firstlm::router_pool_packed_backward",
    _packed_double_backward,
    setup_context=_save_packed_backward,
)
torch.library.register_autograd("firstlm::router_head", _head_backward, setup_context=_save_head)
