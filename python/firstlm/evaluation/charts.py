"""The pictures of an evaluation's report, as PNG files.

Colours are Okabe and Ito's, which colour-blind readers tell apart; markers and labels repeat what
they say. FiRST is blue everywhere. Methods that lie far outside are named, not drawn, so that one
broken control does not flatten the rest.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from firstlm.evaluation.conclusions import outcome, rivals, shuffled
from firstlm.evaluation.metrics import METRICS
from firstlm.evaluation.records import Evaluation, MethodResult
from firstlm.evaluation.statistics import best_rows, is_first, keep_masks
from firstlm.evaluation.tables import (
    answer_metric,
    control_title,
    in_order,
    is_own,
    number,
    title,
    with_interval,
)
from firstlm.plots import KEPT, MUTED, SKIPPED, draw_plans, new_figure, style, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9",
)  # fmt: skip
_OUTCOMES = {"better": (BLUE, "o"), "even": ("#777777", "D"), "worse": (VERMILLION, "s")}
_MARKERS = "sD^vP*Xph<>d"
_COLORS = (GREEN, ORANGE, PURPLE, VERMILLION, SKY, "#666666", "#8C6D00")
_TASK_COLORS, _TASK_HATCHES = (KEPT, ORANGE, GREEN, PURPLE), ("", "//", "..", "xx")
_IDEAL = VERMILLION  # seen on bars, whatever their colour, and beside them


def draw_all(
    evaluation: Evaluation, rows: Sequence[Row], folder: Path
) -> list[tuple[str, Path, str]]:
    """Write all pictures that the figures allow: (name, file, what it shows)."""
    folder.mkdir(parents=True, exist_ok=True)
    firsts = [r for r in in_order(rows) if is_own(r)]
    results = first_results(evaluation)
    found = []
    with style():
        if any(rivals(row, rows) for row in firsts):
            found.append(("gains", gains(rows, firsts, folder / "gains.png"), _GAINS))
        if any(row["timing"] for row in rows):
            path = quality_against(rows, "time", folder / "quality_tpot.png")
            found.append(("quality_tpot", path, _PARETO))
        path = quality_against(rows, "skip_rate", folder / "quality_skip_rate.png")
        found.append(("quality_skip_rate", path, _QUALITY))
        if results:
            found.append(("plans", plans(results, folder / "plans.png"), _PLANS))
            path = keep_share(firsts, folder / "keep_share.png")
            found.append(("keep_share", path, _KEEP_SHARE))
            path = skip_rates(results, folder / "skip_rates.png")
            found.append(("skip_rates", path, _SKIP_RATES))
        if any(row["timing"] for row in rows):
            found.append(("latency", latency(rows, folder / "latency.png"), _LATENCY))
    return found


_GAINS = (
    "What FiRST gains over each rival of the same skip rate, paired by prompt, with 95 % "
    "intervals. Right of the line FiRST is better. The last rows are its own plans dealt to other "
    "prompts: if they are not right of the line, it is not shown that plans fit their prompts."
)
_PARETO = (
    "Quality against measured time per output token, in per cent of what the same weights take "
    "with all layers, in turns: up and left is better. The grey steps join the means that no other "
    "method beats in both. Bars: 95 % intervals. Hollow: not finetuned."
)
_QUALITY = (
    "Quality against the share of layer calls that is skipped: up is better. Bars: 95 % intervals. "
    "Hollow: not finetuned."
)
_PLANS = "Which prompt keeps which layer (first seed of FiRST), like plans side by side."
_KEEP_SHARE = "Share of the prompts of each task that keep a layer, mean over seeds of FiRST."
_SKIP_RATES = "How many layer calls the prompts of each task skip (first seed of FiRST)."
_LATENCY = (
    "Time of one answer: prefill to the first token, then decoding, at batch 1; medians. The red "
    "mark is where the decode time would be if it fell as the bytes that a token reads. Methods of "
    "different weights were timed at different times: what to compare is the speedup."
)


def first_results(evaluation: Evaluation) -> list[MethodResult]:
    """FiRST's results, one a skip rate (its first seed), lowest rate first."""
    chosen: dict[float, MethodResult] = {}
    for result in sorted(evaluation.methods, key=lambda r: r.method.seed):
        method = result.method
        if is_first(method.name, method.weights):
            chosen.setdefault(method.skip_rate_asked, result)
    return [chosen[rate] for rate in sorted(chosen)]


def gains(rows: Sequence[Row], firsts: Sequence[Row], path: Path) -> Path:
    """A forest plot a rate and metric: what FiRST gains over its rivals."""
    entries = [_rivals_then_shuffled(row, rows) for row in firsts]
    heights = [max(len(keys), 1) + 1.6 for keys in entries]
    figure = new_figure(11, 0.27 * sum(heights) + 0.4)
    shown = _shown(rows)
    grid = figure.subplots(
        len(firsts), len(shown), squeeze=False, sharey="row", height_ratios=heights
    )
    for row, keys, axes in zip(firsts, entries, grid, strict=True):
        for metric, axis in zip(shown, axes, strict=True):
            _draw_gains(axis, row, keys, metric)
        axes[0].set_yticks(range(len(keys)), [control_title(key) for key in keys])
        axes[0].set_ylim(len(keys) - 0.4, -0.6)
        axes[0].set_title(
            f"{row['skip_rate_asked']:.0%} of the layers skipped, n = {row['n']} prompts, "
            f"{_seeds(row)}"
        )
    return write_png(figure, path)


def _shown(rows: Sequence[Row]) -> tuple[str, str]:
    """The metrics that a verdict rests on."""
    return "cross_entropy", answer_metric(rows[0])


def _rivals_then_shuffled(row: Row, rows: Sequence[Row]) -> list[str]:
    def gain(key: str) -> float:
        return -row["vs"][key]["cross_entropy"]["delta"]

    others = rivals(row, rows)
    kinds = [[k for k in others if k.endswith(f"-{w}")] for w in ("trained", "first", "base")]
    return [*(key for kind in kinds for key in sorted(kind, key=gain)), *shuffled(row)]


def _draw_gains(axis: Axes, row: Row, keys: Sequence[str], metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    sign = 1 if METRICS[metric].more_is_better else -1
    values = np.array([[sign * row["vs"][k][metric]["delta"],
                        *sorted(sign * end for end in row["vs"][k][metric]["ci95"])]
                       for k in keys])  # fmt: skip
    close = (
        [i for i, k in enumerate(keys) if k.endswith("-trained")]
        or [i for i, k in enumerate(keys) if k.endswith("-first")]
        or list(range(len(keys)))
    )
    close += [i for i, k in enumerate(keys) if k in shuffled(row)]
    reach = 1.25 * np.abs(values[close]).max() or 1.0
    for place, key in enumerate(keys):
        color, marker = _OUTCOMES[outcome(row["vs"][key], metric)]
        value, low, high = values[place]
        if abs(value) > reach:
            axis.plot(np.sign(value) * reach * 0.97, place, ">" if value > 0 else "<", color=color)
        else:
            axis.plot([low, high], [place, place], color=color, linewidth=2, clip_on=True)
            axis.plot(value, place, marker, color=color, markersize=6)
        text = with_interval({"mean": value, "ci95": (low, high)}, metric, "+")
        axis.annotate(
            text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=7.5,
            color=color,
        )  # fmt: skip
    axis.axvline(0, color="#333333", linewidth=1)
    axis.axvspan(0, reach, color=BLUE, alpha=0.05, zorder=0)
    axis.set_xlim(-reach, reach)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.grid(axis="x", color="#eeeeee")
    axis.set_axisbelow(True)
    name, _, unit = METRICS[metric].title.partition(", ")
    verb = "gained" if sign > 0 else "saved"
    axis.set_xlabel(f"{name} {verb} by FiRST{', ' + unit if unit else ''} →")
    axis.tick_params(axis="y", length=0)
    kinds = [key in shuffled(row) or key.rpartition("-")[2] for key in keys]
    for place in range(1, len(keys)):
        if kinds[place] != kinds[place - 1]:
            axis.axhline(place - 0.5, color="#bbbbbb", linewidth=0.8, linestyle=":")


def _seeds(row: Row) -> str:
    return f"{len(row['seeds'])} seed{'s' if len(row['seeds']) > 1 else ''}"


def quality_against(rows: Sequence[Row], axis_name: str, path: Path) -> Path:
    """Quality against "time" (measured) or "skip_rate": one panel a metric, a line a method."""
    shown = [r for r in best_rows(rows) if axis_name != "time" or r["timing"]]
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(shown, key=lambda r: r["skip_rate_asked"]):
        lines.setdefault((row["method"], row["weights"]), []).append(row)
    looks = _looks(list(lines))
    figure = new_figure(11, 5)
    metrics = _shown(rows)
    axes = figure.subplots(1, len(metrics))
    for metric, axis in zip(metrics, axes, strict=True):
        low, high = _limits(shown, metric)
        outside = []
        for key, line in lines.items():
            inside = [r for r in line if low <= r["metrics"][metric]["mean"] <= high]
            outside += [r for r in line if r not in inside]
            _draw_line(axis, inside, metric, axis_name, looks[key], title(*key))
        if axis_name == "time":
            front = pareto_front(shown, metric)
            axis.step(
                [100 / r["speedup"] for r in front], [r["metrics"][metric]["mean"] for r in front],
                where="post", color="#bbbbbb", linewidth=1, zorder=0, label="Pareto front",
            )  # fmt: skip
        axis.set_ylim((high, low) if not METRICS[metric].more_is_better else (low, high))
        turned = "" if METRICS[metric].more_is_better else " (turned: up is better)"
        axis.set_ylabel(METRICS[metric].title + turned)
        axis.grid(color="#eeeeee")
        axis.set_axisbelow(True)
        label = "layer calls skipped, % (mean over prompts)"
        if axis_name == "time":
            label = (
                f"time per token, % of all layers' with the same weights ({_timing_text(shown)})"
            )
        axis.set_xlabel(label + _outside_text(outside, metric), fontsize=8)
    ns = sorted({row["n"] for row in shown})
    axes[0].set_title(f"n = {', '.join(map(str, ns))} prompts")
    handles, labels = axes[0].get_legend_handles_labels()
    other = axes[1].get_legend_handles_labels()
    for handle, label in zip(*other, strict=True):
        if label not in labels:
            handles.append(handle)
            labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return write_png(figure, path)


def pareto_front(rows: Sequence[Row], metric: str) -> list[Row]:
    """The timed rows, fastest first, that no other beats in both speed and a metric's mean."""
    sign = 1 if METRICS[metric].more_is_better else -1
    front: list[Row] = []
    best = -np.inf
    for row in sorted(rows, key=lambda r: (-r["speedup"], -sign * r["metrics"][metric]["mean"])):
        if (value := sign * row["metrics"][metric]["mean"]) > best:
            front.append(row)
            best = value
    return front


def _looks(keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    looks: dict[tuple[str, str], dict[str, Any]] = {}
    unskipped = [key for key in keys if key[0] in ("lora_only", "base")]
    others = [key for key in keys if not is_first(*key) and key not in unskipped]
    names = list(dict.fromkeys(name for name, _ in others))
    for key in others:
        place = names.index(key[0])
        color = _COLORS[place % len(_COLORS)]
        looks[key] = {"color": color, "marker": _MARKERS[place % len(_MARKERS)], "linewidth": 1}
        if key[1] == "first":
            looks[key] |= {"linestyle": "--", "markersize": 4}
        if key[0].startswith("shuffled") and key[1] == "first":
            looks[key] |= {"color": BLUE, "linestyle": ":", "linewidth": 1.6}
    for key in keys:
        if key in unskipped:
            looks[key] = {"color": "#222222", "marker": "o", "linewidth": 1}
        if is_first(*key):
            looks[key] = {"color": BLUE, "marker": "o", "linewidth": 2.6, "markersize": 8,
                          "zorder": 5}  # fmt: skip
        looks[key]["markerfacecolor"] = "white" if key[1] == "base" else looks[key]["color"]
    return looks


def _limits(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    """Of FiRST and what was trained like it, with room for what is worse; of all where there is
    no more than FiRST."""
    chosen = [r for r in rows if r["weights"] == "trained" or is_own(r)]
    if len({(r["method"], r["weights"]) for r in chosen}) < 3:
        chosen = [r for r in rows if r["weights"] != "base"] or list(rows)
    ends = np.array([r["metrics"][metric]["ci95"] for r in chosen])
    low, high = float(ends.min()), float(ends.max())
    better, worse = 0.08 * (high - low) or 0.05, 0.35 * (high - low) or 0.05
    if METRICS[metric].more_is_better:
        return max(low - worse, 0.0), high + better
    return low - better, high + worse


def _draw_line(
    axis: Axes,
    line: Sequence[Row],
    metric: str,
    axis_name: str,
    look: Mapping[str, Any],
    label: str,
) -> None:
    if not line:
        return
    y = np.array([row["metrics"][metric]["mean"] for row in line])
    ends = np.array([row["metrics"][metric]["ci95"] for row in line]).T  # [2, points]
    spread = None
    if axis_name == "time":
        x = np.array([100 / row["speedup"] for row in line])
        least, most = 100 / np.array([row["speedup_ci95"] for row in line]).T[::-1]  # [points]
        spread = np.maximum([x - least, most - x], 0)
    else:
        x = 100 * np.array([row["skip_rate"] for row in line])
    axis.errorbar(
        x, y, yerr=np.maximum([y - ends[0], ends[1] - y], 0), xerr=spread, label=label,
        elinewidth=0.8, **look,
    )  # fmt: skip
    if is_own(line[0]):
        for row, across, up in zip(line, x, y, strict=True):
            axis.annotate(
                f"{row['skip_rate_asked']:.0%}", (across, up), xytext=(7, 6),
                textcoords="offset points", color=BLUE, fontweight="bold", fontsize=8,
            )  # fmt: skip


def _outside_text(outside: Sequence[Row], metric: str) -> str:
    """Methods that are not drawn, with their values."""
    values: dict[str, list[str]] = {}
    for row in outside:
        value = number(metric, row["metrics"][metric]["mean"])
        at = f" at {row['skip_rate_asked']:.0%}" if row["skip_rate_asked"] else ""
        values.setdefault(title(row["method"], row["weights"]), []).append(value + at)
    names = "; ".join(f"{name} {', '.join(found)}" for name, found in values.items())
    return "\n" + textwrap.fill(f"Off the chart: {names}", 88) if names else ""


def _timing_text(rows: Sequence[Row]) -> str:
    timing = next(row["timing"] for row in rows if row["timing"])
    return f"{timing['engine']} engine, {timing['precision']}, {timing['threads']} threads"


def plans(results: Sequence[MethodResult], path: Path) -> Path:
    """Heatmap of layers × prompts, a panel a rate."""
    figure = new_figure(11, 3.4 * len(results))
    for axis, result in zip(figure.subplots(len(results), 1, squeeze=False)[:, 0], results,
                            strict=True):  # fmt: skip
        tasks = [example.task for example in result.examples]
        several = len(set(tasks)) > 1
        draw_plans(axis, keep_masks(result), tasks if several else None)
        asked = f"asked {result.method.skip_rate_asked:.0%}: "
        axis.set_title(asked + axis.get_title(loc="left"), pad=18 if several else None)
    return write_png(figure, path)


def keep_share(firsts: Sequence[Row], path: Path) -> Path:
    """Rows are tasks at a rate, columns layers; colour is the share of prompts that keep it."""
    from matplotlib.colors import LinearSegmentedColormap

    lines = [
        (f"{row['skip_rate_asked']:.0%}, {task} (n = {part['n']})", part["keep_share"])
        for row in firsts
        for task, part in row["tasks"].items()
    ]
    shares = 100 * np.array([share for _, share in lines])
    figure = new_figure(11, 1.1 + 0.36 * len(lines))
    axis = figure.subplots()
    colors = LinearSegmentedColormap.from_list("kept", [SKIPPED, KEPT])  # as the heatmaps
    image = axis.pcolormesh(shares, cmap=colors, vmin=0, vmax=100, edgecolors="white")
    for y, x in np.argwhere((shares > 0) & (shares < 100)):
        dark = shares[y, x] > 50
        axis.annotate(
            f"{shares[y, x]:.0f}", (x + 0.5, y + 0.5), ha="center", va="center", fontsize=6.5,
            color="white" if dark else "black",
        )  # fmt: skip
    axis.set_yticks(np.arange(len(lines)) + 0.5, [label for label, _ in lines])
    axis.set_xticks(np.arange(shares.shape[1]) + 0.5, range(shares.shape[1]), fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("decoder layer")
    figure.colorbar(image, ax=axis, label="kept, % of prompts", pad=0.01)
    return write_png(figure, path)


def skip_rates(results: Sequence[MethodResult], path: Path) -> Path:
    """Histogram over prompts, a panel a rate, bars of one layer, tasks side by side."""
    figure = new_figure(11, 2.9)
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, result in zip(axes, results, strict=True):
        layers = result.num_layers
        tasks = list(dict.fromkeys(example.task for example in result.examples))
        width = 0.8 / len(tasks)
        for place, task in enumerate(tasks):
            skipped = [layers - len(e.kept) for e in result.examples if e.task == task]
            counts = np.bincount(skipped, minlength=layers + 1)
            (where,) = np.nonzero(counts)
            axis.bar(
                where + (place - (len(tasks) - 1) / 2) * width, counts[where], width,
                color=_TASK_COLORS[place % 4], hatch=_TASK_HATCHES[place % 4], edgecolor="white",
                label=f"{task} (n = {len(skipped)})",
            )  # fmt: skip
        asked = result.method.skip_rate_asked * layers
        axis.axvline(asked, color="#333333", linestyle="--", linewidth=1)
        axis.annotate(
            f" asked: {result.method.skip_rate_asked:.0%}", (asked, 1.01),
            xycoords=("data", "axes fraction"), fontsize=8,
        )  # fmt: skip
        reached = [asked, *(layers - len(e.kept) for e in result.examples)]
        axis.set_xlim(min(reached) - 2.5, max(reached) + 2.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(xlabel=f"layers skipped, of {layers}", ylabel="prompts")
    axes[-1].legend()
    return write_png(figure, path)


def latency(rows: Sequence[Row], path: Path) -> Path:
    """Bars: time to the first token and of the decoding after it."""
    timed = [row for row in in_order(rows) if row["timing"]]
    tokens = timed[0]["timing"]["new_tokens"]
    figure = new_figure(11, 1.1 + 0.28 * len(timed))
    axis = figure.subplots()
    end = 0.0
    for place, row in enumerate(timed):
        ttft, decode = row["ttft_ms"]["median"], (tokens - 1) * row["tpot_ms"]["median"]
        own = is_own(row)
        axis.barh(place, ttft, color=MUTED, height=0.72)
        axis.barh(place, decode, left=ttft, color=BLUE if own else SKY, height=0.72)
        ideal = ttft + (tokens - 1) * row["full_tpot_ms"]["median"] / row["ideal_speedup"]
        axis.plot([ideal, ideal], [place - 0.36, place + 0.36], color=_IDEAL, linewidth=2)
        axis.annotate(
            f"  {row['tpot_ms']['median']:.2f} ms/token, {row['speedup']:.2f}× "
            f"(ideal {row['ideal_speedup']:.2f}×)",
            (max(ttft + decode, ideal), place), va="center", fontsize=7.5,
        )  # fmt: skip
        end = max(end, ttft + decode, ideal)
    labels = [
        f"{title(r['method'], r['weights'])}"
        + (f", {r['skip_rate_asked']:.0%}" if r["skip_rate_asked"] else "")
        for r in timed
    ]
    axis.set_yticks(range(len(timed)), labels)
    axis.set_ylim(len(timed) - 0.4, -0.6)
    axis.set_xlim(0, 1.32 * end)
    timing = timed[0]["timing"]
    axis.set_xlabel(
        f"ms for {tokens} tokens, grey: prefill to the first token, blue: decoding, red: ideal\n"
        f"({_timing_text(timed)}, {timing['prompts']} prompts × {timing['repeats']} repeats)"
    )
    return write_png(figure, path)
