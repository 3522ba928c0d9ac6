"""The rows of `results.json`: metrics of every method, with intervals, and its paired differences.

One bootstrap serves all rows: the same resamples of examples (drawn within each task) for every
method, so that differences are paired by example; and for several seeds the same resamples of
seeds wherever two methods have the same ones. Letters: N examples, R resamples, K seeds, L layers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from firstlm import figures
from firstlm.evaluation.metrics import METRICS, sentence_statistics
from firstlm.evaluation.records import Evaluation, ExampleResult, Method, MethodResult, Timing

RESAMPLES = 2000

_Samples = dict[str, np.ndarray]  # task, or "" for all -> [1 + R, N]: how often each is drawn


@dataclass(frozen=True)
class _Estimate:
    """A figure of the examples as they are, and of every resample [R]."""

    point: float
    draws: np.ndarray


@dataclass(frozen=True)
class _Series:
    """A method at one rate under its K seeds.

    Attributes:
        results: K of them, their examples in the order of the samples.
        masks: [K, N, L] bool, true = kept.
        estimates: task -> metric -> one a seed.
    """

    results: list[MethodResult]
    masks: np.ndarray
    estimates: dict[str, dict[str, list[_Estimate]]]

    @property
    def method(self) -> Method:
        return self.results[0].method

    @property
    def seeds(self) -> list[int]:
        return [result.method.seed for result in self.results]

    @property
    def control_key(self) -> str:
        return control_key(self.method)


def is_first(method: str, weights: str) -> bool:
    """Whether this is FiRST itself, which all others are rivals of: its plans on its weights."""
    return (method, weights) == ("first", "first")


def control_key(method: Method) -> str:
    """The key of a method in the `vs` of others: "static-trained", "shuffled-first"."""
    return f"{method.name}-{method.weights}"


def rows(
    evaluation: Evaluation, *, seed: int = 0, resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """One row a (method, skip rate, seed), and one with seed "all" where there are several seeds.

    `metrics.<name>.{mean,ci95,n}`, the same for each task in `tasks`; `vs.<control>.<name>` has the
    paired difference to a control: `delta` (this row minus the control), its `ci95` and two-sided
    `p`, and `share`, what is kept of the control's quality: 1 is as good, more is better, also
    for losses. FiRST is set against everything of its rate and all that skips nothing, other rows
    against what skips nothing. A control with the row's seed is compared under it, others with
    the mean over their seeds.

    Args:
        seed: of the bootstrap.
        resamples: R.

    Raises:
        ValueError: there are no methods or examples, a method lacks examples that another one has,
            has one twice, or another reference for it.
    """
    by_method = _aligned(evaluation)
    samples = _samples([example.task for example in by_method[0].examples], seed, resamples)
    series = [_measure(group, samples) for group in _group(by_method)]
    found: list[dict[str, Any]] = []
    for own in series:
        rivals = [other for other in series if other is not own and _is_control(own, other)]
        picks: list[int | None] = list(range(len(own.results)))
        if len(picks) > 1:
            picks.append(None)
        found += [_row(own, pick, rivals, samples, seed) for pick in picks]
    return found


def _key(example: ExampleResult) -> tuple[str, str]:
    return example.task, example.example


def _aligned(evaluation: Evaluation) -> list[MethodResult]:
    """The methods with their examples in the order of the first method's."""
    methods = evaluation.methods
    if not methods or not methods[0].examples:
        raise ValueError("the evaluation has no examples: nothing can be said about it")
    order = [_key(example) for example in methods[0].examples]
    references = {_key(example): example.reference for example in methods[0].examples}
    aligned = []
    for result in methods:
        examples = {_key(example): example for example in result.examples}
        name = result.method.key
        if len(examples) != len(result.examples):
            raise ValueError(f"{name}: {len(result.examples) - len(examples)} examples come twice")
        if odd := references.keys() ^ examples.keys():
            some = ", ".join("/".join(key) for key in sorted(odd)[:3])
            raise ValueError(
                f"{name} and {methods[0].method.key} were measured on different examples "
                f"({len(odd)} are in one of them only: {some}, …): nothing can be paired"
            )
        for key in order:
            if examples[key].reference != references[key]:
                raise ValueError(f"{name}: the reference of {'/'.join(key)} is another one")
        aligned.append(replace(result, examples=[examples[key] for key in order]))
    return aligned


def _group(results: Sequence[MethodResult]) -> list[list[MethodResult]]:
    groups: dict[tuple[str, float], list[MethodResult]] = {}
    for result in results:
        key = control_key(result.method), result.method.skip_rate_asked
        groups.setdefault(key, []).append(result)
    for group in groups.values():
        seeds = [result.method.seed for result in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{group[0].method.key} is there twice")
    return list(groups.values())


def _is_control(own: _Series, other: _Series) -> bool:
    if other.method.skip_rate_asked == 0:
        return True
    same_rate = np.isclose(own.method.skip_rate_asked, other.method.skip_rate_asked)
    return is_first(own.method.name, own.method.weights) and bool(same_rate)


def _samples(tasks: Sequence[str], seed: int, resamples: int) -> _Samples:
    """Row 0 has every example once; the others are drawn within each task."""
    names = np.asarray(tasks)
    generator = np.random.default_rng(seed)
    all_tasks = np.ones((1 + resamples, len(tasks)))
    for task in dict.fromkeys(tasks):
        (where,) = np.nonzero(names == task)
        share = np.full(len(where), 1 / len(where))
        all_tasks[1:, where] = generator.multinomial(len(where), share, size=resamples)
    return {"": all_tasks} | {
        task: np.where(names == task, all_tasks, 0) for task in dict.fromkeys(tasks)
    }


def _measure(results: list[MethodResult], samples: _Samples) -> _Series:
    results = sorted(results, key=lambda result: result.method.seed)
    estimates: dict[str, dict[str, list[_Estimate]]] = {task: {} for task in samples}
    for result in results:
        statistics = sentence_statistics(result.examples)
        names, blocks = list(statistics), list(statistics.values())
        ends = np.cumsum([block.shape[1] for block in blocks])
        for task, counts in samples.items():
            sums = counts @ np.concatenate(blocks, 1)  # [1 + R, S of all]
            by_name = dict(zip(names, np.split(sums, ends[:-1], 1), strict=True))
            for name, metric in METRICS.items():
                if metric.statistics in by_name:
                    values = metric.value(by_name[metric.statistics])
                    estimate = _Estimate(float(values[0]), values[1:])
                    estimates[task].setdefault(name, []).append(estimate)
    masks = np.stack([keep_masks(result) for result in results])
    return _Series(results, masks, estimates)


def keep_masks(result: MethodResult) -> np.ndarray:
    """The skip plans of a method's examples, [N, L] bool, true = kept."""
    mask = np.zeros((len(result.examples), result.num_layers), dtype=bool)
    for row, example in enumerate(result.examples):
        mask[row, list(example.kept)] = True
    return mask


def _over_seeds(estimates: Sequence[_Estimate], seeds: Sequence[Any], seed: int) -> _Estimate:
    """The mean over K seeds, both examples and seeds resampled; not below 0, where no metric is."""
    count = len(seeds)
    if count == 1:
        return estimates[0]
    points = np.array([estimate.point for estimate in estimates])  # [K]
    draws = np.stack([estimate.draws for estimate in estimates])  # [K, R]
    # From the seeds alone, so that methods with the same ones are resampled alike.
    generator = np.random.default_rng([seed, zlib.crc32(repr(list(seeds)).encode())])
    weights = _few_resampled(count, draws.shape[1], generator)  # [R, K]
    return _Estimate(float(points.mean()), (weights.T * draws).sum(0).clip(min=0))


def _few_resampled(count: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Weights [R, K] that make means of a few values from a resample.

    Resampled means of K values vary (K - 1) / K of what such means do: widened to make up for it.
    """
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    widen = np.sqrt(count / (count - 1)) if count > 1 else 1.0
    return 1 / count + widen * (drawn - 1) / count


def _pick(own: _Series, task: str, metric: str, pick: int | None, seed: int) -> _Estimate:
    """Of one seed (its position), or of all (None)."""
    estimates = own.estimates[task][metric]
    if pick is not None:
        return estimates[pick]
    # Draws of random layers are no training seeds, so they are not resampled along with these.
    draws = [f"draw {draw}" for draw in own.seeds]
    return _over_seeds(estimates, draws if own.method.name == "random" else own.seeds, seed)


def _row(
    own: _Series, pick: int | None, rivals: Sequence[_Series], samples: _Samples, seed: int
) -> dict[str, Any]:
    chosen = own.results if pick is None else [own.results[pick]]
    method = own.method
    row: dict[str, Any] = {
        "method": method.name,
        "weights": method.weights,
        "skip_rate_asked": method.skip_rate_asked,
        "seed": "all" if pick is None else own.seeds[pick],
        "seeds": [result.method.seed for result in chosen],
        "num_layers": own.results[0].num_layers,
        **_part(own, pick, rivals, "", samples, seed),
        **_timing_figures([result.timing for result in chosen], seed),
        "tasks": {task: _part(own, pick, rivals, task, samples, seed) for task in samples if task},
        "notes": list(dict.fromkeys(note for result in chosen for note in result.notes)),
    }
    return row


def _part(
    own: _Series,
    pick: int | None,
    rivals: Sequence[_Series],
    task: str,
    samples: _Samples,
    seed: int,
) -> dict[str, Any]:
    """What is said of all examples and of those of each task."""
    here = samples[task][0] > 0
    part: dict[str, Any] = {"n": int(here.sum()), **_plan_figures(own, pick, here)}
    part["metrics"], part["vs"] = {}, {rival.control_key: {} for rival in rivals}
    for rival in rivals:
        part["vs"][rival.control_key]["same_plans"] = _same_plans(own, rival, pick, here)
    for name in own.estimates[task]:
        mine = _pick(own, task, name, pick, seed)
        n = part["n"]
        part["metrics"][name] = {"mean": mine.point, "ci95": _interval(mine.draws), "n": n}
        for rival in rivals:
            theirs = _pick(rival, task, name, _same_seed(own, rival, pick), seed)
            difference = _difference(mine, theirs, METRICS[name].more_is_better)
            part["vs"][rival.control_key][name] = {**difference, "n": n}
    return part


def _same_seed(own: _Series, rival: _Series, pick: int | None) -> int | None:
    """The rival of the same training seed; None: all of its seeds, or draws, together.

    Numbers name the same seeds only where both methods have the same ones. Draws are no seeds.
    """
    if pick is None or set(own.seeds) != set(rival.seeds) or rival.method.name == "random":
        return None
    return rival.seeds.index(own.seeds[pick])


def _plan_figures(own: _Series, pick: int | None, here: np.ndarray) -> dict[str, Any]:
    chosen = own.results if pick is None else [own.results[pick]]
    masks = (own.masks if pick is None else own.masks[[pick]])[:, here]  # [K, n, L]
    tokens = np.array([example.tokens for example in chosen[0].examples], dtype=float)[here]
    skipped = 1 - masks.mean(2)  # [K, n]
    layers = [e.layers_run for r in chosen for e, h in zip(r.examples, here, strict=True) if h]
    return {
        "skip_rate": float(skipped.mean()),
        "skip_rate_by_token": float((skipped @ tokens).mean() / tokens.sum()),
        "skip_rate_spread": figures.measured(skipped.ravel()),
        "distinct_plans": float(np.mean([len(np.unique(mask, axis=0)) for mask in masks])),
        "keep_share": masks.mean((0, 1)).tolist(),
        "layers_run": float(np.mean(layers)),
    }


def _same_plans(own: _Series, rival: _Series, pick: int | None, here: np.ndarray) -> float:
    """Share of examples for which both have the same plan."""
    if own.masks.shape[2] != rival.masks.shape[2]:
        return 0.0
    pairs = range(len(own.results)) if pick is None else [pick]
    shares = []
    for index in pairs:
        match = _same_seed(own, rival, index)
        theirs = rival.masks if match is None else rival.masks[[match]]
        shares.append((own.masks[index] == theirs).all(2)[:, here].mean())
    return float(np.mean(shares))


def _interval(draws: np.ndarray) -> list[float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return [float(low), float(high)]


def _difference(mine: _Estimate, theirs: _Estimate, more_is_better: bool) -> dict[str, Any]:
    delta = mine.draws - theirs.draws
    extreme = min((delta <= 0).sum(), (delta >= 0).sum())
    found: dict[str, Any] = {
        "delta": mine.point - theirs.point,
        "ci95": _interval(delta),
        "p": float(min(1.0, 2 * (extreme + 1) / (len(delta) + 1))),
    }
    over, under = (mine, theirs) if more_is_better else (theirs, mine)
    if under.point > 0 and (under.draws > 0).all():
        found["share"] = over.point / under.point
        found["share_ci95"] = _interval(over.draws / under.draws)
    return found


def _timing_figures(timings: Sequence[Timing | None], seed: int) -> dict[str, Any]:
    """The keys are there, with None, where nothing was timed."""
    timed = [timing for timing in timings if timing is not None]
    if not timed:
        return dict.fromkeys(
            ("tpot_ms", "ttft_ms", "full_tpot_ms", "full_ttft_ms", "tokens_per_s", "speedup",
             "speedup_ci95", "ideal_speedup", "achieved_ratio", "kv_bytes", "full_kv_bytes",
             "timing"),
        )  # fmt: skip
    tpot = _joined(timed, "tpot_ms")
    # Plans, and so times, differ between prompts: medians over repeats, then means over prompts.
    own, full = (_by_prompt(timed, name) for name in ("tpot_ms", "full_tpot_ms"))  # [K, prompts]
    own_draws, full_draws = _timed_means(own, full, seed)
    speedup = float(full.mean() / own.mean())
    ideal = float(np.mean([timing.ideal_speedup for timing in timed]))
    first = timed[0]
    return {
        "tpot_ms": figures.measured(tpot),
        "ttft_ms": figures.measured(_joined(timed, "ttft_ms")),
        "full_tpot_ms": figures.measured(_joined(timed, "full_tpot_ms")),
        "full_ttft_ms": figures.measured(_joined(timed, "full_ttft_ms")),
        "tokens_per_s": figures.measured(1000 / np.asarray(tpot)),
        "speedup": speedup,
        "speedup_ci95": _interval(full_draws / own_draws),
        "ideal_speedup": ideal,
        "achieved_ratio": speedup / ideal,
        "kv_bytes": float(np.mean(_joined(timed, "kv_bytes"))),
        "full_kv_bytes": float(np.mean(_joined(timed, "full_kv_bytes"))),
        "timing": {
            "engine": first.engine,
            "precision": first.precision,
            "threads": first.threads,
            "prompts": first.prompts,
            "seeds": len(timed),
            "repeats": first.repeats,
            "new_tokens": first.new_tokens,
        },
    }


def _timed_means(own: np.ndarray, full: np.ndarray, seed: int) -> list[np.ndarray]:
    """Means [R] of both [K, prompts] under the same resamples.

    Each axis is resampled as a whole: seeds of one prompt are no prompts of their own. Widened
    weights reach beyond the values, where no mean of them lies.
    """
    generator = np.random.default_rng(seed)
    seeds, prompts = (_few_resampled(size, RESAMPLES, generator) for size in own.shape)
    return [
        np.einsum("rk,kp,rp->r", seeds, times, prompts).clip(times.min(), times.max())
        for times in (own, full)
    ]


def _joined(timings: Sequence[Timing], name: str) -> list[float]:
    return [value for timing in timings for value in getattr(timing, name)]


def _by_prompt(timings: Sequence[Timing], name: str) -> np.ndarray:
    """Medians over the repeats of each prompt, [K, prompts]: all seeds were timed on the same."""
    return np.stack(
        [
            np.median(np.asarray(getattr(timing, name)).reshape(timing.prompts, -1), axis=1)
            for timing in timings
        ]
    )


def best_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One row a method and rate: that of all seeds where there are several."""
    chosen: dict[tuple[str, str, float], Mapping[str, Any]] = {}
    for row in rows:
        key = row["method"], row["weights"], row["skip_rate_asked"]
        if key not in chosen or row["seed"] == "all":
            chosen[key] = row
    return list(chosen.values())
