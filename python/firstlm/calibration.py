"""calibrate(): thresholds for asked skip rates, and the rate that a latency budget needs here.

result = firstlm.calibrate("runs/x/checkpoint", "debian-synopsis", tpot_reduction=0.3)

Nothing is trained. Examples come in two parts: thresholds are found on one, and rates, latency and
quality are measured on the other. Of the checkpoint only router_config.json is rewritten, at the
end. Until then every measurement is kept in .calibration/ of the checkpoint, so that the same call
goes on after an interruption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import firstlm
from firstlm import decode_paths, figures, loading
from firstlm.atomic import check_can_write, write_json
from firstlm.budget import (
    DEFAULT_RATES,
    calibrate_thresholds,
    check_rates,
    keep_masks,
    rate_key,
    skip_rate_of,
)
from firstlm.checkpoint import (
    CONFIG_NAME,
    SHIPPED,
    WEIGHTS_NAME,
    find_checkpoint,
    read_router_config,
)
from firstlm.decode_paths import DecodePath
from firstlm.engine.source import source_folders, source_key
from firstlm.held_out import Example, HeldOut, load_held_out, spread_over_tasks
from firstlm.latency_budget import FULL, Decision, Request, decide
from firstlm.measured_file import MeasuredFile
from firstlm.quality import METRICS, Quality, Scored, compare
from firstlm.router import RouterConfig
from firstlm.skip_plan import SkipPlan
from firstlm.tokenizer import load_tokenizer
from firstlm.train_progress import bar

WORK_FOLDER = ".calibration"
_CHUNK = 8  # examples that are scored between two writes


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        prompts: that thresholds are found on, and that rates are checked on.
        examples: of quality.
        timing_prompts, repeats: of TPOT: every arm decodes each of the prompts `repeats` times.
        new_tokens: of a timed answer.
        max_new_tokens: of an answer whose quality is measured.
        max_length: longer examples (prompt + answer, tokens) are passed over.
    """

    prompts: int = 128
    examples: int = 100
    timing_prompts: int = 8
    repeats: int = 3
    new_tokens: int = 32
    max_new_tokens: int = 64
    max_length: int = 512

    def __post_init__(self) -> None:
        least = {"prompts": 2, "examples": 2, "new_tokens": 2}
        for name, value in vars(self).items():
            if value < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}, got {value}")


@dataclass
class Calibration:
    """What was found.

    Attributes:
        checkpoint: whose router_config.json was rewritten.
        rows: one a rate: asked, achieved, distinct_plans; where latency was asked also tpot_ms,
            tpot_reduction, skip_rate_timed and, where it was measured, quality. Rate 0 is the full
            model.
        choice: what became the default, None if nothing was asked; as in RouterConfig.choice.
        record: all of it, with versions and machine.
    """

    checkpoint: Path
    rows: list[dict[str, Any]]
    choice: dict[str, Any] | None
    record: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return self.record


def calibrate(
    checkpoint: str | os.PathLike[str],
    data: Any,
    rates: Sequence[float] | None = None,
    *,
    split: str = "validation",
    columns: Mapping[str, Any] | None = None,
    tpot_ms: float | None = None,
    tpot_reduction: float | None = None,
    min_quality: float | None = None,
    metric: str | None = None,
    default_rate: float | None = None,
    engine: str = "auto",
    precision: str | None = None,
    dtype: torch.dtype | str | None = None,
    threads: int | None = None,
    effort: Effort | None = None,
    seed: int = 0,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Finds thresholds for average skip rates, and chooses one for a latency budget by measuring.

    Args:
        checkpoint: folder that firstlm trained.
        data: held-out examples, as data.train of a run: a shipped corpus, a JSONL file, a folder, a
            Dataset, or a list of them. A file without splits is taken as a whole.
        rates: asked skip rates; None: 0.1 to 0.6, as far as protected layers allow.
        split: of corpora and folders: "validation" or "test".
        columns: prompt_column, answer_column, messages_column of the data.
        tpot_ms: time per output token, at most, in milliseconds, on this machine, at batch 1.
        tpot_reduction: or: the share of the full model's that is to go, at least.
        min_quality: share of the full model's quality (adapter merged, every layer kept) that has
            to stay, at least. A point estimate on `effort.examples` examples.
        metric: of quality: rouge_l, exact_match, chrf, cross_entropy or perplexity.
        default_rate: or: make the thresholds of this rate the default, without measuring.
        engine: that is measured: "native", "hf", or "auto": native where it runs the model.
        precision: of the engine; None: int8.
        dtype: of the model; thresholds are found and the hf path is measured in it.
        threads: None: as many as torch uses.
        effort: how much is measured.
        seed: of the draw of examples and of the bootstrap.
        work_dir: where measurements are kept; None: .calibration in the checkpoint.
        progress: show bars on stderr; None: on a terminal.

    Returns:
        Calibration; router_config.json of the checkpoint holds it, too.

    Raises:
        ValueError: no checkpoint folder that can be written to, rates that protected layers
            forbid, too little data, or arguments that do not fit together.
    """
    request = Request(tpot_ms, tpot_reduction, min_quality, metric)
    decode_paths.check_options(engine, precision, dtype)
    folder = Path(checkpoint)
    if str(checkpoint) == SHIPPED and not folder.exists():
        raise ValueError(
            f"{SHIPPED} ships with firstlm and is not rewritten: copy {find_checkpoint(SHIPPED)}, "
            "and calibrate the copy"
        )
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{checkpoint} is no folder of a checkpoint (no {CONFIG_NAME}): train one, or download "
            "it, since its thresholds are rewritten"
        )
    if not (folder / WEIGHTS_NAME).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_NAME}: not a whole checkpoint")
    stored = read_router_config(folder)
    rates = _check_rates(rates, default_rate, request, stored)
    if split not in ("validation", "test"):
        raise ValueError(f"split must be 'validation' or 'test', held-out data, got {split!r}")
    check_can_write(work_dir or folder / WORK_FOLDER, folder=True)
    check_can_write(folder / CONFIG_NAME)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        run = _Run(
            folder, rates, request, default_rate, effort or Effort(), seed,
            sys.stderr.isatty() if progress is None else progress,
        )  # fmt: skip
        run.load(data, split, columns, dtype, work_dir, (engine, precision, threads))
        return run.go()
    except KeyboardInterrupt:
        message = "What was measured is kept: run the same command again to go on."
        raise KeyboardInterrupt(message) from None
    finally:
        torch.set_num_threads(before)


def _check_rates(
    rates: Sequence[float] | None,
    default_rate: float | None,
    request: Request,
    config: RouterConfig,
) -> list[float]:
    """The rates in order, each once."""
    if default_rate is not None and request.is_open():
        raise ValueError("default_rate and a latency budget both choose the default: give one")
    num_layers = config.num_layers
    if num_layers is None:
        raise ValueError(f"{CONFIG_NAME} names no num_layers: save the model again")
    protected = config.resolved(num_layers).protected
    most = 1.0 - len(protected) / num_layers
    asked = list(rates) if rates is not None else [r for r in DEFAULT_RATES if r <= most]
    asked += [default_rate] if default_rate is not None else []
    check_rates(asked, num_layers, protected)
    if not asked:
        raise ValueError("rates is empty: at least one skip rate is needed")
    if request.is_open() and not any(asked):
        raise ValueError("a latency budget needs a rate above 0 to choose from")
    return sorted({float(rate_key(rate)) for rate in asked})


class _Run:
    """One calibration; `load`, then `go`."""

    def __init__(
        self,
        folder: Path,
        rates: list[float],
        request: Request,
        default_rate: float | None,
        effort: Effort,
        seed: int,
        show: bool,
    ) -> None:
        self.folder, self.rates, self.request = folder, rates, request
        self.default_rate, self.effort, self.seed, self.show = default_rate, effort, seed, show

    def load(
        self,
        data: Any,
        split: str,
        columns: Mapping[str, Any] | None,
        dtype: torch.dtype | str | None,
        work_dir: str | os.PathLike[str] | None,
        engine: tuple[str, str | None, int | None],
    ) -> None:
        """Data first, which fails sooner than a model loads."""
        effort, (kind, precision, threads) = self.effort, engine
        base = loading.base_config(self.folder).get_text_config()
        positions = getattr(base, "max_position_embeddings", None) or sys.maxsize
        self.tokenizer = load_tokenizer(self.folder)
        self.data: HeldOut = load_held_out(
            data, split, self.tokenizer,
            max_length=min(effort.max_length, positions),
            calibration=effort.prompts,
            check=max(effort.prompts, effort.examples * self.request.is_open()),
            seed=self.seed, columns=columns,
        )  # fmt: skip
        room = positions - max(effort.new_tokens, effort.max_new_tokens)
        self.decoded = [e for e in self.data.check if len(e.prompt_ids) <= room]
        if self.request.is_open() and len(self.decoded) < 2:
            raise ValueError(
                f"the model has {positions} positions: after the held-out prompts there is no room "
                f"for {max(effort.new_tokens, effort.max_new_tokens)} tokens; ask for fewer"
            )
        self.model = loading.from_pretrained(self.folder, dtype=dtype, merge_adapter=True)
        self.model.set_thresholds(_thresholds_to_start_from(self.model.router_config))
        self.engine = kind, precision, dtype, threads
        key = {
            "source": source_key(source_folders(self.folder)),
            "data": self.data.fingerprint(),
            "effort": vars(effort),
            "engine": [str(part) for part in self.engine],
            "threads": torch.get_num_threads(),
            "seed": self.seed,
            "cpu": figures.cpu_model(),
            "version": firstlm.__version__,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.measured = MeasuredFile(Path(work_dir or self.folder / WORK_FOLDER), digest)

    def go(self) -> Calibration:
        thresholds = self._find_thresholds()
        self.model.router_config.calibration = thresholds
        rows = [self._check(rate) for rate in self.rates]
        choice = None
        if self.request.is_open():
            rows, choice = self._fit_budget(rows)
        elif self.default_rate is not None:
            rate = float(rate_key(self.default_rate))
            choice = {"asked": {"rate": rate}, "rate": rate, "met": True}
        found = {
            "checkpoint": str(self.folder),
            "prompts": {
                "calibration": len(self.data.calibration),
                "check": min(len(self.data.check), self.effort.prompts),
            },
            "too_long": self.data.too_long,
            "rows": rows,
            "choice": choice,
        }
        record = figures.record(found, seed=self.seed)
        if choice is not None:
            about = ("seed", "versions", "machine")
            choice = {**choice, "rows": rows, **{name: record[name] for name in about}}
        self._rewrite_config(thresholds, choice)
        self.measured.delete()
        return Calibration(self.folder, rows, choice, record)

    def _bar(self, what: str, total: int | None) -> Any:
        return bar(what, total, self.show)

    # ---- thresholds and rates ----

    def _find_thresholds(self) -> dict[str, list[float]]:
        """{rate_key: thresholds}; each rate is kept when it is found."""
        known = self.measured.part("thresholds")

        def keep(key: str, thresholds: list[float]) -> None:
            known[key] = thresholds
            self.measured.save()

        missing = [rate for rate in self.rates if rate_key(rate) not in known]
        prompts = [example.prompt_ids for example in self.data.calibration]
        for_rates = ", ".join(map(rate_key, missing))
        with self._bar(f"thresholds for {for_rates}: prompts", None) as update:
            calibrate_thresholds(self.model, prompts, missing, found_one=keep, prompts_done=update)
        return {rate_key(rate): known[rate_key(rate)] for rate in self.rates}

    def _check(self, rate: float) -> dict[str, Any]:
        """Asked and achieved rate, on the part that thresholds were not found on."""
        checks = self.measured.part("checks")
        if (key := rate_key(rate)) not in checks:
            prompts = [e.prompt_ids for e in self.data.check[: self.effort.prompts]]
            own = self.model.router_config
            self.model.set_thresholds(own.calibration[key])
            try:
                with self._bar(f"checking {key}: prompts", len(prompts)) as update:
                    mask = keep_masks(self.model, prompts, update)
            finally:
                self.model.router_config = own
            plans = len({tuple(row) for row in mask.tolist()})
            checks[key] = {"achieved": skip_rate_of(mask), "distinct_plans": plans}
            self.measured.save()
        return {"asked": rate, **checks[key]}

    # ---- latency and quality ----

    def _fit_budget(
        self, rows: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(rows with what was measured, the choice)."""
        kind, precision, dtype, threads = self.engine
        path = decode_paths.open_path(
            self.model, self.tokenizer, kind, precision, dtype, threads, self.show
        )
        arms = {FULL: {"skip_plan": SkipPlan.full(len(self.model.decoder_layers))}}
        arms |= {rate: {"budget": rate} for rate in self.rates if rate != FULL}
        timed = self._time(path, arms)
        tpot = {rate: timed[rate_key(rate)]["tpot_ms"] for rate in arms}

        def quality(rate: float) -> Quality:
            metric = self.request.measured_metric
            assert metric is not None
            own, full = (self._score(path, arms, metric, r) for r in (rate, FULL))
            return compare(metric, own, full, self.seed)

        decision = decide(self.request, tpot, quality)
        if all(row["asked"] != FULL for row in rows):
            rows = [{"asked": FULL, "achieved": 0.0, "distinct_plans": 1}, *rows]
        rows = [self._measured_row(row, timed, decision) for row in rows]
        choice = {
            "asked": self.request.to_json(),
            "rate": decision.rate,
            "met": decision.met,
            "reason": decision.reason,
            "path": path.facts,
        }
        return rows, choice

    def _measured_row(
        self, row: dict[str, Any], timed: Mapping[str, Any], decision: Decision
    ) -> dict[str, Any]:
        own, full = timed[rate_key(row["asked"])], timed[rate_key(FULL)]
        tpot_ms = figures.measured(own["tpot_ms"])
        row = row | {
            "tpot_ms": tpot_ms,
            "tpot_reduction": 1 - tpot_ms["median"] / figures.measured(full["tpot_ms"])["median"],
            "skip_rate_timed": 1 - own["layers_per_token"] / len(self.model.decoder_layers),
        }
        if row["asked"] in decision.qualities:
            row["quality"] = decision.qualities[row["asked"]].to_json()
        return row

    def _time(
        self, path: DecodePath, arms: Mapping[float, Mapping[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """rate_key -> {"tpot_ms": all values, "layers_per_token": mean}, over timing prompts."""
        named = {rate_key(rate): arm for rate, arm in arms.items()}
        chosen = spread_over_tasks(self.decoded, self.effort.timing_prompts)
        prompts = [self.decoded[i] for i in chosen]
        kept = self.measured.part("timings", str(path.facts))
        with self._bar("TPOT, full model and rates in turns: prompts", len(prompts)) as update:
            for index, example in enumerate(prompts):
                # Arms are compared where they took turns, so a prompt is whole or done again.
                if kept.get(str(index), {}).keys() != named.keys():
                    kept[str(index)] = path.time(
                        example, named, self.effort.new_tokens, self.effort.repeats
                    )
                    self.measured.save()
                update(1)
        found = {}
        for name in named:
            parts = [kept[str(index)][name] for index in range(len(prompts))]
            found[name] = {
                "tpot_ms": [value for part in parts for value in part["tpot_ms"]],
                "layers_per_token": sum(p["layers_per_token"] for p in parts) / len(parts),
            }
        return found

    def _score(
        self,
        path: DecodePath,
        arms: Mapping[float, Mapping[str, Any]],
        metric: str,
        rate: float,
    ) -> list[Scored]:
        """(value, weight) of every example."""
        examples = self.decoded[: self.effort.examples]
        kind = metric if METRICS[metric] is not None else "loss"  # which two metrics share
        part = self.measured.part("scores", str(path.facts), kind)
        done: list[Any] = part.setdefault(rate_key(rate), [])
        name = "the full model" if rate == FULL else rate_key(rate)
        with self._bar(f"{metric} of {name}: examples", len(examples)) as update:
            update(len(done))
            while len(done) < len(examples):
                chunk = examples[len(done) : len(done) + _CHUNK]
                done += self._score_chunk(path, chunk, arms[rate], metric)
                self.measured.save()
                update(len(chunk))
        return [(value, weight) for value, weight in done]

    def _score_chunk(
        self, path: DecodePath, chunk: list[Example], arm: Mapping[str, Any], metric: str
    ) -> list[list[float]]:
        scorer = METRICS[metric]
        if scorer is None:
            return [[loss, tokens] for loss, tokens in path.losses(chunk, arm)]
        answers = path.answers(chunk, arm, self.effort.max_new_tokens)
        return [[value, 1] for value in scorer(answers, [e.answer for e in chunk])]

    # ---- the checkpoint ----

    def _rewrite_config(
        self, thresholds: dict[str, list[float]], choice: dict[str, Any] | None
    ) -> None:
        """router_config.json with the rates found; other rates and all else stay as they were."""
        config = read_router_config(self.folder)
        changes: dict[str, Any] = {"calibration": {**config.calibration, **thresholds}}
        if choice is not None:
            rate = choice["rate"]
            own = thresholds.get(rate_key(rate)) if rate != FULL else None
            num_layers = len(self.model.decoder_layers)
            changes |= {"choice": choice, "thresholds": own or [0.0] * num_layers}
        write_json(self.folder / CONFIG_NAME, dataclasses.replace(config, **changes).to_dict())


def _thresholds_to_start_from(config: RouterConfig) -> list[float]:
    """The config's own, unless they keep every layer: then those of a rate, whose differences
    between layers are the trained ones."""
    assert isinstance(config.thresholds, list)
    free = [i for i in range(len(config.thresholds)) if i not in config.protected]
    if any(config.thresholds[i] > 0 for i in free) or not config.calibration:
        return config.thresholds
    rates = sorted(config.calibration, key=float)
    return config.calibration[rates[len(rates) // 2]]
