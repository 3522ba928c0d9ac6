"""Sequences that are kept for the next call: their tokens, their plan, their keys and values.

What may be reused is keyed by (tokens, plan): keys and values of a prompt fit another prompt as far
as their tokens agree, and only under the same plan.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class KeptSequence:
    """A sequence of the decoder between two calls.

    Attributes:
        tokens: what its keys and values are of, in order.
        keep: bool [L], its plan.
        sequence: `firstlm.native` Sequence.
        keep_prob: f32 [L], if routers found the plan.
    """

    tokens: list[int]
    keep: torch.Tensor
    sequence: Any
    keep_prob: torch.Tensor | None = None

    def cut_to(self, prompt: list[int]) -> int:
        """Drops what does not begin `prompt`, and at least its last token, whose logits are wanted.

        Returns:
            How many of the prompt's tokens are held; 0 also if a sliding window has dropped some
            that would be needed.
        """
        common = common_prefix(self.tokens, prompt[:-1])
        if common == 0:
            return 0
        try:
            self.sequence.crop(common)
        except RuntimeError:
            return 0
        self.tokens = self.tokens[:common]
        return common


def common_prefix(a: list[int], b: list[int]) -> int:
    """Number of tokens that both begin with."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class PrefixStore:
    """The sequences used last, found by what a prompt begins with and its plan. Any thread may ask.

    Args:
        capacity: sequences that are kept; each holds its keys and values.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[int, KeptSequence] = OrderedDict()
        # While it is held, a collection of garbage may close a stream, which puts its sequence.
        self._lock = threading.RLock()

    def take(self, prompt: list[int], keep: torch.Tensor) -> KeptSequence | None:
        """Removes and returns the sequence that shares most with a prompt under plan `keep` [L]."""
        best, longest = None, 0
        with self._lock:
            for key, kept in list(self._kept.items()):
                if torch.equal(kept.keep, keep):
                    common = common_prefix(kept.tokens, prompt[:-1])
                    if common > longest:
                        best, longest = key, common
            taken = None if best is None else self._kept.pop(best, None)
        return taken if taken is not None and taken.cut_to(prompt) else None

    def put(self, kept: KeptSequence) -> None:
        """Keeps a sequence, if need be in the place of the one that was used longest ago."""
        with self._lock:
            self._kept[id(kept)] = kept
            while len(self._kept) > self.capacity:
                self._kept.popitem(last=False)

    def clear(self) -> None:
        """Keeps nothing."""
        with self._lock:
            self._kept.clear()
