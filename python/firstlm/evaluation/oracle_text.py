"""The oracle's figures as a page and a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firstlm import plots

# In the order of the table; the first ones are no choice among the candidates.
WAYS = {
    "full": "nothing skipped",
    "own_plans": "the routers' own plans",
    "candidates_mean": "a candidate at random",
    "single": "best single plan",
    "per_task": "best plan of each task",
    "predicted_from_length": "predicted from the prompt's length",
    "predicted_from_others": "predicted from another prompt's features",
    "predicted": "predicted from the routers' features",
    "per_prompt_by_halves": "best of each prompt, chosen by half of its tokens, paid on the other",
    "per_prompt": "best of each prompt, in hindsight (bound)",
}


def markdown(record: Mapping[str, Any]) -> str:
    """The page."""
    ways = record["ways"]
    tasks = [name for name in ways["single"] if name not in ("all", "distinct_plans")]
    lines = [
        "# Oracle: what choosing plans can win",
        "",
        f"`{record['checkpoint']}`, {record['candidates']} candidate plans, each skipping "
        f"{record['skip_rate']:.1%} of the layers (the routers' own plans "
        f"{record['own_plans_skip_rate']:.1%}). Plans were chosen and predictors fitted on "
        f"{record['prompts']['choosing']} validation prompts; all figures are of "
        f"{record['prompts']['reported']} test prompts: cross-entropy of the reference answer, "
        "nats per token, mean over prompts; in brackets 95 % intervals of the paired difference.",
        "",
        "| plan | CE | minus best single | minus best per task | plans | "
        + " | ".join(f"CE, {task}" for task in tasks)
        + " |",
        "|---" * (5 + len(tasks)) + "|",
    ]
    for name, words in WAYS.items():
        way = ways[name]
        cells = [
            words,
            f"{way['all']['cross_entropy']:.4f}",
            _difference(way["all"]["minus.single"]),
            _difference(way["all"]["minus.per_task"]),
            str(way.get("distinct_plans", "")),
            *(f"{way[task]['cross_entropy']:.4f}" for task in tasks),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *sentences(record), "", f"Best single plan: `{record['best_single']}`", ""]
    lines += [f"Best of {task}: `{plan}`  " for task, plan in record["best_per_task"].items()]
    return "\n".join(lines).rstrip() + "\n"


def sentences(record: Mapping[str, Any]) -> list[str]:
    """What the figures say, computed from them."""
    ways = record["ways"]
    bound = -ways["per_prompt"]["all"]["minus.single"]["mean"]
    cost = -ways["full"]["all"]["minus.single"]["mean"]
    found = [
        f"- The best single plan costs {cost:.3f} nats more than skipping nothing; choosing in "
        f"hindsight for each prompt would win back {bound:.3f}."
    ]
    for name in ("per_task", "predicted_from_length", "predicted", "per_prompt_by_halves"):
        difference = ways[name]["all"]["minus.single"]
        low, high = difference["ci95"]
        verdict = "wins" if high < 0 else "loses" if low > 0 else "is not told apart from it by"
        share = f" ({-difference['mean'] / bound:.0%} of the bound)" if bound > 0 else ""
        found.append(
            f"- Against the best single plan, the plan {_short(name)} {verdict} "
            f"{abs(difference['mean']):.3f}{share}."
        )
    within = ways["predicted"]["all"]["minus.per_task"]
    low, high = within["ci95"]
    verdict = "wins" if high < 0 else "loses" if low > 0 else "is not told apart from it by"
    found.append(
        f"- Against the best plan of each task, the predicted one {verdict} "
        f"{abs(within['mean']):.3f}: what knowing the prompt adds to knowing its task."
    )
    r2 = record["predictors"]["predicted"]["r2"]
    found.append(
        f"- The features foresee {max(r2, 0):.1%} of the variance of which plan suits a prompt "
        "better than it suits the others (R² on the reported prompts)."
    )
    return found


def plot(path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """A PNG: for all prompts and each task, every way's difference from the best single plan."""
    ways = record["ways"]
    names = [name for name in WAYS if name not in ("full", "single")]
    groups = [name for name in ways["single"] if name != "distinct_plans"]
    with plots.style():
        figure = plots.new_figure(3.2 + 2.6 * len(groups), 3.4)
        axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axis, group in zip(axes, groups, strict=True):
            for row, name in enumerate(reversed(names)):
                difference = ways[name][group]["minus.single"]
                color = plots.ACCENT if name.startswith("per_prompt") else plots.KEPT
                axis.plot(difference["ci95"], [row, row], color=color, linewidth=1.6)
                axis.plot([difference["mean"]], [row], "o", color=color, markersize=4)
            axis.axvline(0, color=plots.MUTED, linewidth=0.8)
            axis.set(title=group, xlabel="CE minus best single plan's")
        axes[0].set_yticks(range(len(names)), [WAYS[name].split(", ")[0] for name in names[::-1]])
        return plots.write_png(figure, path)


def _difference(value: Mapping[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['mean']:+.4f} [{low:+.4f}, {high:+.4f}]"


def _short(name: str) -> str:
    return {
        "per_task": "of the task",
        "predicted": "predicted from the routers' features",
        "predicted_from_length": "predicted from the length",
        "per_prompt_by_halves": "chosen by half of a prompt's own tokens",
    }[name]
