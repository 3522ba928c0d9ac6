"""Plans that go by the prompt's length alone: what `control=length` trains under and runs.

A rival of routers that read the prompt: it knows as many plans, but only how long the prompt is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from firstlm.atomic import write_json

FILE = "length_plans.json"


@dataclass(frozen=True)
class LengthPlans:
    """One plan a class of prompt lengths. C classes, L layers.

    Args:
        bounds: class c holds prompts of bounds[c - 1] <= tokens < bounds[c]; ascending, [C - 1].
        kept: indices of the layers that each class keeps, [C].
        num_layers: L.
    """

    bounds: list[int]
    kept: list[list[int]]
    num_layers: int

    def __call__(
        self, step: int, sequences: Sequence[int], prompt_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Keep mask [sequences, L] bool: a phases.PlanSource."""
        return self.of(prompt_lengths)

    def of(self, prompt_lengths: torch.Tensor) -> torch.Tensor:
        """Keep mask [N, L] bool of prompts of so many tokens, int [N]."""
        masks = torch.zeros(len(self.kept), self.num_layers, dtype=torch.bool)
        for of_class, kept in zip(masks, self.kept, strict=True):
            of_class[kept] = True
        return masks[classes_of(prompt_lengths, self.bounds)]

    def save(self, folder: str | Path) -> None:
        """Writes FILE into a checkpoint's folder."""
        write_json(Path(folder) / FILE, asdict(self))

    @classmethod
    def load(cls, folder: str | Path) -> LengthPlans | None:
        """Those of a checkpoint of `control=length`; None of any other."""
        path = Path(folder) / FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def length_bounds(prompt_lengths: torch.Tensor, count: int) -> list[int]:
    """Bounds that deal prompts of these lengths, int [N], into `count` classes of like size.

    Fewer than count - 1 where equal lengths would leave a class without prompts.
    """
    ordered = prompt_lengths.sort().values
    bounds = {int(ordered[len(ordered) * c // count]) for c in range(1, count)}
    return sorted(bounds - {int(ordered[0])})


def classes_of(prompt_lengths: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
    """The class of each prompt, int64 [N]."""
    return torch.bucketize(
        prompt_lengths.cpu(), torch.tensor(bounds, dtype=torch.int64), right=True
    )
