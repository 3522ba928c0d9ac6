"""`firstlm bench ops`: every native op beside the best composition of torch's own, in one run.

The arms of a contest take turns, round by round, so that a slow minute of the machine hits all
alike. Where a bar is set for the op, the contest says how far from it the op is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.benchmark import Timer

from firstlm import ops
from firstlm.bandwidth import read_gb_per_s
from firstlm.bench_contests import OURS, Contest, Effort, contests
from firstlm.figures import measured


@torch.inference_mode()
def run(effort: Effort | None = None, *, threads: int | None = None, seed: int = 0) -> dict:
    """Figures of all contests, for `firstlm.figures`.

    Args:
        effort: default: a minute or two.
        threads: of torch and of our kernels; default: as torch is set.
        seed: of the drawn tensors.

    Returns:
        `{"isa", "threads", "load_average", "read_gb_per_s", "contests": [...]}`; the load is that
        of the minute before. A contest has `op`, `case`, `bytes`, `us` (arm or yardstick ->
        microseconds), `best_torch` (an arm), `speedup` over it, `gb_per_s`, `bandwidth_share` and
        `bars`.
    """
    effort = effort or Effort()
    threads = threads or torch.get_num_threads()
    torch.manual_seed(seed)
    before = torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    torch.set_num_threads(threads)
    try:
        rates = read_gb_per_s(2 * effort.cold_bytes)
        results = []
        for contest in contests(effort):
            results.append(_judge(contest, _measure(contest, effort, threads), rates))
            rates += read_gb_per_s(2 * effort.cold_bytes, repeats=2)  # the machine's mood changes
    finally:
        torch.set_num_threads(before)
    return {
        "isa": ops.isa(),
        "threads": threads,
        "load_average": load,
        "read_gb_per_s": measured(rates),
        "contests": results,
    }


def _measure(contest: Contest, effort: Effort, threads: int) -> dict[str, list[float]]:
    """Microseconds of every arm and yardstick, one value a block of calls."""
    calls = contest.arms | contest.yardsticks
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(effort.rounds):
        for name in calls if turn % 2 == 0 else reversed(calls):
            timer = Timer("call()", globals={"call": calls[name]}, num_threads=threads)
            measurement = timer.blocked_autorange(min_run_time=effort.seconds)
            times[name] += [1e6 * seconds for seconds in measurement.times]
    return times


def _judge(contest: Contest, times: dict[str, list[float]], rates: list[float]) -> dict:
    us = {name: measured(values) for name, values in times.items()}
    medians = {name: value["median"] for name, value in us.items()}
    best = min((name for name in contest.arms if name != OURS), key=medians.__getitem__)
    read = measured(rates)["median"]
    gb_per_s = contest.nbytes / 1e3 / medians[OURS]
    bars = []
    for bar in contest.bars:
        value = bar.value({**medians, "best_torch": medians[best]}, read)
        met = value >= bar.limit if bar.at_least else value <= bar.limit
        bars.append(
            {
                "quantity": bar.quantity,
                "value": value,
                "limit": bar.limit,
                "at_least": bar.at_least,
                "met": met,
            }
        )
    return {
        "op": contest.op,
        "case": contest.case,
        "bytes": contest.nbytes,
        "us": us,
        "best_torch": best,
        "speedup": medians[best] / medians[OURS],
        "gb_per_s": gb_per_s,
        "bandwidth_share": gb_per_s / read,
        "bars": bars,
    }


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures as a table for a terminal."""
    read = figures["read_gb_per_s"]
    lines = [
        f"{figures['isa']}, {figures['threads']} threads, memory read at {read['median']:.1f} GB/s "
        f"({read['p10']:.1f}-{read['p90']:.1f}, n {read['n']}); microseconds: median (p10-p90)",
        *_warnings(figures),
        "",
    ]
    for row in figures["contests"]:
        ours, best = row["us"][OURS], row["us"][row["best_torch"]]
        lines += [
            f"{row['op']}  {row['case']}",
            f"  {'firstlm':<34}{_microseconds(ours)}   {row['gb_per_s']:7.2f} GB/s",
            f"  {'torch: ' + row['best_torch']:<34}{_microseconds(best)}   "
            f"{row['speedup']:7.2f}x as long",
        ]
        for bar in row["bars"]:
            sign = ">=" if bar["at_least"] else "<="
            verdict = "met" if bar["met"] else "MISSED"
            lines.append(
                f"  {bar['quantity']}: {bar['value']:.3g} (bar {sign} {bar['limit']:g}, {verdict})"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _warnings(figures: Mapping[str, Any]) -> list[str]:
    load = figures["load_average"]
    if load is None or load < 0.5:
        return []
    return [f"warning: other work was running (load {load:.1f}): do not quote these figures"]


def _microseconds(value: Mapping[str, float]) -> str:
    return f"{value['median']:10.2f} ({value['p10']:.2f}-{value['p90']:.2f}, n {value['n']})"
