"""The terms of the training loss, as sums over a micro-batch.

loss of an optimizer step =   sum of answer CE          / answer tokens of the step, all processes
                            + alpha * sum of kept share / sequences of the step, all processes
                            + lambda * ||router weights||^2                       (once per step)

The kept share of a sequence is the mean of its gates: the routed model's own `skip_loss`, linear in
every sequence. Each function here returns a sum; the trainer divides by counts of the whole
optimizer step. So 1 x 8, 8 x 1 (accumulation) and 2 processes x 4 give the same gradient: a mean of
means would not.

Letters: B sequences, T tokens, P answer positions of the batch, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional as F

IGNORED = -100


def answer_positions(labels: torch.Tensor) -> torch.Tensor:
    """Positions whose logits predict an answer token in any row.

    Args:
        labels: [B, T] int64, IGNORED where nothing is predicted.

    Returns:
        [P] int64, ascending: every t < T - 1 with labels[b, t + 1] != IGNORED for some b. Handed
        to `forward(logits_to_keep=...)`, it spares the output head the prompt.
    """
    return (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()  # [P]


def answer_token_losses(
    logits: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every answer token of the batch, K in all.

    Args:
        logits: [B, P, V] at `positions`; low precision is raised to f32.
        labels: [B, T] int64.
        positions: [P], from answer_positions.

    Returns:
        (losses [K] f32 or f64, [K, 2] int64: their row and their place among `positions`); row by
        row, tokens in order.
    """
    targets = labels[:, positions + 1]  # [B, P]
    answer = targets != IGNORED  # [B, P]
    losses = F.cross_entropy(_raised(logits[answer]), targets[answer], reduction="none")  # [K]
    return losses, answer.nonzero()


def answer_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every sequence's answer, summed over its tokens.

    Args:
        logits, labels, positions: as in answer_token_losses.

    Returns:
        (sums [B] f32 or f64, answer tokens [B] int64).
    """
    losses, where = answer_token_losses(logits, labels, positions)
    sums = losses.new_zeros(labels.shape[0]).index_add(0, where[:, 0], losses)
    return sums, (labels[:, positions + 1] != IGNORED).sum(1)


def distillation(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    positions: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """KL(teacher || student) summed over answer tokens, times temperature^2 (Hinton's scaling).

    Args:
        logits, teacher_logits: [B, P, V] at `positions`; the teacher gets no gradient.
        labels: [B, T]; positions: [P].

    Returns:
        Scalar.
    """
    answer = labels[:, positions + 1] != IGNORED  # [B, P]
    student = F.log_softmax(_raised(logits[answer]) / temperature, -1)  # [N, V]
    teacher = F.log_softmax(_raised(teacher_logits[answer]).detach() / temperature, -1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def router_norm(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """Sum of squares of the routers' weights. Biases are left out: they carry the skip rate."""
    squares = [p.square().sum() for name, p in named_parameters if not name.endswith("bias")]
    return torch.stack(squares).sum() if squares else torch.zeros(())


def _raised(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
