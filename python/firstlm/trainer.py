"""firstlm.Trainer: transformers' Trainer for one phase (warm-up, routers, or LoRA).

What it adds: the phase decides which parameters learn and how gates act; the loss of losses.py,
normalised over the whole optimizer step; targets, multiplier and thresholds that move at optimizer
steps only; a data order that does not depend on the batch layout; checkpoints of routers and
adapter that are whole or absent; stopping on a signal after the step at hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from firstlm.adapter import has_adapter, load_adapter_weights
from firstlm.atomic import publish_folder, write_json
from firstlm.checkpoint import ADAPTER_FOLDER, load_routers
from firstlm.data_order import ShuffledSteps
from firstlm.interrupt import InterruptGuard
from firstlm.losses import (
    answer_cross_entropy,
    answer_positions,
    distillation,
    router_norm,
)
from firstlm.master_weights import MasterWeights
from firstlm.phases import Phase
from firstlm.scoring import Collator, score
from firstlm.step_stats import StepStats
from firstlm.trainable import adapter_off, choose_trainable

STATE_FILE = "firstlm_state.json"


class NonFiniteLoss(FloatingPointError):
    """The loss or a gradient is NaN or infinite; the message names step and examples."""


class Trainer(transformers.Trainer):
    """Trains one phase of a routed model.

    Args:
        model: from firstlm.from_pretrained, with an adapter attached if the phase trains one.
        phase: see firstlm.phases; its controllers move while training.
        args: transformers' TrainingArguments; max_steps must be set. training_arguments() in
            firstlm.training makes them from a TrainConfig.
        sequence_average, group_by_length: see TrainConfig.
        steps_before: optimizer steps of the run before this phase; the order of the data, seeded by
            args.data_seed, goes on where they ended.
        guard: asks for a stop after the current step; train() installs signal handlers on it.
        **kwargs: transformers.Trainer's: train_dataset (rows with input_ids, labels, prompt_mask),
            data_collator, callbacks...

    Raises:
        ValueError: max_steps is not set, the phase trains an adapter and there is none, or an
            option that cannot work here.
    """

    def __init__(
        self,
        model: Any,
        phase: Phase,
        args: TrainingArguments,
        *,
        sequence_average: float = 0.0,
        group_by_length: bool = False,
        steps_before: int = 0,
        guard: InterruptGuard | None = None,
        **kwargs: Any,
    ) -> None:
        if args.max_steps <= 0:
            raise ValueError("set max_steps: firstlm.Trainer counts in optimizer steps")
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end is not supported: evaluate the checkpoints of output_dir"
            )
        if kwargs.get("compute_metrics") is not None:
            raise ValueError(
                "compute_metrics is not supported: evaluate() measures loss and skip rate, "
                "firstlm.evaluate the answers"
            )
        self.phase = phase
        self.sequence_average = sequence_average
        self.group_by_length = group_by_length
        self.steps_before = steps_before
        self.guard = guard if guard is not None else InterruptGuard()
        self.protected = model.router_config.protected
        self.stats = StepStats()
        self._staging: Path | None = None
        self._micro_step = 0
        choose_trainable(model, phase)
        # DataParallel would split one batch over threads; several GPUs are used through torchrun.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(model=model, args=args, **kwargs)
        self.remove_callback(PrinterCallback)
        # compute_loss normalises over the whole step, so training_step must not divide again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._order = self._make_order()
        # First, so that other callbacks find gradients filled and figures of the step closed.
        self.callback_handler.callbacks.insert(0, _StepHooks(self))

    # ---- data: the order and the counts of an optimizer step ----

    def _make_order(self) -> ShuffledSteps:
        if self.train_dataset is None:
            raise ValueError("train_dataset is needed")
        batch = self.args.train_batch_size * self.args.world_size
        per_step = batch * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        count = len(self.train_dataset)
        lengths = None
        if self.group_by_length:
            lengths = [len(self.train_dataset[i]["input_ids"]) for i in range(count)]
        length, start = per_step * self.args.max_steps, per_step * self.steps_before
        return ShuffledSteps(count, length, seed, lengths, per_step, start)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        return self._order

    def _sequences_in_step(self, micro_step: int, count: int) -> list[int]:
        """Where this process's rows of a micro-batch stand among the sequences of the step."""
        start = (micro_step * self.args.world_size + self.args.process_index) * count
        return list(range(start, start + count))

    def get_batch_samples(
        self, *args: Any, **kwargs: Any
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of a step, and its answer tokens over all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        # Position 0 is never predicted.
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        sequences = sum(len(b["labels"]) for b in batches)
        counts = torch.tensor([tokens, sequences], device=self.args.device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        self._step_tokens, self._step_sequences = counts.tolist()
        self._step_micro_batches = len(batches)
        self._micro_step = 0
        return batches, counts[0]

    # ---- the loss ----

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of the loss of the optimizer step, times the process count.

        The factor undoes DistributedDataParallel's mean over processes.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        positions = answer_positions(labels)
        forward = {**inputs, "logits_to_keep": positions, "use_cache": False}
        teacher = self._teacher_logits(forward)
        output = model(**forward, **self._gate_arguments(inputs["prompt_mask"].sum(1)))

        sums, tokens = answer_cross_entropy(output.logits, labels, positions)
        cross_entropy = sums.sum() / self._step_tokens
        loss = cross_entropy
        if self.sequence_average:
            by_sequence = (sums / tokens.clamp_min(1)).sum() / self._step_sequences
            loss = torch.lerp(cross_entropy, by_sequence, self.sequence_average)
        parts = {"cross_entropy": cross_entropy}
        if teacher is not None:
            kl = distillation(
                output.logits, teacher, labels, positions, self.phase.distill.temperature
            )
            parts["distill"] = kl / self._step_tokens
            loss = loss + self.phase.distill.weight * parts["distill"]
        if self.phase.train_routers:
            # skip_loss is a mean over this micro-batch's sequences; the step's mean is wanted.
            parts["kept_share"] = output.skip_loss * (len(labels) / self._step_sequences)
            loss = loss + self.phase.multiplier.alpha * parts["kept_share"]
            # Every micro-batch of every process adds its share of the one term of the step.
            share = 1.0 / (self._step_micro_batches * self.args.world_size)
            parts["router_norm"] = router_norm(self._router_parameters()) * share
            loss = loss + self.phase.lambda_norm * parts["router_norm"]
        self._check_finite(loss, len(labels))
        self.stats.add(parts, output.keep_prob, output.keep_mask)
        self._micro_step += 1
        loss = loss * self.args.world_size
        return (loss, output) if return_outputs else loss

    def _gate_arguments(self, prompt_lengths: torch.Tensor) -> dict[str, Any]:
        """Of the forward pass of rows whose prompts have so many tokens, int [B]."""
        arguments: dict[str, Any] = {"gate": self.phase.gate}
        if self.phase.plans is not None:
            step, rows = self.state.global_step, len(prompt_lengths)
            sequences = self._sequences_in_step(self._micro_step, rows)
            arguments["skip_plan"] = self.phase.plans(step, sequences, prompt_lengths)
        if self.phase.gate == "hard":
            # DDP needs every parameter in every process's graph; alone, skipped rows cost nothing.
            arguments["compute_skipped"] = self.args.world_size > 1
        return arguments

    def _router_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for layer in self.model.decoder_layers:
            yield from ((n, p) for n, p in layer.router.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def _teacher_logits(self, forward: dict[str, Any]) -> torch.Tensor | None:
        """Logits [B, P, V] of the same weights, every layer kept; None without distillation."""
        if not self.phase.distill.weight:
            return None
        everything = torch.ones(
            len(forward["input_ids"]), len(self.model.decoder_layers), dtype=torch.bool
        )
        bare = self.phase.distill.teacher == "base"
        self.model.eval()  # no dropout
        try:
            with adapter_off(self.model) if bare else contextlib.nullcontext():
                return self.model(**forward, skip_plan=everything).logits
        finally:
            self.model.train()

    def _check_finite(self, loss: torch.Tensor, rows: int) -> None:
        if bool(torch.isfinite(loss.detach())):
            return
        raise NonFiniteLoss(
            f"the loss is {loss.item()} in step {self.state.global_step + 1} of phase "
            f"{self.phase.name!r}, batch {self._micro_step + 1} of {self._step_micro_batches}, "
            f"examples {self._example_names(self._micro_step, rows)}: lower the learning rate, or "
            "look at these examples"
        )

    def _example_names(self, micro_step: int, rows: int) -> list[str]:
        first = self.state.global_step * self._step_sequences
        indices = [self._order.order[first + s] for s in self._sequences_in_step(micro_step, rows)]
        ids = getattr(self.train_dataset, "ids", None)
        return [str(ids[i]) if ids is not None else f"#{i}" for i in indices]

    # ---- held-out rows ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """What the model does with held-out rows, see `held_out_figures`.

        Nothing is learnt, and no controller sees these rows. Every process runs all of them.

        Args:
            eval_dataset: rows as of train_dataset, or several named sets; None: the trainer's.
            ignore_keys: unused; transformers' Trainer passes it.
            metric_key_prefix: of the names of what is returned.

        Returns:
            `eval_cross_entropy` (also as `eval_loss`), `eval_skip_rate` and `eval_plans`.

        Raises:
            ValueError: there are no rows.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ValueError("evaluate needs eval_dataset")
        if isinstance(rows, dict):
            found: dict[str, float] = {}
            for name, some in rows.items():
                found |= self.evaluate(some, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        batch_size = self.args.per_device_eval_batch_size
        measured = held_out_figures(self.model, self.phase, rows, self.data_collator, batch_size)
        measured["loss"] = measured["cross_entropy"]  # the name that transformers looks for
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: the loss of a training step is none of a held-out batch."""
        raise ValueError(
            "firstlm.Trainer has no predict: use evaluate(), or the model's forward and generate"
        )

    # ---- around the optimizer ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW (or args.optim) with a group for routers and one for the adapter, in float32."""
        if self.optimizer is None:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            routers = {id(p) for p in self.model.router_parameters()}
            learn = [p for p in self.model.parameters() if p.requires_grad]
            masters = MasterWeights(learn)
            decay = self.args.weight_decay
            of_routers = [masters.of(p) for p in learn if id(p) in routers]
            of_adapter = [masters.of(p) for p in learn if id(p) not in routers]
            groups: list[dict[str, Any]] = [
                {"params": of_routers, "weight_decay": decay},
                {"params": of_adapter, "weight_decay": decay},
            ]
            if self.phase.train_routers and self.phase.adapter_lr is not None:
                groups[1]["lr"] = self.phase.adapter_lr
            self.optimizer = cls([g for g in groups if g["params"]], **kwargs)
            masters.attach(self.optimizer)
        return self.optimizer

    def before_optimizer_step(self) -> None:
        """Gradients of layers that no row kept are zero, not None; none may be NaN or infinite."""
        grads = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads.append(parameter.grad)
        total = sum(g.sum(dtype=torch.float64) for g in grads)
        if not bool(torch.isfinite(total)):
            count = self._step_sequences // self._step_micro_batches // self.args.world_size
            names = [
                n for m in range(self._step_micro_batches) for n in self._example_names(m, count)
            ]
            raise NonFiniteLoss(
                f"a gradient is not finite in step {self.state.global_step + 1} of phase "
                f"{self.phase.name!r}, examples {names}: lower the learning rate"
            )

    def after_optimizer_step(self) -> bool:
        """Moves alpha and thresholds by the global rate. Returns whether a stop was asked for."""
        step = self.state.global_step - 1  # the one just taken, from 0
        if self.args.world_size > 1:
            self.stats.gather(self.accelerator)
        asked = self.phase.target(step)
        record = self.stats.close(asked, self.protected, self.phase.gate)
        record["alpha"] = self.phase.multiplier.alpha
        self.phase.multiplier.step(asked, record["steered_rate"])
        if self.phase.follower is not None and self.phase.plans is None:
            self.model.set_thresholds(self.phase.follower.step(self.stats.last_keep_prob, asked))
        if self.args.world_size > 1:  # all processes must stop after the same step, and know why
            number = torch.tensor([self.guard.signal_number or 0], device=self.args.device)
            asked_by_any = int(self.accelerator.gather(number).max())
            if asked_by_any:
                self.guard.request(asked_by_any)
        return self.guard.requested

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds cross-entropy and skip rates since the last line."""
        if "loss" in logs:
            logs.update(self.stats.report())
        super().log(logs, *args, **kwargs)

    # ---- checkpoints: routers, adapter, optimizer, controllers; never the base ----

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial=trial)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Written under another name and renamed, so a kill cannot leave half a checkpoint."""
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = folder / f".{name}.partial"
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_folder(self._staging / name, folder / name)
        finally:
            staging, self._staging = self._staging, None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self._remove_old_checkpoints(folder, keep=self._checkpoints_to_keep())

    def _checkpoints_to_keep(self) -> int | None:
        return self.args.save_total_limit

    def _remove_old_checkpoints(self, folder: Path, keep: int | None) -> None:
        if keep and self.args.should_save:
            for old in checkpoints_in(folder)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        state = {
            "phase": self.phase.name,
            "step": self.state.global_step,
            "thresholds": list(self.model.router_config.thresholds),
            "controllers": self.phase.state_dict(),
            "stats": self.stats.state_dict(),
        }
        write_json(folder / STATE_FILE, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if state["phase"] != self.phase.name:
            raise ValueError(
                f"{folder} is a checkpoint of phase {state['phase']!r}, not {self.phase.name!r}: "
                "start from it with TrainConfig.checkpoint instead of resuming"
            )
        load_routers(self.model, folder)
        if has_adapter(self.model):
            load_adapter_weights(self.model, folder / ADAPTER_FOLDER)
        self.model.set_thresholds(state["thresholds"])
        self.phase.load_state_dict(state["controllers"])
        self.stats.load_state_dict(state["stats"])


def held_out_figures(
    model: Any,
    phase: Phase,
    rows: Sequence[Mapping[str, Any]],
    collator: Collator,
    batch_size: int = 16,
) -> dict[str, float]:
    """How a model does on rows that it does not learn from, under its routers' decisions.

    A phase under drawn plans, which teaches no router, is judged with every layer kept.

    Returns:
        `cross_entropy` (nats a token of the answers), `skip_rate`, `plans` (how many differ).
    """
    whole = None if phase.plans is None else torch.ones(len(model.decoder_layers)).bool()
    scores = score(model, rows, collator, batch_size=batch_size, keep_mask=whole)
    return {
        "cross_entropy": scores.cross_entropy,
        "skip_rate": scores.skip_rate,
        "plans": scores.distinct_plans,
    }


class _StepHooks(TrainerCallback):
    """Calls the trainer around the optimizer step and passes on a request to stop."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.before_optimizer_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.trainer.after_optimizer_step():
            control.should_save = True
            control.should_training_stop = True
        return control


def checkpoints_in(folder: str | os.PathLike[str]) -> list[Path]:
    """Whole checkpoints of a phase's folder, oldest first."""
    folder = Path(folder)
    found = []
    for entry in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", entry.name)
        if match and (entry / STATE_FILE).is_file():
            found.append((int(match[1]), entry))
    return [entry for _, entry in sorted(found)]


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint of a phase's folder."""
    found: Sequence[Path] = checkpoints_in(folder)
    return found[-1] if found else None
