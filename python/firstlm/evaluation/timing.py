"""Decode latency of the methods that share weights, taking turns with the plan that keeps all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from firstlm.decode_paths import Arm, DecodePath, PlanNotFollowed
from firstlm.evaluation.records import Timing
from firstlm.evaluation.store import digest
from firstlm.held_out import Example
from firstlm.measured_file import MeasuredFile
from firstlm.skip_plan import SkipPlan

FULL = "full"


def time_methods(
    path: DecodePath,
    examples: Sequence[Example],
    arms: Mapping[str, Sequence[Arm]],
    num_layers: int,
    *,
    new_tokens: int,
    repeats: int,
    folder: Path,
    key: Any,
    progress: Any,
) -> dict[str, Timing]:
    """Times every method on every example, all methods of a prompt in turns.

    Args:
        examples: prompts, at batch 1.
        arms: method key -> what it asks of each prompt.
        folder, key: where finished prompts are kept, and what they depend on.
        progress: called with 1 after every prompt.

    Raises:
        RuntimeError: arms produced different numbers of tokens.
        PlanNotFollowed: other layers ran than the plans say.
    """
    kept = MeasuredFile(folder, digest(key))
    full = {"skip_plan": SkipPlan.full(num_layers)}
    for index, example in enumerate(examples):
        own = {FULL: full} | {name: of_prompts[index] for name, of_prompts in arms.items()}
        # Arms are compared where they took turns, so a prompt is whole or done again.
        if kept.part("prompts").get(str(index), {}).keys() != own.keys():
            with path.any_plan():
                found = path.time(example, own, new_tokens, repeats)
                for name, arm in own.items():
                    _check_layers(name, found[name]["layers_per_token"], path, example, arm)
            kept.part("prompts")[str(index)] = found
            kept.save()
        progress(1)
    parts = [kept.part("prompts")[str(index)] for index in range(len(examples))]
    return {
        name: _timing(path.facts, [part[name] for part in parts], [part[FULL] for part in parts],
                      repeats, new_tokens)
        for name in arms
    }  # fmt: skip


def _check_layers(name: str, counted: float, path: DecodePath, example: Example, arm: Arm) -> None:
    plan = arm.get("skip_plan")
    layers = int(path.plans([example], arm).sum()) if plan is None else len(plan.kept)
    if counted != layers:
        raise PlanNotFollowed(
            f"{name}: a timed token went through {counted} layers, and its plan keeps {layers}"
        )


def _timing(
    facts: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
    full: Sequence[Mapping[str, Any]],
    repeats: int,
    new_tokens: int,
) -> Timing:
    def every(parts: Sequence[Mapping[str, Any]], name: str) -> list[float]:
        return [value for part in parts for value in part[name]]

    read = [sum(part["bytes_per_token"] for part in parts) for parts in (own, full)]
    return Timing(
        engine=facts["engine"],
        precision=facts["precision"],
        threads=facts["threads"],
        prompts=len(own),
        repeats=repeats,
        new_tokens=new_tokens,
        tpot_ms=every(own, "tpot_ms"),
        ttft_ms=every(own, "ttft_ms"),
        full_tpot_ms=every(full, "tpot_ms"),
        full_ttft_ms=every(full, "ttft_ms"),
        ideal_speedup=read[1] / read[0],
        kv_bytes=[part["kv_bytes"] for part in own],
        full_kv_bytes=[part["kv_bytes"] for part in full],
    )


def arms_of(name: str, rate: float, keep: torch.Tensor, prompts: Sequence[int]) -> list[Arm]:
    """What a method asks of each timed prompt: FiRST and `exact` routers, everything else a plan.

    Args:
        keep: bool [N, L], the method's plans.
        prompts: indices of the timed examples.
    """
    if name == "first":
        return [{"budget": rate}] * len(prompts)
    if name == "exact":
        return [{"budget": rate, "budget_mode": "exact"}] * len(prompts)
    return [{"skip_plan": SkipPlan.from_mask(keep[i])} for i in prompts]
