"""Masked layer execution: gather the rows that keep a layer, run it, scatter them back.

Kernels in csrc/rows.h. Letters: B sequences, L layers, R rows of one layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def plan_rows(keep_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that keep each layer, for all layers at once and without a host synchronisation.

    Args:
        keep_mask: bool [B, L], true for the layers that a sequence keeps.

    Returns:
        rows [L, B] int64: the sequences that keep layer l, ascending, then -1.
        counts [L] int64: how many they are. Both where keep_mask is.

    Raises:
        ValueError, TypeError: a shape or dtype that is not the above.
    """
    return torch.ops.firstlm.plan_rows(keep_mask)


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a batch: `hidden[rows]`, with zeros where rows is -1.

    Args:
        hidden: [B, ...] of any dtype and strides.
        rows: [R] int64, each -1 or in [0, B); may repeat.

    Returns:
        [R, ...] contiguous; of float32, bfloat16, float16 and float64 differentiable with respect
        to `hidden`.

    Raises:
        ValueError, TypeError: a shape or dtype that is not the above.
        IndexError: on the CPU, a row outside of the batch.
    """
    return torch.ops.firstlm.gather_rows(hidden, rows)


def scatter_rows(
    hidden: Tensor, rows: Tensor, values: Tensor, gate: Tensor | None = None
) -> Tensor:
    """A copy of a batch in which some rows are replaced, or blended with their replacement.

    Row rows[r] becomes values[r]; with a gate `torch.lerp(hidden[rows[r]], values[r], gate[r])`,
    computed in float32 (float64 for float64 states), and a plain copy where the gate is 0 or 1.

    Args:
        hidden: [B, ...] of any strides; any dtype without a gate, with one float32, bfloat16,
            float16 or float64.
        rows: [R] int64, distinct, each -1 (ignored) or in [0, B).
        values: [R, ...] of hidden's dtype.
        gate: [R] floating; converted to float32, or float64 for float64 states.

    Returns:
        [B, ...] contiguous, differentiable with respect to `hidden`, `values` and `gate`.

    Raises:
        ValueError, TypeError: a shape or dtype that is not the above; on the CPU, a repeated row.
        IndexError: on the CPU, a row outside of the batch.
    """
    return torch.ops.firstlm.scatter_rows(hidden, rows, values, _as_accumulator(gate, hidden))


def scatter_rows_(
    hidden: Tensor, rows: Tensor, values: Tensor, gate: Tensor | None = None
) -> Tensor:
    """`scatter_rows` in place, for inference: the other rows are not touched.

    Returns:
        `hidden`.

    Raises:
        RuntimeError: autograd is on and a tensor needs a gradient; or hidden overlaps itself or
            values.
        ValueError, TypeError, IndexError: as `scatter_rows`; nothing is written then.
    """
    _check_inference("scatter_rows_", hidden, values, gate)
    torch.ops.firstlm.scatter_rows_(hidden, rows, values, _as_accumulator(gate, hidden))
    return hidden


def scatter_add_rows_(hidden: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """Add to some rows of a batch in place: `hidden[rows[r]] += update[r]`, for inference.

    Args:
        hidden: [B, ...] float32, bfloat16, float16 or float64; any strides.
        rows: [R] int64, each -1 (ignored) or in [0, B); may repeat. A 16-bit row that repeats is
            rounded after every addition on the CPU, once on CUDA.
        update: [R, ...] of hidden's dtype.

    Returns:
        `hidden`.

    Raises:
        RuntimeError: autograd is on and a tensor needs a gradient; or hidden overlaps itself or
            update.
        ValueError, TypeError: a shape or dtype that is not the above.
        IndexError: on the CPU, a row outside of the batch; nothing is written then.
    """
    _check_inference("scatter_add_rows_", hidden, update)
    torch.ops.firstlm.scatter_add_rows_(hidden, rows, update)
    return hidden


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as_accumulator(gate: Tensor | None, hidden: Tensor) -> Tensor | None:
    return None if gate is None else gate.to(_accumulator(hidden.dtype))


def _check_inference(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{name} keeps no autograd history: run it under torch.no_grad(), or use the op that "
            "returns a copy"
        )


# --- Fake kernels: shapes for torch.compile and export ----------------------------------------


@torch.library.register_fake("firstlm::plan_rows")
def _(keep_mask: Tensor) -> tuple[Tensor, Tensor]:
    B, L = keep_mask.shape
    return keep_mask.new_empty(L, B, dtype=torch.int64), keep_mask.new_empty(L, dtype=torch.int64)


@torch.library.register_fake("firstlm::gather_rows")
def _(hidden: Tensor, rows: Tensor) -> Tensor:
    return hidden.new_empty(rows.shape[0], *hidden.shape[1:])


@torch.library.register_fake("firstlm::gather_rows_backward")
def _(grad_gathered: Tensor, rows: Tensor, batch_size: int) -> Tensor:
    return grad_gathered.new_empty(batch_size, *grad_gathered.shape[1:])


@torch.library.register_fake("firstlm::scatter_rows")
def _(hidden: Tensor, rows: Tensor, values: Tensor, gate: Tensor | None) -> Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.register_fake("firstlm::scatter_rows_")
def _(hidden: Tensor, rows: Tensor, values: Tensor, gate: Tensor | None) -> None:
    return None


@torch.library.register_fake("firstlm::scatter_add_rows_")
def _(hidden: Tensor, rows: Tensor, update: Tensor) -> None:
    return None


# --- Autograd -----------------------------------------------------------------------------------


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, rows = inputs
    ctx.batch_size = hidden.shape[0]
    ctx.save_for_backward(rows)


def _gather_backward(ctx: Any, grad_gathered: Tensor) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    return torch.ops.firstlm.gather_rows_backward(grad_gathered, rows, ctx.batch_size), None


def _save_gather_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gather_double_backward(ctx: Any, grad_grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
    # Gathering is linear, so the adjoint of its adjoint is gathering.
    (rows,) = ctx.saved_tensors
    return torch.ops.firstlm.gather_rows(grad_grad_hidden, rows), None, None


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, rows, values, gate = inputs
    ctx.values_shape = values.shape
    gate_needs_grad = gate is not None and gate.requires_grad
    ctx.save_for_backward(rows, gate, *((hidden, values) if gate_needs_grad else ()))


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of out = h + g (v - h): 1 - g of the gradient goes to h, g to v, and <grad, v - h> to g."""
    rows, gate, *blended = ctx.saved_tensors
    grad_hidden = grad_values = grad_gate = None
    if ctx.needs_input_grad[0]:
        zeros = grad.new_zeros(1, *ctx.values_shape[1:]).expand(ctx.values_shape)
        grad_hidden = torch.ops.firstlm.scatter_rows(grad, rows, zeros, gate)
    grad_rows = torch.ops.firstlm.gather_rows(grad, rows)  # [R, ...]
    if ctx.needs_input_grad[2]:
        grad_values = grad_rows
        if gate is not None:
            weight = gate.view(-1, *[1] * (grad.ndim - 1))  # [R, 1, ...]
            grad_values = (grad_rows * weight).to(grad.dtype)
    if blended:
        hidden, values = blended
        old_rows = torch.ops.firstlm.gather_rows(hidden, rows)
        products = (values.to(gate.dtype) - old_rows) * grad_rows  # [R, ...]
        # What an ignored row holds may be anything.
        grad_gate = torch.where(rows >= 0, products.unsqueeze(-1).flatten(1).sum(1), 0)
    return grad_hidden, None, grad_values, grad_gate


torch.library.register_autograd(
    "firstlm::gather_rows", _gather_backward, setup_context=_save_gather
)
torch.library.register_autograd(
    "firstlm::gather_rows_backward", _gather_double_backward, setup_context=_save_gather_backward
)
torch.library.register_autograd(
    "firstlm::scatter_rows", _scatter_backward, setup_context=_save_scatter
)
