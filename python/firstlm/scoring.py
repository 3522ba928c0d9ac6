"""Answer cross-entropy of examples: under the routers' own plans, a given plan, or a soft gate.

Letters: N examples, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from firstlm.losses import answer_cross_entropy, answer_positions

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]


@dataclass
class Scores:
    """What a pass over N examples found, in their order; all on the CPU.

    Attributes:
        loss: [N] f64, cross-entropy summed over the answer's tokens.
        tokens: [N] int64, answer tokens.
        keep_prob: [N, L] f32 or f64, what the routers said.
        keep_mask: [N, L] bool, what was run.
    """

    loss: torch.Tensor
    tokens: torch.Tensor
    keep_prob: torch.Tensor
    keep_mask: torch.Tensor

    @property
    def cross_entropy(self) -> float:
        """Mean over answer tokens, in nats."""
        return (self.loss.sum() / self.tokens.sum()).item()

    @property
    def skip_rate(self) -> float:
        """Skipped layers / all layers."""
        return 1.0 - self.keep_mask.double().mean().item()

    @property
    def distinct_plans(self) -> int:
        """Different plans among the N."""
        return len({tuple(row) for row in self.keep_mask.tolist()})


@torch.no_grad()
def score(
    model: Any,
    examples: Sequence[Mapping[str, Any]],
    collator: Collator,
    *,
    batch_size: int = 16,
    gate: str | None = None,
    keep_mask: torch.Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Runs `examples` through `model` without learning; examples of like length share a batch.

    Args:
        model: from firstlm.from_pretrained; its mode (train/eval) is restored afterwards.
        examples: N rows with input_ids, labels, prompt_mask.
        collator: rows -> padded tensors.
        batch_size: rows per forward pass.
        gate: None or "hard" for decisions, "soft" for expected gates.
        keep_mask: [N, L] or [L] bool, replaces the routers' decisions.
        progress: called with the number of examples done since the last call.
    """
    if not len(examples):
        raise ValueError("examples is empty: at least one is needed")
    rows = [examples[i] for i in range(len(examples))]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    if keep_mask is not None and keep_mask.ndim == 1:
        keep_mask = keep_mask.expand(len(rows), -1)
    order: list[int] = []
    parts: list[tuple[torch.Tensor, ...]] = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            chosen = by_length[start : start + batch_size]
            batch = collator([rows[i] for i in chosen])
            plan = None if keep_mask is None else keep_mask[chosen]
            parts.append(score_batch(model, batch, gate, plan))
            order += chosen
            if progress is not None:
                progress(len(chosen))
    finally:
        model.train(was_training)
    back = torch.tensor(order).argsort()
    loss, tokens, keep_prob, mask = (torch.cat(column)[back] for column in zip(*parts, strict=True))
    return Scores(loss, tokens, keep_prob, mask)


def score_batch(
    model: Any, batch: dict[str, torch.Tensor], gate: str | None, plan: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """One batch of a collator: (loss [B] f64, tokens [B], keep_prob [B, L], keep_mask [B, L])."""
    batch = {name: value.to(model.device) for name, value in batch.items()}
    labels = batch.pop("labels")
    positions = answer_positions(labels)
    output = model(**batch, use_cache=False, gate=gate, skip_plan=plan, logits_to_keep=positions)
    loss, tokens = answer_cross_entropy(output.logits, labels, positions)
    return (
        loss.double().cpu(),
        tokens.cpu(),
        output.keep_prob.cpu(),
        output.keep_mask.cpu(),
    )
