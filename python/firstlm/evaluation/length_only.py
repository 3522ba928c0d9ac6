"""Plans from the prompt's length alone: what an adaptive plan has to beat to be more than that.

A trained router's plans of held-out prompts are gathered in bins of prompt length; a prompt then
gets the layers that prompts of its length keep most often, as many as they keep. This is a table,
not a trained router: it runs on the weights of the run that it imitates.

Letters: N prompts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from firstlm.controls import most_kept_plan


@dataclass(frozen=True)
class LengthPlans:
    """One plan for every bin of prompt length.

    Attributes:
        bounds: ascending; a prompt of `bounds[i]` tokens or more is in bin i + 1 or later.
        plans: bool [bins, L].
    """

    bounds: torch.Tensor
    plans: torch.Tensor

    def plans_of(self, lengths: Sequence[int]) -> torch.Tensor:
        """Keep mask [N, L] of prompts of these lengths, in tokens."""
        bins = torch.bucketize(torch.tensor(list(lengths)), self.bounds, right=True)
        return self.plans[bins]


def fit_length_plans(
    lengths: Sequence[int], keep_mask: torch.Tensor, protected: Sequence[int], bins: int = 8
) -> LengthPlans:
    """Bins of about equally many prompts, each with the most kept layers of its prompts.

    Args:
        lengths: N, in tokens.
        keep_mask: [N, L], the router's plans.
        protected: layers that no plan drops.
        bins: at most; equal lengths share one.

    Raises:
        ValueError: no prompts, or another number of plans.
    """
    if not lengths or len(lengths) != len(keep_mask):
        raise ValueError(f"{len(lengths)} lengths do not match {len(keep_mask)} plans")
    size = torch.tensor(list(lengths))
    order = size.sort().values
    cuts = order[[len(order) * i // bins for i in range(1, bins)]].unique()
    bounds = cuts[cuts > order[0]]
    bin_of = torch.bucketize(size, bounds, right=True)
    num_layers, plans = keep_mask.shape[1], []
    owed = 0.0  # skipped layers that rounding has withheld so far, over all prompts
    for index in range(len(bounds) + 1):
        own = keep_mask[bin_of == index].double()
        owed += float((1 - own).sum())
        most = num_layers - len(set(protected))
        count = min(max(round(owed / len(own)), 0), most)
        owed -= count * len(own)
        plans.append(most_kept_plan(own.mean(0).tolist(), count / num_layers, protected))
    return LengthPlans(bounds, torch.tensor(plans))
