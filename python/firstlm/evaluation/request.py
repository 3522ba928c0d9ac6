"""What an evaluation is asked for, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from firstlm import decode_paths
from firstlm.checkpoint import read_router_config
from firstlm.evaluation import methods as rules
from firstlm.evaluation.records import Method
from firstlm.settings import build_settings


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        examples: tested, of each task.
        validation: of each task, that thresholds and FiRST's most kept layers are found on.
        plan_examples: of these, of each task, that the plans of other controls are measured on.
        batch_size: of the hf path.
        max_new_tokens: of an answer; None: as long as a task's longest validation reference.
        max_length: longer examples (prompt + answer, tokens) are passed over.
        timing_prompts, repeats: of TPOT: every method decodes each of the prompts `repeats` times.
        new_tokens: of a timed answer.
        draws: of random plans.
    """

    examples: int = 300
    validation: int = 96
    plan_examples: int = 16
    batch_size: int = 16
    max_new_tokens: int | None = None
    max_length: int = 512
    timing_prompts: int = 8
    repeats: int = 3
    new_tokens: int = 32
    draws: int = 2

    def __post_init__(self) -> None:
        least = {"examples": 2, "validation": 2, "new_tokens": 2, "timing_prompts": 0}
        for name, value in vars(self).items():
            if value is not None and value < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}, got {value}")

    @classmethod
    def of(cls, given: Effort | Mapping[str, Any] | None) -> Effort:
        """An effort as it is, or one of a mapping, whose missing names take their defaults.

        Raises:
            ValueError: names that are no attributes, or values of another type or too small.
        """
        if isinstance(given, Effort):
            return given
        return build_settings(cls, given or {})


@dataclass(frozen=True)
class Request:
    """The arguments of `evaluate`, checked as far as files without weights tell."""

    first: dict[float | None, list[str]]
    trained: dict[str, dict[float | None, list[str]]]
    sources: list[Any]
    controls: tuple[str, ...]
    weights: tuple[str, ...]
    effort: Effort
    seed: int
    engine: str
    timing_engine: str | None
    precision: str | None
    dtype: torch.dtype | str | None

    def check(self) -> None:
        rules.check_folders(self.first, "checkpoints")
        for name, folders in self.trained.items():
            if not name.isidentifier() or name == "base" or name.startswith("shuffled"):
                raise ValueError(
                    f"trained {name!r}: give a rival a name of letters, digits and _, as static, "
                    "lora_only or one of your own; base is what was not trained, and shuffled… "
                    "are FiRST's plans for other prompts"
                )
            rules.check_folders(folders, f"trained {name}")
        rules.check_controls(self.controls, self.weights)
        if not self.sources:
            raise ValueError("data names no task: give at least one")
        quality_precision = self.precision if self.engine != "hf" else None
        decode_paths.check_options(self.engine, quality_precision, None)
        decode_paths.check_options(self.timing_engine or "hf", None, None)
        if (
            self.precision is not None
            and self.engine == "hf"
            and self.timing_engine in (None, "hf")
        ):
            raise ValueError("precision is of the native engine, and none is used")
        layers = {
            read_router_config(Path(folder)).num_layers
            for folders in (self.first, *self.trained.values())
            for found in folders.values()
            for folder in found
        }
        if len(layers) > 1:
            raise ValueError(f"the checkpoints are of models of {sorted(map(str, layers))} layers")

    def methods(self, skip_rates: Sequence[float] | None) -> list[Method]:
        rates = rules.rates_of(self.first, skip_rates)
        return rules.make_methods(
            self.first, self.trained, rates, self.controls, self.weights, self.effort.draws
        )
