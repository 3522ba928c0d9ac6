"""What one optimizer step saw, over its micro-batches and processes, for the log."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_PLAN_WINDOW = 128  # sequences over which distinct plans are counted


class StepStats:
    """Collects per micro-batch, closes per optimizer step, reports per log line.

    Attributes:
        last_keep_prob: [N, L], of all sequences of the last closed step.
    """

    def __init__(self) -> None:
        self.last_keep_prob = torch.empty(0, 0)
        self._parts: dict[str, torch.Tensor] = {}
        self._keep_prob: list[torch.Tensor] = []
        self._keep_mask: list[torch.Tensor] = []
        self._records: list[dict[str, float]] = []
        self._plans: deque[tuple[bool, ...]] = deque(maxlen=_PLAN_WINDOW)

    def add(
        self,
        parts: Mapping[str, torch.Tensor],
        keep_prob: torch.Tensor,
        keep_mask: torch.Tensor,
    ) -> None:
        """Takes a micro-batch: its shares of the loss terms, keep_prob and keep_mask [B, L]."""
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value.detach().double()
        self._keep_prob.append(keep_prob.detach())
        self._keep_mask.append(keep_mask.detach().to(keep_prob.device))

    def state_dict(self) -> dict[str, Any]:
        """The plans seen lately, "1" for a kept layer; a checkpoint never falls within a step."""
        return {"plans": ["".join("01"[kept] for kept in plan) for plan in self._plans]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._plans.clear()
        self._plans.extend(tuple(c == "1" for c in plan) for plan in state["plans"])

    def gather(self, accelerator: Any) -> None:
        """Joins the step's numbers of all processes."""
        self._parts = {
            name: accelerator.gather(value.reshape(1)).sum() for name, value in self._parts.items()
        }
        self._keep_prob = [accelerator.gather(torch.cat(self._keep_prob))]
        self._keep_mask = [accelerator.gather(torch.cat(self._keep_mask))]

    def close(self, asked: float, protected: Sequence[int], gate: str) -> dict[str, float]:
        """Ends the step; returns its record.

        "steered_rate" is the rate that gates had: expected for soft ones, decided for the others.
        """
        keep_prob = torch.cat(self._keep_prob).cpu()  # [N, L]
        mask = torch.cat(self._keep_mask).cpu()
        expected = keep_prob.double()
        expected[:, list(protected)] = 1.0
        record = {name: value.item() for name, value in self._parts.items()}
        record["skip_rate_asked"] = asked
        record["skip_rate"] = 1.0 - mask.double().mean().item()
        record["expected_skip_rate"] = 1.0 - expected.mean().item()
        steered = "expected_skip_rate" if gate == "soft" else "skip_rate"
        record["steered_rate"] = record[steered]
        self.last_keep_prob = keep_prob
        self._plans.extend(tuple(row) for row in mask.tolist())
        self._parts, self._keep_prob, self._keep_mask = {}, [], []
        self._records.append(record)
        return record

    def report(self) -> dict[str, float]:
        """Means over the steps since the last report, and distinct plans among recent sequences."""
        records, self._records = self._records, []
        if not records:
            return {}
        names = [n for n in records[-1] if n != "steered_rate"]
        means = {n: sum(r[n] for r in records if n in r) / len(records) for n in names}
        means["recent_plans"] = len(set(self._plans))
        means["recent_sequences"] = len(self._plans)
        return means
