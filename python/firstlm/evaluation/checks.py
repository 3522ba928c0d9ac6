"""Self-checks of an evaluation: each one raises, or says what it found."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from firstlm.checkpoint import name_of
from firstlm.decode_paths import DecodePath
from firstlm.held_out import Example
from firstlm.settings import flatten
from firstlm.skip_plan import SkipPlan, mask_to_plans
from firstlm.train_config import TrainConfig

# Settings that decide which examples a step sees.
_EXAMPLES = (
    "data.train", "data.max_length", "data.max_examples", "batch_size", "accumulation",
    "group_by_length",
)  # fmt: skip
# Settings, or sections, in which rivals should be trained alike; where they are not, it is said.
_RECIPE = ("phases", "dtype", "precision", "sequence_average", "warmup.", "lora.")
_SAME_LOSS = 1e-2  # relative; 16-bit weights add up in another order


class CheckFailed(RuntimeError):
    """Figures would not mean what they seem to mean."""


def check_skipping_matters(
    path: DecodePath, examples: Sequence[Example], protected: Sequence[int], num_layers: int
) -> str:
    """Without any unprotected layer the loss is another one.

    Raises:
        CheckFailed: it is not, as plans do not reach the model, or it is no number.
    """
    keep = torch.zeros(num_layers, dtype=torch.bool)
    keep[list(protected) or [num_layers - 1]] = True
    plans = [SkipPlan.from_mask(keep), SkipPlan.full(num_layers)]
    with path.any_plan():
        without, full = (path.losses(examples, {"skip_plan": plan}) for plan in plans)
    losses = [sum(loss for loss, _ in part) for part in (without, full)]
    tokens = sum(count for _, count in full)
    if not all(map(math.isfinite, losses)):
        raise CheckFailed(f"the answers have losses of {losses} nats: the weights are broken")
    if not bool(keep.all()) and losses[0] == losses[1]:
        raise CheckFailed(
            "a plan that skips every unprotected layer leaves the loss as it is "
            f"({losses[1] / tokens:.4f} nats a token): plans do not reach the model"
        )
    return f"{losses[1] / tokens:.3f} -> {losses[0] / tokens:.3f} nats a token"


def check_routed_plans(
    path: DecodePath, examples: Sequence[Example], keep: torch.Tensor, rate: float
) -> str:
    """Prompts that are read by the routers get the plans `keep` [N, L] that are measured, and
    answers the losses that they have under these plans.

    Raises:
        CheckFailed: they do not.
    """
    own = path.plans(examples, {"budget": rate})
    if not torch.equal(own, keep):
        wrong = int((own != keep).any(1).sum())
        raise CheckFailed(
            f"the routers give {wrong} of {len(keep)} prompts another plan than was measured"
        )
    arms = {"budget": rate}, {"skip_plan": mask_to_plans(keep)}
    both = zip(*(path.losses(examples, arm) for arm in arms), strict=True)
    for example, ((routed, _), (planned, _)) in zip(examples, both, strict=True):
        if not math.isclose(routed, planned, rel_tol=_SAME_LOSS):
            raise CheckFailed(
                f"{example.id}: the answer's loss is {routed:.4f} nats where routers choose the "
                f"layers and {planned:.4f} under the plan they choose"
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
    phases = _steps_of_phases(checkpoint)
    return None if phases is None else sum(phases.values())


def _steps_of_phases(checkpoint: str | Path) -> dict[str, int] | None:
    try:
        result = json.loads((Path(checkpoint).parent / "result.json").read_text(encoding="utf-8"))
        return {phase["name"]: phase["steps"] for phase in result["phases"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _has_warmup(checkpoint: str | Path) -> bool:
    return "warmup" in (_steps_of_phases(checkpoint) or {})


def check_steps(first: str, controls: Mapping[str, str]) -> str:
    """Trained controls took FiRST's number of optimizer steps, on the same examples.

    Args:
        first: FiRST's checkpoint.
        controls: method key -> checkpoint.

    Returns:
        The number, and where controls were trained in another way otherwise.

    Raises:
        CheckFailed: one took another number, or others.
    """
    own = optimizer_steps(first)
    unknown, otherwise = [], []
    for name, folder in controls.items():
        steps = optimizer_steps(folder)
        if steps is None or own is None:
            unknown.append(name)
        elif steps != own:
            raise CheckFailed(
                f"{name} was trained for {steps} optimizer steps and FiRST for {own}: a control "
                "gets FiRST's number over all phases"
            )
        runs = Path(first).parent, Path(folder).parent
        if other := _other_settings(*runs, _EXAMPLES):
            raise CheckFailed(f"{name} was trained on other examples than FiRST: {other}")
        if other := _other_settings(*runs, _RECIPE):
            otherwise.append(f"{name}: {other}")
        if _has_warmup(first) and not _has_warmup(folder):
            otherwise.append(f"{name}: no warm-up")
    if own is None:
        return f"unknown: no result.json beside {name_of(first)}"
    found = [f"{own} steps", *([f"unknown of {', '.join(unknown)}"] if unknown else []), *otherwise]
    return "; ".join(found)


def run_settings(checkpoints: Iterable[str | None]) -> dict[str, str]:
    """Checkpoint -> settings of its run that are not the defaults, where its folder says them."""
    default = TrainConfig()
    found = {}
    for folder in dict.fromkeys(checkpoints):
        if folder is not None and (file := Path(folder).parent / "config.yaml").is_file():
            config = TrainConfig.from_yaml(file)
            values = dict(flatten(config.to_dict()))
            found[folder] = " ".join(f"{n}={values[n]}" for n in config.difference(default))
    return found


def _other_settings(first: Path, control: Path, names: tuple[str, ...]) -> str:
    """In which of the settings, or sections, the configs of two runs differ."""
    files = [run / "config.yaml" for run in (first, control)]
    if not all(file.is_file() for file in files):
        return ""
    own, other = (dict(flatten(TrainConfig.from_yaml(file).to_dict())) for file in files)
    if any("warmup" not in config["phases"] for config in (own, other)):
        names = tuple(name for name in names if name != "warmup.")
    return ", ".join(
        f"{name} {other[name]} instead of {own[name]}"
        for name in own
        if name.startswith(names) and other[name] != own[name]
    )
