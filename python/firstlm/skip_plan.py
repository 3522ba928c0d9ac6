"""The skip plan: which decoder layers one sequence keeps, and the rule that decides it.

Letters used below: B sequences, L decoder layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from firstlm import ops
from firstlm.arguments import number

KEPT, SKIPPED = "▮", "▯"
BUDGET_MODES = ("threshold", "exact")
_FORMAT_VERSION = 1
_TAKEN = "skip_plan takes SkipPlan objects or a bool keep mask"


@dataclass(frozen=True)
class SkipPlan:
    """The layers that one sequence keeps, for its prompt and its whole answer.

    Immutable, hashable, picklable. `str(plan)` is one character a layer (`▮▮▯▮`).

    Args:
        kept: indices of the kept layers, in any order, each in `[0, num_layers)`.
        num_layers: number of decoder layers of the model.

    Raises:
        ValueError: an index outside the model, a duplicate, or no kept layer at all.
    """

    kept: tuple[int, ...]
    num_layers: int

    def __post_init__(self) -> None:
        kept = tuple(sorted(int(layer) for layer in self.kept))
        num_layers = int(self.num_layers)
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if not kept:
            raise ValueError("a skip plan must keep at least one layer, got kept=()")
        if len(set(kept)) != len(kept):
            raise ValueError(f"a skip plan names each kept layer once, got {kept}")
        if kept[0] < 0 or kept[-1] >= num_layers:
            raise ValueError(f"kept layers must lie in [0, {num_layers}), got {kept}")
        object.__setattr__(self, "kept", kept)
        object.__setattr__(self, "num_layers", num_layers)

    @classmethod
    def full(cls, num_layers: int) -> SkipPlan:
        """The plan that keeps every layer."""
        return cls(tuple(range(num_layers)), num_layers)

    @classmethod
    def from_mask(cls, keep_mask: Sequence[bool] | torch.Tensor) -> SkipPlan:
        """The plan of one row of a keep mask, `[L]`, true = kept."""
        flags = [bool(flag) for flag in keep_mask]
        return cls(tuple(layer for layer, flag in enumerate(flags) if flag), len(flags))

    @property
    def skipped(self) -> tuple[int, ...]:
        """The layers that are not kept."""
        kept = set(self.kept)
        return tuple(layer for layer in range(self.num_layers) if layer not in kept)

    @property
    def skip_rate(self) -> float:
        """Skipped layers / all layers."""
        return 1.0 - len(self.kept) / self.num_layers

    def to_mask(self) -> torch.Tensor:
        """The plan as a bool tensor `[L]` on the CPU, true = kept."""
        mask = torch.zeros(self.num_layers, dtype=torch.bool)
        mask[list(self.kept)] = True
        return mask

    def to_json(self) -> str:
        """`{"version": 1, "num_layers": 30, "kept": [0, 1, ...]}`."""
        return json.dumps(
            {"version": _FORMAT_VERSION, "num_layers": self.num_layers, "kept": list(self.kept)}
        )

    @classmethod
    def from_json(cls, text: str) -> SkipPlan:
        """The inverse of `to_json`.

        Raises:
            ValueError: not JSON, a missing key, or a version that this release does not read.
        """
        try:
            fields = json.loads(text)
            version, kept, num_layers = fields["version"], fields["kept"], fields["num_layers"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'not a skip plan: {text!r}; expected {{"version", "num_layers", "kept"}}'
            ) from error
        if version != _FORMAT_VERSION:
            raise ValueError(
                f"skip plan version {version} is not supported, expected {_FORMAT_VERSION}"
            )
        return cls(tuple(kept), num_layers)

    def __str__(self) -> str:
        kept = set(self.kept)
        return "".join(KEPT if layer in kept else SKIPPED for layer in range(self.num_layers))

    def _repr_html_(self) -> str:
        kept = set(self.kept)
        cells = "".join(
            f'<span title="layer {layer}: {"kept" if layer in kept else "skipped"}" style="'
            "display:inline-block;width:10px;height:16px;margin:1px;border:1px solid #3b6ea5;"
            f'background:{"#3b6ea5" if layer in kept else "transparent"}"></span>'
            for layer in range(self.num_layers)
        )
        return (
            f"<div>{cells} <small>{len(kept)} of {self.num_layers} layers kept, "
            f"skip rate {self.skip_rate:.0%}</small></div>"
        )


@dataclass
class RoutingOutput:
    """What the routers say of some prompts.

    Attributes:
        skip_plans: one a prompt.
        keep_prob: `[B, L]`, float32 (float64 for a float64 model).
    """

    skip_plans: list[SkipPlan]
    keep_prob: torch.Tensor


def plans_to_mask(
    plans: SkipPlan | Iterable[SkipPlan] | torch.Tensor, batch_size: int, num_layers: int
) -> torch.Tensor:
    """One plan, one plan a sequence, or a keep mask, as a keep mask.

    Args:
        plans: a `SkipPlan` for all sequences, `batch_size` plans, or a tensor `[B, L]` or `[L]`.
        batch_size: B.
        num_layers: L.

    Returns:
        bool `[B, L]` on the CPU, true = kept.

    Raises:
        ValueError: a plan of another model size, a wrong number of plans, or a row that keeps
            no layer.
        TypeError: something that is not a plan.
    """
    if isinstance(plans, np.ndarray):
        plans = torch.from_numpy(plans)
    if isinstance(plans, torch.Tensor):
        if plans.dtype != torch.bool:
            raise TypeError(f"a keep mask must be bool, got {plans.dtype}")
        mask = plans.detach().cpu()
        if mask.ndim == 1:
            mask = mask.expand(batch_size, -1)
    else:
        if not isinstance(plans, (SkipPlan, Iterable)):
            raise TypeError(f"{_TAKEN}, got {type(plans).__name__}")
        rows = [plans] * batch_size if isinstance(plans, SkipPlan) else list(plans)
        for plan in rows:
            if not isinstance(plan, SkipPlan):
                raise TypeError(f"{_TAKEN}, got {type(plan).__name__}")
            if plan.num_layers != num_layers:
                raise ValueError(
                    f"a skip plan over {plan.num_layers} layers does not fit a model of "
                    f"{num_layers} layers"
                )
        if len(rows) != batch_size:
            raise ValueError(
                f"skip_plan takes one plan or one a prompt: got {len(rows)} plans for "
                f"{batch_size} prompts"
            )
        mask = torch.stack([plan.to_mask() for plan in rows]) if rows else torch.ones(0, num_layers)
    if mask.shape != (batch_size, num_layers):
        raise ValueError(
            f"a keep mask must be [{batch_size}, {num_layers}] (sequences, layers), "
            f"got {list(mask.shape)}"
        )
    mask = mask.to(torch.bool)
    # Every SkipPlan keeps a layer; what a mask holds is not known while torch.compile traces.
    is_checked = isinstance(plans, torch.Tensor) and not torch.compiler.is_compiling()
    if is_checked and not bool(mask.any(dim=1).all()):
        raise ValueError("a skip plan must keep at least one layer in every row")
    return mask.contiguous()


def mask_to_plans(keep_mask: torch.Tensor) -> list[SkipPlan]:
    """A keep mask `[B, L]` as one plan a row."""
    return [SkipPlan.from_mask(row) for row in keep_mask.tolist()]


def kept_rows(
    keep_mask: torch.Tensor, device: torch.device | str | None = None
) -> list[torch.Tensor]:
    """The sequences that keep each layer of a keep mask `[B, L]`: int64 `[R]`, one a layer.

    Args:
        keep_mask: bool `[B, L]`.
        device: where the indices are wanted; None = where the mask is.
    """
    rows, counts = ops.plan_rows(keep_mask)
    rows = rows.to(device)  # [L, B], once for all layers
    return [of_layer[:count] for of_layer, count in zip(rows, counts.tolist(), strict=True)]


def planned_rows(
    plans: SkipPlan | Sequence[SkipPlan] | torch.Tensor,
    keep_mask: torch.Tensor,
    device: torch.device | str | None = None,
) -> list[torch.Tensor] | None:
    """`kept_rows` of fixed plans, where they can be known before the pass runs.

    Inside torch.compile, `SkipPlan` objects are constants: the graph is made for them and skips
    their layers. A mask is an input whose values no graph can be shaped by.

    Args:
        plans: what the caller gave.
        keep_mask: bool `[B, L]`, what `plans_to_mask` made of it.
        device: where the indices are wanted; None = where the mask is.

    Returns:
        int64 `[R]`, one a layer; None for a mask inside torch.compile.
    """
    if not torch.compiler.is_compiling():
        return kept_rows(keep_mask, device)
    if isinstance(plans, torch.Tensor):
        return None
    batch_size, num_layers = keep_mask.shape
    of_rows = [plans] * batch_size if isinstance(plans, SkipPlan) else list(plans)

    def keeps(plan: SkipPlan, layer: int) -> bool:
        # Not `in`: after a recompilation numbers are symbols, which torch 2.13 finds in no tuple. A
        # comparison makes them constants again.
        return any(layer == kept for kept in plan.kept)

    kept = [[b for b, plan in enumerate(of_rows) if keeps(plan, i)] for i in range(num_layers)]
    return [torch.tensor(rows, dtype=torch.int64, device=device) for rows in kept]


def keep_decision(keep_prob: torch.Tensor, threshold: float, protected: bool) -> torch.Tensor:
    """The one rule that turns a router's score into a decision.

    Args:
        keep_prob: `[B]`, the probability of keeping one layer.
        threshold: of that layer.
        protected: the layer is always kept.

    Returns:
        bool `[B]`: kept iff `keep_prob >= threshold` or the layer is protected.
    """
    if protected:
        return torch.ones_like(keep_prob, dtype=torch.bool)
    return keep_prob >= threshold


def keep_mask_of(
    keep_prob: torch.Tensor, thresholds: Sequence[float], protected: Iterable[int]
) -> torch.Tensor:
    """The decisions of all layers at once: bool `[B, L]` for keep_prob `[B, L]`."""
    protected = set(protected)
    columns = [
        keep_decision(keep_prob[:, layer], threshold, layer in protected)
        for layer, threshold in enumerate(thresholds)
    ]
    return keep_something(torch.stack(columns, 1))


def keep_something(keep_mask: torch.Tensor) -> torch.Tensor:
    """Skipping everything is not a plan: a row of `[B, L]` that keeps none keeps the last layer."""
    kept = keep_mask.clone()
    kept[:, -1] |= ~keep_mask.any(1)
    return kept


def exactly_dropped(num_layers: int, skip_rate: float, protected: Iterable[int]) -> int:
    """How many layers an exact budget drops; arguments and errors as `exact_budget_mask`."""
    check_skip_rate(skip_rate)
    num_dropped = round(skip_rate * num_layers)
    protected = sorted(set(protected))
    available = num_layers - max(len(protected), 1)
    if num_dropped > available:
        raise ValueError(
            f"budget {skip_rate} asks to skip {num_dropped} of {num_layers} layers, but only "
            f"{available} may be skipped (protected layers: {protected})"
        )
    return num_dropped


def exact_budget_mask(
    keep_prob: torch.Tensor, skip_rate: float, protected: Iterable[int]
) -> torch.Tensor:
    """Drop the layers with the lowest scores, the same number in every row.

    Args:
        keep_prob: `[B, L]`, scores of one unskipped pass.
        skip_rate: asked share of skipped layers; rounded to whole layers.
        protected: layers that are never dropped.

    Returns:
        bool `[B, L]` on the CPU, true = kept.

    Raises:
        ValueError: a rate outside [0, 1), or more layers to drop than are unprotected.
    """
    protected = sorted(set(protected))
    num_dropped = exactly_dropped(keep_prob.shape[1], skip_rate, protected)
    scores = keep_prob.detach().to("cpu", torch.float64).clone()
    scores[:, protected] = float("inf")
    mask = torch.ones(scores.shape, dtype=torch.bool)
    dropped = scores.argsort(dim=1, stable=True)[:, :num_dropped]
    return mask.scatter_(1, dropped, False)


def check_protected(keep_mask: torch.Tensor, protected: Iterable[int]) -> None:
    """Raises ValueError if a row of the keep mask `[B, L]` skips a protected layer."""
    skipped = [layer for layer in protected if not bool(keep_mask[:, layer].all())]
    if skipped:
        raise ValueError(
            f"skip_plan skips the protected layers {skipped}: keep them, or change "
            "model.router_config.protected"
        )


def check_plan_choice(
    skip_plan: object | None, budget: float | None, budget_mode: str = "threshold"
) -> None:
    """Raises ValueError unless at most one of plan and budget is given, and the latter is one."""
    if skip_plan is not None and budget is not None:
        raise ValueError("pass skip_plan or budget, not both")
    if budget_mode not in BUDGET_MODES:
        raise ValueError(f"budget_mode must be one of {BUDGET_MODES}, got {budget_mode!r}")
    if budget is not None:
        check_skip_rate(number("budget", budget))


def check_skip_rate(skip_rate: float) -> None:
    """Raises ValueError unless `skip_rate` lies in [0, 1)."""
    if not 0.0 <= skip_rate < 1.0:
        raise ValueError(f"a skip rate must lie in [0, 1), got {skip_rate}")
