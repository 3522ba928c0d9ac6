"""Self-checks of an evaluation: each one raises, or says what it found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from firstlm.decode_paths import DecodePath
from firstlm.held_out import Example
from firstlm.settings import flatten
from firstlm.train_config import TrainConfig

# Settings that decide which examples a step sees.
_EXAMPLES = (
    "data.train", "data.max_length", "data.max_examples", "batch_size", "accumulation",
    "group_by_length",
)  # fmt: skip


class CheckFailed(RuntimeError):
    """Figures would not mean what they seem to mean."""


def check_skipping_matters(
    path: DecodePath, examples: Sequence[Example], protected: Sequence[int], num_layers: int
) -> str:
    """Without any unprotected layer the loss is another one.

    Raises:
        CheckFailed: it is not: plans do not reach the model.
    """
    keep = torch.zeros(num_layers, dtype=torch.bool)
    keep[list(protected) or [num_layers - 1]] = True
    plans = [_plan(keep), _plan(torch.ones_like(keep))]
    with path.any_plan():
        without, full = (path.losses(examples, {"skip_plan": plan}) for plan in plans)
    losses = [sum(loss for loss, _ in part) for part in (without, full)]
    tokens = sum(count for _, count in full)
    if not bool(keep.all()) and losses[0] == losses[1]:
        raise CheckFailed(
            "a plan that skips every unprotected layer leaves the loss as it is "
            f"({losses[1] / tokens:.4f} nats a token): plans do not reach the model"
        )
    return f"{losses[1] / tokens:.3f} -> {losses[0] / tokens:.3f} nats a token"


def check_routed_plans(
    path: DecodePath, examples: Sequence[Example], keep: torch.Tensor, rate: float
) -> str:
    """Prompts that are read by the routers get the plans `keep` [N, L] that are measured.

    Raises:
        CheckFailed: they do not.
    """
    own = path.plans(examples, {"budget": rate})
    if not torch.equal(own, keep):
        wrong = int((own != keep).any(1).sum())
        raise CheckFailed(
            f"the routers give {wrong} of {len(keep)} prompts another plan than was measured"
        )
    return f"{len(keep)} prompts"


def compare_timed_plans(
    path: DecodePath, examples: Sequence[Example], keep: torch.Tensor, rate: float
) -> str:
    """How many of the timed prompts get, from the weights that are timed, the plans that were
    scored. Rounded weights may tip a router that lies near its threshold: that is no error, but
    quality and speed are then of different plans."""
    same = int((path.plans(examples, {"budget": rate}) == keep).all(1).sum())
    return f"{same} of {len(keep)} prompts"


def optimizer_steps(checkpoint: str | Path) -> int | None:
    """Steps that a run took over all phases; None where its folder does not say."""
    try:
        result = json.loads((Path(checkpoint).parent / "result.json").read_text(encoding="utf-8"))
        return sum(phase["steps"] for phase in result["phases"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_steps(first: str, controls: Mapping[str, str]) -> str:
    """Trained controls took FiRST's number of optimizer steps, on the same examples.

    Args:
        first: FiRST's checkpoint.
        controls: method key -> checkpoint.

    Raises:
        CheckFailed: one took another number, or others.
    """
    own = optimizer_steps(first)
    unknown = []
    for name, folder in controls.items():
        steps = optimizer_steps(folder)
        if steps is None or own is None:
            unknown.append(name)
        elif steps != own:
            raise CheckFailed(
                f"{name} was trained for {steps} optimizer steps and FiRST for {own}: a control "
                "gets FiRST's number over all phases"
            )
        if other := _other_settings(Path(first).parent, Path(folder).parent):
            raise CheckFailed(f"{name} was trained on other examples than FiRST: {other}")
    if own is None:
        return f"unknown: no result.json beside {first}"
    return f"{own} steps" + (f"; unknown of {', '.join(unknown)}" if unknown else "")


def _other_settings(first: Path, control: Path) -> str:
    """What decides which examples a step sees, where the configs of two runs differ in it."""
    files = [run / "config.yaml" for run in (first, control)]
    if not all(file.is_file() for file in files):
        return ""
    own, other = (dict(flatten(TrainConfig.from_yaml(file).to_dict())) for file in files)
    return ", ".join(
        f"{name} {other[name]} instead of {own[name]}"
        for name in _EXAMPLES
        if other[name] != own[name]
    )


def _plan(keep: torch.Tensor) -> Any:
    from firstlm.skip_plan import SkipPlan

    return SkipPlan.from_mask(keep)
