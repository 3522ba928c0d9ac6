"""Rival ways to pick layers, as static plans of an asked size: what FiRST has to beat.

uniform          drop layers at equal distances
random:SEED      drop layers drawn at random
first, last      drop the first or the last layers; `last` is an early exit at a fixed layer
block_influence  drop the layers that change the hidden state least (ShortGPT, arXiv 2403.03853)
importance       drop the layers whose single absence costs least cross-entropy
greedy           drop one layer after the other, each time the one that costs least then
most_kept        keep the layers that trained routers keep most often

No rule drops a protected layer. LoRA-only is no rule of its own: it is the plan that keeps every
layer. L layers below.
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


def uniform_plan(num_layers: int, skip_rate: float, protected: Sequence[int]) -> list[bool]:
    """Keep mask [L] that drops unprotected layers at equal distances, the ends spared."""
    free = _free_layers(num_layers, protected)
    count = layers_to_drop(skip_rate, num_layers, protected)
    return plan_without(
        num_layers, [free[(2 * i + 1) * len(free) // (2 * count)] for i in range(count)]
    )


def random_plan(
    num_layers: int, skip_rate: float, protected: Sequence[int], seed: int
) -> list[bool]:
    """Keep mask [L]; every set of unprotected layers is dropped equally likely."""
    free = _free_layers(num_layers, protected)
    count = layers_to_drop(skip_rate, num_layers, protected)
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed)).tolist()
    return plan_without(num_layers, [free[i] for i in order[:count]])


def first_plan(num_layers: int, skip_rate: float, protected: Sequence[int]) -> list[bool]:
    """Keep mask [L] without the first unprotected layers."""
    count = layers_to_drop(skip_rate, num_layers, protected)
    return plan_without(num_layers, _free_layers(num_layers, protected)[:count])


def last_plan(num_layers: int, skip_rate: float, protected: Sequence[int]) -> list[bool]:
    """Keep mask [L] without the last unprotected layers: an early exit, but for protected ones."""
    count = layers_to_drop(skip_rate, num_layers, protected)
    free = _free_layers(num_layers, protected)
    return plan_without(num_layers, free[len(free) - count :])


_BY_POSITION = {"uniform": uniform_plan, "first": first_plan, "last": last_plan}


def plan_by_position(
    rule: str, num_layers: int, skip_rate: float, protected: Sequence[int]
) -> list[bool] | None:
    """Keep mask [L] of a rule that measures nothing: uniform, first, last, or random:SEED.

    None for every other rule.
    """
    if rule.startswith("random:"):
        return random_plan(num_layers, skip_rate, protected, int(rule.partition(":")[2]))
    if rule in _BY_POSITION:
        return _BY_POSITION[rule](num_layers, skip_rate, protected)
    return None


def _free_layers(num_layers: int, protected: Sequence[int]) -> list[int]:
    return [i for i in range(num_layers) if i not in set(protected)]


def plan_without(num_layers: int, dropped: Sequence[int]) -> list[bool]:
    """Keep mask [L] without some layers."""
    return [i not in set(dropped) for i in range(num_layers)]


def importance_plan(
    importance: Sequence[float], skip_rate: float, protected: Sequence[int]
) -> list[bool]:
    """Keep mask [L] without the layers of least importance, or of least block influence."""
    count = layers_to_drop(skip_rate, len(importance), protected)
    free = _free_layers(len(importance), protected)
    return plan_without(len(importance), sorted(free, key=lambda i: (importance[i], i))[:count])


def greedy_order(
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    skip_rate: float,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[int]:
    """What `greedy_plan` drops, in turn; its plan of a lower rate drops the first of these."""
    num_layers = len(model.decoder_layers)
    protected = model.router_config.protected
    keep = torch.ones(num_layers, dtype=torch.bool)
    order: list[int] = []
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
        order.append(min(costs, key=lambda i: (costs[i], i)))
        keep[order[-1]] = False
    return order


def greedy_plan(
    model: Any, examples: Sequence[Any], collator: Collator, skip_rate: float, **options: Any
) -> list[bool]:
    """Keep mask [L]: layers are dropped one by one, each time the one that costs least then."""
    order = greedy_order(model, examples, collator, skip_rate, **options)
    return plan_without(len(model.decoder_layers), order)


def most_kept_plan(
    keep_share: Sequence[float], skip_rate: float, protected: Sequence[int]
) -> list[bool]:
    """Keep mask [L] of the layers that routers keep for most prompts."""
    return importance_plan(keep_share, skip_rate, protected)


def keep_share_of_run(folder: str | Path) -> list[float]:
    """Share of held-out prompts that kept each layer [L], of a finished run.

    Raises:
        FileNotFoundError: `folder` (a run or its checkpoint) has no health.json.
    """
    for candidate in (Path(folder), Path(folder) / "checkpoint", Path(folder).parent):
        if (candidate / "health.json").is_file():
            health = json.loads((candidate / "health.json").read_text(encoding="utf-8"))
            return [layer["kept"] for layer in health["layers"]]
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
    free = _free_layers(num_layers, protected)
    order = sorted(free, key=lambda i: (importance[i], i))
    count = layers_to_drop(skip_rate, num_layers, protected)
    step = 2 * spread / max(len(order) - 1, 1)
    biases = [spread] * num_layers
    for rank, layer in enumerate(order):
        biases[layer] = (rank - count + 0.5) * step  # the sign changes between count - 1 and count
    return biases
