"""From prompts to sequences that have a plan and the logits of the next token.

The rules are those of `model.generate` on the hf path, from the same functions. Letters: B prompts,
L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from firstlm.engine.core import DecoderCore, restrict
from firstlm.engine.prefix import KeptSequence, PrefixStore
from firstlm.engine.stats import EngineStats
from firstlm.router import PREFILLS, warn_of_other_prefill
from firstlm.skip_plan import (
    SkipPlan,
    check_plan_choice,
    check_protected,
    exact_budget_mask,
    exactly_dropped,
    keep_mask_of,
    mask_to_plans,
    plans_to_mask,
)


@dataclass(frozen=True)
class PlanChoice:
    """How the plans of a call are found; made by `of`.

    Attributes:
        skip_plans: one a prompt, which replace the routers; None: these decide.
        budget, budget_mode: asked skip rate; see `Engine.generate`.
        prefill: "route" or "full"; None: as the routers were trained.
    """

    skip_plans: list[SkipPlan] | None = None
    budget: float | None = None
    budget_mode: str = "threshold"
    prefill: str | None = None

    @classmethod
    def of(
        cls,
        core: DecoderCore,
        num_prompts: int,
        skip_plan: SkipPlan | Sequence[SkipPlan] | torch.Tensor | None = None,
        budget: float | None = None,
        budget_mode: str = "threshold",
        prefill: str | None = None,
    ) -> PlanChoice:
        """What the arguments of `Engine.generate` ask of this decoder.

        Raises:
            TypeError, ValueError: a choice that it cannot follow.
        """
        check_plan_choice(skip_plan, budget, budget_mode)
        budget = None if budget is None else float(budget)
        if prefill is not None and prefill not in PREFILLS:
            raise ValueError(f"prefill must be one of {PREFILLS}, got {prefill!r}")
        if budget is not None and core.routers is None:
            raise ValueError("a budget needs routers, and this model has none: give skip_plan")
        if budget is not None and budget_mode == "exact":
            exactly_dropped(core.num_layers, budget, core.routers.config.protected)
        skip_plans = None
        if skip_plan is not None:
            mask = plans_to_mask(skip_plan, num_prompts, core.num_layers)
            if core.routers is not None:
                check_protected(mask, core.routers.config.protected)
            skip_plans = mask_to_plans(mask)
        return cls(skip_plans, budget, budget_mode, prefill)

    def of_row(self, row: int) -> PlanChoice:
        """The choice of one of the prompts alone."""
        if self.skip_plans is None:
            return self
        return dataclasses.replace(self, skip_plans=[self.skip_plans[row]])

    def prefill_of(self, core: DecoderCore) -> str:
        """The prefill of this call."""
        own = "route" if core.routers is None else core.routers.config.prefill
        return self.prefill or own


@dataclass
class Prefilled:
    """Prompts that have been read.

    Attributes:
        sequences: of the native decoder, one a prompt.
        logits: f32 [B, V], of the next token.
        keep: bool [B, L].
        keep_prob: f32 [B, L]; None under given plans.
    """

    sequences: list[Any]
    logits: torch.Tensor
    keep: torch.Tensor
    keep_prob: torch.Tensor | None


def prefill_prompts(
    core: DecoderCore,
    prompts: Sequence[list[int]],
    choice: PlanChoice,
    stats: EngineStats,
    store: PrefixStore | None = None,
) -> Prefilled:
    """Reads prompts, each under a plan of its own.

    Args:
        choice: of plans.
        store: where sequences of earlier calls are, for plans that are known before the pass.
    """
    prefill = choice.prefill_of(core)
    if core.routers is not None:
        warn_of_other_prefill(core.routers.trained_prefill, prefill, stacklevel=4)
    keep, keep_prob = known_plans(core, len(prompts), choice)
    if keep is not None:
        return _planned(core, prompts, keep, keep_prob, prefill, stats, store)
    routers = core.routers
    assert routers is not None
    if choice.budget is not None and choice.budget_mode == "exact":
        everything = [float("-inf")] * core.num_layers
        if prefill == "full":  # scores and states come from the same pass
            sequences, logits, scores = core.routed(prompts, everything, prefill, stats)
            keep = exact_budget_mask(scores, choice.budget, routers.config.protected)
            restrict(sequences, keep)
            return Prefilled(sequences, logits, keep, scores)
        _, _, scores = core.routed(prompts, everything, prefill, stats, num_logits=0)
        keep = exact_budget_mask(scores, choice.budget, routers.config.protected)
        return _planned(core, prompts, keep, scores, prefill, stats, None)
    thresholds = routers.thresholds(choice.budget)
    sequences, logits, keep_prob = core.routed(prompts, thresholds, prefill, stats)
    keep = torch.stack([sequence.keep_mask for sequence in sequences])
    return Prefilled(sequences, logits, keep, keep_prob)


def known_plans(
    core: DecoderCore, num_prompts: int, choice: PlanChoice
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(keep [B, L], keep_prob [B, L]) where they do not depend on the prompts, else None."""
    if choice.skip_plans is not None:
        return plans_to_mask(choice.skip_plans, num_prompts, core.num_layers), None
    routers = core.routers
    if routers is None:
        return torch.ones(num_prompts, core.num_layers, dtype=torch.bool), None
    if routers.constant is None:
        return None, None
    keep_prob = routers.constant.expand(num_prompts, -1)
    protected = routers.config.protected
    if choice.budget is not None and choice.budget_mode == "exact":
        return exact_budget_mask(keep_prob, choice.budget, protected), keep_prob
    return keep_mask_of(keep_prob, routers.thresholds(choice.budget), protected), keep_prob


def is_reusable(keep: torch.Tensor, prefill: str) -> bool:
    """Whether a prompt reads the tokens that it has in common with another one the same way.

    Under prefill="full" it does not where layers are dropped: they were run for the prompt, and are
    not for what came after it.

    Args:
        keep: bool [L], the plan of both.
    """
    return prefill == "route" or bool(keep.all())


def _planned(
    core: DecoderCore,
    prompts: Sequence[list[int]],
    keep: torch.Tensor,
    keep_prob: torch.Tensor | None,
    prefill: str,
    stats: EngineStats,
    store: PrefixStore | None,
) -> Prefilled:
    """Under given plans; what an earlier call has read of a prompt under them is not read again."""
    kept: dict[int, KeptSequence] = {}
    if store is not None:
        for row, prompt in enumerate(prompts):
            found = store.take(prompt, keep[row]) if is_reusable(keep[row], prefill) else None
            if found is not None:
                kept[row] = found
    fresh = [row for row in range(len(prompts)) if row not in kept]
    sequences: dict[int, Any] = {row: found.sequence for row, found in kept.items()}
    parts: list[torch.Tensor] = []
    if fresh:
        made, logits = core.planned([prompts[row] for row in fresh], keep[fresh], prefill, stats)
        sequences |= dict(zip(fresh, made, strict=True))
        parts.append(logits)
    if kept:
        rest = [prompts[row][len(found.tokens) :] for row, found in kept.items()]
        stats.reused_tokens += sum(len(found.tokens) for found in kept.values())
        parts.append(core.extend([k.sequence for k in kept.values()], rest, [1] * len(kept), stats))
    in_order = [sequences[row] for row in range(len(prompts))]
    return Prefilled(in_order, _in_order(parts, [*fresh, *kept]), keep, keep_prob)


def _in_order(parts: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
    """parts [.., V] of these rows -> [B, V]. One part is in order and not copied: torch's threads,
    once woken, spin for milliseconds, and the first tokens would be decoded against them."""
    if len(parts) == 1:
        return parts[0]
    joined = torch.cat(list(parts))
    return joined[torch.tensor(rows).argsort()]
