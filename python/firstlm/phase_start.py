"""Where each phase of a run starts from: layer importance, plans, routers, thresholds.

What is measured here is written into the run's folder, so a resumed run starts its phase from the
same numbers without measuring again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from firstlm.adapter import attach_adapter, has_adapter
from firstlm.budget import calibrate_thresholds, keep_masks, rate_key
from firstlm.checkpoint import is_checkpoint, router_state_dict
from firstlm.controls import (
    greedy_plan,
    importance_bias,
    importance_plan,
    keep_share_of_run,
    layers_to_drop,
    most_kept_plan,
    plan_by_position,
    set_keep_bias,
)
from firstlm.layer_drop import FixedPlan
from firstlm.layer_importance import measure_block_influence, measure_importance
from firstlm.length_plans import LengthPlans, classes_of, length_bounds
from firstlm.phases import (
    Phase,
    control_phase,
    lora_phase,
    router_phase,
    steps_of,
    warmup_phase,
)
from firstlm.plan_search import PlanLoss, fit_routers, search_plan, search_task_plans
from firstlm.run_folder import RunFolder
from firstlm.train_config import PhaseConfig, TrainConfig
from firstlm.train_data import TrainData
from firstlm.train_progress import bar


@dataclass
class Job:
    """A phase of this run; `fixed`: a control's, under plans that are no router's."""

    name: str
    settings: PhaseConfig
    steps: int
    fixed: bool = False


def phase_names(config: TrainConfig) -> list[str]:
    """The phases that a run goes through; controls have no phase 1."""
    if config.control == "lora_only":
        return ["lora"]
    if config.control != "none":
        return [n for n in config.phases if n == "warmup"] + ["lora"]
    return list(config.phases)


def make_jobs(config: TrainConfig, examples: int, batch: int) -> list[Job]:
    """The phases of the run; a control spends the same steps in all on LoRA alone.

    Args:
        examples: in the training set.
        batch: sequences per optimizer step, all processes.
    """
    steps = {n: steps_of(getattr(config, n), examples, batch) for n in config.phases}
    names = phase_names(config)
    if config.control == "none":
        return [Job(n, getattr(config, n), steps[n]) for n in names]
    warm = [Job("warmup", config.warmup, steps["warmup"])] if "warmup" in names else []
    rest = sum(steps.values()) - sum(job.steps for job in warm)
    return [*warm, Job("lora", config.lora, rest, fixed=True)]


class PhaseStarts:
    """Prepares the model for a phase, and says what the phase is.

    Args:
        config: of the run.
        folder: of the run.
        model: routed; changed in place.
        data: of the run.
        jobs: all phases of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        model: Any,
        data: TrainData,
        jobs: Sequence[Job],
    ) -> None:
        self.config, self.folder, self.model = config, folder, model
        self.data, self.jobs = data, jobs

    def bar(self, what: str, total: int | None) -> Any:
        """A progress bar of the run, see train_progress.bar."""
        return bar(what, total, self.config.progress and self.folder.writes)

    def check(self) -> None:
        """Raises ValueError or FileNotFoundError for settings that do not fit this model."""
        config, num_layers = self.config, len(self.model.decoder_layers)
        if config.control != "lora_only":
            layers_to_drop(config.skip_rate, num_layers, self.model.router_config.protected)
        own = config.checkpoint is None and not is_checkpoint(config.base)
        if own and config.router.keep_bias == "plans" and config.router.head != "linear":
            raise ValueError("router.keep_bias=plans fits linear heads: set router.head=linear")
        if config.control == "static" and not isinstance(config.control_plan, list):
            if config.control_plan.startswith("most_kept:"):
                keep_share_of_run(config.control_plan.partition(":")[2])
        elif config.control == "static":
            wrong = [i for i in config.control_plan if not 0 <= i < num_layers]
            if wrong or not config.control_plan:
                raise ValueError(
                    f"control_plan={config.control_plan}: must name kept layers from 0 to "
                    f"{num_layers - 1}"
                )
            left_out = set(self.model.router_config.protected) - set(config.control_plan)
            if left_out:
                raise ValueError(
                    f"control_plan={config.control_plan} skips the protected layers "
                    f"{', '.join(map(str, sorted(left_out)))}: keep them, or change "
                    "router.protected"
                )

    def make_phase(self, job: Job) -> Phase:
        """The phase at its start, the model prepared for it; the same again when it is resumed."""
        if job.fixed:
            self.need_adapter()
            keep = self.static_plan()
            rate = 1.0 - sum(keep) / len(keep)
            return control_phase(job.name, self.length_plans() or FixedPlan(keep), rate)
        if job.name == "warmup":
            self.need_adapter()
            importance = None
            if self.config.warmup.drop_weights == "importance":
                importance = self._importance("warmup")
            return warmup_phase(self.config, job.steps, self.model, importance)
        if job.name == "routers":
            if self.config.routers.train_adapter:
                self.need_adapter()
            self._initialise_routers()
            return router_phase(self.config, job.steps, self.model)
        keep_share = self._start_of_lora()
        self.need_adapter()
        return lora_phase(self.config, self.model, keep_share)

    def need_adapter(self) -> None:
        """Attaches a fresh adapter unless the model has one."""
        if not has_adapter(self.model):
            attach_adapter(self.model, self.config.lora, self.config.seed)

    def _initialise_routers(self) -> None:
        """Routers start from keep_bias, unless they came with a checkpoint."""
        fresh = self.config.checkpoint is None and not is_checkpoint(self.config.base)
        if fresh and self.config.router.keep_bias == "importance":
            bias = importance_bias(
                self._importance("routers"),
                self.config.skip_rate,
                self.config.router.keep_bias_spread,
                self.model.router_config.protected,
            )
            set_keep_bias(self.model, bias)
        if fresh and self.config.router.keep_bias == "plans":
            self._routers_from_plans()
        path = self.folder.path / "router_init.safetensors"
        if self.folder.writes and not path.is_file():
            temporary = path.with_suffix(".tmp")
            save_file(router_state_dict(self.model), temporary)
            os.replace(temporary, path)

    def _routers_from_plans(self) -> None:
        """The best plan of each task, searched once per run, and routers fitted to them."""
        config = self.config
        groups, _ = self._task_groups()
        plans = self.folder.read("task_plans.json")
        if plans is None:
            common = self._common_plan()
            found = self._departures(common)
            plans = {"common": _kept(common), "tasks": {t: _kept(p) for t, p in found.items()}}
            self.folder.write("task_plans.json", plans)
        masks = torch.zeros(len(groups), len(self.model.decoder_layers), dtype=torch.bool)
        for index, task in enumerate(groups):
            masks[index, plans["tasks"][task]] = True
        sizes = torch.tensor([len(examples) for examples in groups.values()])
        with self.bar("routers from plans", int(sizes.sum())) as update:
            fit_routers(
                self.model,
                [row for examples in groups.values() for row in examples],
                self.data.collator,
                masks.repeat_interleave(sizes, 0),
                margin=config.router.keep_bias_spread,
                progress=update,
            )
        self.model.set_thresholds([0.5] * masks.shape[1])

    def _departures(self, common: Sequence[bool]) -> dict[str, list[bool]]:
        """The best plan of each group of training rows (_task_groups), near the common one."""
        config, importance = self.config, self._importance("search")
        with self.bar("plans of the tasks", None) as update:
            return search_task_plans(
                self._plan_loss(update),
                common,
                trials=config.plan_search_trials,
                seed=config.seed,
                trade=config.plan_search_trade,
                importance=importance,
            )

    def _common_plan(self) -> list[bool]:
        """Of the static control that the config names, or searched."""
        if self.config.plan_search_common is None:
            return self._searched_plan()
        path = Path(self.config.plan_search_common) / "control_plan.json"
        if not path.is_file():
            raise ValueError(f"plan_search_common: {path} does not exist; train that control first")
        kept = json.loads(path.read_text(encoding="utf-8"))["kept"]
        return [layer in kept for layer in range(len(self.model.decoder_layers))]

    def _searched_plan(self) -> list[bool]:
        """The best plan for the whole mixture: a static control, or what tasks depart from."""
        importance = self._importance("search")
        with self.bar("searching a common plan", None) as update:
            plan, _ = search_plan(
                self._plan_loss(update),
                self.config.skip_rate,
                trials=self.config.plan_search_trials,
                seed=self.config.seed,
                importance=importance,
            )
        return plan

    def _plan_loss(self, progress: Callable[[int], None]) -> PlanLoss:
        groups, weights = self._task_groups()
        by_tokens = self.config.plan_search_by == "tokens"
        return PlanLoss(
            self.model, groups, weights, self.data.collator, by_tokens, progress=progress
        )

    def _task_groups(self) -> tuple[dict[str, list[Any]], dict[str, float]]:
        """Training rows of every task that plans are measured on, and what each row stands for.

        Under control=length a class of prompt lengths is what a task is to FiRST.
        """
        tasks = self._tasks()
        if self.config.control == "length":
            classes = classes_of(self._prompt_lengths(), self._length_bounds())
            tasks = [str(c) for c in classes.tolist()]
        rows = self.data.train
        groups, weights = {}, {}
        for task in sorted(set(tasks)):
            chosen = [i for i, other in enumerate(tasks) if other == task]
            measured = chosen[: self.config.plan_search_examples]
            groups[task] = [rows[i] for i in measured]
            weights[task] = len(chosen) / len(measured)
        return groups, weights

    def _tasks(self) -> list[str]:
        """The task of each training row."""
        rows = self.data.train
        return getattr(rows, "tasks", None) or ["all"] * len(rows)

    def _prompt_lengths(self) -> torch.Tensor:
        """Tokens of the prompt of each training row, int64 [N]."""
        rows = self.data.train
        return torch.tensor([sum(rows[i]["prompt_mask"]) for i in range(len(rows))])

    def _length_bounds(self) -> list[int]:
        """Of as many classes as there are tasks, so that length has as many plans as FiRST."""
        return length_bounds(self._prompt_lengths(), max(len(set(self._tasks())), 2))

    def _start_of_lora(self) -> list[float]:
        """Calibrated thresholds are set; returns how often each layer is kept with them, [L]."""
        alone = "routers" not in [j.name for j in self.jobs]  # else phase 1 has just calibrated
        if alone:
            self._initialise_routers()
        stored = self.folder.read("lora/start.json")
        if stored is None:
            if alone:
                self.calibrate([self.config.skip_rate])
            prompts = self.data.prompts(self.data.validation)
            mask = keep_masks(self.model, prompts)
            stored = {
                "thresholds": list(self.model.router_config.thresholds),
                "keep_share": mask.double().mean(0).tolist(),
            }
            self.folder.write("lora/start.json", stored)
        self.model.set_thresholds(stored["thresholds"])
        return stored["keep_share"]

    def _importance(self, when: str) -> list[float]:
        """CE rise of every layer at the start of phase `when`, measured once per run."""
        known = self.folder.read("importance.json") or {}
        if when not in known:
            examples = self._measured_examples()
            with self.bar("layer importance", len(self.model.decoder_layers)) as update:
                known[when] = measure_importance(
                    self.model, examples, self.data.collator, progress=update
                )
            self.folder.write("importance.json", known)
        return known[when]

    def _measured_examples(self) -> list[Any]:
        """The validation examples that layers are measured on."""
        count = min(self.config.importance_examples, len(self.data.validation))
        return [self.data.validation[i] for i in range(count)]

    def static_plan(self) -> list[bool]:
        """The plan of a control, decided once per run; that of length departs from it."""
        num_layers = len(self.model.decoder_layers)
        stored = self.folder.read("control_plan.json")
        if stored is None:
            keep = self._choose_static_plan(num_layers)
            stored = {"kept": [i for i in range(num_layers) if keep[i]], "num_layers": num_layers}
            self.folder.write("control_plan.json", stored)
        return [i in stored["kept"] for i in range(num_layers)]

    def length_plans(self) -> LengthPlans | None:
        """The plans of control=length, decided once per run; None of any other run."""
        if self.config.control != "length":
            return None
        plans = LengthPlans.load(self.folder.path)
        if plans is None:
            found = self._departures(self.static_plan())
            kept = [_kept(found[c]) for c in sorted(found, key=int)]
            plans = LengthPlans(self._length_bounds(), kept, len(self.model.decoder_layers))
            if self.folder.writes:
                plans.save(self.folder.path)
        return plans

    def _choose_static_plan(self, num_layers: int) -> list[bool]:
        config, protected = self.config, self.model.router_config.protected
        if config.control == "lora_only":
            return [True] * num_layers
        if config.control == "length":
            return self._common_plan()
        if isinstance(config.control_plan, list):
            return [i in config.control_plan for i in range(num_layers)]
        if config.control_plan.startswith("most_kept:"):
            share, rate = keep_share_of_run(config.control_plan.partition(":")[2])
            return most_kept_plan(share, rate, protected)
        by_position = plan_by_position(config.control_plan, num_layers, config.skip_rate, protected)
        if by_position is not None:
            return by_position
        if config.control_plan == "block_influence":
            examples = self._measured_examples()
            with self.bar("block influence", len(examples)) as update:
                influence = measure_block_influence(
                    self.model, examples, self.data.collator, progress=update
                )
            return importance_plan(influence, config.skip_rate, protected)
        if config.control_plan == "greedy":
            with self.bar("greedy static plan", None) as update:
                return greedy_plan(
                    self.model, self._measured_examples(), self.data.collator, config.skip_rate,
                    progress=update,
                )  # fmt: skip
        if config.control_plan == "search":
            return self._searched_plan()
        return importance_plan(self._importance("control"), config.skip_rate, protected)

    def calibrate(self, rates: Sequence[float]) -> None:
        """Sets thresholds for the asked rate, and stores them for all `rates`."""
        prompts = self.data.prompts(self.data.validation)
        with self.bar("calibrating thresholds", len(rates)) as update:
            found = calibrate_thresholds(
                self.model, prompts, rates, progress=lambda asked, achieved: update(1)
            )
        self.model.set_thresholds(found[rate_key(self.config.skip_rate)])
        self.model.router_config.calibration = found


def _kept(plan: Sequence[bool]) -> list[int]:
    return [layer for layer, flag in enumerate(plan) if flag]
