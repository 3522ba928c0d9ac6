"""Plans found by measuring whole plans, for a mixture and for each of its tasks, and routers
that start as classifiers of the tasks' plans.

First-order importance misleads: two layers that are cheap to skip alone can be dear together, so
plans are compared as wholes. Letters: N examples, L layers, F router features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from firstlm.controls import importance_plan, layers_to_drop
from firstlm.layer_importance import measure_importance
from firstlm.scoring import Collator, score

_RIDGE = 1e-2  # of the fit, on features of unit mean square


def search_plan(
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    skip_rate: float,
    *,
    trials: int,
    seed: int,
    importance: Sequence[float] | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[bool], float]:
    """The best plan of one size that a walk of swaps finds, from the least important layers on.

    A trial exchanges one skipped layer for a kept one, cheap ones more often, and stays if the
    answer cross-entropy of `examples` falls.

    Args:
        model: from firstlm.from_pretrained; its routers play no part.
        examples: N encoded rows.
        skip_rate: share of skipped layers, rounded to whole layers.
        trials: swaps tried.
        seed: of the swaps.
        importance: [L], measured on the examples if not given (about L / 2 passes over them).

    Returns:
        Keep mask [L], and its cross-entropy (nats per answer token).
    """
    num_layers, protected = len(model.decoder_layers), model.router_config.protected
    if importance is None:
        importance = measure_importance(
            model, examples, collator, batch_size=batch_size, progress=progress
        )
    plan = importance_plan(importance, skip_rate, protected)

    def cross_entropy(keep: Sequence[bool]) -> float:
        mask = torch.tensor(list(keep))
        found = score(model, examples, collator, batch_size=batch_size, keep_mask=mask)
        if progress is not None:
            progress(1)
        return found.cross_entropy

    best = cross_entropy(plan)
    if not 0 < layers_to_drop(skip_rate, num_layers, protected) < num_layers - len(protected):
        return plan, best
    generator = torch.Generator().manual_seed(seed)
    cost = torch.tensor(importance, dtype=torch.float64)  # [L]
    cost[protected] = torch.inf
    tried = {tuple(plan)}
    for _ in range(trials):
        swapped = _swap(plan, cost, generator)
        if tuple(swapped) in tried:
            continue
        tried.add(tuple(swapped))
        value = cross_entropy(swapped)
        if value < best:
            plan, best = swapped, value
    return plan, best


def search_task_plans(
    model: Any,
    groups: Mapping[str, Sequence[Any]],
    weights: Mapping[str, float],
    collator: Collator,
    skip_rate: float,
    *,
    trials: int,
    seed: int,
    common: Sequence[bool] | None = None,
    importance: Sequence[float] | None = None,
    by_tokens: bool = False,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[bool], dict[str, list[bool]]]:
    """The best common plan of a mixture, and each task's own departures from it.

    Weights that serve one plan serve it well, so tasks leave the common plan only where that pays:
    a trial swaps two layers of one task, or lets one task skip a layer more and another a layer
    less (the total stays), and stays if the loss of the mixture falls.

    Args:
        model, collator, skip_rate, seed: as in search_plan.
        groups: task -> encoded rows.
        weights: task -> how many times its rows stand in the mixture for each row in `groups`.
        trials: moves tried for the common plan, and as many for every task.
        common: keep mask [L] to depart from; searched if not given.
        importance: [L], makes cheap layers likelier in a trial; measured if not given.
        by_tokens: every answer token counts alike, and long answers buy their layers from short
            ones; else every prompt does.

    Returns:
        The common keep mask [L], and task -> keep mask [L].
    """
    everything = [row for rows in groups.values() for row in rows]
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    if importance is None:
        importance = measure_importance(model, everything, collator, **options)
    if common is None:
        common, _ = search_plan(
            model,
            everything,
            collator,
            skip_rate,
            trials=trials,
            seed=seed,
            importance=importance,
            **options,
        )
    common = list(common)
    if len(groups) == 1:
        return common, {task: common for task in groups}
    protected = model.router_config.protected
    cost = torch.tensor(importance, dtype=torch.float64)  # [L]
    cost[protected] = torch.inf

    def loss(task: str, plan: Sequence[bool]) -> float:
        found = score(
            model, groups[task], collator, batch_size=batch_size, keep_mask=torch.tensor(list(plan))
        )
        if progress is not None:
            progress(1)
        values = found.loss if by_tokens else found.loss / found.tokens
        return weights[task] * float(values.sum())

    plans = {task: list(common) for task in groups}
    losses = {task: loss(task, plan) for task, plan in plans.items()}
    tried: set[tuple[Any, ...]] = set()
    generator = torch.Generator().manual_seed(seed + 1)
    names = list(groups)
    for _ in range(trials * len(names)):
        first, second = (names[i] for i in torch.randperm(len(names), generator=generator)[:2])
        moved = {first: _swap(plans[first], cost, generator)}
        if torch.rand(1, generator=generator) < 0.5:
            moved = {
                first: _change(plans[first], cost, generator, keep=False),
                second: _change(plans[second], cost, generator, keep=True),
            }
        key = tuple((task, tuple(plan)) for task, plan in sorted(moved.items()))
        if key in tried or not all(any(plan) and not all(plan) for plan in moved.values()):
            continue
        tried.add(key)
        new = {task: loss(task, plan) for task, plan in moved.items()}
        if sum(new.values()) < sum(losses[task] for task in new):
            plans.update(moved)
            losses.update(new)
    return common, plans


def _change(
    plan: list[bool], cost: torch.Tensor, generator: torch.Generator, *, keep: bool
) -> list[bool]:
    """Keep one skipped layer (dear ones more often), or skip a kept one (cheap ones more often)."""
    spread = cost[cost.isfinite()].std().clamp(min=1e-6)
    ease = (cost / spread) * (1 if keep else -1)
    candidates = torch.tensor([kept != keep for kept in plan]) & cost.isfinite()
    if not candidates.any():
        return plan
    odds = torch.where(candidates, ease, -torch.inf).softmax(0)
    changed = list(plan)
    changed[int(torch.multinomial(odds, 1, generator=generator))] = keep
    return changed


def _swap(plan: list[bool], cost: torch.Tensor, generator: torch.Generator) -> list[bool]:
    """One skipped layer comes back and a kept one goes."""
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
    features = _features(model, examples, collator, plans, undecided, batch_size, progress)
    for layer_idx, layer in enumerate(model.decoder_layers):
        if layer_idx in undecided:
            weight, bias = _discriminant(features[layer_idx], plans[:, layer_idx], margin)
            layer.router.weight.copy_(weight[None])
            layer.router.bias.fill_(bias)
        else:
            layer.router.reset_parameters(margin if bool(plans[0, layer_idx]) else -margin)


def _features(
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
