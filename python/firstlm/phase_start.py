"""Where each phase of a run starts from: its plans (run_plans.py), routers, thresholds.

What is measured is written into the run's folder, so a resumed run starts its phase from the
same numbers without measuring again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save

from firstlm.adapter import attach_adapter, has_adapter
from firstlm.atomic import write_bytes
from firstlm.budget import calibrate_thresholds, keep_masks, rate_key
from firstlm.checkpoint import is_checkpoint, router_state_dict
from firstlm.controls import (
    importance_bias,
    layers_to_drop,
    set_keep_bias,
)
from firstlm.layer_drop import FixedPlan
from firstlm.phases import (
    Phase,
    control_phase,
    lora_phase,
    router_phase,
    steps_of,
    warmup_phase,
)
from firstlm.plan_search import fit_routers
from firstlm.run_folder import RunFolder
from firstlm.run_plans import RunPlans
from firstlm.train_config import PhaseConfig, TrainConfig
from firstlm.train_data import TrainData


@dataclass
class Job:
    """A phase of this run; `fixed`: a control's, under plans that are no router's."""

    name: str
    settings: PhaseConfig
    steps: int
    fixed: bool = False


def make_jobs(config: TrainConfig, examples: int, batch: int) -> list[Job]:
    """The phases of the run; a control spends the same steps in all on LoRA alone.

    Args:
        examples: in the training set.
        batch: sequences per optimizer step, all processes.
    """
    steps = {n: steps_of(getattr(config, n), examples, batch) for n in config.phases}
    if config.control == "none":
        return [Job(n, getattr(config, n), steps[n]) for n in config.phases]
    warm = []
    if "warmup" in steps and config.control != "lora_only":  # which nothing prepares for skipping
        warm = [Job("warmup", config.warmup, steps["warmup"])]
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

    Attributes:
        plans: of the run.
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
        self.plans = RunPlans(config, folder, model, data)

    def check(self) -> None:
        """Raises ValueError or FileNotFoundError for settings that do not fit this model."""
        config, num_layers = self.config, len(self.model.decoder_layers)
        if config.control != "lora_only":
            layers_to_drop(config.skip_rate, num_layers, self.model.router_config.protected)
        own = config.checkpoint is None and not is_checkpoint(config.base)
        if own and config.router.keep_bias == "plans" and config.router.head != "linear":
            raise ValueError(
                "router.keep_bias=plans, the default, fits linear heads: set router.head=linear "
                "or router.keep_bias=importance"
            )
        self.plans.check()

    def make_phase(self, job: Job) -> Phase:
        """The phase at its start, the model prepared for it; the same again when it is resumed."""
        if job.fixed:
            self.need_adapter()
            keep = self.plans.static()
            rate = 1.0 - sum(keep) / len(keep)
            return control_phase(self.config, self.plans.by_length() or FixedPlan(keep), rate)
        if job.name == "warmup":
            self.need_adapter()
            importance = None
            if self.config.warmup.drop_weights == "importance":
                importance = self.plans.importance("warmup")
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
                self.plans.importance("routers"),
                self.config.skip_rate,
                self.config.router.keep_bias_spread,
                self.model.router_config.protected,
            )
            set_keep_bias(self.model, bias)
        if fresh and self.config.router.keep_bias == "plans":
            self._routers_from_plans()
        path = self.folder.path / "router_init.safetensors"
        if self.folder.writes and not path.is_file():
            write_bytes(path, save(router_state_dict(self.model)))

    def _routers_from_plans(self) -> None:
        """Routers fitted to the best plan of each task."""
        groups, _ = self.plans.groups()
        plans = self.plans.of_tasks()
        masks = torch.tensor([plans[task] for task in groups])
        sizes = torch.tensor([len(examples) for examples in groups.values()])
        with self.plans.bar("routers from plans", int(sizes.sum())) as update:
            fit_routers(
                self.model,
                [row for examples in groups.values() for row in examples],
                self.data.collator,
                masks.repeat_interleave(sizes, 0),
                margin=self.config.router.keep_bias_spread,
                progress=update,
            )
        self.model.set_thresholds([0.5] * masks.shape[1])

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

    def calibrate(self, rates: Sequence[float]) -> None:
        """Sets thresholds for the asked rate, and stores them for all `rates`."""
        prompts = self.data.prompts(self.data.validation)
        with self.plans.bar("calibrating thresholds", len(rates)) as update:
            found = calibrate_thresholds(
                self.model, prompts, rates, progress=lambda asked, achieved: update(1)
            )
        self.model.set_thresholds(found[rate_key(self.config.skip_rate)])
        self.model.router_config.calibration = found
