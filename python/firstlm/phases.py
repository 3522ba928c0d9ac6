"""What one phase of training trains, how its gates act, and what steers its skip rate.

warm-up   LoRA; layers dropped at random
routers   phase 1: routers; soft or straight-through gates
lora      phase 2: LoRA; routers frozen, hard gates, rows that skip a layer are not computed in it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from firstlm.layer_drop import RandomLayerDrop, drop_weights
from firstlm.rate_control import Multiplier, Ramp, ThresholdFollower
from firstlm.train_config import DistillConfig, PhaseConfig, TrainConfig

# (optimizer step, indices of the sequences within it, tokens of their prompts) -> keep mask
# [sequences, L]
PlanSource = Callable[[int, Sequence[int], torch.Tensor], torch.Tensor]


@dataclass
class Phase:
    """Everything that firstlm.Trainer needs to know beyond transformers' TrainingArguments.

    Args:
        name: names the phase in logs and messages.
        gate: "soft", "straight_through" or "hard".
        train_routers, train_adapter: which parameters learn.
        target: asked skip rate by optimizer step.
        plans: where skip plans come from, in place of the routers.
        multiplier: alpha of the skip penalty and how it moves.
        follower: thresholds and how they move.
        lambda_norm: weight of the squared norm of the router weights.
        adapter_lr: learning rate of the adapter where routers learn too.
        distill: see DistillConfig.
    """

    name: str
    gate: str
    train_routers: bool = False
    train_adapter: bool = False
    target: Callable[[int], float] = field(default=lambda step: 0.0)
    plans: PlanSource | None = None
    multiplier: Multiplier = field(default_factory=lambda: Multiplier(0.0, 0.0))
    follower: ThresholdFollower | None = None
    lambda_norm: float = 0.0
    adapter_lr: float | None = None
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        if self.gate not in ("soft", "straight_through", "hard"):
            raise ValueError(f"gate={self.gate!r}: must be soft, straight_through or hard")
        if self.train_routers and self.gate == "hard":
            raise ValueError("a hard gate gives routers no gradient: use soft or straight_through")
        if not (self.train_routers or self.train_adapter):
            raise ValueError("a phase must train the routers, the adapter, or both")

    def state_dict(self) -> dict[str, Any]:
        """What moved since the start of the phase."""
        return {
            "alpha": self.multiplier.alpha,
            "follower": None if self.follower is None else self.follower.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.multiplier.alpha = state["alpha"]
        if self.follower is not None and state["follower"] is not None:
            self.follower.load_state_dict(state["follower"])


def steps_of(phase: PhaseConfig, examples: int, batch: int) -> int:
    """Optimizer steps of a phase; `batch` is sequences per step over all processes."""
    if phase.epochs is None:
        return phase.steps
    return max(1, math.ceil(phase.epochs * examples / batch))


def warmup_phase(
    config: TrainConfig, steps: int, model: Any, importance: Sequence[float] | None
) -> Phase:
    """LoRA under random layer drop. `importance` [L] is needed for drop_weights="importance"."""
    c = config.warmup
    end = config.skip_rate if c.drop_rate_end is None else c.drop_rate_end
    ramp = Ramp(c.drop_rate_start, end, c.drop_ramp, steps)
    weights = None
    if c.drop_weights == "importance":
        assert importance is not None
        weights = drop_weights(importance, c.drop_temperature)
    drop = RandomLayerDrop(
        ramp,
        len(model.decoder_layers),
        model.router_config.protected,
        weights,
        c.drop_rate_spread,
        config.seed,
    )
    return Phase("warmup", "hard", train_adapter=True, target=ramp, plans=drop, distill=c.distill)


def router_phase(config: TrainConfig, steps: int, model: Any) -> Phase:
    """Phase 1: routers, and LoRA along with them if the config says so."""
    c = config.routers
    start = config.skip_rate if c.skip_rate_start is None else c.skip_rate_start
    rate = c.multiplier_lr if c.penalty == "multiplier" else 0.0
    thresholds = list(model.router_config.thresholds)
    # Protected layers skip nothing, so the free ones make up for them.
    free = len(thresholds) - len(model.router_config.protected)
    share = [1.0 - min(config.skip_rate * len(thresholds) / max(free, 1), 1.0)] * len(thresholds)
    return Phase(
        "routers",
        c.gate,
        train_routers=True,
        train_adapter=c.train_adapter,
        target=Ramp(start, config.skip_rate, c.skip_rate_ramp, steps),
        multiplier=Multiplier(c.alpha, rate, c.alpha_range[0], c.alpha_range[1]),
        follower=ThresholdFollower(
            c.hold, thresholds, model.router_config.protected, c.hold_window, share
        ),
        lambda_norm=c.lambda_norm,
        adapter_lr=c.adapter_lr,
        distill=c.distill,
    )


def lora_phase(config: TrainConfig, model: Any, keep_share: Sequence[float]) -> Phase:
    """Phase 2. `keep_share` [L]: how often each layer was kept after phase 1, held by per_layer."""
    c = config.lora
    follower = ThresholdFollower(
        c.hold,
        list(model.router_config.thresholds),
        model.router_config.protected,
        c.hold_window,
        keep_share,
    )
    return Phase(
        "lora",
        "hard",
        train_adapter=True,
        target=lambda step: config.skip_rate,
        follower=follower,
        distill=c.distill,
    )


def control_phase(config: TrainConfig, plans: PlanSource, skip_rate: float) -> Phase:
    """Phase 2 of a control: LoRA under plans that are no router's, `skip_rate` on average.

    What skips is distilled as FiRST is; of a model that does not, the teacher would be itself.
    """
    distill = config.lora.distill if skip_rate else DistillConfig()
    return Phase(
        "lora",
        "hard",
        train_adapter=True,
        target=lambda step: skip_rate,
        plans=plans,
        distill=distill,
    )
