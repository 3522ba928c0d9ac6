"""Which methods an evaluation compares, and the layers that each of them keeps for each prompt.

base                 nothing skipped, not finetuned
lora_only            nothing skipped
first                FiRST: its routers, at thresholds for the asked rate
shuffled             FiRST's plans dealt to other prompts
shuffled_in_task     … to other prompts of the same task
exact                FiRST's routers, under which every prompt skips as many layers
length               plans from the prompt's length alone, fitted to FiRST's
most_kept            the layers that FiRST keeps most often, for all prompts
greedy               layers dropped one by one, each time the one that costs least then
static               the better of these two on validation examples
random, uniform, block_influence, first_layers, last_layers
                     of controls.py; the last two drop the first or last unprotected layers
early_exit           the first layers alone, protected or not
early_exit_confidence
                     every token leaves where it is predicted surely enough, see early_exit.py

Every rule sees validation examples only. Letters: N examples, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from firstlm import controls
from firstlm.budget import check_rates, nearest_rate
from firstlm.checkpoint import (
    CONFIG_NAME,
    SHIPPED,
    WEIGHTS_NAME,
    find_checkpoint,
    read_router_config,
)
from firstlm.data import PromptAnswerCollator
from firstlm.evaluation.records import Method
from firstlm.health import derangement
from firstlm.held_out import Example, rows_of
from firstlm.layer_importance import measure_block_influence
from firstlm.scoring import score
from firstlm.train_config import TrainConfig

UNSKIPPED = ("base", "lora_only")
FROM_FIRST = ("exact", "shuffled", "shuffled_in_task", "length", "most_kept")
MEASURED = ("greedy", "static", "block_influence")
BY_POSITION = ("random", "uniform", "first_layers", "last_layers", "early_exit")
CONFIDENT_EXIT = "early_exit_confidence"
CONTROLS = (*UNSKIPPED, *FROM_FIRST, *MEASURED, *BY_POSITION, CONFIDENT_EXIT)
DEFAULT_CONTROLS = ("base", "lora_only", "shuffled", "static", "random", "uniform")
WEIGHTS = ("first", "base")
_NEIGHBOURS = 15  # validation prompts of like length that vote on a plan

# Folders of one method, by skip rate where it is given (None: as the folder says); seeds in order.
Folders = Mapping[float | None, Sequence[str]]


def folders_of(given: Any) -> dict[float | None, list[str]]:
    """A path, a list of paths (a seed each), or a dict from skip rates to either, as a dict.

    "embedded-first" becomes the folder that ships with firstlm.
    """
    if not isinstance(given, Mapping):
        given = {None: given}
    found = {}
    for rate, names in given.items():
        names = names if isinstance(names, (list, tuple)) else [names]
        found[rate] = [str(find_checkpoint(n) if n == SHIPPED else n) for n in names]
    return found


def check_folders(folders: Folders, what: str) -> None:
    """Raises ValueError for what is no folder of a whole checkpoint."""
    if not any(folders.values()):
        raise ValueError(f"{what}: at least one checkpoint is needed")
    for found in folders.values():
        for folder in map(Path, found):
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                if not (folder / name).is_file():
                    raise ValueError(f"{what}: {folder} is no folder of a checkpoint (no {name})")
        if len({Path(folder).resolve() for folder in found}) < len(found):
            raise ValueError(f"{what}: {', '.join(found)}: every training seed has its own folder")


def trained_rate(folder: str | Path) -> float | None:
    """The skip rate that a checkpoint was trained for, as its files say; None if they do not."""
    folder = Path(folder)
    for file in (folder / "health.json", folder.parent / "health.json"):
        if file.is_file():
            return float(json.loads(file.read_text(encoding="utf-8"))["skip_rate_asked"])
    rates = list(read_router_config(folder).calibration)
    return float(rates[0]) if len(rates) == 1 else None


def training_seed(folder: str | Path) -> int | None:
    """The seed that a checkpoint was trained with; None where its run's config is not there."""
    try:
        return TrainConfig.from_yaml(Path(folder).parent / "config.yaml").seed
    except (OSError, ValueError):
        return None


def rates_of(first: Folders, asked: Sequence[float] | None) -> list[float]:
    """The skip rates of an evaluation, ascending.

    Raises:
        ValueError: none are asked and the checkpoints do not say, or one cannot be reached; or
            checkpoints are given as seeds of one training that were trained for several rates, or
            one for no rate.
    """
    rates = {rate for rate in first if rate is not None} | set(asked or ())
    for folders in first.values():
        known = {folder: trained_rate(folder) for folder in folders}
        if len(set(known.values()) - {None}) > 1:
            each = ", ".join(f"{folder}: {rate}" for folder, rate in known.items())
            raise ValueError(
                f"checkpoints given together are seeds of one training, and these were trained for "
                f"several skip rates ({each}): name each one's, RATE=FOLDER"
            )
    if None in first and rates and rates <= first.keys():
        raise ValueError(
            f"{', '.join(first[None])} is of no skip rate: {', '.join(f'{r:g}' for r in rates)} "
            "have checkpoints of their own; name its rate, RATE=FOLDER"
        )
    if not rates:
        found = [trained_rate(folder) for folder in first[None]]
        if None in found or 0.0 in found:
            raise ValueError(
                f"{first[None][0]} does not say for which skip rate it was trained: name skip_rates"
            )
        rates = {rate for rate in found if rate is not None}
    for folder in (f for found in first.values() for f in found):
        config = read_router_config(Path(folder))
        if config.num_layers is None:
            raise ValueError(f"{folder}: {CONFIG_NAME} names no num_layers: save the model again")
        check_rates(sorted(rates), config.num_layers, config.resolved(config.num_layers).protected)
    if 0.0 in rates:
        raise ValueError("skip_rates holds 0: lora_only and base skip nothing")
    return sorted(rates)


def check_controls(names: Iterable[str], weights: Iterable[str]) -> None:
    """Raises ValueError for names that are none of CONTROLS and WEIGHTS, or no weights."""
    for name in names:
        if name not in CONTROLS:
            raise ValueError(f"unknown control {name!r}: {', '.join(CONTROLS)}")
    weights = list(weights)
    if not weights or not set(weights) <= set(WEIGHTS):
        raise ValueError(f"weights of controls are {' or '.join(WEIGHTS)} or both, got {weights}")


def make_methods(
    first: Folders,
    trained: Mapping[str, Folders],
    rates: Sequence[float],
    names: Sequence[str],
    weights: Sequence[str],
    draws: int,
) -> list[Method]:
    """The methods, FiRST's own weights first.

    Args:
        first: FiRST's checkpoints.
        trained: name of a control -> checkpoints that `firstlm train control=…` made.
        names: controls without training of their own.
        weights: whose weights these run on.
        draws: of random plans, at least.

    Raises:
        ValueError: a checkpoint that no rate fits.
    """
    found: list[Method] = []
    seeds = {rate: list(first.get(rate) or first.get(None) or ()) for rate in rates}
    for rate in rates:
        if not seeds[rate]:
            raise ValueError(f"no checkpoint is given for the skip rate {rate}")
        for seed, folder in enumerate(seeds[rate]):
            found.append(Method("first", "first", rate, seed, folder))
    if "lora_only" in names and "first" in weights:
        for seed, folder in enumerate(seeds[rates[0]]):
            found.append(Method("lora_only", "first", 0.0, seed, folder))
    if "base" in names:
        found.append(Method("base", "base", 0.0))
    skipping = [name for name in names if name not in UNSKIPPED]
    for rate in rates:
        folders = seeds[rate]
        for name in skipping:
            count = max(draws, len(folders)) if name == "random" else len(folders)
            if "first" in weights:
                found += [
                    Method(name, "first", rate, seed, folders[seed % len(folders)])
                    for seed in range(count)
                ]
            if "base" in weights:
                count = draws if name == "random" else 1
                found += [Method(name, "base", rate, seed) for seed in range(count)]
    if "base" in weights:
        found += [Method("first", "base", rate) for rate in rates]
    for name, folders in trained.items():
        found += _trained_methods(name, folders, rates)
    _check_seeds(found)
    return found


def _check_seeds(methods: Sequence[Method]) -> None:
    """Raises ValueError where FiRST would be paired with another seed of a rival than its own.

    Draws of random layers are no seeds, and nothing is known of checkpoints without their run.
    """
    own = {
        (m.skip_rate_asked, m.seed): m.checkpoint
        for m in methods
        if (m.name, m.weights) == ("first", "first")
    }
    several = {rate for rate, seed in own if seed > 0}
    for method in methods:
        place = method.skip_rate_asked, method.seed
        paired = method.weights == "trained" and method.name != "random" and place in own
        if not paired or method.skip_rate_asked not in several:
            continue
        seeds = [training_seed(folder) for folder in (own[place], method.checkpoint)]
        if None not in seeds and seeds[0] != seeds[1]:
            raise ValueError(
                f"{method.checkpoint} was trained with seed {seeds[1]}, and stands where FiRST has "
                f"seed {seeds[0]} ({own[place]}): name checkpoints of the same seeds, in one order"
            )


def _trained_methods(name: str, folders: Folders, rates: Sequence[float]) -> list[Method]:
    found: dict[float, list[str]] = {}
    for rate, paths in folders.items():
        for path in paths:
            found.setdefault(_rate_among(name, path, rate, rates), []).append(path)
    return [
        Method(name, "trained", rate, seed, path)
        for rate, paths in found.items()
        for seed, path in enumerate(paths)
    ]


def _rate_among(name: str, folder: str, given: float | None, rates: Sequence[float]) -> float:
    """The asked rate that a trained control belongs to."""
    if name == "lora_only":
        return 0.0
    own = trained_rate(folder) if given is None else given
    if own is None:
        raise ValueError(
            f"{folder} does not say for which skip rate it was trained: name it, {name}=RATE=FOLDER"
        )
    num_layers = read_router_config(Path(folder)).num_layers or 1
    nearest = nearest_rate(rates, own, num_layers)
    if nearest is None:
        raise ValueError(
            f"{name}: {folder} is of a skip rate of {own:g}, and "
            f"{', '.join(f'{rate:g}' for rate in rates)} are compared"
        )
    return nearest


@dataclass(frozen=True)
class FirstPlans:
    """FiRST's own plans at one rate: thresholds [L], keep masks [N, L] of both parts of data.

    `exact` [N, L], of the test examples, under an exact budget; None where no method asks for it.
    """

    thresholds: list[float]
    validation: torch.Tensor
    test: torch.Tensor
    exact: torch.Tensor | None = None

    @property
    def skip_rate(self) -> float:
        """On validation examples."""
        return 1.0 - self.validation.double().mean().item()

    @property
    def keep_share(self) -> list[float]:
        """Share of validation prompts that keep each layer."""
        return self.validation.double().mean(0).tolist()


def plans_from_first(
    name: str, first: FirstPlans, validation: Sequence[Example], test: Sequence[Example], seed: int,
    protected: Sequence[int], rate: float,
) -> torch.Tensor:  # fmt: skip
    """The keep mask [N, L] of a control that FiRST's own plans make."""
    if name == "exact":
        assert first.exact is not None
        return first.exact
    if name == "shuffled":
        return first.test[derangement(len(test), seed)]
    if name == "shuffled_in_task":
        mask = first.test.clone()
        for task in dict.fromkeys(example.task for example in test):
            rows = torch.tensor([i for i, e in enumerate(test) if e.task == task])
            mask[rows] = first.test[rows[derangement(len(rows), seed)]]
        return mask
    if name == "length":
        return vote_by_length(
            first.validation, [len(e.prompt_ids) for e in validation],
            [len(e.prompt_ids) for e in test],
        )  # fmt: skip
    assert name == "most_kept"
    plan = controls.most_kept_plan(first.keep_share, rate, protected)
    return torch.tensor(plan).expand(len(test), -1)


def vote_by_length(
    plans: torch.Tensor, lengths: Sequence[int], asked: Sequence[int]
) -> torch.Tensor:
    """Plans for prompts of which only the length is known.

    The prompts of nearest length vote: as many layers are kept as they keep on average, the ones
    that they keep most often.

    Args:
        plans: bool [M, L], of known prompts.
        lengths: of these, tokens.
        asked: lengths of N other prompts.

    Returns:
        bool [N, L].
    """
    known = torch.tensor(lengths)
    found = {}
    for length in set(asked):
        distance = (known - length).abs()
        near = distance.argsort(stable=True)[:_NEIGHBOURS]
        share = plans[near].double().mean(0)  # [L]
        kept = share.argsort(descending=True, stable=True)[: round(share.sum().item())]
        mask = torch.zeros(plans.shape[1], dtype=torch.bool)
        mask[kept] = True
        found[length] = mask
    return torch.stack([found[length] for length in asked])


def plan_by_position(
    name: str, num_layers: int, rate: float, protected: Sequence[int], seed: int
) -> list[bool]:
    """Keep mask [L] of a rule that looks at no example."""
    if name == "early_exit":
        kept = num_layers - controls.layers_to_drop(rate, num_layers, protected)
        return [layer < kept for layer in range(num_layers)]
    rule = {"random": f"random:{seed}", "first_layers": "first", "last_layers": "last"}
    plan = controls.plan_by_position(rule.get(name, name), num_layers, rate, protected)
    assert plan is not None
    return plan


def greedy_order(
    model: Any, examples: Sequence[Example], tokenizer: Any, rate: float, progress: Any
) -> list[int]:
    """The layers that greedy drops, in turn, up to a rate, measured on the weights that run it."""
    collator = PromptAnswerCollator(tokenizer)
    return controls.greedy_order(model, rows_of(examples), collator, rate, progress=progress)


def block_influence(
    model: Any, examples: Sequence[Example], tokenizer: Any, progress: Any
) -> list[float]:
    """How far each layer [L] turns the hidden state of the weights that will run without it."""
    collator = PromptAnswerCollator(tokenizer)
    return measure_block_influence(model, rows_of(examples), collator, progress=progress)


def better_plan(
    plans: Mapping[str, list[bool]], model: Any, examples: Sequence[Example], tokenizer: Any
) -> str:
    """The name of the plan under which the examples have less cross-entropy."""
    rows, collator = rows_of(examples), PromptAnswerCollator(tokenizer)
    losses = {
        name: score(model, rows, collator, keep_mask=torch.tensor(plan)).cross_entropy
        for name, plan in plans.items()
    }
    return min(losses, key=lambda name: losses[name])
