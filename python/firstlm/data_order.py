"""Which example stands where in a training run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_STEPS_SORTED_TOGETHER = 16  # few enough that a step's lengths stay a fair sample over time


class ShuffledSteps(Sampler[int]):
    """Example indices of all steps: permutations of the data set, one after the other.

    The order depends on the seed alone, so 1 x 8, 8 x 1 and 2 processes x 4 see the same examples
    in the same step, and a resumed run the same as an uninterrupted one.

    Args:
        num_examples: size of the data set.
        length: indices to yield, sequences per step x steps.
        seed: any whole number.
        lengths: of the examples, in tokens; given, examples of like length share a step.
        per_step: sequences per optimizer step, over all processes; needed with lengths.
    """

    def __init__(
        self,
        num_examples: int,
        length: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        per_step: int = 1,
    ) -> None:
        self.length = length
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while len(order) < length:
            order += torch.randperm(num_examples, generator=generator).tolist()
        self.order = order[:length]
        if lengths is not None:
            chunk = _STEPS_SORTED_TOGETHER * per_step
            parts = [self.order[i : i + chunk] for i in range(0, length, chunk)]
            self.order = [
                i for part in parts for i in _by_length(part, lengths, per_step, generator)
            ]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return self.length


def _by_length(
    part: list[int], lengths: Sequence[int], per_step: int, generator: torch.Generator
) -> list[int]:
    """`part` sorted by length, cut into steps, the steps in random order."""
    ordered = sorted(part, key=lambda i: lengths[i])
    steps = [ordered[i : i + per_step] for i in range(0, len(ordered), per_step)]
    shuffled = torch.randperm(len(steps), generator=generator).tolist()
    return [index for s in shuffled for index in steps[s]]
