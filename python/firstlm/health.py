"""Router health: have the routers learnt, do their plans differ, and do they keep the asked rate?

Each figure answers a way in which published routers have failed: weights that never left their
initial values, one plan for everybody, plans that only measure the prompt's length, soft gates that
mean nothing once they are hard, budgets that are missed. N prompts, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from firstlm.checkpoint import router_state_dict
from firstlm.controls import most_kept_plan
from firstlm.scoring import Collator, Scores, score

_ADAPTIVE = (0.05, 0.95)  # kept for a share of the prompts in here: the layer depends on the prompt


@dataclass
class LayerHealth:
    """One layer's router over the held-out prompts.

    Attributes:
        kept: share of the prompts that keep the layer.
        keep_prob, spread: mean and standard deviation of the keep probability over prompts.
        distance: L2 distance of the router's parameters from their initial values; None if unknown.
        length_correlation: point-biserial correlation of "kept" with the prompt's tokens; None for
            a layer that all prompts keep or all skip.
    """

    layer: int
    protected: bool
    kept: float
    keep_prob: float
    spread: float
    threshold: float
    distance: float | None
    length_correlation: float | None = None


@dataclass
class TaskHealth:
    """The prompts of one task (corpus) of a mixture."""

    prompts: int
    skip_rate: float
    cross_entropy: float


@dataclass
class HealthReport:
    """What `router_health` measured; cross-entropies are nats per answer token.

    Attributes:
        skip_rate_asked, skip_rate: asked, and achieved on these prompts.
        distinct_plans: of `prompts`.
        adaptive_layers: layers kept for 5-95 % of the prompts.
        length_correlation: Pearson, number of kept layers against prompt tokens; None if one is
            constant.
        cross_entropy: with hard gates, as generation runs.
        cross_entropy_soft: with the gates' expected values; soft_hard_gap is hard minus soft.
        cross_entropy_full: no layer skipped.
        cross_entropy_shuffled: every prompt under another prompt's plan.
        cross_entropy_most_kept: the most kept layers as one plan of the same size for all.
        distance: L2 distance of all routers from their initial values; None if unknown.
    """

    prompts: int
    skip_rate_asked: float
    skip_rate: float
    distinct_plans: int
    adaptive_layers: int
    length_correlation: float | None
    cross_entropy: float
    cross_entropy_soft: float
    soft_hard_gap: float
    cross_entropy_full: float
    cross_entropy_shuffled: float
    cross_entropy_most_kept: float
    distance: float | None
    layers: list[LayerHealth] = field(default_factory=list)
    tasks: dict[str, TaskHealth] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HealthReport:
        """The inverse of to_json."""
        values = dict(values)
        values["layers"] = [LayerHealth(**v) for v in values["layers"]]
        values["tasks"] = {k: TaskHealth(**v) for k, v in values["tasks"].items()}
        return cls(**values)

    def warnings(self) -> list[str]:
        """What a reader should worry about, in words."""
        found = []
        if abs(self.skip_rate - self.skip_rate_asked) > 0.02:
            found.append(
                f"skips {self.skip_rate:.1%} where {self.skip_rate_asked:.1%} was asked: calibrate "
                "on more prompts of this kind"
            )
        if self.distance is not None and self.distance < 1e-3:
            found.append("the routers are still where they started: train longer or raise lr")
        if self.skip_rate > 0 and self.distinct_plans == 1:
            found.append("all prompts have one plan: a static plan would do the same")
        elif self.skip_rate > 0 and self.cross_entropy_shuffled <= self.cross_entropy:
            found.append("plans of other prompts do no worse: which prompt has which is noise")
        if self.length_correlation is not None and abs(self.length_correlation) > 0.8:
            found.append("the number of kept layers follows the prompt's length")
        return found

    def to_markdown(self) -> str:
        """The report as tables."""
        length = "-" if self.length_correlation is None else f"{self.length_correlation:+.2f}"
        distance = "-" if self.distance is None else f"{self.distance:.3f}"
        rows = [
            ("skip rate, asked / achieved", f"{self.skip_rate_asked:.1%} / {self.skip_rate:.1%}"),
            ("distinct plans", f"{self.distinct_plans} of {self.prompts} prompts"),
            ("layers kept for 5-95 % of the prompts", str(self.adaptive_layers)),
            ("kept layers against prompt length (Pearson)", length),
            ("routers' distance from init (L2)", distance),
            ("CE, hard gates", f"{self.cross_entropy:.4f}"),
            ("CE, soft gates", f"{self.cross_entropy_soft:.4f}"),
            ("CE, no layer skipped", f"{self.cross_entropy_full:.4f}"),
            ("CE, each prompt under another's plan", f"{self.cross_entropy_shuffled:.4f}"),
            ("CE, most kept layers for all", f"{self.cross_entropy_most_kept:.4f}"),
        ]
        lines = ["| held-out prompts | |", "|---|---|"] + [f"| {a} | {b} |" for a, b in rows]
        if len(self.tasks) > 1:
            lines += ["", "| task | prompts | skip rate | CE |", "|---|---|---|---|"]
            lines += [
                f"| {name} | {t.prompts} | {t.skip_rate:.1%} | {t.cross_entropy:.4f} |"
                for name, t in self.tasks.items()
            ]
        lines += ["", "| layer | kept | keep prob. | spread | threshold | distance | r(length) |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for layer in self.layers:
            name = f"{layer.layer} (protected)" if layer.protected else str(layer.layer)
            moved = "-" if layer.distance is None else f"{layer.distance:.3f}"
            along = layer.length_correlation
            lines.append(
                f"| {name} | {layer.kept:.1%} | {layer.keep_prob:.3f} | {layer.spread:.3f} "
                f"| {layer.threshold:.3f} | {moved} | {'-' if along is None else f'{along:+.2f}'} |"
            )
        lines += [""] + [f"- {warning}" for warning in self.warnings()]
        return "\n".join(lines).rstrip() + "\n"


def router_health(
    model: Any,
    examples: Sequence[Mapping[str, Any]],
    collator: Collator,
    skip_rate_asked: float,
    *,
    initial: Mapping[str, torch.Tensor] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> HealthReport:
    """Measures the report on held-out examples: five passes over them.

    Args:
        model: from firstlm.from_pretrained, trained.
        examples: N rows with input_ids, labels, prompt_mask; their tasks in an attribute `tasks`.
        collator: rows -> padded tensors.
        skip_rate_asked: what training aimed at.
        initial: the routers' state (checkpoint.router_state_dict) before training.
        batch_size: rows per forward pass.
        seed: of the shuffle that gives each prompt another's plan.
        progress: called with the number of examples done since the last call.
    """

    def run(**how: Any) -> Scores:
        return score(model, examples, collator, batch_size=batch_size, progress=progress, **how)

    protected = model.router_config.protected
    hard = run()
    mask = hard.keep_mask
    soft = run(gate="soft")
    full = run(keep_mask=torch.ones_like(mask))
    other = run(keep_mask=mask[derangement(len(mask), seed)])
    kept = mask.double().mean(0)  # [L]
    static = torch.tensor(most_kept_plan(kept.tolist(), hard.skip_rate, protected))
    most_kept = run(keep_mask=static)
    lengths = torch.tensor([sum(examples[i]["prompt_mask"]) for i in range(len(examples))]).double()
    distances = _distances(model, initial)
    layers = [
        LayerHealth(
            layer=i,
            protected=i in protected,
            kept=kept[i].item(),
            keep_prob=hard.keep_prob[:, i].double().mean().item(),
            spread=hard.keep_prob[:, i].double().std(unbiased=False).item(),
            threshold=float(model.router_config.thresholds[i]),
            distance=None if distances is None else distances[i],
            length_correlation=_pearson(mask[:, i].double(), lengths),
        )
        for i in range(mask.shape[1])
    ]
    return HealthReport(
        prompts=len(mask),
        skip_rate_asked=skip_rate_asked,
        skip_rate=hard.skip_rate,
        distinct_plans=hard.distinct_plans,
        adaptive_layers=sum(_ADAPTIVE[0] <= layer.kept <= _ADAPTIVE[1] for layer in layers),
        length_correlation=_pearson(mask.sum(1).double(), lengths),
        cross_entropy=hard.cross_entropy,
        cross_entropy_soft=soft.cross_entropy,
        soft_hard_gap=hard.cross_entropy - soft.cross_entropy,
        cross_entropy_full=full.cross_entropy,
        cross_entropy_shuffled=other.cross_entropy,
        cross_entropy_most_kept=most_kept.cross_entropy,
        distance=None if distances is None else math.hypot(*distances),
        layers=layers,
        tasks=_by_task(hard, getattr(examples, "tasks", None)),
    )


def derangement(count: int, seed: int) -> torch.Tensor:
    """A permutation [count] without fixed points: one cycle through all in random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    next_of = torch.empty_like(order)
    next_of[order] = order.roll(1)
    return next_of


def _pearson(x: torch.Tensor, y: torch.Tensor) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    scale = (x.norm() * y.norm()).item()
    return None if scale == 0 else (x @ y).item() / scale


def _distances(model: Any, initial: Mapping[str, torch.Tensor] | None) -> list[float] | None:
    if initial is None:
        return None
    squares = [0.0] * len(model.decoder_layers)
    for name, value in router_state_dict(model).items():
        layer = int(name.split(".")[1])
        squares[layer] += (value.double() - initial[name].double()).square().sum().item()
    return [math.sqrt(s) for s in squares]


def _by_task(scores: Scores, tasks: Sequence[str] | None) -> dict[str, TaskHealth]:
    found = {}
    for task in sorted(set(tasks or ())):
        rows = torch.tensor([t == task for t in tasks or ()])
        part = Scores(
            scores.loss[rows], scores.tokens[rows], scores.keep_prob[rows], scores.keep_mask[rows]
        )
        found[task] = TaskHealth(int(rows.sum()), part.skip_rate, part.cross_entropy)
    return found
