"""`firstlm bench decode`: firstlm's engine beside llama.cpp and transformers, in one run.

A *contest* is one question, say decoding after a prompt of 256 tokens. Its entries, an arm with a
prompt and skip plans each, take turns round by round, so that a slow minute of the machine hits all
alike; the read bandwidth of memory is measured between the rounds. All arms have the same weights,
prompt tokens, number of new tokens and threads.

Letters: B sequences, L layers.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from firstlm import bench_models, ops
from firstlm.bandwidth import cold_bytes, read_gb_per_s
from firstlm.bench_arms import HF, LLAMA_CPP, NATIVE, Arm, HfArm, LlamaCppArm, NativeArm
from firstlm.bench_models import EQUAL_GGUF, PRECISIONS, BenchModel, Timing
from firstlm.bench_text import windows
from firstlm.figures import measured

AGAINST = ("hf", "llama.cpp")
ALIASES = {"f32": "float32", "bf16": "bfloat16", "i8": "int8", "i4": "int4"}
# Of the engine's decode rate over llama.cpp's, and of its share of the read bandwidth.
DECODE_BARS = {
    "float32": (1.0, 0.88),
    "bfloat16": (1.5, 0.90),
    "int8": (1.9, 0.85),
    "int4": (2.2, 0.75),
}
PREFILL_BAR, CONTEXT_BAR, KEPT_BAR, HF_BAR = 1.2, 1.3, 0.95, 9.0
PAUSE_S = 0.02  # until the threads of the arm before have stopped spinning


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        repeats: rounds of every contest.
        hf_repeats: of these, the first in which transformers takes part.
        new_tokens: produced after a prompt.
        prompt_tokens: lengths of the prompts.
        context: tokens of cache for the long context; 0: not measured.
        kept_layers: how many of L layers are kept; None: as `kept_counts`; (): not measured.
        batches: numbers of sequences; (): not measured.
        read_bytes: of the buffer that the read bandwidth is measured with.
    """

    repeats: int = 5
    hf_repeats: int = 2
    new_tokens: int = 32
    prompt_tokens: tuple[int, ...] = (64, 256, 1024)
    context: int = 4096
    kept_layers: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1, 2, 4, 8)
    read_bytes: int = field(default_factory=lambda: 2 * cold_bytes())


QUICK = Effort(
    repeats=1, hf_repeats=1, new_tokens=4, prompt_tokens=(8,), context=16, batches=(1, 2),
    read_bytes=2**20,
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What an arm does in a contest.

    Attributes:
        prompts: B lists of T tokens.
        keep: skip plans, bool [B, L]; None: nothing is skipped.
        plans: "full", "equal" or "different", for the reader.
        again: the prompts are read once, before the rounds.
        rounds: how many it takes part in; None: all.
    """

    arm: Arm
    prompts: Sequence[Sequence[int]]
    keep: Tensor | None = None
    plans: str = "full"
    again: bool = False
    rounds: int | None = None


@dataclass(frozen=True)
class Contest:
    """Entries that take turns; see the module."""

    case: str
    new_tokens: int
    entries: list[Entry]


def run(
    path: str = "embedded",
    *,
    against: Sequence[str] = AGAINST,
    precisions: Sequence[str] = PRECISIONS,
    effort: Effort | None = None,
    threads: int | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    native: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Figures of all contests, for `firstlm.figures`.

    Args:
        path: a base model or checkpoint, as `firstlm.from_pretrained` takes it.
        against: rivals, of `AGAINST`.
        precisions: of the engine; llama.cpp runs the GGUF types of `EQUAL_GGUF`.
        effort: default: a run of several minutes.
        threads: of every arm; default: the cores that this process may use.
        work_dir: for GGUF files; default: the user's cache.
        native: whether firstlm's engine takes part.
        seed: of the drawn skip plans.

    Returns:
        `{"model", "isa", "threads", "load_average", "read_bandwidth_gb_s", "rows", "bars"}`; see
        `_row`.

    Raises:
        ValueError: an unknown precision or rival, or a prompt longer than the model's positions.
        RuntimeError: llama-cpp-python is asked for and missing.
    """
    from firstlm.figures import available_cores

    effort = effort or Effort()
    precisions = check_precisions(precisions)
    check_against(against)
    threads = threads or available_cores()
    if "llama.cpp" in against:
        from firstlm.llama_cpp_model import binding

        binding()  # complains before any work is done
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    arms: list[Arm] = []
    try:
        model = bench_models.load(path, work_dir)
        open_arms(model, arms, against, precisions, effort, threads, native)
        rows, rates = _run_contests(_contests(model, arms, effort, seed), effort, threads, progress)
    finally:
        for arm in arms:
            arm.close()
        torch.set_num_threads(before)
    return {
        "model": path,
        "isa": ops.isa(),
        "threads": threads,
        "load_average": load,
        "read_bandwidth_gb_s": measured(rates),
        "rows": rows,
        "bars": bars(rows),
    }


def check_precisions(names: Sequence[str]) -> tuple[str, ...]:
    """Full names of precisions; f32, bf16, i8 and i4 are short ones.

    Raises:
        ValueError: an unknown one.
    """
    full = tuple(ALIASES.get(name, name) for name in names)
    if unknown := [name for name in full if name not in PRECISIONS]:
        raise ValueError(f"unknown precision {unknown[0]!r}; known: {', '.join(PRECISIONS)}")
    return full


def check_against(names: Sequence[str]) -> None:
    """Refuse unknown rivals.

    Raises:
        ValueError: there is one.
    """
    if unknown := [name for name in names if name not in AGAINST]:
        raise ValueError(f"unknown rival {unknown[0]!r}; known: {', '.join(AGAINST)}")


def open_arms(
    model: BenchModel,
    arms: list[Arm],
    against: Sequence[str],
    precisions: Sequence[str],
    effort: Effort,
    threads: int,
    native: bool = True,
) -> None:
    """Append the arms to `arms`, one by one, so that the caller can close them after a failure."""
    if not effort.prompt_tokens:
        raise ValueError("prompt_tokens is empty: give at least one length")
    longest = max((effort.context, *effort.prompt_tokens)) + effort.new_tokens
    positions = model.hf.config.max_position_embeddings
    if longest > positions:
        raise ValueError(
            f"prompt and new tokens are {longest}, the model has {positions} positions"
        )
    kinds = [kind for precision in precisions for kind in EQUAL_GGUF[precision]]
    files = model.gguf(kinds, threads) if "llama.cpp" in against else {}
    for precision in precisions:
        if native:
            arms.append(NativeArm(model, precision, threads=threads))
        if "llama.cpp" in against:
            for kind in EQUAL_GGUF[precision]:
                arms.append(
                    LlamaCppArm(
                        files[kind], kind, model.hf.config, threads=threads, context=longest
                    )
                )
    if "hf" in against:
        arms.append(HfArm(model.hf))
        arms.append(HfArm(bench_models.in_dtype(model.hf, torch.bfloat16)))


# ---- the contests ----


def _contests(model: BenchModel, arms: Sequence[Arm], effort: Effort, seed: int) -> list[Contest]:
    L = model.hf.config.num_hidden_layers
    longest = max((effort.context, *effort.prompt_tokens))
    count = max(effort.batches, default=1)
    texts = windows("debian-en-de", model.tokenizer, length=longest, count=count)

    def prompts(T: int, B: int = 1) -> list[list[int]]:
        return [text.tokens[:T] for text in texts[:B]]

    own = [arm for arm in arms if arm.runtime == NATIVE]
    found = [
        Contest(
            f"prompt of {T}",
            effort.new_tokens,
            [
                Entry(arm, prompts(T), rounds=effort.hf_repeats if arm.runtime == HF else None)
                for arm in arms
            ],
        )
        for T in effort.prompt_tokens
    ]
    if effort.context:
        entries = [Entry(a, prompts(effort.context), again=True) for a in arms if a.runtime != HF]
        found.append(Contest(f"context of {effort.context}", effort.new_tokens, entries))
    T = min(effort.prompt_tokens)
    kept = kept_counts(L) if effort.kept_layers is None else effort.kept_layers
    for arm in own:
        entries = [
            Entry(arm, prompts(T), spread_plan(k, L)[None], "full" if k == L else "equal")
            for k in dict.fromkeys((L, *kept))
        ]
        if kept:
            found.append(Contest(f"{arm.precision}, kept layers", effort.new_tokens, entries))
    for arm in own:
        entries = list(_batch_entries(arm, prompts, T, effort.batches, L, seed))
        if effort.batches:
            found.append(Contest(f"{arm.precision}, batches", effort.new_tokens, entries))
    return [contest for contest in found if contest.entries]


def _batch_entries(
    arm: Arm,
    prompts: Callable[[int, int], list[list[int]]],
    T: int,
    batches: Sequence[int],
    L: int,
    seed: int,
) -> Iterator[Entry]:
    """All layers, two thirds of them under one plan, two thirds under a plan for each sequence."""
    k = max(1, round(2 * L / 3))
    generator = torch.Generator().manual_seed(seed)
    for B in dict.fromkeys((1, *batches)):
        yield Entry(arm, prompts(T, B), torch.ones(B, L, dtype=torch.bool), "full")
        yield Entry(arm, prompts(T, B), spread_plan(k, L).expand(B, L).contiguous(), "equal")
        if B > 1:
            keep = torch.zeros(B, L, dtype=torch.bool)
            for row in keep:
                row[torch.randperm(L, generator=generator)[:k]] = True
            yield Entry(arm, prompts(T, B), keep, "different")


def spread_plan(k: int, L: int) -> Tensor:
    """A plan that keeps k of L layers, evenly spread, bool [L].

    Raises:
        ValueError: k is not from 1 to L.
    """
    if not 1 <= k <= L:
        raise ValueError(f"kept layers must be from 1 to {L}, got {k}")
    keep = torch.zeros(L, dtype=torch.bool)
    keep[torch.arange(k) * L // k] = True
    return keep


def kept_counts(L: int) -> tuple[int, ...]:
    """L to L / 3 in five steps."""
    return tuple(dict.fromkeys(max(1, round(L * (1 - step / 6))) for step in range(5)))


# ---- the measurements ----


def _run_contests(
    contests: Sequence[Contest], effort: Effort, threads: int, progress: bool
) -> tuple[list[dict[str, Any]], list[float]]:
    """(rows, all read bandwidths in GB/s)."""
    from tqdm.auto import tqdm

    rows: list[dict[str, Any]] = []
    all_rates = read_gb_per_s(effort.read_bytes)
    total = sum(len(_in_round(contest, r)) for contest in contests for r in range(effort.repeats))
    with tqdm(total=total, unit="run", disable=not progress) as bar:
        for contest in contests:
            bar.set_description(contest.case)
            for entry in contest.entries:  # buffers and caches are there; not timed
                entry.arm.run(entry.prompts, 2, entry.keep)
            timings: list[list[Timing]] = [[] for _ in contest.entries]
            rates: list[float] = []
            for turn in range(effort.repeats):
                rates += read_gb_per_s(effort.read_bytes, repeats=2)
                order = _in_round(contest, turn)
                for i in order if turn % 2 == 0 else reversed(order):
                    time.sleep(PAUSE_S)
                    timings[i].append(_time(contest, contest.entries[i]))
                    bar.update(1)
            all_rates += rates
            rows += _rows(contest, timings, rates, threads)
    return rows, all_rates


def _in_round(contest: Contest, turn: int) -> list[int]:
    """Indices of the entries that take part in a round."""
    return [i for i, e in enumerate(contest.entries) if e.rounds is None or turn < e.rounds]


def _time(contest: Contest, entry: Entry) -> Timing:
    if entry.again:
        timing = entry.arm.again(contest.new_tokens)
    else:
        timing = entry.arm.run(entry.prompts, contest.new_tokens, entry.keep)
    produced = {len(row) for row in timing.tokens}
    if produced != {contest.new_tokens} or len(timing.tokens) != len(entry.prompts):
        raise RuntimeError(
            f"{entry.arm.name} produced {sorted(produced)} tokens for {len(timing.tokens)} prompts "
            f"instead of {contest.new_tokens} for {len(entry.prompts)}"
        )
    return timing


def _rows(
    contest: Contest, timings: list[list[Timing]], rates: list[float], threads: int
) -> list[dict[str, Any]]:
    rows = [
        _row(contest, entry, timing, rates, threads)
        for entry, timing in zip(contest.entries, timings, strict=True)
    ]
    for row in rows:
        rivals = [r for r in rows if r["runtime"] != NATIVE and r["batch"] == row["batch"]]
        base = next((r for r in rows if _is_base(r, row)), row)
        per_token = row["tpot_ms"]["median"] / row["batch"]
        row["speedup"] = base["tpot_ms"]["median"] / per_token
        row["ideal_speedup"] = base["step_bytes"] / (row["step_bytes"] / row["batch"])
        if row["runtime"] == NATIVE and row["plans"] == "full":
            row["over"] = [_over(row, rival) for rival in rivals]
    return rows


def _is_base(candidate: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether it is the same arm at batch 1 without skipping."""
    same = all(candidate[key] == row[key] for key in ("runtime", "precision", "prompt_tokens"))
    return same and candidate["plans"] == "full" and candidate["batch"] == 1


def _over(row: Mapping[str, Any], rival: Mapping[str, Any]) -> dict[str, Any]:
    """How much faster a row of ours is than a rival's: ratios of medians."""
    ratios = {"runtime": rival["runtime"], "precision": rival["precision"]}
    for quantity in ("decode_tokens_per_s", "prefill_tokens_per_s"):
        if row[quantity] is not None and rival[quantity] is not None:
            ratios[quantity] = row[quantity]["median"] / rival[quantity]["median"]
    return ratios


def _row(
    contest: Contest, entry: Entry, timings: list[Timing], rates: list[float], threads: int
) -> dict[str, Any]:
    """One entry's figures. `step_bytes`: weights and keys and values of one decode step: layers
    that any row keeps once, the head once, the cache of every row."""
    B, T = len(entry.prompts), len(entry.prompts[0])
    sizes = entry.arm.sizes
    L = len(sizes.layers)
    keep = torch.ones(B, L, dtype=torch.bool) if entry.keep is None else entry.keep
    tpot = [timing.decode_s / timing.steps for timing in timings]
    ttft = [timing.ttft_s for timing in timings if timing.ttft_s is not None]
    step_bytes = sizes.step(keep, T + contest.new_tokens / 2)
    read = statistics.median(rates)
    return {
        "case": contest.case,
        "runtime": entry.arm.runtime,
        "precision": entry.arm.precision,
        "threads": threads,
        "batch": B,
        "layers": L,
        "kept_layers": int(keep.sum()) / B,
        "layers_read": int(keep.any(0).sum()),
        "plans": entry.plans,
        "prompt_tokens": T,
        "new_tokens": contest.new_tokens,
        "decode_tokens_per_s": measured(B / seconds for seconds in tpot),
        "prefill_tokens_per_s": measured(B * T / seconds for seconds in ttft) if ttft else None,
        "ttft_ms": measured(1e3 * seconds for seconds in ttft) if ttft else None,
        "tpot_ms": measured(1e3 * seconds for seconds in tpot),
        "read_bandwidth_gb_s": measured(rates),
        "bandwidth_share": step_bytes / 1e9 / statistics.median(tpot) / read,
        "weight_bytes": sizes.step_weights(keep),
        "step_bytes": step_bytes,
    }


# ---- the bars ----


def bars(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`{"quantity", "value", "limit", "met"}` of every limit that these rows can be held to."""
    found: list[dict[str, Any]] = []

    def judge(quantity: str, value: float, limit: float) -> None:
        met = value >= limit
        found.append({"quantity": quantity, "value": value, "limit": limit, "met": met})

    for row in rows:
        if row["runtime"] != NATIVE:
            continue
        name = f"{row['precision']}, {row['case']}"
        decode_limit, share_limit = DECODE_BARS[row["precision"]]
        if row["case"].startswith("prompt of"):
            judge(f"{name}: share of the read bandwidth", row["bandwidth_share"], share_limit)
        elif row["case"].endswith("kept layers") and row["plans"] != "full":
            ratio = row["speedup"] / row["ideal_speedup"]
            kept = f"{row['kept_layers']:g} of {row['layers']}"
            judge(f"{row['precision']}, {kept} layers: speedup over the ideal", ratio, KEPT_BAR)
        for over in row.get("over", ()):
            rival = f"{over['runtime']} {over['precision']}"
            if over["runtime"] == LLAMA_CPP and over["precision"] in EQUAL_GGUF[row["precision"]]:
                context = row["case"].startswith("context of")
                limit = CONTEXT_BAR if context else decode_limit
                judge(f"{name}: decode over {rival}", over["decode_tokens_per_s"], limit)
                if not context:
                    prefill = over["prefill_tokens_per_s"]
                    judge(f"{name}: prefill over {rival}", prefill, PREFILL_BAR)
            elif over["runtime"] == HF and row["precision"] == "int8":
                judge(f"{name}: decode over {rival}", over["decode_tokens_per_s"], HF_BAR)
    return found


# ---- what is printed ----


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures as tables for a terminal."""
    read = figures["read_bandwidth_gb_s"]
    lines = [
        f"{figures['model']}, {figures['threads']} threads, memory read at {read['median']:.1f} "
        f"GB/s ({read['p10']:.1f}-{read['p90']:.1f}, n {read['n']}); median (p10-p90)",
    ]
    load = figures["load_average"]
    if load is not None and load >= 0.5:
        lines.append(
            f"warning: other work was running (load {load:.1f}): do not quote these figures"
        )
    case = None
    for row in figures["rows"]:
        if row["case"] != case:
            case = row["case"]
            lines += ["", f"{case}, {row['new_tokens']} new tokens", _HEADER]
        lines.append(_text_row(row))
    if figures["bars"]:
        lines += ["", "bars"]
    for bar in figures["bars"]:
        verdict = "met" if bar["met"] else "MISSED"
        lines.append(f"  {bar['quantity']}: {bar['value']:.3g} (>= {bar['limit']:g}, {verdict})")
    return "\n".join(lines)


_HEADER = (
    f"  {'':<26}{'layers':>9}{'batch':>6}  {'decode tokens/s':>22}  {'prefill tokens/s':>22}"
    f"  {'GB/s':>6} {'share':>6} {'speedup':>8} {'ideal':>6}"
)


def _text_row(row: Mapping[str, Any]) -> str:
    name = f"{row['runtime']} {row['precision']}"
    layers = f"{row['kept_layers']:g}/{row['layers']}" + (
        "*" if row["plans"] == "different" else ""
    )
    gb_per_s = row["step_bytes"] / 1e6 / row["tpot_ms"]["median"]
    return (
        f"  {name:<26}{layers:>9}{row['batch']:>6}  {_rate(row['decode_tokens_per_s']):>22}"
        f"  {_rate(row['prefill_tokens_per_s']):>22}  {gb_per_s:6.1f} {row['bandwidth_share']:6.1%}"
        f" {row['speedup']:8.2f} {row['ideal_speedup']:6.2f}"
    )


def _rate(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value['median']:.1f} ({value['p10']:.1f}-{value['p90']:.1f})"
