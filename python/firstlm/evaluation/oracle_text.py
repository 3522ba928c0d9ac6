"""The oracle's figures as a page and a picture."""

from __future__ import annotations

import os
import textwrap
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
    for name, words in _CHOSEN.items():
        difference = ways[name]["all"]["minus.single"]
        won = max(-difference["mean"], 0.0)
        share = f", {won / bound:.0%} of that" if bound > 0 and difference["ci95"][1] < 0 else ""
        found.append(f"- {words}: {_verdict(difference, 'the best single plan')}{share}.")
    found.append(
        "- What knowing the prompt adds to knowing its task: the predicted plan "
        f"{_verdict(ways['predicted']['all']['minus.per_task'], 'the best plan of each task')}."
    )
    quality = record["predictors"]["predicted"]
    half = max(record["agreement_of_halves"], 0.0)
    found.append(
        "- The features foresee "
        f"{max(quality['r2'], 0):.1%} of the variance of how much better or worse than the average "
        f"candidate each plan is for a prompt, and {max(quality['r2_within_tasks'], 0):.1%} within "
        f"tasks (R² on the test prompts). The two halves of an answer's tokens agree with r = "
        f"{record['agreement_of_halves']:.2f}, so that about {2 * half / (1 + half):.0%} of the "
        "latter is the prompt's and could be foreseen at all."
    )
    return found


_CHOSEN = {
    "per_task": "A plan a task",
    "predicted_from_length": "Plans predicted from the prompt's length",
    "predicted": "Plans predicted from the routers' features",
    "per_prompt_by_halves": "A prompt's own plan without luck (chosen by half of its tokens)",
}


def _verdict(difference: Mapping[str, Any], rival: str) -> str:
    low, high = difference["ci95"]
    size = f"{abs(difference['mean']):.3f}"
    if high < 0:
        return f"{size} better than {rival}"
    if low > 0:
        return f"{size} worse than {rival}"
    return f"not told apart from {rival} ({difference['mean']:+.3f})"


def plot(path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """A PNG: for all prompts and each task, every way's difference from the best single plan."""
    ways = record["ways"]
    names = [name for name in WAYS if name not in ("full", "single")]
    groups = [name for name in ways["single"] if name != "distinct_plans"]
    with plots.style():
        figure = plots.new_figure(3.2 + 2.6 * len(groups), 4.2)
        axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axis, group in zip(axes, groups, strict=True):
            for row, name in enumerate(reversed(names)):
                difference = ways[name][group]["minus.single"]
                color = plots.ACCENT if name.startswith("per_prompt") else plots.KEPT
                axis.plot(difference["ci95"], [row, row], color=color, linewidth=1.6)
                axis.plot([difference["mean"]], [row], "o", color=color, markersize=4)
            axis.axvline(0, color=plots.MUTED, linewidth=0.8)
            axis.set(title=group, xlabel="CE minus best single plan's")
        axes[0].set_yticks(
            range(len(names)),
            [textwrap.fill(WAYS[name].partition(" (")[0], 36) for name in names[::-1]],
        )
        return plots.write_png(figure, path)


def _difference(value: Mapping[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['mean']:+.4f} [{low:+.4f}, {high:+.4f}]"
