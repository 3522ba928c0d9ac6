"""Every setting of a finetuning run, once: YAML files, command-line flags and Python share these dataclasses.

    config = TrainConfig.from_yaml("configs/quickstart.yaml", overrides=["lora.steps=100"])
    config = TrainConfig.from_dict({"base": "embedded", "skip_rate": 0.25})
    config.validate()          # every complaint in one ValueError, before any work starts

`config_fields()` lists name, type, default and help of each setting, which is what `firstlm train
--help` prints. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from firstlm.atomic import write_text

PHASES = ("warmup", "routers", "lora")


def _setting(default: Any, help: str) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class DataConfig:
    """What is trained on. A name is a shipped corpus, a path is a JSONL file; a list is a mixture."""

    train: str | list[str] = _setting(
        "debian-synopsis", "corpus name, JSONL path, or a list (mixture)"
    )
    validation: str | list[str] | None = _setting(
        None, "as train; default: the validation split of train's corpora"
    )
    test: str | list[str] | None = _setting(
        None, "as train; default: the test split of train's corpora"
    )
    max_length: int = _setting(
        512, "longer examples (prompt + answer, tokens) are dropped and counted"
    )
    max_examples: int | None = _setting(None, "use only the first so many training examples")
    validation_prompts: int = _setting(
        128, "validation prompts that thresholds, importance and curves are measured on"
    )
    test_prompts: int = _setting(200, "held-out prompts of the health report")


@dataclass
class RouterSettings:
    """The routers' shape; the names are RouterConfig's."""

    pooling: Literal["mean", "windowed_mean", "last"] = _setting(
        "mean", "prompt features of a router"
    )
    windows: int = _setting(1, "windows of windowed_mean")
    head: Literal["linear", "mlp"] = _setting("linear", "linear, or a bottleneck MLP")
    bottleneck: int = _setting(64, "width of the MLP")
    normalize: bool = _setting(True, "scale the pooled features to unit mean square")
    prefill: Literal["route", "full"] = _setting(
        "route", "route: routers read the states left by earlier skips; full: unskipped states"
    )
    protected: list[int] = _setting(
        [0, 1, -1], "layers that are never skipped; negative from the end"
    )
    keep_bias: float | Literal["importance"] = _setting(
        "importance",
        "initial logit of keeping, or `importance`: from each layer's measured CE loss",
    )
    keep_bias_spread: float = _setting(
        2.0, "importance: logits span +-spread around the one that gives skip_rate"
    )


@dataclass
class DistillConfig:
    """Matching the same weights unskipped, at the answer positions; no second copy in memory."""

    weight: float = _setting(0.0, "weight of the KL term; 0 turns it off")
    temperature: float = _setting(1.0, "softmax temperature of teacher and student")
    teacher: Literal["adapted", "base"] = _setting(
        "adapted", "unskipped with the adapter, or without"
    )


@dataclass
class PhaseConfig:
    """What the three phases share."""

    steps: int = _setting(100, "optimizer steps")
    epochs: float | None = _setting(None, "passes over the training examples, in place of steps")
    lr: float = _setting(1e-3, "peak learning rate")
    lr_schedule: Literal["constant", "linear", "cosine"] = _setting(
        "linear", "decay after the warm-up"
    )
    lr_warmup: float = _setting(0.05, "share of the steps with rising learning rate")
    weight_decay: float = _setting(0.0, "AdamW's weight decay")


@dataclass
class WarmupConfig(PhaseConfig):
    """LoRA with random layer drop, so that the model survives skipping before routers learn."""

    lr: float = _setting(1e-3, "peak learning rate")
    drop_rate_start: float = _setting(0.0, "expected share of dropped layers at the first step")
    drop_rate_end: float | None = _setting(None, "... once the ramp is over; default: skip_rate")
    drop_ramp: float = _setting(0.5, "share of the steps over which the rate rises (linearly)")
    drop_rate_spread: float = _setting(
        1.0, "each sequence's rate is drawn from rate * (1 - spread .. 1 + spread)"
    )
    drop_weights: Literal["uniform", "importance"] = _setting(
        "importance", "how likely each layer is to be dropped: alike, or unimportant ones more"
    )
    drop_temperature: float = _setting(
        0.5, "importance: weight = exp(-CE increase / temperature); large is uniform"
    )
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class RoutersConfig(PhaseConfig):
    """Phase 1: routers alone. loss = CE + alpha * kept share + lambda * ||router||^2."""

    lr: float = _setting(1e-3, "peak learning rate of the routers")
    gate: Literal["soft", "straight_through"] = _setting(
        "straight_through", "how gates act while training"
    )
    penalty: Literal["multiplier", "fixed"] = _setting(
        "multiplier", "multiplier: alpha is steered to skip_rate; fixed: alpha stays"
    )
    alpha: float = _setting(
        0.0, "weight of the kept share (fixed), or its first value (multiplier)"
    )
    alpha_range: list[float] = _setting([-20.0, 20.0], "bounds of the multiplier")
    multiplier_lr: float = _setting(0.5, "change of alpha per step per unit of rate missed")
    skip_rate_start: float | None = _setting(
        None, "target at the first step; default: skip_rate throughout"
    )
    skip_rate_ramp: float = _setting(
        0.5, "share of the steps over which the target moves (linearly)"
    )
    hold: Literal["none", "shared", "per_layer"] = _setting(
        "none", "thresholds follow the asked rate while routers train, see lora.hold"
    )
    hold_window: int = _setting(256, "sequences over which thresholds follow")
    lambda_norm: float = _setting(1e-4, "weight of the squared norm of the router weights")
    train_adapter: bool = _setting(False, "train LoRA along with the routers (not the paper's way)")
    adapter_lr: float = _setting(5e-4, "learning rate of that LoRA")
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class LoraPhaseConfig(PhaseConfig):
    """Phase 2: LoRA with frozen routers and hard gates. The adapter's shape holds for all phases."""

    lr: float = _setting(5e-4, "peak learning rate of the adapter")
    rank: int = _setting(16, "LoRA rank")
    alpha: float = _setting(32.0, "LoRA alpha")
    dropout: float = _setting(0.0, "LoRA dropout")
    targets: str | list[str] = _setting(
        "all-linear", "module names, a regular expression, or all-linear"
    )
    exclude: str | list[str] | None = _setting(".*router.*", "modules that never get LoRA")
    hold: Literal["none", "shared", "per_layer"] = _setting(
        "per_layer",
        "thresholds while LoRA trains: stay (none), move together to the asked rate (shared), or "
        "each keeps its layer's share (per_layer)",
    )
    hold_window: int = _setting(256, "sequences over which thresholds follow")
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass
class TrainConfig:
    """One finetuning run: warm-up -> routers (phase 1) -> LoRA (phase 2)."""

    base: str = _setting(
        "embedded", "model: folder, hub id, GGUF, `embedded`, or a firstlm checkpoint"
    )
    checkpoint: str | None = _setting(
        None, "firstlm checkpoint whose routers and adapter to start from"
    )
    output_dir: str = _setting("runs/train", "where everything of this run is written")
    seed: int = _setting(0, "seeds data order, initial weights, dropout and layer drop")
    skip_rate: float = _setting(0.25, "asked share of skipped layers, of all layers")
    phases: list[str] = _setting(list(PHASES), "which phases run, in this order")
    control: Literal["none", "lora_only", "static"] = _setting(
        "none", "train a rival for as many steps: LoRA without skipping, or with one static plan"
    )
    control_plan: str | list[int] = _setting(
        "importance",
        "static: kept layers, or where they come from: importance, greedy, or most_kept:FOLDER (a "
        "firstlm run or checkpoint)",
    )
    batch_size: int = _setting(8, "sequences per process and forward pass")
    accumulation: int = _setting(1, "forward passes per optimizer step")
    sequence_average: float = _setting(
        0.0, "share of the CE that averages over sequences first; the rest over all answer tokens"
    )
    precision: Literal["f32", "bf16"] = _setting("f32", "bf16: autocast; parameters stay as loaded")
    dtype: Literal["float32", "bfloat16", "float64"] = _setting(
        "float32", "the base's weights in memory"
    )
    device: str | None = _setting(None, "cpu, cuda, ...; default: what there is")
    gradient_checkpointing: bool = _setting(False, "recompute activations: less memory, more time")
    max_grad_norm: float = _setting(1.0, "gradients are clipped to this norm; 0: never")
    importance_examples: int = _setting(
        32, "validation examples that layer importance is measured on"
    )
    calibrate_rates: list[float] = _setting(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "rates that generate(budget=...) finds in the checkpoint"
    )
    eval_every: int = _setting(
        0, "steps between evaluations on validation prompts; 0: only at the end"
    )
    log_every: int = _setting(1, "steps between lines of train_log.jsonl")
    save_every: int = _setting(50, "steps between checkpoints; 0: only at the end of a phase")
    save_total_limit: int = _setting(2, "checkpoints kept of each phase")
    resume: bool = _setting(True, "go on with an interrupted run found in output_dir")
    overwrite: bool = _setting(False, "delete a run of other settings found in output_dir")
    progress: bool = _setting(True, "progress bars")
    data: DataConfig = field(default_factory=DataConfig)
    router: RouterSettings = field(default_factory=RouterSettings)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    routers: RoutersConfig = field(default_factory=RoutersConfig)
    lora: LoraPhaseConfig = field(default_factory=LoraPhaseConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Iterable[str] = ()) -> TrainConfig:
        """Builds a config from nested dicts. `overrides` are "dotted.name=value" strings, later wins.

        Raises ValueError naming every unknown key (and its near miss) and every value of a wrong type.
        """
        tree = _copy_tree(values)
        complaints: list[str] = []
        for override in overrides:
            _apply_override(tree, override, complaints)
        config = _build(cls, tree, "", complaints)
        _raise_all(complaints)
        return config

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> TrainConfig:
        """Reads a YAML file; see from_dict. Raises FileNotFoundError, ValueError."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            values = yaml.safe_load(text) or {}
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

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Writes every setting, defaults included, so that the file alone repeats the run."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    def validate(self) -> TrainConfig:
        """Raises one ValueError that lists everything that cannot work; returns self."""
        _raise_all(list(_complaints(self)))
        return self

    def difference(self, other: TrainConfig) -> list[str]:
        """Dotted names of settings that differ and that change the trained weights."""
        ours, theirs = dict(_flatten(self.to_dict())), dict(_flatten(other.to_dict()))
        return [k for k in ours if k not in _HARMLESS and ours[k] != theirs.get(k)]


# Settings that may differ between an interrupted run and the one that takes it up again.
_HARMLESS = {
    "output_dir", "resume", "overwrite", "progress", "save_every", "save_total_limit", "log_every",
    "data.test_prompts",
}  # fmt: skip


@dataclass(frozen=True)
class ConfigField:
    """One setting, for `--help` and for generated flags."""

    name: str
    type: str
    default: Any
    help: str


def config_fields(cls: type = TrainConfig, prefix: str = "") -> list[ConfigField]:
    """All settings with their dotted names, in the order of the classes."""
    found: list[ConfigField] = []
    defaults = cls()
    hints = _hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found += config_fields(hints[f.name], f"{prefix}{f.name}.")
        else:
            found.append(
                ConfigField(
                    prefix + f.name,
                    str(f.type),
                    getattr(defaults, f.name),
                    f.metadata.get("help", ""),
                )
            )
    return found


# ---- building from nested dicts ----


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _copy_tree(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy_tree(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _raise_all(complaints: list[str]) -> None:
    if complaints:
        raise ValueError("; ".join(complaints) if len(complaints) == 1 else
                         "settings that cannot work:\n  - " + "\n  - ".join(complaints))  # fmt: skip


def _near_miss(key: str, known: Iterable[str]) -> str:
    known = list(known)
    # A setting is often named without its section ("rank" for "lora.rank"): look at the last part too.
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        tails = {name.rpartition(".")[2]: name for name in known}
        near = [
            tails[t]
            for t in difflib.get_close_matches(key.rpartition(".")[2], tails, n=1, cutoff=0.7)
        ]
    return f"; did you mean {near[0]!r}?" if near else ""


def _unknown(path: str, section: str, cls: type) -> str:
    dotted = [f.name for f in config_fields()] + [
        f.name
        for f in dataclasses.fields(TrainConfig)
        if dataclasses.is_dataclass(_hints(TrainConfig)[f.name])
    ]
    local = [section + f.name for f in dataclasses.fields(cls)]
    hint = _near_miss(path, local) or _near_miss(path, dotted)
    return f"unknown setting {path!r}{hint}"


def _build(cls: type, values: Mapping[str, Any], prefix: str, complaints: list[str]) -> Any:
    hints = _hints(cls)
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in hints:
            complaints.append(_unknown(path, prefix, cls))
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, hints[key]):
                kwargs[key] = value
            elif isinstance(value, Mapping):
                kwargs[key] = _build(hints[key], value, path + ".", complaints)
            else:
                complaints.append(f"{path} is a section of settings, not {value!r}")
        else:
            try:
                kwargs[key] = _convert(value, hints[key])
            except (TypeError, ValueError):
                complaints.append(f"{path}={value!r}: expected {_type_name(hints[key])}")
    return cls(**kwargs)


def _apply_override(tree: dict[str, Any], override: str, complaints: list[str]) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        complaints.append(f"override {override!r} is not of the form name=value, as lora.steps=100")
        return
    *sections, key = name.strip().split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            complaints.append(f"override {override!r}: {section!r} is not a section of settings")
            return
    try:
        node[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        node[key] = text


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or TypeError/ValueError. YAML reads 1e-3 as text: floats take text."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for option in get_args(hint):
            try:
                return _convert(value, option)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in get_args(hint)):
            return value
        raise ValueError
    if origin is list:
        if isinstance(value, tuple):
            value = list(value)
        if not isinstance(value, list):
            raise TypeError
        return [_convert(item, get_args(hint)[0]) for item in value]
    if hint is type(None):
        if value is None:
            return None
        raise TypeError
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError
        return float(value)
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError
        return value
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, hint):
        return value
    raise TypeError


def _type_name(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in get_args(hint))
    if origin is list:
        return f"a list of {_type_name(get_args(hint)[0])}"
    return {
        type(None): "null",
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
    }.get(hint, str(hint))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# ---- what cannot work ----


def _complaints(c: TrainConfig) -> Iterator[str]:
    def positive(name: str, value: float, least: float = 1) -> Iterator[str]:
        if not value >= least:
            yield f"{name}={value}: must be at least {least}"

    def share(name: str, value: float | None, top: float = 1.0) -> Iterator[str]:
        if value is not None and not 0.0 <= value <= top:
            yield f"{name}={value}: must lie between 0 and {top}"

    for name, least in (("batch_size", 1), ("accumulation", 1), ("log_every", 1), ("save_total_limit", 1),
                        ("eval_every", 0), ("save_every", 0), ("importance_examples", 1), ("max_grad_norm", 0),
                        ("seed", 0)):  # fmt: skip
        yield from positive(name, getattr(c, name), least)
    yield from share("sequence_average", c.sequence_average)
    if not 0.0 <= c.skip_rate < 0.95:
        yield f"skip_rate={c.skip_rate}: must be at least 0 and below 0.95"

    if any(not 0.0 <= rate < 0.95 for rate in c.calibrate_rates):
        yield f"calibrate_rates={c.calibrate_rates}: each must be at least 0 and below 0.95"

    if not c.phases:
        yield f"phases is empty: name at least one of {', '.join(PHASES)}"
    for phase in c.phases:
        if phase not in PHASES:
            near = difflib.get_close_matches(phase, PHASES, n=1)
            yield f"phases holds {phase!r}, which is none of {', '.join(PHASES)}" + (
                f"; did you mean {near[0]!r}?" if near else ""
            )
    if [p for p in PHASES if p in c.phases] != [p for p in c.phases if p in PHASES]:
        yield f"phases={c.phases}: each at most once, in the order {', '.join(PHASES)}"

    yield from positive("data.max_length", c.data.max_length, 8)
    yield from positive("data.validation_prompts", c.data.validation_prompts)
    yield from positive("data.test_prompts", c.data.test_prompts)
    if c.data.max_examples is not None:
        yield from positive("data.max_examples", c.data.max_examples)

    yield from positive("router.windows", c.router.windows)
    yield from positive("router.bottleneck", c.router.bottleneck)
    yield from positive("router.keep_bias_spread", c.router.keep_bias_spread, 0)

    for name, phase in (("warmup", c.warmup), ("routers", c.routers), ("lora", c.lora)):
        if phase.epochs is not None:
            if not phase.epochs > 0:
                yield f"{name}.epochs={phase.epochs}: must be above 0 (or null, to count in steps)"
        else:
            yield from positive(f"{name}.steps", phase.steps)
        if not 0 < phase.lr < 1:
            yield f"{name}.lr={phase.lr}: must lie between 0 and 1"
        yield from share(f"{name}.lr_warmup", phase.lr_warmup)
        yield from positive(f"{name}.weight_decay", phase.weight_decay, 0)
        yield from positive(f"{name}.distill.weight", phase.distill.weight, 0)
        if not phase.distill.temperature > 0:
            yield f"{name}.distill.temperature={phase.distill.temperature}: must be above 0"

    yield from share("warmup.drop_rate_start", c.warmup.drop_rate_start, 0.95)
    yield from share("warmup.drop_rate_end", c.warmup.drop_rate_end, 0.95)
    yield from share("warmup.drop_ramp", c.warmup.drop_ramp)
    yield from share("warmup.drop_rate_spread", c.warmup.drop_rate_spread)
    if not c.warmup.drop_temperature > 0:
        yield f"warmup.drop_temperature={c.warmup.drop_temperature}: must be above 0"
    yield from share("routers.skip_rate_start", c.routers.skip_rate_start, 0.95)
    yield from share("routers.skip_rate_ramp", c.routers.skip_rate_ramp)
    yield from positive("routers.multiplier_lr", c.routers.multiplier_lr, 0)
    yield from positive("routers.lambda_norm", c.routers.lambda_norm, 0)
    yield from positive("routers.hold_window", c.routers.hold_window, 8)
    low_high = c.routers.alpha_range
    if len(low_high) != 2 or not low_high[0] <= c.routers.alpha <= low_high[1]:
        yield f"routers.alpha_range={low_high}: must be [low, high] with routers.alpha={c.routers.alpha} inside"
    yield from positive("lora.rank", c.lora.rank)
    yield from share("lora.dropout", c.lora.dropout)
    yield from positive("lora.hold_window", c.lora.hold_window, 8)
    if isinstance(c.control_plan, str) and not (
        c.control_plan in ("importance", "greedy") or c.control_plan.startswith("most_kept:")
    ):
        yield f"control_plan={c.control_plan!r}: importance, greedy, most_kept:FOLDER, or a list of kept layers"
    if c.resume and c.overwrite:
        yield "resume and overwrite exclude each other: set resume=false to start anew"
