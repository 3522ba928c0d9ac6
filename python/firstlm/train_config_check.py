"""What a TrainConfig cannot be: every complaint about one, in the words of its settings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from firstlm.train_config import PhaseConfig, TrainConfig

PHASES = ("warmup", "routers", "lora")
_PLAN_RULES = r"uniform|random:\d+|first|last|block_influence|importance|greedy|search|most_kept:.+"


def _positive(name: str, value: float, least: float = 1) -> Iterator[str]:
    if not value >= least:
        yield f"{name}={value}: must be at least {least}"


def _share(name: str, value: float | None, top: float = 1.0) -> Iterator[str]:
    if value is not None and not 0.0 <= value <= top:
        yield f"{name}={value}: must lie between 0 and {top}"


def complaints_about(config: TrainConfig) -> Iterator[str]:
    """One sentence for every setting, or combination of settings, that cannot work."""
    yield from _about_run(config)
    yield from _about_plans(config)
    yield from _about_phase_names(config)
    for name in PHASES:
        yield from _about_any_phase(name, getattr(config, name))
    yield from _about_warmup(config)
    yield from _about_routers(config)
    yield from _about_lora(config)


def _about_run(c: TrainConfig) -> Iterator[str]:
    for name in ("batch_size", "accumulation", "log_every", "save_total_limit"):
        yield from _positive(name, getattr(c, name))
    for name in ("seed", "eval_every", "save_every", "max_grad_norm"):
        yield from _positive(name, getattr(c, name), 0)
    yield from _positive("importance_examples", c.importance_examples)
    yield from _positive("plan_search_trade", c.plan_search_trade, 0)
    yield from _positive("plan_search_examples", c.plan_search_examples)
    yield from _positive("plan_search_trials", c.plan_search_trials, 0)
    yield from _share("sequence_average", c.sequence_average)
    if not 0.0 <= c.skip_rate < 0.95:
        yield f"skip_rate={c.skip_rate}: must be at least 0 and below 0.95"
    if any(not 0.0 <= rate < 0.95 for rate in c.calibrate_rates):
        yield f"calibrate_rates={c.calibrate_rates}: each must be at least 0 and below 0.95"
    if c.resume and c.overwrite:
        yield "resume and overwrite exclude each other: set resume=false to start anew"
    yield from _positive("data.max_length", c.data.max_length, 8)
    yield from _positive("data.validation_prompts", c.data.validation_prompts)
    yield from _positive("data.test_prompts", c.data.test_prompts)
    if c.data.max_examples is not None:
        yield from _positive("data.max_examples", c.data.max_examples)
    if c.data.messages_column and (c.data.prompt_column or c.data.answer_column):
        yield "data: name either messages_column or prompt_column and answer_column, not both"
    yield from _positive("router.windows", c.router.windows)
    if c.router.windows != 1 and c.router.pooling != "windowed_mean":
        yield f"router.windows={c.router.windows}: goes with router.pooling=windowed_mean only"
    yield from _positive("router.bottleneck", c.router.bottleneck)
    yield from _positive("router.keep_bias_spread", c.router.keep_bias_spread, 0)
    if c.router.head != "mlp" and c.router.bottleneck != type(c.router)().bottleneck:
        yield f"router.bottleneck={c.router.bottleneck}: goes with router.head=mlp only"


def _about_plans(c: TrainConfig) -> Iterator[str]:
    if isinstance(c.control_plan, str) and not re.fullmatch(_PLAN_RULES, c.control_plan):
        yield (
            f"control_plan={c.control_plan!r}: must be uniform, random:SEED, first, last, "
            "block_influence, importance, greedy, search, most_kept:FOLDER, or a list of kept "
            "layers"
        )
    elif c.control != "static" and c.control_plan != type(c)().control_plan:
        yield f"control_plan={c.control_plan!r}: goes with control=static only"
    departs = c.control == "length" or (c.control == "none" and c.router.keep_bias == "plans")
    if c.plan_search_common is not None and not departs:
        yield (
            f"plan_search_common={c.plan_search_common}: goes only with control=length, or with "
            "router.keep_bias=plans and no control"
        )


def _about_phase_names(c: TrainConfig) -> Iterator[str]:
    known = ", ".join(PHASES)
    if not c.phases:
        yield f"phases is empty: name at least one of {known}"
    for phase in c.phases:
        if phase not in PHASES:
            near = difflib.get_close_matches(phase, PHASES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"phases holds {phase!r}, which is none of {known}{hint}"
    if [p for p in PHASES if p in c.phases] != [p for p in c.phases if p in PHASES]:
        yield f"phases={c.phases}: each at most once, in the order {known}"
    if c.warmup_from is not None and ("warmup" not in c.phases or c.control == "lora_only"):
        yield f"warmup_from={c.warmup_from}: this run has no warm-up; leave it out"
    if c.control in ("static", "length") and c.phases == ["warmup"]:
        yield (
            f"control={c.control} trains LoRA under its plan after the warm-up: phases has nothing "
            "left"
        )


def _about_any_phase(name: str, phase: PhaseConfig) -> Iterator[str]:
    if phase.epochs is None:
        yield from _positive(f"{name}.steps", phase.steps)
    elif not phase.epochs > 0:
        yield f"{name}.epochs={phase.epochs}: must be above 0 (or null, to count in steps)"
    if not 0 < phase.lr < 1:
        yield f"{name}.lr={phase.lr}: must lie between 0 and 1"
    yield from _share(f"{name}.lr_warmup", phase.lr_warmup)
    yield from _positive(f"{name}.weight_decay", phase.weight_decay, 0)
    yield from _positive(f"{name}.distill.weight", phase.distill.weight, 0)
    if not phase.distill.temperature > 0:
        yield f"{name}.distill.temperature={phase.distill.temperature}: must be above 0"


def _about_warmup(c: TrainConfig) -> Iterator[str]:
    yield from _share("warmup.drop_rate_start", c.warmup.drop_rate_start, 0.95)
    yield from _share("warmup.drop_rate_end", c.warmup.drop_rate_end, 0.95)
    yield from _share("warmup.drop_ramp", c.warmup.drop_ramp)
    yield from _share("warmup.drop_rate_spread", c.warmup.drop_rate_spread)
    if not c.warmup.drop_temperature > 0:
        yield f"warmup.drop_temperature={c.warmup.drop_temperature}: must be above 0"


def _about_routers(c: TrainConfig) -> Iterator[str]:
    routers = c.routers
    yield from _share("routers.skip_rate_start", routers.skip_rate_start, 0.95)
    yield from _share("routers.skip_rate_ramp", routers.skip_rate_ramp)
    yield from _positive("routers.multiplier_lr", routers.multiplier_lr, 0)
    yield from _positive("routers.lambda_norm", routers.lambda_norm, 0)
    yield from _positive("routers.hold_window", routers.hold_window, 8)
    if routers.hold == "per_layer" and routers.skip_rate_start not in (None, c.skip_rate):
        yield (
            "routers.hold=per_layer holds every layer's share of skip_rate from the first step on, "
            f"which routers.skip_rate_start={routers.skip_rate_start} contradicts: set "
            "routers.hold=shared, or leave routers.skip_rate_start unset"
        )
    bounds = routers.alpha_range
    if len(bounds) != 2 or not bounds[0] <= routers.alpha <= bounds[1]:
        yield (
            f"routers.alpha_range={bounds}: must be [low, high] with routers.alpha="
            f"{routers.alpha} inside"
        )


def _about_lora(c: TrainConfig) -> Iterator[str]:
    yield from _positive("lora.rank", c.lora.rank)
    yield from _share("lora.dropout", c.lora.dropout)
    yield from _positive("lora.hold_window", c.lora.hold_window, 8)
