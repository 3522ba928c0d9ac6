"""Rival ways to pick layers, as static plans of an asked size: what FiRST has to beat.

importance   drop the layers whose single absence costs least cross-entropy
greedy       drop one layer after the other, each time the one that costs least then
most_kept    keep the layers that trained routers keep most often

LoRA-only is no rule of its own: it is the plan that keeps every layer. L layers below.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from firstlm.scoring import Collator, score

Progress = Callable[[int], None]


def layers_to_drop(skip_rate: float, num_layers: int, protected: Sequence[int]) -> int:
    """How many layers a static plan drops. Raises ValueError if too many are protected."""
    count = round(skip_rate * num_layers)
    if count > num_layers - len(protected):
        raise ValueError(
            f"skip rate {skip_rate} drops {count} of {num_layers} layers, but {len(protected)} are "
            "protected: lower skip_rate or protect fewer layers"
        )
    return count


def importance_plan(
    importance: Sequence[float], skip_rate: float, protected: Sequence[int]
) -> list[bool]:
    """Keep mask [L] without the layers of least importance."""
    count = layers_to_drop(skip_rate, len(importance), protected)
    free = [i for i in range(len(importance)) if i not in set(protected)]
    dropped = set(sorted(free, key=lambda i: (importance[i], i))[:count])
    return [i not in dropped for i in range(len(importance))]


def greedy_plan(
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    skip_rate: float,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[bool]:
    """Keep mask [L]: layers are dropped one by one, each time the one that costs least then."""
    num_layers = len(model.decoder_layers)
    protected = model.router_config.protected
    keep = torch.ones(num_layers, dtype=torch.bool)
    for _ in range(layers_to_drop(skip_rate, num_layers, protected)):
        costs: dict[int, float] = {}
        for layer in range(num_layers):
            if not keep[layer] or layer in protected:
                continue
            keep[layer] = False
            trial = score(model, examples, collator, batch_size=batch_size, keep_mask=keep)
            costs[layer] = trial.cross_entropy
            keep[layer] = True
            if progress is not None:
                progress(1)
        keep[min(costs, key=lambda i: (costs[i], i))] = False
    return keep.tolist()


def most_kept_plan(
    keep_share: Sequence[float], skip_rate: float, protected: Sequence[int]
) -> list[bool]:
    """Keep mask [L] of the layers that routers keep for most prompts."""
    return importance_plan(keep_share, skip_rate, protected)


def keep_share_of_run(folder: str | Path) -> tuple[list[float], float]:
    """Share of held-out prompts that kept each layer [L], and the skip rate, of a finished run.

    Raises:
        FileNotFoundError: `folder` (a run or its checkpoint) has no health.json.
    """
    for candidate in (Path(folder), Path(folder) / "checkpoint", Path(folder).parent):
        if (candidate / "health.json").is_file():
            health = json.loads((candidate / "health.json").read_text(encoding="utf-8"))
            return [layer["kept"] for layer in health["layers"]], health["skip_rate"]
    raise FileNotFoundError(
        f"no health.json in {folder}: name the output_dir of a finished run, as "
        "control_plan=most_kept:runs/train"
    )


@torch.no_grad()
def write_plan_into_routers(model: Any, keep: Sequence[bool], logit: float = 12.0) -> None:
    """Makes the routers say `keep` [L] to every prompt, so that a checkpoint carries its plan."""
    biases = [logit if kept else -logit for kept in keep]
    set_keep_bias(model, biases)
    model.set_thresholds([0.5] * len(biases))


@torch.no_grad()
def set_keep_bias(model: Any, biases: Sequence[float]) -> None:
    """Starts every router anew: no weights, and its layer's bias of the keep logit [L]."""
    for layer, bias in zip(model.decoder_layers, biases, strict=True):
        layer.router.reset_parameters(float(bias))
    model.router_config.keep_bias = [float(bias) for bias in biases]


def importance_bias(
    importance: Sequence[float], skip_rate: float, spread: float, protected: Sequence[int]
) -> list[float]:
    """Initial keep logits [L] that skip unimportant layers first.

    Free layers, ordered by importance, take logits spaced evenly over 2 * spread, shifted so that
    the threshold 0.5 drops the asked share: routers start from the static plan, and learning can
    only add to it. Protected layers take the highest logit.
    """
    num_layers = len(importance)
    free = [i for i in range(num_layers) if i not in set(protected)]
    order = sorted(free, key=lambda i: (importance[i], i))
    count = layers_to_drop(skip_rate, num_layers, protected)
    step = 2 * spread / max(len(order) - 1, 1)
    biases = [spread] * num_layers
    for rank, layer in enumerate(order):
        biases[layer] = (rank - count + 0.5) * step  # the sign changes between count - 1 and count
    return biases
