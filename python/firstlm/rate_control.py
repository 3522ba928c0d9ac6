"""What keeps the skip rate where it was asked while weights move under it.

Three knobs, all moved at optimizer steps only and from the whole step's sequences (all
micro-batches, all processes), so that batch layout cannot change what is learnt:

  Ramp              the target itself, from its first to its last value
  Multiplier        alpha, the weight of the kept share in the loss (phase 1)
  ThresholdFollower the thresholds, from a running quantile of the routers' logits

Letters: N sequences of an optimizer step, W sequences remembered, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ramp:
    """Linear from `start` to `end` over the first `share` of the steps, then constant."""

    start: float
    end: float
    share: float
    steps: int

    def __call__(self, step: int) -> float:
        """Value for optimizer step `step`, counted from 0."""
        ramp = self.share * self.steps
        return self.end if step >= ramp else self.start + (self.end - self.start) * step / ramp


@dataclass
class Multiplier:
    """Integral control: alpha rises while too little is skipped, and falls while too much is."""

    alpha: float
    lr: float  # 0 keeps alpha fixed
    low: float = -20.0
    high: float = 20.0

    def step(self, asked: float, achieved: float) -> None:
        self.alpha = min(max(self.alpha + self.lr * (asked - achieved), self.low), self.high)


def keep_logits(keep_prob: torch.Tensor) -> torch.Tensor:
    """Logits of f32 probabilities in f64; the ends are pulled in to where f32 still tells apart."""
    return torch.logit(keep_prob.double().clamp(1e-7, 1 - 6e-8))


def to_thresholds(logits: torch.Tensor | Sequence[float]) -> list[float]:
    """Probability thresholds [L] of logit thresholds [L]; -inf keeps always, +inf never."""
    return torch.sigmoid(torch.as_tensor(logits, dtype=torch.float64)).tolist()


def split_value(values: torch.Tensor, below: float) -> float:
    """A value with the share `below` of `values` under it: midway between two neighbours.

    `values` is flat, f64. With ties the nearest reachable share is taken; below <= 0 gives a value
    under all of them, below >= 1 one above.
    """
    ordered = values.flatten().sort().values
    count = round(below * len(ordered))
    if count <= 0:
        return ordered[0].item() - 1.0
    if count >= len(ordered):
        return ordered[-1].item() + 1.0
    if ordered[count] == ordered[count - 1]:
        return _nearest_gap(ordered, count)
    return ((ordered[count] + ordered[count - 1]) / 2).item()


def _nearest_gap(ordered: torch.Tensor, count: int) -> float:
    tied = ordered[count]
    first = int(torch.searchsorted(ordered, tied))
    last = int(torch.searchsorted(ordered, tied, right=True))
    if count - first <= last - count:  # cut under the tied values
        return tied.item() - 1.0 if first == 0 else ((ordered[first - 1] + tied) / 2).item()
    return tied.item() + 1.0 if last == len(ordered) else ((tied + ordered[last]) / 2).item()


class ThresholdFollower:
    """Moves thresholds so that the last `window` sequences would have skipped what was asked.

    With frozen routers LoRA still changes the states that routers read, and plans drift; a running
    quantile of their logits follows that drift. "shared" adds one logit to all thresholds, so only
    the total rate is held and layers may trade shares; "per_layer" holds each layer's own share.

    Args:
        mode: "none" (thresholds stay), "shared" or "per_layer".
        thresholds: [L] probabilities to start from.
        protected: layers that are never skipped.
        window: sequences remembered; thresholds stay until a quarter of them has been seen.
        keep_share: [L], asked of "per_layer": the share of sequences that keeps each layer.
    """

    def __init__(
        self,
        mode: str,
        thresholds: Sequence[float],
        protected: Sequence[int],
        window: int,
        keep_share: Sequence[float] | None = None,
    ) -> None:
        if mode not in ("none", "shared", "per_layer"):
            raise ValueError(f"hold={mode!r}: must be none, shared or per_layer")
        if mode == "per_layer" and keep_share is None:
            raise ValueError("hold=per_layer needs keep_share, the share to hold of every layer")
        self.mode = mode
        self.window = window
        self.base = keep_logits(torch.tensor(list(thresholds)))  # [L]
        self.thresholds = list(thresholds)  # [L]
        self.free = [i for i in range(len(thresholds)) if i not in set(protected)]
        self.keep_share = None if keep_share is None else list(keep_share)
        self.seen = torch.empty(0, len(self.thresholds), dtype=torch.float64)  # [<= W, L] logits

    def step(self, keep_prob: torch.Tensor, asked: float) -> list[float]:
        """Takes an optimizer step's keep_prob [N, L]; returns the thresholds [L] from now on."""
        if self.mode == "none" or not self.free:
            return self.thresholds
        self.seen = torch.cat([self.seen, keep_logits(keep_prob.detach().cpu())])[-self.window :]
        if 4 * len(self.seen) < self.window:
            return self.thresholds
        moved = self.base.clone()
        if self.mode == "shared":
            share = min(asked * len(self.base) / len(self.free), 1.0)
            excess = self.seen[:, self.free] - self.base[self.free]
            moved[self.free] += split_value(excess, share)
        else:
            assert self.keep_share is not None
            for layer in self.free:
                moved[layer] = split_value(self.seen[:, layer], 1.0 - self.keep_share[layer])
        at_rest = [layer for layer in range(len(self.base)) if layer not in set(self.free)]
        new = to_thresholds(moved)
        for layer in at_rest:
            new[layer] = self.thresholds[layer]
        self.thresholds = new
        return new

    def state_dict(self) -> dict[str, Any]:
        return {
            "thresholds": self.thresholds,
            "base": self.base.tolist(),
            "keep_share": self.keep_share,
            "seen": self.seen.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.thresholds = list(state["thresholds"])
        self.base = torch.tensor(state["base"], dtype=torch.float64)
        self.keep_share = state["keep_share"]
        self.seen = torch.tensor(state["seen"], dtype=torch.float64).reshape(-1, len(self.base))
