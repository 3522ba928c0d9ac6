"""Pictures: which prompt keeps which layer, the keep share of each layer, and the training curves.

Letters: N prompts, L decoder layers. Everything is drawn with matplotlib's Agg canvas and without
pyplot, so a caller's own backend and figures are left alone.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from firstlm.atomic import write_bytes
from firstlm.skip_plan import SkipPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT, SKIPPED, ACCENT, MUTED = "#2f5d8a", "#f1ede4", "#d1693c", "#8a8f98"
PHASE_SHADES = {"warmup": "#f7f3ea", "routers": "#eaf1f7", "lora": "#eef6ec"}
PHASE_TITLES = {
    "warmup": "warm-up",
    "routers": "phase 1: routers",
    "lora": "phase 2: LoRA",
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": "#333333",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def overview(
    path: str | os.PathLike[str],
    plans: Sequence[SkipPlan],
    training_log: Sequence[Mapping[str, Any]] = (),
    *,
    title: str = "",
    groups: Sequence[str] | None = None,
) -> Path:
    """Write one PNG: heatmap of layers x prompts, keep share per layer, training curves.

    Args:
        path: the PNG to write; whole or absent.
        plans: one plan a prompt, all of one model.
        training_log: rows of a run's train_log.jsonl: `total_step`, `phase` and any of `loss`,
            `cross_entropy`, `skip_rate`, `skip_rate_asked`. Empty: no curves.
        title: the picture's headline.
        groups: a label for each prompt, say its task; prompts of a group are drawn together.

    Raises:
        ValueError: no plans, plans of several models, or a wrong number of groups.
    """
    mask = keep_matrix(plans)
    with style():
        rows = 2 if training_log else 1
        figure = new_figure(10, 3.9 * rows if rows == 2 else 4.4)
        top, *bottom = np.atleast_1d(figure.subfigures(rows, 1, height_ratios=[1.3, 1][:rows]))
        heatmap, share = top.subplots(1, 2, width_ratios=[5, 1], sharey=True)
        draw_plans(heatmap, mask, groups)
        draw_keep_share(share, mask)
        if bottom:
            draw_training(bottom[0].subplots(1, 3), training_log)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return write_png(figure, path)


def keep_share(
    path: str | os.PathLike[str],
    plans_by_label: Mapping[str, Sequence[SkipPlan]],
    *,
    title: str = "Share of prompts that keep each layer",
) -> Path:
    """Write a PNG with one line a label (a task, a checkpoint): the keep share of every layer.

    Raises:
        ValueError: no labels, or plans as in `keep_matrix`.
    """
    if not plans_by_label:
        raise ValueError("no plans to draw: plans_by_label is empty")
    with style():
        figure = new_figure(8, 3.2)
        axis = figure.subplots()
        for label, plans in plans_by_label.items():
            share = keep_matrix(plans).mean(axis=0)  # [L]
            edges = np.arange(len(share) + 1) - 0.5
            axis.stairs(100 * share, edges, baseline=None, label=label, linewidth=1.6)
        axis.set(xlabel="layer", ylabel="kept, % of prompts", ylim=(-3, 103), title=title)
        if len(plans_by_label) > 1:
            axis.legend()
        return write_png(figure, path)


def keep_matrix(plans: Iterable[SkipPlan]) -> np.ndarray:
    """Plans as a bool matrix `[N, L]`, true = kept.

    Raises:
        ValueError: no plans, or plans over different numbers of layers.
    """
    plans = list(plans)
    sizes = {plan.num_layers for plan in plans}
    if len(sizes) != 1:
        raise ValueError(
            f"plans of one model are needed, got {len(plans)} plans over {sorted(sizes)} layers"
        )
    mask = np.zeros((len(plans), sizes.pop()), dtype=bool)
    for row, plan in enumerate(plans):
        mask[row, list(plan.kept)] = True
    return mask


def prompt_order(mask: np.ndarray, groups: Sequence[str] | None = None) -> np.ndarray:
    """Column order `[N]` that puts like plans side by side: by group, then main change.

    Args:
        mask: bool `[N, L]`.
        groups: a label for each prompt, or None.

    Raises:
        ValueError: another number of groups than of prompts.
    """
    if groups is not None and len(groups) != len(mask):
        raise ValueError(f"{len(mask)} prompts need as many groups, got {len(groups)}")
    centred = mask - mask.mean(axis=0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]  # [L]
    # The sign of a singular vector is arbitrary: let plans that keep more come later.
    if np.dot(centred @ direction, mask.sum(axis=1)) < 0:
        direction = -direction
    position = np.round(centred @ direction, 9)
    keys = [*mask.T.astype(int), position]
    if groups is not None:
        labels = sorted(set(groups))
        keys.append(np.asarray([labels.index(group) for group in groups]))
    return np.lexsort(keys)


def draw_plans(axis: Axes, mask: np.ndarray, groups: Sequence[str] | None = None) -> None:
    """Heatmap of layers (rows, the first at the bottom) x prompts (columns), kept or skipped."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    order = prompt_order(mask, groups)
    prompts, layers = mask.shape
    axis.pcolormesh(
        np.arange(prompts + 1) - 0.5,
        np.arange(layers + 1) - 0.5,
        mask[order].T.astype(int),
        cmap=ListedColormap([SKIPPED, KEPT]),
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=0.4 if prompts <= 150 else 0,
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    distinct = len(np.unique(mask, axis=0))
    axis.set(
        xlabel="held-out prompts, like plans side by side",
        ylabel="decoder layer",
        title=f"{distinct} distinct plans over {prompts} prompts, "
        f"{1 - mask.mean():.1%} of the layer calls skipped",
    )
    if groups is not None:
        sorted_groups = np.asarray(list(groups))[order]
        for label in np.unique(sorted_groups):
            where = np.flatnonzero(sorted_groups == label)
            axis.annotate(
                label, (where.mean(), layers - 0.4), ha="center", va="bottom", annotation_clip=False
            )
            if where[0] > 0:
                axis.axvline(where[0] - 0.5, color=ACCENT, linewidth=1.5)
        axis.set_title(axis.get_title(loc="left"), pad=18)
    handles = [
        Patch(facecolor=KEPT, label="kept"),
        Patch(facecolor=SKIPPED, edgecolor=MUTED, linewidth=0.5, label="skipped"),
    ]
    above = 1 if groups is None else 1.05
    axis.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, above), ncols=2, borderaxespad=0.2
    )


def draw_keep_share(axis: Axes, mask: np.ndarray) -> None:
    """Horizontal bars: the share of prompts that keep each layer, beside the heatmap's rows."""
    share = 100 * mask.mean(axis=0)  # [L]
    layers = np.arange(len(share))
    axis.barh(layers, np.full(len(share), 100), color=SKIPPED, height=0.8)
    adaptive = (share > 0) & (share < 100)
    axis.barh(layers, share, color=[ACCENT if a else KEPT for a in adaptive], height=0.8)
    axis.set(xlabel="% of prompts", xlim=(0, 100), title="kept by (orange: varies)")
    axis.tick_params(axis="y", left=False, labelleft=False)


def draw_training(axes: Sequence[Axes], log: Sequence[Mapping[str, Any]]) -> None:
    """Three panels over all optimizer steps: loss, cross-entropy, skip rate against its target."""
    loss, cross_entropy, skip_rate = axes
    for axis, key, color in (
        (loss, "loss", KEPT),
        (cross_entropy, "cross_entropy", KEPT),
        (skip_rate, "skip_rate", ACCENT),
    ):
        for x, y in _segments(log, key):
            axis.plot(x, y, color=color, alpha=0.35, linewidth=0.9)
            axis.plot(x, _smoothed(y), color=color, linewidth=1.8)
    for x, y in _segments(log, "skip_rate_asked"):
        skip_rate.plot(x, y, color="#333333", linewidth=1.1, linestyle="--", label="asked")
    skip_rate.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if skip_rate.get_legend_handles_labels()[0]:
        handles = dict(zip(*reversed(skip_rate.get_legend_handles_labels()), strict=True))
        skip_rate.legend(handles.values(), handles.keys(), loc="lower right")
    skip_rate.set_ylim(bottom=0)
    titles = ("loss (all terms)", "cross-entropy of the answers", "skip rate")
    for axis, name in zip(axes, titles, strict=True):
        axis.set(title=name, xlabel="optimizer step")
        _shade_phases(axis, log)


def _shade_phases(axis: Axes, log: Sequence[Mapping[str, Any]]) -> None:
    low, high = axis.get_ylim()
    phases: dict[str, list[float]] = {}
    for row in log:
        phases.setdefault(str(row["phase"]), []).append(float(row["total_step"]))
    for index, (phase, steps) in enumerate(phases.items()):
        end = max(steps) + 0.5
        axis.axvspan(min(steps) - 0.5, end, color=PHASE_SHADES.get(phase, "#f4f4f4"), zorder=0)
        axis.annotate(
            PHASE_TITLES.get(phase, phase),
            (min(steps), 0.985 if index % 2 == 0 else 0.915),
            xycoords=("data", "axes fraction"), fontsize=7, va="top", color="#555555",
        )  # fmt: skip
    # Room above the curves for the phases' names.
    axis.set_ylim(low, high + 0.18 * (high - low))


def _segments(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[list[float], list[float]]]:
    """The curve of `key`, one piece a phase: a line across phases would show a change of loss."""
    pieces: dict[str, tuple[list[float], list[float]]] = {}
    for row in log:
        if row.get(key) is not None:
            x, y = pieces.setdefault(str(row["phase"]), ([], []))
            x.append(float(row["total_step"]))
            y.append(float(row[key]))
    return list(pieces.values())


def _smoothed(values: Sequence[float], window: int = 9) -> np.ndarray:
    """Centred moving mean that shrinks its window at both ends."""
    array = np.asarray(values, dtype=float)
    half = min(window // 2, max(0, (len(array) - 1) // 4))
    return np.asarray([array[max(0, i - half) : i + half + 1].mean() for i in range(len(array))])


def style():
    """The look of all pictures, as a context in which they are drawn."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, with a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write the picture so that the file is whole or absent."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_bytes(path, picture.getvalue())
    return Path(path)
