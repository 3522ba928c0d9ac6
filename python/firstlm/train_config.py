"""Every setting of a finetuning run, once: YAML, command-line flags and Python share these classes.

    config = TrainConfig.from_yaml("configs/quickstart.yaml", overrides=["lora.steps=100"])
    config = TrainConfig.from_dict({"base": "embedded", "skip_rate": 0.25})
    config.validate()          # every complaint in one ValueError, before any work starts

`config_fields()` lists name, type, default and help of each setting, for the command's help.
Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from firstlm.atomic import write_text
from firstlm.settings import ConfigField, build_settings, fields_of, flatten, raise_all, setting
from firstlm.train_config_check import PHASES, complaints_about

LrSchedule = Literal["constant", "linear", "cosine"]


@dataclass
class DataConfig:
    """What is trained on: names of shipped corpora, JSONL files, or a list of them (a mixture)."""

    train: str | list[str] = setting(
        "debian-synopsis", "corpus name, JSONL path, or a list (mixture)"
    )
    validation: str | list[str] | None = setting(
        None, "as train; default: the validation split of train's corpora"
    )
    test: str | list[str] | None = setting(
        None, "as train; default: the test split of train's corpora"
    )
    prompt_column: str | None = setting(None, "the prompts' column; default: prompt")
    answer_column: str | None = setting(None, "the answers' column; default: answer")
    messages_column: str | None = setting(
        None, "the column of chats, in place of prompts and answers; default: messages"
    )
    max_length: int = setting(
        512, "longer examples (prompt + answer, tokens) are dropped and counted"
    )
    max_examples: int | None = setting(None, "use only the first so many training examples")
    validation_prompts: int = setting(
        128, "validation prompts that thresholds, importance and curves are measured on"
    )
    test_prompts: int = setting(200, "held-out prompts of the health report")


@dataclass
class RouterSettings:
    """The routers' shape; the names are RouterConfig's."""

    pooling: Literal["mean", "windowed_mean", "last"] = setting(
        "mean", "prompt features of a router"
    )
    windows: int = setting(1, "windows of windowed_mean")
    head: Literal["linear", "mlp"] = setting("linear", "linear, or a bottleneck MLP")
    bottleneck: int = setting(64, "width of the MLP")
    normalize: bool = setting(True, "scale the pooled features to unit mean square")
    prefill: Literal["route", "full"] = setting(
        "route", "route: routers read the states left by earlier skips; full: unskipped states"
    )
    protected: list[int] = setting(
        [0, 1, -1], "layers that are never skipped; negative from the end"
    )
    keep_bias: float | Literal["importance", "plans"] = setting(
        "plans",
        "initial logit of keeping; `importance`: from each layer's measured CE loss; `plans`: the "
        "best plan of each task is searched, and routers start as classifiers of these plans",
    )
    keep_bias_spread: float = setting(
        3.0,
        "importance: logits span +-spread around the one that gives skip_rate; plans: they aim at "
        "+-spread",
    )


@dataclass
class DistillConfig:
    """Matching the same weights unskipped, at the answer positions; no second copy in memory."""

    weight: float = setting(0.0, "weight of the KL term; 0 turns it off")
    temperature: float = setting(1.0, "softmax temperature of teacher and student")
    teacher: Literal["adapted", "base"] = setting(
        "adapted", "unskipped with the adapter, or without"
    )


@dataclass
class PhaseConfig:
    """What the three phases share."""

    steps: int = setting(100, "optimizer steps")
    epochs: float | None = setting(None, "passes over the training examples, in place of steps")
    lr: float = setting(1e-3, "peak learning rate")
    lr_schedule: LrSchedule = setting("linear", "decay after the first steps")
    lr_warmup: float = setting(0.05, "share of the steps with rising learning rate")
    weight_decay: float = setting(0.0, "AdamW's weight decay")


@dataclass
class WarmupConfig(PhaseConfig):
    """LoRA with random layer drop, so that the model survives skipping before routers learn."""

    steps: int = setting(150, "optimizer steps")
    lr_schedule: LrSchedule = setting("constant", "decay after the first steps")
    drop_rate_start: float = setting(0.1, "expected share of dropped layers at the first step")
    drop_rate_end: float | None = setting(None, "... once the ramp is over; default: skip_rate")
    drop_ramp: float = setting(0.3, "share of the steps over which the rate rises (linearly)")
    drop_rate_spread: float = setting(
        0.3, "each sequence's rate is drawn from rate * (1 - spread .. 1 + spread)"
    )
    drop_weights: Literal["uniform", "importance"] = setting(
        "importance", "how likely each layer is to be dropped: alike, or unimportant ones more"
    )
    drop_temperature: float = setting(
        0.3, "importance: weight = exp(-CE increase / temperature); large is uniform"
    )
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class RoutersConfig(PhaseConfig):
    """Phase 1: routers alone. loss = CE + alpha * kept share + lambda * ||router||^2."""

    steps: int = setting(30, "optimizer steps")
    lr: float = setting(3e-4, "peak learning rate of the routers")
    gate: Literal["soft", "straight_through"] = setting(
        "straight_through", "how gates act while training"
    )
    penalty: Literal["multiplier", "fixed"] = setting(
        "multiplier", "multiplier: alpha is steered to skip_rate; fixed: alpha stays"
    )
    alpha: float = setting(0.0, "weight of the kept share (fixed), or its first value (multiplier)")
    alpha_range: list[float] = setting([-20.0, 20.0], "bounds of the multiplier")
    multiplier_lr: float = setting(0.5, "change of alpha per step per unit of rate missed")
    skip_rate_start: float | None = setting(
        None, "target at the first step; default: skip_rate throughout"
    )
    skip_rate_ramp: float = setting(
        0.5, "share of the steps over which the target moves (linearly)"
    )
    hold: Literal["none", "shared", "per_layer"] = setting(
        "none", "thresholds follow the asked rate while routers train, see lora.hold"
    )
    hold_window: int = setting(256, "sequences over which thresholds follow")
    lambda_norm: float = setting(1e-4, "weight of the squared norm of the router weights")
    train_adapter: bool = setting(False, "train LoRA along with the routers (not the paper's way)")
    adapter_lr: float = setting(5e-4, "learning rate of that LoRA")
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class LoraPhaseConfig(PhaseConfig):
    """Phase 2: LoRA with frozen routers and hard gates. Its adapter is that of all phases."""

    steps: int = setting(620, "optimizer steps")
    lr: float = setting(2e-3, "peak learning rate of the adapter")
    lr_schedule: LrSchedule = setting("cosine", "decay after the first steps")
    rank: int = setting(16, "LoRA rank")
    alpha: float = setting(32.0, "LoRA alpha")
    dropout: float = setting(0.0, "LoRA dropout")
    targets: str | list[str] = setting(
        "all-linear", "module names, a regular expression, or all-linear"
    )
    exclude: str | list[str] | None = setting(".*router.*", "modules that never get LoRA")
    hold: Literal["none", "shared", "per_layer"] = setting(
        "per_layer",
        "thresholds while LoRA trains: stay (none), move together to the asked rate (shared), or "
        "each keeps its layer's share (per_layer)",
    )
    hold_window: int = setting(256, "sequences over which thresholds follow")
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class TrainConfig:
    """One finetuning run: warm-up -> routers (phase 1) -> LoRA (phase 2)."""

    base: str = setting(
        "embedded", "model: folder, hub id, GGUF, `embedded`, or a firstlm checkpoint"
    )
    checkpoint: str | None = setting(
        None, "firstlm checkpoint whose routers and adapter to start from"
    )
    output_dir: str = setting("runs/train", "where everything of this run is written")
    seed: int = setting(0, "seeds data order, initial weights, dropout and layer drop")
    skip_rate: float = setting(0.25, "asked share of skipped layers, of all layers")
    phases: list[str] = setting(list(PHASES), "which phases run, in this order")
    warmup_from: str | None = setting(
        None,
        "folder of a run that has finished the same warm-up (seed, data, settings), which is taken "
        "over instead of trained again",
    )
    control: Literal["none", "lora_only", "static", "length"] = setting(
        "none",
        "train a rival for as many steps: LoRA without skipping, with one static plan, or with "
        "plans searched for classes of prompt lengths as FiRST's are for tasks",
    )
    control_plan: str | list[int] = setting(
        "importance",
        "static: kept layers, or where they come from: uniform, random:SEED, first or last "
        "(dropped), block_influence, importance, greedy, search (swaps, as "
        "router.keep_bias=plans starts), or most_kept:FOLDER (a firstlm run or checkpoint)",
    )
    batch_size: int = setting(8, "sequences per process and forward pass")
    accumulation: int = setting(1, "forward passes per optimizer step")
    group_by_length: bool = setting(
        True, "examples of like length share an optimizer step: less padding"
    )
    sequence_average: float = setting(
        0.0, "share of the CE that averages over sequences first; the rest over all answer tokens"
    )
    precision: Literal["f32", "bf16"] = setting("f32", "bf16: autocast; parameters stay as loaded")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "auto", "the base's weights in memory; auto: bfloat16 where it is fast, else float32"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = setting(
        None, "transformers' attention; default: its own choice, or eager for bfloat16 on a CPU"
    )
    device: str | None = setting(None, "cpu, cuda, ...; default: what there is")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, more time")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0: never")
    importance_examples: int = setting(
        32, "validation examples that layer importance is measured on"
    )
    plan_search_examples: int = setting(
        64, "plans: training examples of each task that whole plans are measured on"
    )
    plan_search_common: str | None = setting(
        None,
        "plans: run folder of a static control, whose plan tasks depart from; default: searched",
    )
    plan_search_by: Literal["prompts", "tokens"] = setting(
        "prompts", "plans: what counts alike in the loss that the search lowers"
    )
    plan_search_trade: int = setting(
        1, "plans: how many layers more or fewer than the common plan a task may skip"
    )
    plan_search_trials: int = setting(24, "plans: swaps of two layers that are tried for each task")
    calibrate_rates: list[float] = setting(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "rates that generate(budget=...) finds in the checkpoint"
    )
    eval_every: int = setting(
        0, "steps between evaluations on validation prompts; 0: only at the end"
    )
    log_every: int = setting(1, "steps between lines of train_log.jsonl")
    save_every: int = setting(50, "steps between checkpoints; 0: only at the end of a phase")
    save_total_limit: int = setting(2, "checkpoints kept of each phase")
    resume: bool = setting(True, "go on with an interrupted run found in output_dir")
    overwrite: bool = setting(
        False,
        "with resume=false: delete the run found in output_dir, finished or not, once the new one "
        "has loaded its model and data and is about to start",
    )
    progress: bool = setting(True, "progress bars")
    data: DataConfig = field(default_factory=DataConfig)
    router: RouterSettings = field(default_factory=RouterSettings)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    routers: RoutersConfig = field(default_factory=RoutersConfig)
    lora: LoraPhaseConfig = field(default_factory=LoraPhaseConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Iterable[str] = ()) -> TrainConfig:
        """Builds a config from nested dicts; see settings.build_settings."""
        return build_settings(cls, values, overrides)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> TrainConfig:
        """Reads a YAML file; see from_dict. Raises FileNotFoundError, ValueError."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a mapping of settings, not {type(values).__name__}")
        try:
            return cls.from_dict(values, overrides)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Every setting as YAML, defaults included, so that the text alone repeats the run."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_text`."""
        write_text(path, self.to_text())

    def validate(self) -> TrainConfig:
        """Raises one ValueError that lists everything that cannot work; returns self."""
        raise_all(list(complaints_about(self)))
        return self

    def difference(self, other: TrainConfig) -> list[str]:
        """Dotted names of settings that differ and that change the trained weights."""
        ours, theirs = dict(flatten(self.to_dict())), dict(flatten(other.to_dict()))
        return [k for k in ours if k not in _HARMLESS and ours[k] != theirs.get(k)]

    def other_warmup(self, other: TrainConfig) -> list[str]:
        """Dotted names of settings that differ and that change the weights after the warm-up."""
        later = _AFTER_WARMUP
        if self.warmup.drop_rate_end is not None:
            later = (*later, "skip_rate")
        return [n for n in self.difference(other) if not n.startswith(later)]


# Settings that may differ between an interrupted run and the one that takes it up again.
_HARMLESS = {
    "output_dir", "resume", "overwrite", "progress", "save_every", "save_total_limit", "log_every",
    "data.test_prompts", "warmup_from",
}  # fmt: skip
# Settings, or sections, that play no part before the warm-up is over. (LoRA's rank and dropout do.)
_AFTER_WARMUP = (
    "phases", "control", "plan_search_", "calibrate_rates", "routers.",
    *(f"lora.{name}" for name in ("steps", "epochs", "lr", "weight_decay", "hold", "distill.")),
)  # fmt: skip


def config_fields() -> list[ConfigField]:
    """All settings with their dotted names, in the order of the classes."""
    return fields_of(TrainConfig)
