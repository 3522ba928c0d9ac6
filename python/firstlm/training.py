"""train(): warm-up -> routers (phase 1) -> LoRA (phase 2), resumable, each phase alone possible.

result = firstlm.train("configs/quickstart.yaml", overrides=["lora.steps=100"])
result = firstlm.train(base="embedded", output_dir="runs/mine", phases=["routers"])
model = firstlm.from_pretrained(result.checkpoint)
"""

from __future__ import annotations

import dataclasses
import gc
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import TrainingArguments

from firstlm import loading
from firstlm.adapter import load_adapter_weights
from firstlm.atomic import staged_folder, write_json, write_text
from firstlm.budget import keep_masks, skip_rate_of
from firstlm.checkpoint import ADAPTER_FOLDER, load_routers, read_router_config
from firstlm.controls import write_plan_into_routers
from firstlm.data import PromptAnswerCollator
from firstlm.health import HealthReport, router_health
from firstlm.interrupt import InterruptGuard, TrainingInterrupted
from firstlm.phase_start import Job, PhaseStarts, make_jobs
from firstlm.phases import Phase
from firstlm.router import RouterConfig, differences
from firstlm.run_folder import RunFolder
from firstlm.tokenizer import load_tokenizer
from firstlm.train_config import PhaseConfig, RouterSettings, TrainConfig
from firstlm.train_data import TrainData, hashes_of, load_train_data
from firstlm.train_progress import ProgressAndLog
from firstlm.trainer import Trainer, held_out_figures

# Its name in the transformers that is installed.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


@dataclass
class PhaseResult:
    """One phase at its end.

    Attributes:
        checkpoint: folder of its routers and adapter.
        cross_entropy: on the validation examples, hard gates.
        skip_rate_asked, skip_rate: asked, and achieved on the held-out (test) prompts.
        seconds: training time in this process, without what an interrupted run had spent.
    """

    name: str
    steps: int
    seconds: float
    checkpoint: str
    cross_entropy: float
    skip_rate_asked: float
    skip_rate: float


@dataclass
class TrainResult:
    """A finished run.

    Attributes:
        output_dir: the run's folder, see run_folder.py.
        checkpoint: what firstlm.from_pretrained loads.
        log: train_log.jsonl.
        phases: in order.
        health: of the final model, on the held-out prompts.
        too_long: examples that were left out because of data.max_length, by set.
    """

    output_dir: Path
    checkpoint: Path
    log: Path
    phases: list[PhaseResult]
    health: HealthReport
    too_long: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; paths as text."""
        return {
            "output_dir": str(self.output_dir),
            "checkpoint": str(self.checkpoint),
            "log": str(self.log),
            "phases": [dataclasses.asdict(p) for p in self.phases],
            "health": self.health.to_json(),
            "too_long": self.too_long,
        }


def train(
    config: TrainConfig | str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    overrides: Iterable[str] = (),
    train_dataset: Any = None,
    validation_dataset: Any = None,
    test_dataset: Any = None,
    **settings: Any,
) -> TrainResult:
    """Finetunes routers and LoRA as `config` says, or goes on with a run that was interrupted.

    Args:
        config: a TrainConfig, a YAML file, or nested dicts.
        overrides: "dotted.name=value" strings.
        train_dataset, validation_dataset, test_dataset: datasets.Dataset, path or encoded rows,
            in place of config.data's.
        **settings: settings by name, sections as dicts: lora={"steps": 100}.

    Returns:
        TrainResult; a run that was already complete is read and not repeated.

    Raises:
        ValueError: settings that cannot work, before any work starts.
        TrainingInterrupted: stopped by Ctrl-C or SIGTERM, after saving.
        NonFiniteLoss: NaN or infinite loss; step and examples are named.
    """
    config = resolve_auto(_as_config(config, settings, overrides).validate())
    given = {"train": train_dataset, "validation": validation_dataset, "test": test_dataset}
    return _Run(config, {k: v for k, v in given.items() if v is not None}).go()


def _as_config(
    config: TrainConfig | str | os.PathLike[str] | Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    overrides: Iterable[str],
) -> TrainConfig:
    if isinstance(config, (str, os.PathLike)):
        config = TrainConfig.from_yaml(config)
    values = config.to_dict() if isinstance(config, TrainConfig) else dict(config or {})
    for name, value in settings.items():
        if isinstance(value, Mapping) and isinstance(values.get(name), Mapping):
            value = {**values[name], **value}
        values[name] = value
    return TrainConfig.from_dict(values, overrides)


def resolve_auto(config: TrainConfig) -> TrainConfig:
    """`config` with what "auto" and default attention mean on this machine."""
    on_cpu = PartialState(cpu=config.device == "cpu").device.type == "cpu"
    dtype, attention = config.dtype, config.attn_implementation
    if dtype in ("auto", "bfloat16"):
        fast = torch.cpu._is_avx512_bf16_supported() if on_cpu else torch.cuda.is_bf16_supported()
        if dtype == "auto":
            dtype = "bfloat16" if fast else "float32"
        elif not fast:
            # Measured on a Zen 3: a product of the backward pass took 50 times as long.
            warnings.warn(
                "dtype=bfloat16: this machine has no instructions for it, and a training step may "
                "take tens of times as long as in float32; dtype=auto chooses",
                stacklevel=3,
            )
    if attention is None and on_cpu and dtype == "bfloat16":
        # Measured: of 3.2 s per step of 8 x 128 tokens, SDPA's bf16 backward took 0.5 s more.
        attention = "eager"
    return dataclasses.replace(config, dtype=dtype, attn_implementation=attention)


class _Run:
    """The state of one run, and its steps in order (go)."""

    def __init__(self, config: TrainConfig, given: Mapping[str, Any]) -> None:
        self.config = config
        self.given = given
        self.state = PartialState(cpu=config.device == "cpu")
        self.guard = InterruptGuard()

    def go(self) -> TrainResult:
        config = self.config
        self.folder = RunFolder(config.output_dir, self.state.is_main_process)
        hashes = hashes_of(config.data, self.given)
        done = self.folder.open(config, hashes)
        if done is not None:
            return _result_from_json(done, self.folder)
        self.model = self._load_model()
        self.data = self._load_data()
        per_step = config.batch_size * config.accumulation * self.state.num_processes
        self.jobs = make_jobs(config, len(self.data.train), per_step)
        self.starts = PhaseStarts(config, self.folder, self.model, self.data, self.jobs)
        self.starts.check()
        self.folder.begin(config, hashes)
        self.state.wait_for_everyone()
        results = [self._run_job(job) for job in self.jobs]
        return self._finish(results)

    # ---- model and data ----

    def _load_model(self) -> Any:
        config = self.config
        options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
        if config.attn_implementation is not None:
            options["attn_implementation"] = config.attn_implementation
        values = dataclasses.asdict(config.router)
        values.pop("keep_bias_spread")
        if not isinstance(values["keep_bias"], float):
            values["keep_bias"] = 0.0  # set once importance is measured
        router = RouterConfig(**values)
        source = config.checkpoint or config.base
        # A firstlm checkpoint, as base too, brings its own routers.
        own = loading.checkpoint.is_checkpoint(source)
        model = loading.from_pretrained(source, router=None if own else router, **options)
        if own:
            model.router_config.choice = None  # of a model that is about to change
            self._warn_of_settings_without_effect(model, source, router)
        device = config.device or str(self.state.device)
        return model.to(device)

    def _warn_of_settings_without_effect(
        self, model: Any, source: str, router: RouterConfig
    ) -> None:
        """Of the routers' settings, those that a checkpoint has decided already."""
        ignored = [f"router.{d}" for d in differences(router, model.router_config)]
        if self.config.router.keep_bias != RouterSettings().keep_bias:
            ignored.append(
                f"router.keep_bias={self.config.router.keep_bias!r} (theirs: as trained)"
            )
        if ignored and self.state.is_main_process:
            warnings.warn(
                f"{source} brings its own routers, whose settings win; without effect: "
                + ", ".join(ignored),
                stacklevel=2,
            )

    def _load_data(self) -> TrainData:
        tokens_given = len(self.given) == 3 and all(
            not isinstance(v, (str, os.PathLike)) for v in self.given.values()
        )
        try:
            self.tokenizer = load_tokenizer(self.config.checkpoint or self.config.base)
        except (OSError, ValueError, TypeError):
            if not tokens_given:
                raise
            self.tokenizer = None
        stand_in = SimpleNamespace(pad_token_id=None, eos_token_id=None)
        collator = PromptAnswerCollator(self.tokenizer or stand_in)
        return load_train_data(
            self.config.data,
            self.tokenizer,
            collator,
            self.given,
            self.config.seed,
            self.config.progress and self.state.is_main_process,
        )

    # ---- one phase ----

    def _run_job(self, job: Job) -> PhaseResult:
        index = self.jobs.index(job)
        if self.folder.is_finished(job.name):
            self._restore(self.folder.final(job.name))
            return PhaseResult(**self.folder.finished_phase(job.name))
        resumed = self.folder.resumable(job.name)
        self.folder.rewind_log(job.name, int(resumed.name.split("-")[1]) if resumed else 0)
        phase = self.starts.make_phase(job)
        started = time.perf_counter()
        trainer = self._make_trainer(job, phase, self.config.seed + 1000 * index)
        with self.guard:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        # Accelerate wraps forward for autocast, and the next phase would wrap it once more.
        # (Its own unwrap_model follows __wrapped__ past the class's forward.)
        original = self.model.__dict__.pop("_original_forward", None)
        if original is not None:
            self.model.forward = original
        step = trainer.state.global_step
        if self.guard.requested:
            self._raise_interrupted(job, step)
        seconds = time.perf_counter() - started
        del trainer
        gc.collect()
        return self._close_phase(job, phase, seconds)

    def _make_trainer(self, job: Job, phase: Phase, seed: int) -> Trainer:
        steps_before = sum(j.steps for j in self.jobs[: self.jobs.index(job)])
        hooks = ProgressAndLog(
            self.folder,
            job.name,
            job.steps,
            steps_before=steps_before,
            show=self.config.progress and self.state.is_main_process,
            eval_every=self.config.eval_every,
            evaluate=lambda: self._evaluate(phase),
        )
        return Trainer(
            self.model,
            phase,
            training_arguments(self.config, job.settings, job.steps, self._phase_dir(job), seed),
            sequence_average=self.config.sequence_average,
            group_by_length=self.config.group_by_length,
            steps_before=steps_before,
            guard=self.guard,
            train_dataset=self.data.train,
            data_collator=self.data.collator,
            callbacks=[hooks],
        )

    def _phase_dir(self, job: Job) -> str:
        return str(self.folder.phase(job.name))

    def _evaluate(self, phase: Phase) -> dict[str, float]:
        data = self.data
        measured = held_out_figures(self.model, phase, data.validation, data.collator)
        return {f"eval_{name}": value for name, value in measured.items()}

    def _raise_interrupted(self, job: Job, step: int) -> None:
        assert self.guard.signal_number is not None
        raise TrainingInterrupted(
            f"stopped after step {step} of {job.steps} of phase {job.name!r}; all is saved in "
            f"{self.folder.path}: run the same command again to go on",
            self.guard.signal_number,
        )

    def _close_phase(self, job: Job, phase: Phase, seconds: float) -> PhaseResult:
        """Calibrates, measures and publishes the end of a phase."""
        steered = not job.fixed and job.name != "warmup"
        asked = 0.0  # of a warm-up
        if job.fixed:
            asked = phase.target(job.steps)
            write_plan_into_routers(self.model, self.starts.plans.static())
        elif steered:
            asked = self.config.skip_rate
            self.starts.calibrate([asked])
        rate = skip_rate_of(keep_masks(self.model, self.data.prompts(self.data.test)))
        measured = self._evaluate(
            phase if not job.fixed else dataclasses.replace(phase, plans=None)
        )
        self.folder.log({"phase": job.name, "step": job.steps, "end": True, **measured})
        final = self.folder.final(job.name)
        result = PhaseResult(
            job.name, job.steps, seconds, str(final), measured["eval_cross_entropy"], asked, rate
        )
        if self.state.is_main_process:
            with staged_folder(final) as staging:
                self.model.save_pretrained(staging)
                write_json(staging / "phase.json", dataclasses.asdict(result))
            self.folder.clear_checkpoints(job.name)
        self.state.wait_for_everyone()
        return result

    def _restore(self, folder: Path) -> None:
        """The model as a finished phase left it."""
        if (folder / ADAPTER_FOLDER).is_dir():
            self.starts.need_adapter()
            load_adapter_weights(self.model, folder / ADAPTER_FOLDER)
        load_routers(self.model, folder)
        stored = read_router_config(folder)
        self.model.router_config.keep_bias = stored.keep_bias
        self.model.router_config.calibration = stored.calibration
        self.model.set_thresholds(stored.thresholds)

    # ---- the end ----

    def _finish(self, results: list[PhaseResult]) -> TrainResult:
        config = self.config
        last = self.jobs[-1]
        if not last.fixed and last.name != "warmup":
            rates = sorted({config.skip_rate, *self._reachable(config.calibrate_rates)})
            self.starts.calibrate(rates)
        asked = results[-1].skip_rate_asked
        initial = self.folder.path / "router_init.safetensors"
        with self.starts.plans.bar("router health", 5 * len(self.data.test)) as update:
            health = router_health(
                self.model,
                self.data.test,
                self.data.collator,
                asked,
                initial=load_file(initial) if initial.is_file() else None,
                seed=config.seed,
                progress=update,
            )
        result = TrainResult(
            self.folder.path,
            self.folder.checkpoint,
            self.folder.log_path,
            results,
            health,
            self.data.too_long,
        )
        if self.state.is_main_process:
            with staged_folder(self.folder.checkpoint) as staging:
                self.model.save_pretrained(staging)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(staging)
                write_json(staging / "health.json", health.to_json())
                if by_length := self.starts.plans.by_length():
                    by_length.save(staging)
            write_json(self.folder.path / "health.json", health.to_json())
            write_text(self.folder.path / "health.md", health.to_markdown())
            self.folder.write("result.json", result.to_json())
        self.state.wait_for_everyone()
        return result

    def _reachable(self, rates: Sequence[float]) -> list[float]:
        num_layers = len(self.model.decoder_layers)
        most = 1.0 - len(self.model.router_config.protected) / num_layers
        return [rate for rate in rates if rate <= most]


def training_arguments(
    config: TrainConfig, settings: PhaseConfig, steps: int, output_dir: str, seed: int
) -> TrainingArguments:
    """transformers' arguments for one phase of `config`; `seed` is of its dropout."""
    return TrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.lr_schedule,
        warmup_steps=round(settings.lr_warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=config.precision == "bf16",
        use_cpu=config.device == "cpu",
        **{CHECKPOINTING: config.gradient_checkpointing},
        seed=seed,
        data_seed=config.seed,  # one order for the run: controls have other phases
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # we stop instead
        save_strategy="steps",
        save_steps=config.save_every or steps,
        save_total_limit=config.save_total_limit,
        disable_tqdm=True,  # our own bar shows skip rates
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available() and config.device != "cpu",
        ddp_find_unused_parameters=False,
    )


def _result_from_json(values: Mapping[str, Any], folder: RunFolder) -> TrainResult:
    """A stored result; `folder` may have been moved since."""
    return TrainResult(
        folder.path,
        folder.checkpoint,
        folder.log_path,
        [PhaseResult(**p | {"checkpoint": str(folder.final(p["name"]))}) for p in values["phases"]],
        HealthReport.from_json(values["health"]),
        values["too_long"],
    )
