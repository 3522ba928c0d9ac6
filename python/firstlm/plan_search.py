"""Plans found by measuring whole plans, for a mixture and for each of its tasks, and routers
that start as classifiers of the tasks' plans.

First-order importance misleads: two layers that are cheap to skip alone can be dear together, so
plans are compared as wholes. Letters: N examples, L layers, F router features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from firstlm.controls import importance_plan, layers_to_drop
from firstlm.layer_importance import measure_importance
from firstlm.scoring import Collator, score

_CLEARLY = 1.0  # standard errors; a walk over many moves keeps what luck favours otherwise
_RIDGE = 1e-2  # of the fit, on features of unit mean square


@dataclass(frozen=True)
class PlanLoss:
    """What a plan costs a mixture of tasks: the one measure that every search goes by.

    Args:
        model: from firstlm.from_pretrained; its routers play no part.
        groups: task -> encoded rows.
        weights: task -> how many times its rows stand in the mixture for each row in `groups`.
        collator: rows -> padded tensors.
        by_tokens: every answer token counts alike, and long answers buy their layers from short
            ones; else every prompt does.
        batch_size: rows per forward pass.
        progress: called with the number of rows done since the last call.
    """

    model: Any
    groups: Mapping[str, Sequence[Any]]
    weights: Mapping[str, float]
    collator: Collator
    by_tokens: bool = False
    batch_size: int = 16
    progress: Callable[[int], None] | None = None

    def of_task(self, task: str, plan: Sequence[bool]) -> torch.Tensor:
        """Weighted loss of every row of `task` (nats) under the keep mask `plan` [L]: [N] f64."""
        found = score(
            self.model,
            self.groups[task],
            self.collator,
            batch_size=self.batch_size,
            keep_mask=torch.tensor(list(plan)),
            progress=self.progress,
        )
        values = found.loss if self.by_tokens else found.loss / found.tokens
        return self.weights[task] * values

    def __call__(self, plan: Sequence[bool]) -> float:
        """Loss of the mixture if every row follows `plan`, in nats."""
        return sum(float(self.of_task(task, plan).sum()) for task in self.groups)

    def importance(self) -> list[float]:
        """Cost of every layer's absence alone, [L]: about L / 2 passes over the rows."""
        rows = [row for group in self.groups.values() for row in group]
        return measure_importance(
            self.model, rows, self.collator, batch_size=self.batch_size, progress=self.progress
        )


def search_plan(
    loss: PlanLoss,
    skip_rate: float,
    *,
    trials: int,
    seed: int,
    importance: Sequence[float] | None = None,
) -> tuple[list[bool], float]:
    """The best plan of one size that a walk of swaps finds, from the least important layers on.

    A trial exchanges one skipped layer for a kept one, cheap ones more often, and stays if the
    loss falls.

    Args:
        loss: what is to fall.
        skip_rate: share of skipped layers, rounded to whole layers.
        trials: swaps tried.
        seed: of the swaps.
        importance: [L], makes cheap layers likelier in a trial; measured if not given.

    Returns:
        Keep mask [L], and its loss.
    """
    num_layers, protected = len(loss.model.decoder_layers), loss.model.router_config.protected
    if importance is None:
        importance = loss.importance()
    plan = importance_plan(importance, skip_rate, protected)
    best = loss(plan)
    if not 0 < layers_to_drop(skip_rate, num_layers, protected) < num_layers - len(protected):
        return plan, best
    generator = torch.Generator().manual_seed(seed)
    cost = _free_cost(importance, protected)
    tried = {tuple(plan)}
    for _ in range(trials):
        swapped = swap(plan, cost, generator)
        if tuple(swapped) in tried:
            continue
        tried.add(tuple(swapped))
        value = loss(swapped)
        if value < best:
            plan, best = swapped, value
    return plan, best


def search_task_plans(
    loss: PlanLoss,
    common: Sequence[bool],
    *,
    trials: int,
    seed: int,
    trade: int = 1,
    importance: Sequence[float] | None = None,
) -> dict[str, list[bool]]:
    """Each task's own departures from the plan that is common to the mixture.

    Weights that serve one plan serve it well, so a task leaves the common plan only where that
    clearly pays: a trial swaps two layers of one task, or lets one task skip a layer more and
    another a layer less (the total stays), and stays if the loss falls by more than chance
    explains (`_CLEARLY` standard errors of the paired difference).

    Args:
        loss: what is to fall.
        common: keep mask [L] to depart from.
        trials: moves tried for every task.
        seed: of the moves.
        trade: how many layers more or fewer than `common` a task may skip, for another's sake.
        importance: [L], makes cheap layers likelier in a trial; measured if not given.

    Returns:
        task -> keep mask [L].
    """
    names = list(loss.groups)
    plans = {task: list(common) for task in names}
    if len(names) == 1:
        return plans
    cost = _free_cost(
        loss.importance() if importance is None else importance,
        loss.model.router_config.protected,
    )
    losses = {task: loss.of_task(task, plan) for task, plan in plans.items()}
    tried: set[tuple[Any, ...]] = set()
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(trials * len(names)):
        first, second = (names[i] for i in torch.randperm(len(names), generator=generator)[:2])
        moved = {first: swap(plans[first], cost, generator)}
        if trade and torch.rand(1, generator=generator) < 0.5:
            moved = {
                first: _change(plans[first], cost, generator, keep=False),
                second: _change(plans[second], cost, generator, keep=True),
            }
        key = tuple((task, tuple(plan)) for task, plan in sorted(moved.items()))
        if key in tried or any(abs(sum(plan) - sum(common)) > trade for plan in moved.values()):
            continue
        tried.add(key)
        new = {task: loss.of_task(task, plan) for task, plan in moved.items()}
        if _clearly_less(new, losses):
            plans.update(moved)
            losses.update(new)
    return plans


def _clearly_less(new: Mapping[str, torch.Tensor], old: Mapping[str, torch.Tensor]) -> bool:
    """Whether the sums of `new` [N each] fall below those of `old` by more than noise explains."""
    gains = [old[task] - values for task, values in new.items()]  # [N] each, paired
    error = sum(len(gain) * float(gain.var(correction=0)) for gain in gains) ** 0.5
    return sum(float(gain.sum()) for gain in gains) > _CLEARLY * error


def _free_cost(importance: Sequence[float], protected: Sequence[int]) -> torch.Tensor:
    """Importance [L], infinite where a layer must stay."""
    cost = torch.tensor(importance, dtype=torch.float64)
    cost[list(protected)] = torch.inf
    return cost


def _change(
    plan: list[bool], cost: torch.Tensor, generator: torch.Generator, *, keep: bool
) -> list[bool]:
    """Keep one skipped layer (dear ones more often), or skip a kept one (cheap ones more often)."""
    free = cost[cost.isfinite()]
    spread = free.std().clamp(min=1e-6) if len(free) > 1 else 1.0
    ease = (cost / spread) * (1 if keep else -1)
    candidates = torch.tensor([kept != keep for kept in plan]) & cost.isfinite()
    if not candidates.any():
        return plan
    odds = torch.where(candidates, ease, -torch.inf).softmax(0)
    changed = list(plan)
    changed[int(torch.multinomial(odds, 1, generator=generator))] = keep
    return changed


def swap(plan: list[bool], cost: torch.Tensor, generator: torch.Generator) -> list[bool]:
    """One skipped layer comes back and a kept one goes; never one of infinite cost [L]."""
    returned = _change(plan, cost, generator, keep=True)
    candidates = [kept and old for kept, old in zip(returned, plan, strict=True)]
    still = cost.clone()
    still[[i for i, flag in enumerate(candidates) if not flag]] = torch.inf
    return _change(returned, still, generator, keep=False)


@torch.no_grad()
def fit_routers(
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    plans: torch.Tensor,
    *,
    margin: float,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Routers that say `plans` of `examples`, by least squares on the features they read.

    A layer on which all plans agree gets no weights, only a bias of `margin` or `-margin`.

    Args:
        model: with linear router heads.
        examples: N encoded rows.
        plans: bool [N, L], the plan of every example.
        margin: size of the logits that the fit aims at.

    Raises:
        ValueError: mlp heads.
    """
    if model.router_config.head != "linear":
        raise ValueError('routers start from plans only with head="linear"')
    undecided = [i for i in range(plans.shape[1]) if 0 < int(plans[:, i].sum()) < len(plans)]
    features = router_features(model, examples, collator, plans, undecided, batch_size, progress)
    for layer_idx, layer in enumerate(model.decoder_layers):
        if layer_idx in undecided:
            weight, bias = _discriminant(features[layer_idx], plans[:, layer_idx], margin)
            layer.router.weight.copy_(weight[None])
            layer.router.bias.fill_(bias)
        else:
            layer.router.reset_parameters(margin if bool(plans[0, layer_idx]) else -margin)


def router_features(
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    plans: torch.Tensor,
    layers: Sequence[int],
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> dict[int, torch.Tensor]:
    """What the head of each router in `layers` reads under `plans`: layer -> [N, F]."""
    config = model.router_config
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def hook(module: Any, args: tuple[torch.Tensor, torch.Tensor]) -> None:
        pooled = module.pool(*args)
        if config.normalize:
            pooled = pooled * pooled.square().mean(-1, keepdim=True).rsqrt()
        seen[module.layer_idx].append(pooled.float().cpu())

    handles = [model.decoder_layers[i].router.register_forward_pre_hook(hook) for i in layers]
    try:
        for start in range(0, len(examples), batch_size):
            rows = [examples[i] for i in range(start, min(start + batch_size, len(examples)))]
            batch = {k: v.to(model.device) for k, v in collator(rows).items() if k != "labels"}
            chosen = plans[start : start + len(rows)]
            model(**batch, use_cache=False, skip_plan=chosen, logits_to_keep=1)
            if progress is not None:
                progress(len(rows))
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in seen.items()}


def _discriminant(
    features: torch.Tensor, keep: torch.Tensor, margin: float
) -> tuple[torch.Tensor, float]:
    """Ridge fit of targets ±margin, balanced over both answers. Returns weight [F] and bias.

    The direction of least squares on two classes is Fisher's discriminant: no iterations, and the
    size of the logits is bounded by the margin.
    """
    x, y = features.double(), torch.where(keep, margin, -margin).double()
    share = keep.double().mean()
    balance = torch.where(keep, 0.5 / share, 0.5 / (1 - share))  # [N], mean 1
    mean = (balance[:, None] * x).mean(0)
    centred = x - mean
    gram = (balance[:, None] * centred).T @ centred / len(x)
    gram += _RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, (balance * y) @ centred / len(x))
    return weight.float(), float(-(mean @ weight))
