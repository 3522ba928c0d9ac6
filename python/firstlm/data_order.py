"""Which example stands where in a training run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_STEPS_SORTED_TOGETHER = 16  # few enough that a step's lengths stay a fair sample over time


class ShuffledSteps(Sampler[int]):
    """Example indices of some steps of a run, in the one order that the run has.

    That order is permutations of the data set, one after the other, and depends on the seed alone:
    1 x 8, 8 x 1 and 2 processes x 4 see the same examples in the same step, a resumed run the same
    as an uninterrupted one, and a control the same as the run of several phases beside it.

    Args:
        num_examples: size of the data set.
        length: indices to yield, sequences per step x steps.
        seed: any whole number.
        lengths: of the examples, in tokens; given, examples of like length share a step.
        per_step: sequences per optimizer step, over all processes; needed with lengths.
        start: indices of the run's order that were used before, by earlier phases.
    """

    def __init__(
        self,
        num_examples: int,
        length: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        per_step: int = 1,
        start: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        endless = _permutations(num_examples, generator)
        if lengths is not None:
            endless = _by_length(endless, lengths, per_step, generator)
        self.order = list(itertools.islice(endless, start, start + length))

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def _permutations(num_examples: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(num_examples, generator=generator).tolist()


def _by_length(
    indices: Iterator[int], lengths: Sequence[int], per_step: int, generator: torch.Generator
) -> Iterator[int]:
    """`indices`, some steps at a time sorted by length, cut into steps, these in random order."""
    while True:
        part = list(itertools.islice(indices, _STEPS_SORTED_TOGETHER * per_step))
        part.sort(key=lambda i: lengths[i])
        for step in torch.randperm(_STEPS_SORTED_TOGETHER, generator=generator).tolist():
            yield from part[step * per_step : (step + 1) * per_step]
