"""The plans of a run, each decided once: a control's own, those of tasks, and what they go by.

What is measured here is written into the run's folder, so a resumed run goes on under the same
plans without measuring again. L layers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from firstlm.controls import (
    greedy_plan,
    importance_plan,
    keep_share_of_run,
    most_kept_plan,
    plan_by_position,
)
from firstlm.layer_importance import measure_block_influence, measure_importance
from firstlm.length_plans import LengthPlans, classes_of, length_bounds
from firstlm.plan_search import PlanLoss, search_plan, search_task_plans
from firstlm.run_folder import RunFolder
from firstlm.train_config import TrainConfig
from firstlm.train_data import TrainData
from firstlm.train_progress import bar


class RunPlans:
    """Finds the plans of a run, or reads them.

    Args:
        config: of the run.
        folder: of the run.
        model: routed; measured as it is when a plan is first asked for.
        data: of the run.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, model: Any, data: TrainData) -> None:
        self.config, self.folder, self.model, self.data = config, folder, model, data
        self.num_layers = len(model.decoder_layers)

    def bar(self, what: str, total: int | None) -> Any:
        """A progress bar of the run, see train_progress.bar."""
        return bar(what, total, self.config.progress and self.folder.writes)

    def check(self) -> None:
        """Raises ValueError or FileNotFoundError for a named plan that does not fit this model."""
        config = self.config
        if config.control == "static" and not isinstance(config.control_plan, list):
            if config.control_plan.startswith("most_kept:"):
                keep_share_of_run(config.control_plan.partition(":")[2])
        elif config.control == "static":
            self._check_kept(f"control_plan={config.control_plan}", config.control_plan)
        searched = ("task_plans.json", "control_plan.json")  # by the run that is taken up again
        known = not config.overwrite and any((self.folder.path / n).is_file() for n in searched)
        if config.plan_search_common is not None and not known:
            self._named_common()

    def _check_kept(self, setting: str, kept: Sequence[int]) -> None:
        """Raises ValueError for kept layers that are none, not the model's, or lack protected."""
        wrong = [i for i in kept if not 0 <= i < self.num_layers]
        if wrong or not kept:
            raise ValueError(f"{setting}: must name kept layers from 0 to {self.num_layers - 1}")
        left_out = set(self.model.router_config.protected) - set(kept)
        if left_out:
            raise ValueError(
                f"{setting} skips the protected layers {', '.join(map(str, sorted(left_out)))}: "
                "keep them, or change router.protected"
            )

    def static(self) -> list[bool]:
        """The plan of a control, decided once per run; that of length departs from it."""
        stored = self.folder.read("control_plan.json")
        if stored is None:
            keep = self._choose_static()
            stored = {"kept": _kept(keep), "num_layers": self.num_layers}
            self.folder.write("control_plan.json", stored)
        return self._mask(stored["kept"])

    def by_length(self) -> LengthPlans | None:
        """The plans of control=length, decided once per run; None of any other run."""
        if self.config.control != "length":
            return None
        plans = LengthPlans.load(self.folder.path)
        if plans is None:
            found = self._departures(self.static())
            kept = [_kept(found[c]) for c in sorted(found, key=int)]
            plans = LengthPlans(self._length_bounds(), kept, self.num_layers)
            if self.folder.writes:
                plans.save(self.folder.path)
        return plans

    def of_tasks(self) -> dict[str, list[bool]]:
        """Task -> keep mask [L]: what routers start from, searched once per run."""
        plans = self.folder.read("task_plans.json")
        if plans is None:
            common = self._common()
            found = self._departures(common)
            plans = {"common": _kept(common), "tasks": {t: _kept(p) for t, p in found.items()}}
            self.folder.write("task_plans.json", plans)
        return {task: self._mask(kept) for task, kept in plans["tasks"].items()}

    def importance(self, when: str) -> list[float]:
        """CE rise of every layer at the start of phase `when`, measured once per run."""
        known = self.folder.read("importance.json") or {}
        if when not in known:
            examples = self._measured_examples()
            with self.bar("layer importance", self.num_layers) as update:
                known[when] = measure_importance(
                    self.model, examples, self.data.collator, progress=update
                )
            self.folder.write("importance.json", known)
        return known[when]

    def groups(self) -> tuple[dict[str, list[Any]], dict[str, float]]:
        """Training rows of every task that plans are measured on, and what each row stands for.

        Under control=length a class of prompt lengths is what a task is to FiRST.
        """
        tasks = self._tasks()
        if self.config.control == "length":
            classes = classes_of(self._prompt_lengths, self._length_bounds())
            tasks = [str(c) for c in classes.tolist()]
        rows = self.data.train
        groups, weights = {}, {}
        for task in sorted(set(tasks)):
            chosen = [i for i, other in enumerate(tasks) if other == task]
            measured = chosen[: self.config.plan_search_examples]
            groups[task] = [rows[i] for i in measured]
            weights[task] = len(chosen) / len(measured)
        return groups, weights

    def _measured_examples(self) -> list[Any]:
        """The validation examples that layers are measured on."""
        count = min(self.config.importance_examples, len(self.data.validation))
        return [self.data.validation[i] for i in range(count)]

    def _departures(self, common: Sequence[bool]) -> dict[str, list[bool]]:
        """The best plan of each group of training rows, near the common one."""
        config, importance = self.config, self.importance("search")
        with self.bar("plans of the tasks", None) as update:
            return search_task_plans(
                self._plan_loss(update),
                common,
                trials=config.plan_search_trials,
                seed=config.seed,
                trade=config.plan_search_trade,
                importance=importance,
            )

    def _common(self) -> list[bool]:
        """Of the static control that the config names, or searched."""
        named = self.config.plan_search_common is not None
        return self._mask(self._named_common()) if named else self._searched()

    def _named_common(self) -> list[int]:
        """Kept layers of the control that plan_search_common names; ValueError if none fit."""
        setting = f"plan_search_common={self.config.plan_search_common}"
        path = Path(self.config.plan_search_common or "") / "control_plan.json"
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            kept, num_layers = [int(i) for i in plan["kept"]], plan["num_layers"]
        except OSError:
            raise ValueError(
                f"{setting}: {path} cannot be read; name the output_dir of a static control, and "
                "train that control first"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{setting}: {path} is no plan that firstlm train wrote") from None
        if num_layers != self.num_layers:
            raise ValueError(
                f"{setting}: its plan is of {num_layers} layers, and this model has "
                f"{self.num_layers}"
            )
        self._check_kept(f"{setting}: its plan", kept)
        return kept

    def _searched(self) -> list[bool]:
        """The best plan for the whole mixture: a static control, or what tasks depart from."""
        importance = self.importance("search")
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
        groups, weights = self.groups()
        by_tokens = self.config.plan_search_by == "tokens"
        return PlanLoss(
            self.model, groups, weights, self.data.collator, by_tokens, progress=progress
        )

    def _tasks(self) -> list[str]:
        """The task of each training row."""
        rows = self.data.train
        return getattr(rows, "tasks", None) or ["all"] * len(rows)

    @functools.cached_property
    def _prompt_lengths(self) -> torch.Tensor:
        """Tokens of the prompt of each training row, int64 [N]."""
        rows = self.data.train
        return torch.tensor([sum(rows[i]["prompt_mask"]) for i in range(len(rows))])

    def _length_bounds(self) -> list[int]:
        """Of as many classes as there are tasks, so that length has as many plans as FiRST."""
        return length_bounds(self._prompt_lengths, max(len(set(self._tasks())), 2))

    def _choose_static(self) -> list[bool]:
        config, protected = self.config, self.model.router_config.protected
        num_layers = self.num_layers
        if config.control == "lora_only":
            return [True] * num_layers
        if config.control == "length":
            return self._common()
        if isinstance(config.control_plan, list):
            return self._mask(config.control_plan)
        if config.control_plan.startswith("most_kept:"):
            share = keep_share_of_run(config.control_plan.partition(":")[2])
            return most_kept_plan(share, config.skip_rate, protected)
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
            return self._searched()
        return importance_plan(self.importance("control"), config.skip_rate, protected)

    def _mask(self, kept: Sequence[int]) -> list[bool]:
        return [layer in kept for layer in range(self.num_layers)]


def _kept(plan: Sequence[bool]) -> list[int]:
    return [layer for layer, flag in enumerate(plan) if flag]
