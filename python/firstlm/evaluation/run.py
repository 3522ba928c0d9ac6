"""evaluate(): every method on the same examples, beside FiRST.

evaluation = evaluate("runs/x/checkpoint", ["debian-synopsis"], [0.25], output="runs/x/evaluation")

Data, then of each set of weights the plans of the methods that use it (plans.py), their quality
batch by batch and their latency, then all results. What is measured goes to disk at once
(store.py), so that the same call goes on after an interruption, and under torchrun or
`accelerate launch` every process takes its share of the batches.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import firstlm
from firstlm import figures, loading
from firstlm.checkpoint import name_of
from firstlm.data import PromptAnswerCollator
from firstlm.evaluation import checks, early_exit, timing
from firstlm.evaluation import methods as rules
from firstlm.evaluation.data import fingerprint, load_evaluation_data
from firstlm.evaluation.plans import Plans, mask_to_bits
from firstlm.evaluation.records import Evaluation, ExampleResult, Method, MethodResult, Timing
from firstlm.evaluation.request import Effort, Request
from firstlm.evaluation.store import Store, digest
from firstlm.evaluation.weights import Weights
from firstlm.held_out import Example, rows_of, spread_over_tasks
from firstlm.skip_plan import mask_to_plans
from firstlm.tokenizer import load_tokenizer
from firstlm.train_progress import bar

_WAIT = datetime.timedelta(days=7)  # other processes wait while one measures latency or plans


def evaluate(
    checkpoints: Any,
    data: Sequence[Any] | Any,
    skip_rates: Sequence[float] | None = None,
    *,
    output: str | Path,
    trained: Mapping[str, Any] | None = None,
    controls: Sequence[str] = rules.DEFAULT_CONTROLS,
    weights: Sequence[str] = ("first",),
    columns: Mapping[str, Any] | None = None,
    engine: str = "hf",
    timing_engine: str | None = "auto",
    precision: str | None = None,
    dtype: torch.dtype | str | None = None,
    threads: int | None = None,
    effort: Effort | Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Evaluation:
    """Measures FiRST and its rivals on the same examples.

    Args:
        checkpoints: FiRST's: a folder, a list of folders (one a training seed), or a dict from skip
            rates to these, where each rate was trained for itself.
        data: tasks, each a shipped corpus, a JSONL file, a folder with one a split, or a Dataset.
        skip_rates: asked; None: those that the checkpoints were trained for.
        output: folder of results.json, examples.jsonl, report.md and report.html, and of what an
            interrupted evaluation goes on from.
        trained: name of a rival -> checkpoints of its own, given as `checkpoints` are: static,
            length, lora_only… of `firstlm train control=…`, or any whose routers say its plans.
        controls: that need no training of their own, of methods.CONTROLS.
        weights: whose weights these run on: "first" (FiRST's), "base" (not finetuned), or both.
        columns: prompt_column, answer_column, messages_column of the data.
        engine: that quality is measured on: "hf" (batches), "native", or "auto".
        timing_engine: that latency is measured on: "auto" (native where it runs the model),
            "native", "hf", or None: no latency.
        precision: of the native engine; None: int8.
        dtype: of the hf path; None: as stored.
        threads: None: as many as torch uses.
        effort: how much is measured: an Effort, or a mapping that names what differs from its
            defaults, as {"examples": 48, "timing_prompts": 4}.
        seed: of the draw of examples, of shuffling and of random plans.
        progress: show bars on stderr; None: on a terminal.

    Returns:
        Evaluation, with latencies in the main process only, which writes the files.

    Raises:
        ValueError: arguments that do not fit together or that are unknown, before any work.
        CheckFailed, PlanNotFollowed: a self-check found that figures would be wrong.
    """
    request = Request(
        rules.folders_of(checkpoints),
        {name: rules.folders_of(given) for name, given in (trained or {}).items()},
        [data] if isinstance(data, (str, Path)) or not isinstance(data, Sequence) else list(data),
        tuple(dict.fromkeys(controls)),
        tuple(dict.fromkeys(weights)),
        Effort.of(effort),
        seed,
        engine,
        timing_engine,
        precision,
        dtype,
    )
    request.check()
    methods = request.methods(skip_rates)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        show = sys.stderr.isatty() if progress is None else progress
        return Run(request, methods, Path(output), threads, show).go(columns)
    except KeyboardInterrupt:
        message = "What was measured is kept: run the same command again to go on."
        raise KeyboardInterrupt(message) from None
    finally:
        torch.set_num_threads(before)


class Run:
    """One evaluation."""

    def __init__(
        self,
        request: Request,
        methods: list[Method],
        output: Path,
        threads: int | None,
        show: bool,
    ) -> None:
        from accelerate import PartialState

        self.request, self.methods, self.output = request, methods, output
        self.effort, self.seed, self.threads = request.effort, request.seed, threads
        self.state = PartialState(cpu=not torch.cuda.is_available(), timeout=_WAIT)
        self.main = self.state.is_main_process
        self.show = show and self.main
        self.store = Store(output, self.state.process_index)
        self.plans = Plans(self)
        self.timings: dict[str, Timing] = {}
        self.checks: dict[str, str] = {}

    def go(self, columns: Mapping[str, Any] | None) -> Evaluation:
        """Data first, which fails sooner than a model loads."""
        folder = next(m.checkpoint for m in self.methods if m.name == "first")
        assert folder is not None
        self.checks["optimizer steps"] = self._check_steps()
        self.tokenizer = load_tokenizer(folder)
        base = loading.base_config(folder).get_text_config()
        self.positions = getattr(base, "max_position_embeddings", None) or sys.maxsize
        self.data = load_evaluation_data(
            self.request.sources, self.tokenizer,
            examples=self.effort.examples, validation=self.effort.validation,
            max_length=min(self.effort.max_length, self.positions), seed=self.seed,
            columns=columns,
            checkpoints=[m.checkpoint for m in self.methods if m.checkpoint is not None],
        )  # fmt: skip
        self.batches = self.data.batches(self.effort.batch_size)
        self.prints = {
            "validation": fingerprint(self.data.validation),
            "test": fingerprint(self.data.test),
        }
        for group in _groups(self.methods):
            self._run_group(group)
        evaluation = self._collect()
        if self.main:
            from firstlm.evaluation.files import write_evaluation

            write_evaluation(evaluation, self.output, self.seed)
        self.state.wait_for_everyone()
        return evaluation

    def _check_steps(self) -> str:
        """Every other run of a rate, whatever its seed, against FiRST's first one."""
        first: dict[float, Method] = {}
        for method in self.methods:
            if (method.name, method.weights) == ("first", "first"):
                first.setdefault(method.skip_rate_asked, method)
        found = []
        for rate, own in first.items():
            rivals = {
                m.key: m.checkpoint
                for m in self.methods
                if m.checkpoint not in (None, own.checkpoint)
                and m.skip_rate_asked in (0.0, rate)
                and (m.weights == "trained" or m.name == "first")
            }
            found.append(f"{own.key}: {checks.check_steps(own.checkpoint, rivals)}")
        return "; ".join(found)

    # ---- one set of weights ----

    def _run_group(self, group: list[Method]) -> None:
        """All methods that share weights: plans, then quality, then latency."""
        weights = Weights(self, group[0])
        self.plans.find(weights, group)
        self._check_weights(weights, group)
        for method in group:
            self._measure(weights, method)
        if self.request.timing_engine is not None and self.effort.timing_prompts:
            self._time(weights, group)
        self.state.wait_for_everyone()

    def once(self, key: dict[str, Any], find: Callable[[], Any]) -> Any:
        """A value that the main process finds, if no file holds it, and every process reads."""
        if self.main and self.store.read(key) is None:
            self.store.write(key, find())
        self.state.wait_for_everyone()
        return self.store.read(key)

    # ---- quality ----

    def _key_of(self, weights: Weights, method: Method) -> str:
        return digest(
            {
                "weights": weights.key, "plans": self.plans.bits(method),
                "exit": self.plans.exits.get(method.key),
                "test": self.prints["test"], **weights.quality_key,
                "limits": self._limits(), "version": firstlm.__version__,
            }
        )  # fmt: skip

    def _limits(self) -> dict[str, int]:
        """Tokens of an answer, at most, by task."""
        if self.effort.max_new_tokens is not None:
            return dict.fromkeys(self.data.tasks, self.effort.max_new_tokens)
        return {
            task: max(len(e.answer_ids) for e in self.data.validation if e.task == task)
            for task in self.data.tasks
        }

    def _longer_references(self) -> dict[str, int]:
        """Test references that no answer can be as long as, by task."""
        return {
            task: sum(len(e.answer_ids) > limit for e in self.data.test if e.task == task)
            for task, limit in self._limits().items()
        }

    def _measure(self, weights: Weights, method: Method) -> None:
        """The batches of this process that no file holds yet."""
        store = self.store.examples(method.key, self._key_of(weights, method))
        done = store.read()
        self.state.wait_for_everyone()  # nobody writes before all have read
        own = range(self.state.process_index, len(self.batches), self.state.num_processes)
        missing = [number for number in own if number not in done]
        store.begin()
        with self.bar(f"{method.key}: batches", len(own)) as update:
            update(len(own) - len(missing))
            for number in missing:
                batch = self.batches[number]
                store.append(number, self._measure_batch(weights, method, batch))
                update(1)

    def _check_weights(self, weights: Weights, group: Sequence[Method]) -> None:
        """Self-checks on the first batch."""
        examples = [self.data.test[i] for i in self.batches[0]]
        same = {"weights": weights.key, "test": self.prints["test"], **weights.quality_key}

        def skipping() -> str:
            return checks.check_skipping_matters(
                weights.path, examples, weights.protected, weights.num_layers
            )

        name = name_of(group[0].checkpoint) if group[0].checkpoint else "base"
        found = self.once({"what": "skipping", **same}, skipping)
        self.checks[f"a plan without unprotected layers changes the loss, {name}"] = found
        for method in group:
            if (method.name, method.weights) != ("first", "first"):
                continue
            rate, keep = method.skip_rate_asked, self.plans.keep[method.key][self.batches[0]]

            def routed(method: Method = method, rate: float = rate, keep: Any = keep) -> str:
                weights.use_thresholds(rate, self.plans.thresholds(method))
                return checks.check_routed_plans(weights.path, examples, keep, rate)

            found = self.once({"what": "routed", **same, "plans": mask_to_bits(keep)}, routed)
            self.checks[f"the routers give the plans that are measured, {method.key}"] = found

    def _measure_batch(
        self, weights: Weights, method: Method, batch: Sequence[int]
    ) -> list[ExampleResult]:
        examples = [self.data.test[i] for i in batch]
        keep = self.plans.keep[method.key][batch]
        longest = max(len(e.prompt_ids) for e in examples)
        limit = min(self._limits()[examples[0].task], self.positions - longest)
        kept = [tuple(row.nonzero().flatten().tolist()) for row in keep]
        if method.name == rules.CONFIDENT_EXIT:
            losses, answers, kept = self._leave_early(weights, method, examples, max(limit, 1))
        else:
            path = weights.path
            with path.any_plan():
                losses = path.losses(examples, {"skip_plan": mask_to_plans(keep)})
                answers = path.counted_answers(examples, keep, max(limit, 1))
        return [
            ExampleResult(
                example=example.id,
                task=example.task,
                prompt_tokens=len(example.prompt_ids),
                kept=layers,
                layers_run=layers_run,
                loss=loss,
                tokens=tokens,
                answer=answer,
                reference=example.answer,
            )
            for example, layers, (loss, tokens), (answer, layers_run) in zip(
                examples, kept, losses, answers, strict=True
            )
        ]

    def _leave_early(
        self, weights: Weights, method: Method, examples: Sequence[Example], limit: int
    ) -> tuple[list[tuple[float, int]], list[tuple[str, float]], list[tuple[int, ...]]]:
        """(losses, answers, layers of the mean depth) of an early exit by confidence."""
        threshold, model, size = self.plans.exits[method.key], weights.model, len(examples)
        scores = early_exit.score_early_exit(
            model, rows_of(examples), PromptAnswerCollator(self.tokenizer), threshold,
            batch_size=size,
        )  # fmt: skip
        found = early_exit.answer_early_exit(
            model, self.tokenizer, [example.prompt for example in examples], threshold,
            max_new_tokens=limit, batch_size=size,
        )  # fmt: skip
        return (
            list(zip(scores.loss.tolist(), scores.tokens.tolist(), strict=True)),
            list(zip(found.texts, found.layers_run, strict=True)),
            [tuple(range(round(count))) for count in scores.layers_run.tolist()],
        )

    # ---- latency ----

    def _time(self, weights: Weights, group: Sequence[Method]) -> None:
        group = [method for method in group if method.key not in self.plans.exits]
        if not self.main or not group:
            return
        chosen = spread_over_tasks(self.data.test, self.effort.timing_prompts)
        room = self.positions - self.effort.new_tokens
        chosen = [i for i in chosen if len(self.data.test[i].prompt_ids) <= room]
        if not chosen:
            raise ValueError(
                f"the model has {self.positions} positions: after the prompts there is no room for "
                f"{self.effort.new_tokens} tokens; lower new_tokens"
            )
        arms = {
            m.key: timing.arms_of(m.name, m.skip_rate_asked, self.plans.keep[m.key], chosen)
            if m.weights == "first"
            else timing.arms_of("plan", m.skip_rate_asked, self.plans.keep[m.key], chosen)
            for m in group
        }
        key = {
            "weights": weights.key, "test": self.prints["test"], "prompts": chosen,
            "plans": {m.key: self.plans.bits(m, chosen) for m in group},
            "engine": [self.request.timing_engine, self.request.precision, str(self.request.dtype)],
            "threads": torch.get_num_threads() if self.threads is None else self.threads,
            "effort": [self.effort.new_tokens, self.effort.repeats],
            "cpu": figures.cpu_model(), "version": firstlm.__version__,
        }  # fmt: skip
        path, examples = weights.timing_path(group), [self.data.test[i] for i in chosen]
        for method in group:
            if (method.name, method.weights) == ("first", "first"):
                keep = self.plans.keep[method.key][chosen]
                what = f"the timed engine's routers give the plans that were scored, {method.key}"
                self.checks[what] = checks.compare_timed_plans(
                    path, examples, keep, method.skip_rate_asked
                )
        with self.bar(f"latency of {len(arms)} methods: prompts", len(chosen)) as update:
            self.timings |= timing.time_methods(
                path, examples, arms, weights.num_layers, new_tokens=self.effort.new_tokens,
                repeats=self.effort.repeats,
                folder=self.output / "timing" / digest(weights.key)[:16],
                key=key, progress=update,
            )  # fmt: skip

    # ---- all of it ----

    def _collect(self) -> Evaluation:
        results = []
        for method in self.methods:
            weights = Weights(self, method)
            done = self.store.examples(method.key, self._key_of(weights, method)).read()
            by_index = {
                i: result
                for number, batch in enumerate(self.batches)
                for i, result in zip(batch, done[number], strict=True)
            }
            examples = [by_index[i] for i in range(len(self.data.test))]
            notes = [*self.plans.notes[method.key]]
            if method.name == rules.CONFIDENT_EXIT:
                notes.append(early_exit.rates_note(examples, weights.num_layers))
            timed = self.timings.get(method.key)
            results.append(MethodResult(method, weights.num_layers, examples, timed, notes))
        counted = sum(len(r.examples) for r in results if r.method.name != rules.CONFIDENT_EXIT)
        self.checks["layer calls equal the plans"] = f"{counted} answers"
        if self.timings:
            tokens = self.effort.new_tokens
            self.checks["tokens of every timed answer"] = str(tokens)
        return Evaluation(self._settings(), results, self.checks)

    def _settings(self) -> dict[str, Any]:
        request = self.request
        return {
            "data": [str(source) for source in request.sources],
            "tasks": self.data.tasks,
            "examples": len(self.data.test),
            "validation": len(self.data.validation),
            "too_long": self.data.too_long,
            "skip_rates": sorted({m.skip_rate_asked for m in self.methods if m.name == "first"}),
            "engine": request.engine,
            "precision": request.precision,
            "dtype": None if request.dtype is None else str(request.dtype),
            "timing_engine": request.timing_engine,
            "max_new_tokens": self._limits(),
            "references_longer": self._longer_references(),
            "effort": dataclasses.asdict(self.effort),
            "seed": self.seed,
            "runs": checks.run_settings(m.checkpoint for m in self.methods),
        }

    def bar(self, what: str, total: int | None) -> Any:
        return bar(what, total, self.show)


def _groups(methods: Sequence[Method]) -> list[list[Method]]:
    """Methods that share weights, in order of appearance."""
    found: dict[tuple[bool, str | None], list[Method]] = {}
    for method in methods:
        found.setdefault((method.weights == "base", method.checkpoint), []).append(method)
    # FiRST's own plans make those of other groups.
    return sorted(found.values(), key=lambda group: all(m.name != "first" for m in group))
