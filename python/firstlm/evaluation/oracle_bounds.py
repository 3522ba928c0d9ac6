"""What choosing among candidate plans can win, from a table of losses; no model runs here.

Plans are chosen on the choosing prompts and paid for on the reported ones, except for the bound
`per_prompt`, which takes each reported prompt's best plan in hindsight.

Letters: N prompts, C candidate plans of one size, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_STRENGTHS = [10.0**power for power in range(-3, 7)]  # the last one predicts the mean
_FOLDS = 8
_RESAMPLES = 2000


@dataclass(frozen=True)
class PlanLosses:
    """Losses of some prompts under every candidate plan.

    Attributes:
        halves: [N, C, 2] f64, nats, summed over the answer's tokens at even and at odd places.
        tokens: [N, 2] f64, how many these are.
        tasks: N names.
    """

    halves: torch.Tensor
    tokens: torch.Tensor
    tasks: Sequence[str]

    def per_token(self) -> torch.Tensor:
        """Mean loss over a prompt's tokens, [N, C]."""
        return self.halves.sum(-1) / self.tokens.sum(-1)[:, None]

    def rows_of(self, task: str) -> torch.Tensor:
        """Indices of the task's prompts."""
        return torch.tensor([i for i, other in enumerate(self.tasks) if other == task])


def best_single(choosing: PlanLosses) -> int:
    """The plan that is best for all prompts, each counting alike."""
    return int(choosing.per_token().mean(0).argmin())


def best_per_task(choosing: PlanLosses) -> dict[str, int]:
    """Each task's best plan."""
    values = choosing.per_token()
    return {
        task: int(values[choosing.rows_of(task)].mean(0).argmin())
        for task in sorted(set(choosing.tasks))
    }


def chosen_plans(
    choosing: PlanLosses,
    report: PlanLosses,
    features: dict[str, tuple[torch.Tensor, torch.Tensor]],
    seed: int,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Which candidate every way to choose gives each reported prompt.

    Args:
        features: predictor -> (features of the choosing prompts [N, F], of the reported ones).
        seed: of the folds.

    Returns:
        (way -> [N] indices; predictor -> how well it predicts).
    """
    count, single = len(report.tasks), best_single(choosing)
    of_task = best_per_task(choosing)
    chosen = {
        "single": torch.full((count,), single),
        "per_task": torch.tensor([of_task.get(task, single) for task in report.tasks]),
        "per_prompt": report.per_token().argmin(1),
    }
    quality = {}
    relative = _centred(choosing.per_token())
    for name, (known, new) in features.items():
        predicted, strength = cross_validated_ridge(known, relative, new, seed)
        chosen[name] = predicted.argmin(1)
        truth = _centred(report.per_token()) - relative.mean(0)
        found = predicted - relative.mean(0)
        within = [_without_task_means(values, report) for values in (truth, found)]
        quality[name] = {
            "strength": strength,
            "r2": _r_squared(truth, found),
            "r2_within_tasks": _r_squared(*within),
        }
    return chosen, quality


def _r_squared(truth: torch.Tensor, found: torch.Tensor) -> float:
    total = float(truth.square().sum())
    return 1 - float((truth - found).square().sum()) / total if total else 0.0


def _without_task_means(values: torch.Tensor, losses: PlanLosses) -> torch.Tensor:
    """[N, C] minus each plan's mean over the prompt's task."""
    found = values.clone()
    for task in set(losses.tasks):
        rows = losses.rows_of(task)
        found[rows] -= values[rows].mean(0)
    return found


def agreement_of_halves(report: PlanLosses) -> float:
    """How alike both halves of a prompt's tokens prefer plans beyond its task: a correlation.

    Chance in single tokens is not shared by the halves, so this is how much of the differences
    between prompts of a task is a property of the prompt. 2r / (1 + r) is the same for all tokens,
    which no predictor's `r2_within_tasks` exceeds but by luck.
    """
    both = (report.tokens > 0).all(1)
    some = PlanLosses(
        report.halves[both],
        report.tokens[both],
        [task for task, one in zip(report.tasks, both.tolist(), strict=True) if one],
    )
    even, odd = (
        _without_task_means(_centred(some.halves[:, :, h] / some.tokens[:, h, None]), some)
        for h in (0, 1)
    )
    scale = float(even.norm() * odd.norm())
    return float((even * odd).sum()) / scale if scale else 0.0


def _centred(values: torch.Tensor) -> torch.Tensor:
    """How much better or worse than its mean each plan is for a prompt, [N, C]."""
    return values - values.mean(1, keepdim=True)


def paid(report: PlanLosses, chosen: torch.Tensor) -> torch.Tensor:
    """Summed loss of every prompt under its chosen plan, [N]."""
    return report.halves.sum(-1).gather(1, chosen[:, None])[:, 0]


def paid_by_halves(report: PlanLosses, single: int) -> torch.Tensor:
    """Summed loss [N] where half of a prompt's tokens choose the plan that the other half pays.

    Unlike the bound this has no luck in it: what one half prefers by chance does not help the
    other. It is too low where a half has too few tokens to tell. An answer of one token has no
    other half and takes `single`.
    """
    total = torch.zeros(len(report.tasks), dtype=torch.float64)
    for half in (0, 1):
        best = report.halves[:, :, half].argmin(1)
        best = torch.where(report.tokens[:, half] > 0, best, single)
        total += report.halves[:, :, 1 - half].gather(1, best[:, None])[:, 0]
    return total


def cross_validated_ridge(
    known: torch.Tensor, targets: torch.Tensor, new: torch.Tensor, seed: int
) -> tuple[torch.Tensor, float]:
    """Predictions for `new` [M, F] by ridge regression on `known` [N, F], targets [N, C].

    Returns:
        ([M, C], the strength that predicted held-out folds of `known` best).
    """
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    folds = order.chunk(min(_FOLDS, len(known)))
    errors = torch.zeros(len(_STRENGTHS), dtype=torch.float64)
    for fold in folds:
        rest = torch.tensor([i for i in order.tolist() if i not in set(fold.tolist())])
        if len(rest) == 0:
            continue
        predicted = _ridge(known[rest], targets[rest], known[fold], _STRENGTHS)
        errors += torch.stack([(p - targets[fold]).square().sum() for p in predicted])
    strength = _STRENGTHS[int(errors.argmin())]
    return _ridge(known, targets, new, [strength])[0], strength


def _ridge(
    known: torch.Tensor, targets: torch.Tensor, new: torch.Tensor, strengths: Sequence[float]
) -> list[torch.Tensor]:
    """Predictions [M, C] of every strength, features standardised; few prompts, many features."""
    mean, spread = known.double().mean(0), known.double().std(0, correction=0)
    scale = torch.where(spread > 1e-9, 1 / spread.clamp(min=1e-9), 0.0) / known.shape[1] ** 0.5
    x, x_new = (known.double() - mean) * scale, (new.double() - mean) * scale
    centre = targets.mean(0)
    values, vectors = torch.linalg.eigh(x @ x.T)
    rotated = vectors.T @ (targets - centre)
    base = x_new @ x.T @ vectors
    return [base @ (rotated / (values.clamp(min=0) + s)[:, None]) + centre for s in strengths]


def summary(
    losses: torch.Tensor, tokens: torch.Tensor, rivals: dict[str, torch.Tensor], seed: int
) -> dict[str, Any]:
    """Figures of one way to choose.

    Args:
        losses: [N] summed nats; tokens: [N].
        rivals: name -> [N] of what it is compared with.
        seed: of the bootstrap over prompts.

    Returns:
        cross_entropy (each prompt alike), cross_entropy_by_token, and per rival `minus.<name>`:
        the mean difference by prompt and its 95 % interval.
    """
    own = losses / tokens
    found: dict[str, Any] = {
        "cross_entropy": float(own.mean()),
        "cross_entropy_by_token": float(losses.sum() / tokens.sum()),
        "n": len(own),
    }
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(own), (_RESAMPLES, len(own)), generator=generator)
    for name, rival in rivals.items():
        difference = own - rival / tokens
        interval = difference[draws].mean(1).quantile(torch.tensor([0.025, 0.975]).double())
        found[f"minus.{name}"] = {"mean": float(difference.mean()), "ci95": interval.tolist()}
    return found
