"""The oracle: how much there is to win by choosing layers per task or per prompt, before training.

Candidate plans of one size are drawn near good ones and measured on the choosing prompts; then all
of them are measured on the reported prompts. `oracle_bounds` says what each way to choose pays.
Every candidate is kept when it is measured, and an interrupted run goes on.

Letters: N prompts, C candidates, L layers, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from firstlm import figures, loading
from firstlm.atomic import write_text
from firstlm.controls import importance_plan, layers_to_drop, plan_by_position
from firstlm.data import PromptAnswerCollator
from firstlm.engine.source import source_folders, source_key
from firstlm.evaluation import oracle_text
from firstlm.evaluation.data import load_evaluation_data
from firstlm.evaluation.oracle_bounds import (
    PlanLosses,
    agreement_of_halves,
    best_per_task,
    best_single,
    chosen_plans,
    paid,
    paid_by_halves,
    summary,
)
from firstlm.held_out import Example, rows_of
from firstlm.layer_importance import measure_importance
from firstlm.losses import answer_positions, answer_token_losses
from firstlm.measured_file import MeasuredFile
from firstlm.plan_search import router_features, swap
from firstlm.scoring import Collator, score
from firstlm.skip_plan import SkipPlan
from firstlm.tokenizer import load_tokenizer
from firstlm.train_progress import bar

WORK_FOLDER = ".oracle"
_TRIES = 200  # draws that were all known before: there are no more plans nearby


@dataclass(frozen=True)
class OracleSettings:
    """What is measured.

    Attributes:
        skip_rate: of every candidate, rounded to whole layers.
        candidates: C.
        choosing, reported: prompts of each task that plans are chosen on, and reported on.
        importance_prompts: of each task, that layer importance is measured on.
        max_length: longer examples (prompt + answer, tokens) are passed over.
        batch_size: rows per forward pass.
        seed: of examples, candidates, folds and bootstrap.
    """

    skip_rate: float
    candidates: int = 48
    choosing: int = 64
    reported: int = 64
    importance_prompts: int = 16
    max_length: int = 512
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"skip_rate": 0.0, "seed": 0, "choosing": 2, "reported": 2}
        for name, value in vars(self).items():
            if value < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}, got {value}")


class PromptRows(list[dict[str, list[int]]]):
    """Encoded rows with their `ids` and `tasks`."""

    def __init__(self, rows: Iterable[Any], ids: Sequence[str], tasks: Sequence[str]) -> None:
        super().__init__(rows)
        self.ids, self.tasks = list(ids), list(tasks)

    @classmethod
    def of(cls, examples: Sequence[Example]) -> PromptRows:
        """The rows of some examples."""
        return cls(rows_of(examples), [e.id for e in examples], [e.task for e in examples])


def run_oracle(
    checkpoint: str | os.PathLike[str],
    data: Sequence[str],
    output: str | os.PathLike[str],
    settings: OracleSettings,
    *,
    columns: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measures, and writes OUTPUT/oracle.json, losses.jsonl, oracle.md and oracle.png.

    Args:
        checkpoint: as firstlm.from_pretrained takes it; its adapter is merged.
        data: corpora, files or folders. Plans are chosen on the validation split and reported on
            the test split; a file without splits lends a part to each.
        columns: prompt_column, answer_column, messages_column of the data.
        dtype: of the weights.
        progress: show bars.

    Returns:
        What oracle.json holds.

    Raises:
        ValueError: too little data, or a rate that protected layers forbid.
    """
    output = Path(output)
    tokenizer = load_tokenizer(checkpoint)
    loaded = load_evaluation_data(
        data, tokenizer, examples=settings.reported, validation=settings.choosing,
        max_length=settings.max_length, seed=settings.seed, columns=columns,
        checkpoints=[checkpoint],
    )  # fmt: skip
    choosing, reported = PromptRows.of(loaded.validation), PromptRows.of(loaded.test)
    model = loading.from_pretrained(checkpoint, dtype=dtype, merge_adapter=True)
    key = {
        "source": source_key(source_folders(Path(checkpoint))),
        "rows": [[row["input_ids"] for row in rows] for rows in (choosing, reported)],
        "settings": vars(settings),
        "dtype": str(model.dtype),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    store = MeasuredFile(output / WORK_FOLDER, digest)
    collator = PromptAnswerCollator(tokenizer)
    measured = measure(model, choosing, reported, collator, settings, store, progress)
    found = {
        "checkpoint": str(checkpoint),
        "data": list(data),
        "dtype": str(model.dtype).removeprefix("torch."),
        "settings": vars(settings),
        **analyse(measured, settings.seed),
    }
    written = figures.write(output / "oracle.json", found, seed=settings.seed)
    write_text(output / "losses.jsonl", _lines(measured))
    write_text(output / "oracle.md", oracle_text.markdown(written))
    oracle_text.plot(output / "oracle.png", written)
    return written


@dataclass
class Measured:
    """Of both sets of prompts: losses under all candidates, under no skip and under own plans.

    Attributes:
        plans: the C candidates.
        choosing, reported: losses.
        full, own: [N, 2] halves of the reported prompts, nothing skipped, and routers' own plans.
        own_rate: skip rate of these.
        features: (choosing [N, F], reported) what all routers read in a pass without skips.
        lengths: (choosing [N], reported) tokens of the prompts.
        ids: of the reported prompts.
    """

    plans: list[SkipPlan]
    choosing: PlanLosses
    reported: PlanLosses
    full: torch.Tensor
    own: torch.Tensor
    own_rate: float
    features: tuple[torch.Tensor, torch.Tensor]
    lengths: tuple[torch.Tensor, torch.Tensor]
    ids: list[str]


def measure(
    model: Any,
    choosing: PromptRows,
    reported: PromptRows,
    collator: Collator,
    settings: OracleSettings,
    store: MeasuredFile,
    progress: bool = False,
) -> Measured:
    """Draws candidates and measures everything; what `store` holds is not measured again.

    Args:
        choosing, reported: prompts that plans are chosen on, and that pay.
    """
    model.eval()
    table = _Table(model, collator, settings.batch_size, store)
    with bar("candidates: choosing", settings.candidates, progress) as update:
        plans = _draw_candidates(table, choosing, settings, update)
    with bar("candidates: reporting", len(plans), progress) as update:
        for plan in plans:
            table.losses("reported", reported, plan)
            update(1)
    own = score(model, reported, collator, batch_size=settings.batch_size).keep_mask
    num_layers = own.shape[1]
    full = SkipPlan.full(num_layers)
    with bar("features", len(choosing) + len(reported), progress) as update:
        features = tuple(
            _all_features(model, rows, collator, settings.batch_size, update)
            for rows in (choosing, reported)
        )
    return Measured(
        plans=plans,
        choosing=table.plan_losses("choosing", choosing, plans),
        reported=table.plan_losses("reported", reported, plans),
        full=table.losses("reported", reported, full),
        own=table.losses("own", reported, own),
        own_rate=1 - own.double().mean().item(),
        features=features,
        lengths=tuple(_prompt_lengths(rows) for rows in (choosing, reported)),
        ids=list(reported.ids),
    )


def analyse(measured: Measured, seed: int) -> dict[str, Any]:
    """Figures of every way to choose, over all prompts and for each task."""
    report, choosing = measured.reported, measured.choosing
    order = torch.randperm(len(choosing.tasks), generator=torch.Generator().manual_seed(seed))
    inputs = {
        "predicted": measured.features,
        "predicted_from_length": tuple(n.double().log()[:, None] for n in measured.lengths),
        "predicted_from_others": (measured.features[0][order], measured.features[1]),
    }
    chosen, quality = chosen_plans(choosing, report, inputs, seed)
    losses = {name: paid(report, plans) for name, plans in chosen.items()}
    single = best_single(choosing)
    losses["per_prompt_by_halves"] = paid_by_halves(report, single)
    losses["candidates_mean"] = report.halves.sum(-1).mean(1)
    losses |= {"full": measured.full.sum(-1), "own_plans": measured.own.sum(-1)}
    tokens = report.tokens.sum(-1)
    rivals = {name: losses[name] for name in ("single", "per_task")}
    groups = {"all": torch.arange(len(tokens))}
    groups |= {task: report.rows_of(task) for task in sorted(set(report.tasks))}
    ways: dict[str, Any] = {}
    for name, values in losses.items():
        ways[name] = {
            group: summary(
                values[rows], tokens[rows], {k: v[rows] for k, v in rivals.items()}, seed
            )
            for group, rows in groups.items()
        }
        if name in chosen:
            ways[name]["distinct_plans"] = len(set(chosen[name].tolist()))
    return {
        "prompts": {"choosing": len(choosing.tasks), "reported": len(tokens)},
        "skip_rate": measured.plans[0].skip_rate,
        "own_plans_skip_rate": measured.own_rate,
        "candidates": len(measured.plans),
        "best_single": str(measured.plans[single]),
        "best_per_task": {t: str(measured.plans[i]) for t, i in best_per_task(choosing).items()},
        "predictors": quality,
        "agreement_of_halves": agreement_of_halves(report),
        "ways": ways,
    }


class _Table:
    """Losses by set of prompts and plan, each measured once."""

    def __init__(
        self, model: Any, collator: Collator, batch_size: int, store: MeasuredFile
    ) -> None:
        self.model, self.collator, self.batch_size, self.store = model, collator, batch_size, store

    def losses(self, part: str, rows: Any, plan: SkipPlan | torch.Tensor) -> torch.Tensor:
        """Loss of the even and the odd tokens of each answer, [N, 2]; plan: one, or bool [N, L]."""
        kept, key = self.store.part("losses", part), "own"
        if isinstance(plan, SkipPlan):
            key, plan = str(plan), plan.to_mask()
        if key not in kept:
            mask = plan.expand(len(rows), -1)
            found = _half_losses(self.model, rows, self.collator, mask, self.batch_size)
            kept[key] = found.tolist()
            self.store.save()
        return torch.tensor(kept[key], dtype=torch.float64)

    def plan_losses(self, part: str, rows: Any, plans: Sequence[SkipPlan]) -> PlanLosses:
        """The table of some plans."""
        halves = torch.stack([self.losses(part, rows, plan) for plan in plans], 1)
        answers = [sum(label >= 0 for label in rows[i]["labels"]) for i in range(len(rows))]
        tokens = torch.tensor([[(n + 1) // 2, n // 2] for n in answers], dtype=torch.float64)
        return PlanLosses(halves, tokens, list(rows.tasks))

    def importance(self, rows: Any, per_task: int) -> list[float]:
        """Cost of every layer's absence alone, on the first rows of each task."""
        kept = self.store.part("importance")
        if "values" not in kept:
            some = [
                rows[i]
                for i, task in enumerate(rows.tasks)
                if list(rows.tasks[:i]).count(task) < per_task
            ]
            kept["values"] = measure_importance(
                self.model, some, self.collator, batch_size=self.batch_size
            )
            self.store.save()
        return kept["values"]


def _draw_candidates(
    table: _Table, rows: Any, settings: OracleSettings, update: Callable[[int], None]
) -> list[SkipPlan]:
    """Plans of one size near the best ones so far, for all prompts and for each task in turns.

    The same table gives the same plans, so that a run that was interrupted draws them again.
    """
    protected = table.model.router_config.protected
    num_layers = len(table.model.decoder_layers)
    count = layers_to_drop(settings.skip_rate, num_layers, protected)
    several = 0 < count < num_layers - len(protected)
    importance = table.importance(rows, settings.importance_prompts)
    cost = torch.tensor(importance, dtype=torch.float64)
    cost[list(protected)] = torch.inf
    queue = _start_plans(table.model, rows, table, importance, settings)
    plans: list[SkipPlan] = []
    generator = torch.Generator().manual_seed(settings.seed)
    tries = 0
    while len(plans) < settings.candidates and tries < _TRIES:
        if queue:
            plan = queue.pop(0)
        elif not several:
            break
        else:
            parent = _parents(table, rows, plans)[(len(plans) + tries) % (1 + len(set(rows.tasks)))]
            mask = parent.to_mask().tolist()
            for _ in range(1 + int(torch.randint(2, (1,), generator=generator))):
                mask = swap(mask, cost, generator)
            plan = SkipPlan.from_mask(mask)
        if plan in plans:
            tries += 1
            continue
        tries = 0
        table.losses("choosing", rows, plan)
        plans.append(plan)
        update(1)
    return plans


def _start_plans(
    model: Any, rows: Any, table: _Table, importance: Sequence[float], settings: OracleSettings
) -> list[SkipPlan]:
    """The least important layers skipped; each task's most frequent own plan, brought to size."""
    protected, rate = model.router_config.protected, settings.skip_rate
    num_layers = len(importance)
    plans = [importance_plan(importance, rate, protected)]
    uniform = plan_by_position("uniform", num_layers, rate, protected)
    assert uniform is not None
    plans.append(uniform)
    own = score(model, rows, table.collator, batch_size=settings.batch_size).keep_mask
    span = max(importance) - min(importance) + 1.0
    for task in sorted(set(rows.tasks)):
        masks = own[[other == task for other in rows.tasks]]
        seen, counts = masks.unique(dim=0, return_counts=True)
        usual = seen[int(counts.argmax())].tolist()
        value = [v + span * kept for v, kept in zip(importance, usual, strict=True)]
        plans.append(importance_plan(value, rate, protected))
    return [SkipPlan.from_mask(plan) for plan in plans]


def _parents(table: _Table, rows: Any, plans: Sequence[SkipPlan]) -> list[SkipPlan]:
    """The best plan of all prompts so far, then the best of each task."""
    known = table.plan_losses("choosing", rows, plans)
    return [plans[i] for i in (best_single(known), *best_per_task(known).values())]


@torch.no_grad()
def _half_losses(
    model: Any, rows: Any, collator: Collator, mask: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """Summed loss of every answer's tokens at even and at odd places, under mask [N, L]: [N, 2]."""
    found = torch.zeros(len(rows), 2, dtype=torch.float64)
    # Answers that begin at like places: the head is spared the places between them.
    order = sorted(range(len(rows)), key=lambda i: sum(rows[i]["prompt_mask"]))
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        batch = {k: v.to(model.device) for k, v in collator([rows[i] for i in chosen]).items()}
        labels = batch.pop("labels")  # [B, T]
        positions = answer_positions(labels)
        output = model(**batch, use_cache=False, skip_plan=mask[chosen], logits_to_keep=positions)
        losses, where = answer_token_losses(output.logits, labels, positions)  # [K], [K, 2]
        place = (labels[:, positions + 1] >= 0).cumsum(1)[where[:, 0], where[:, 1]] - 1
        part = torch.zeros(len(chosen) * 2, dtype=torch.float64)
        part.index_add_(0, (where[:, 0] * 2 + place % 2).cpu(), losses.double().cpu())
        found[chosen] = part.view(-1, 2)
    return found


@torch.no_grad()
def _all_features(
    model: Any, rows: Any, collator: Collator, batch_size: int, update: Callable[[int], None]
) -> torch.Tensor:
    """What the routers of all layers read in an unskipped pass, [N, L * F]."""
    num_layers = len(model.decoder_layers)
    full = torch.ones(len(rows), num_layers, dtype=torch.bool)
    found = router_features(model, rows, collator, full, range(num_layers), batch_size, update)
    return torch.cat([found[layer] for layer in range(num_layers)], 1)


def _prompt_lengths(rows: Any) -> torch.Tensor:
    return torch.tensor([sum(rows[i]["prompt_mask"]) for i in range(len(rows))])


def _lines(measured: Measured) -> str:
    """One line a candidate: its plan and the reported prompts' losses, nats per token."""
    values = measured.reported.per_token()
    lines: list[Mapping[str, Any]] = [
        {"prompts": measured.ids, "tasks": list(measured.reported.tasks),
         "tokens": measured.reported.tokens.sum(-1).int().tolist()}
    ]  # fmt: skip
    lines += [
        {"plan": str(plan), "loss": [round(v, 4) for v in values[:, c].tolist()]}
        for c, plan in enumerate(measured.plans)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
