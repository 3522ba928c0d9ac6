"""Random layer drop: what the LoRA warm-up trains under, before there are routers worth following.

A model that was never trained with missing layers breaks when any is skipped, and then routers have
nothing to learn from. So the warm-up drops layers at random, unimportant ones more often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class RandomLayerDrop:
    """Draws keep masks that depend on seed, step and index of the sequence in the step alone.

    So the same sequences drop the same layers under any batch layout, and after a resume.

    Args:
        rate: function of the optimizer step: expected share of dropped layers, of all layers.
        num_layers: L.
        protected: layers that are never dropped.
        weights: [L], how readily each layer is dropped; only ratios matter.
        spread: each sequence's rate is drawn uniformly from rate * (1 - spread .. 1 + spread).
        seed: any whole number >= 0.
    """

    def __init__(
        self,
        rate: object,
        num_layers: int,
        protected: Sequence[int],
        weights: Sequence[float] | None = None,
        spread: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not callable(rate):
            raise TypeError(f"rate must be a function of the step, got {type(rate).__name__}")
        self.rate = rate
        self.num_layers = num_layers
        self.free = [i for i in range(num_layers) if i not in set(protected)]
        chosen = [1.0] * num_layers if weights is None else list(weights)
        if len(chosen) != num_layers or min(chosen) <= 0:
            raise ValueError(f"weights must be {num_layers} positive numbers, got {weights}")
        self.log_weights = torch.tensor([math.log(chosen[i]) for i in self.free])
        self.spread = spread
        self.seed = seed

    def __call__(
        self, step: int, sequences: Sequence[int], prompt_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Keep mask [len(sequences), L] bool of these sequences of optimizer step `step`."""
        return torch.stack([self._draw(step, index) for index in sequences])

    def _draw(self, step: int, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(_mixed(self.seed, step, index))
        shift, rounding = (torch.rand(2, generator=generator) * 2 - 1).tolist()
        rate = min(max(self.rate(step) * (1.0 + self.spread * shift), 0.0), 1.0)
        # Stochastic rounding: a rate of 1.3 layers drops two in 30 % of the sequences.
        count = min(math.floor(rate * self.num_layers + (rounding + 1) / 2), len(self.free))
        # Gumbel top-k is drawing without replacement in proportion to the weights.
        uniform = torch.rand(len(self.free), generator=generator).clamp_min(1e-20)
        order = (self.log_weights - torch.log(-torch.log(uniform))).argsort(descending=True)
        keep = torch.ones(self.num_layers, dtype=torch.bool)
        keep[[self.free[i] for i in order[:count].tolist()]] = False
        return keep


class FixedPlan:
    """One keep mask for every sequence: a static plan, or no skipping at all."""

    def __init__(self, keep: Sequence[bool] | torch.Tensor) -> None:
        self.keep = torch.as_tensor(keep, dtype=torch.bool)  # [L]

    def __call__(
        self, step: int, sequences: Sequence[int], prompt_lengths: torch.Tensor
    ) -> torch.Tensor:
        return self.keep.expand(len(sequences), -1)


def drop_weights(importance: Sequence[float], temperature: float) -> list[float]:
    """Weights for RandomLayerDrop: exp(-CE increase / temperature), scaled against underflow."""
    scaled = [-value / temperature for value in importance]
    top = max(scaled)
    return [math.exp(max(value - top, -40.0)) for value in scaled]


def _mixed(*numbers: int) -> int:
    """One 63-bit seed of several numbers (splitmix64), so that neighbours share nothing."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
