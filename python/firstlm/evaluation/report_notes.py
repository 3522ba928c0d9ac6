"""What a report says beside its figures: what was tested, how, and under which settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from firstlm.checkpoint import name_of
from firstlm.evaluation import tables
from firstlm.evaluation.records import Evaluation
from firstlm.evaluation.statistics import RESAMPLES, is_first

Row = Mapping[str, Any]

_QUALITY_ENGINES = {
    "hf": "in the hf path",
    "native": "in the native engine",
    "auto": "in the native engine where it runs the model, else in the hf path",
}


def what_was_tested(
    evaluation: Evaluation, rows: Sequence[Row], machine: Mapping[str, Any] | None
) -> str:
    """A paragraph: model, tasks, how many examples, rates, training, seeds, machine.

    Args:
        machine: of `figures.machine()` where it was measured; None: not known.
    """
    return " ".join(
        sentence
        for sentence in (
            _model(evaluation, rows),
            _examples(evaluation, rows),
            _where(rows, machine),
        )
        if sentence
    )


def _model(evaluation: Evaluation, rows: Sequence[Row]) -> str:
    count = len({(row["method"], row["weights"]) for row in rows})
    own = [r.method for r in evaluation.methods if is_first(r.method.name, r.method.weights)]
    layers = f"{rows[0]['num_layers']} layers"
    if not own:
        return f"{count} methods of a model of {layers}, without FiRST."
    folders = ", ".join(dict.fromkeys(name_of(m.checkpoint) for m in own if m.checkpoint))
    rates = " and ".join(f"{rate:.3g}" for rate in sorted({m.skip_rate_asked for m in own}))
    seeds = sorted({m.seed for m in own})
    steps = dict.fromkeys(re.findall(r"(\d+) steps", evaluation.checks.get("optimizer steps", "")))
    trained = f", trained for {' or '.join(steps)} optimizer steps" if steps else ""
    return (
        f"FiRST{f' ({folders})' if folders else ''} of {layers}{trained}, training seed"
        f"{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}, asked to skip {rates} of "
        f"the layers, beside {count - 1} other method{'' if count == 2 else 's'}."
    )


def _examples(evaluation: Evaluation, rows: Sequence[Row]) -> str:
    per_task = ", ".join(f"{part['n']} of {task}" for task, part in rows[0]["tasks"].items())
    text = f"Tested on {rows[0]['n']} held-out prompts ({per_task})"
    if (too_long := evaluation.settings.get("too_long")) is not None:
        limit = evaluation.settings.get("effort", {}).get("max_length")
        than = f" than {limit} tokens" if limit else ""
        text += f"; {too_long} examples longer{than} were passed over while drawing"
    return text + "."


def _where(rows: Sequence[Row], machine: Mapping[str, Any] | None) -> str:
    timing = next((row["timing"] for row in rows if row["timing"]), None)
    threads = timing["threads"] if timing else machine["threads"] if machine else None
    known = [
        *([f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores"] if machine else []),
        *([f"{threads} threads"] if threads else []),
    ]
    return f"Machine: {', '.join(known)}." if known else ""


def how_measured(evaluation: Evaluation, rows: Sequence[Row]) -> list[str]:
    """Which figure comes from where."""
    engine = _QUALITY_ENGINES.get(evaluation.settings.get("engine", ""), "")
    lines = [
        "Cross-entropy and perplexity: of the reference's tokens, teacher-forced"
        f"{', ' + engine if engine else ''}; weighted by token unless it says by prompt. "
        "Routers read the prompt only.",
        "ROUGE (rouge-score, stemmed; its tokenizer knows a-z and digits only, which blurs "
        "German), BLEU and chrF (sacrebleu, defaults, over the corpus), exact match and token F1 "
        "(by white space, lower case): of greedy answers"
        f"{_limit(evaluation.settings)}.",
        f"Brackets: 95 % intervals of a percentile bootstrap, {RESAMPLES} resamples of prompts "
        "within each task, the same for all methods, so that differences are paired; p is "
        "two-sided, from the same resamples, and not corrected for the number of comparisons. "
        "Better and worse: the interval excludes 0 and p < 0.05.",
        "Seeds: where a row has several, its value is their mean, and seeds are resampled too. "
        "With two or three seeds such an interval is only a rough guide; a rival of one seed adds "
        "nothing to it.",
        "Skipped: share of layer calls; by token: prompts weighted by their references' tokens.",
        _times(rows),
    ]
    if "bleu" not in rows[0]["metrics"]:
        lines.append("BLEU and chrF are missing: pip install 'firstlm[eval]' and report again.")
    return lines


def _limit(settings: Mapping[str, Any]) -> str:
    """How long answers may be, and how many references are longer."""
    longer = settings.get("references_longer")
    if longer is None:
        return ""
    limits = ", ".join(
        f"{settings['max_new_tokens'][task]} for {task}, where {count} references are longer"
        for task, count in longer.items()
    )
    return f" of so many tokens at most: {limits}"


def _times(rows: Sequence[Row]) -> str:
    timing = next((row["timing"] for row in rows if row["timing"]), None)
    if timing is None:
        return "Nothing was timed."
    return (
        f"Times: {timing['engine']} engine, {timing['precision']}, {timing['threads']} threads, "
        f"batch 1, {timing['new_tokens']} tokens a pass, in turns with the same weights and all "
        "layers kept. Methods of other weights were timed at another time, so milliseconds are "
        "comparable within a group of weights only, and shares of the time with all layers "
        "everywhere. Speedup: mean over prompts of the median over repeats, all layers over these "
        "plans. Ideal: ratio of the bytes that a token reads. Round brackets: 10th-90th percentile "
        "beside the median."
    )


def lists(evaluation: Evaluation, rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """(heading, lines) of what stands at the end."""
    notes = [
        f"{tables.title(row['method'], row['weights'])}, {row['skip_rate_asked']:.3g}: {note}"
        for row in tables.in_order(rows)
        for note in row["notes"]
    ]
    sections = [
        ("How it was measured", how_measured(evaluation, rows)),
        ("Checks that held", [f"{name}: {text}" for name, text in evaluation.checks.items()]),
        ("Notes on methods", notes),
    ]
    return [(heading, lines) for heading, lines in sections if lines]


def settings_table(settings: Mapping[str, Any]) -> tables.Table:
    """A row a setting; what is set within another one has its name before it."""
    body: list[list[str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            body += [[f"{name}: {part}", _setting(inner)] for part, inner in value.items()]
        else:
            body.append([name, _setting(value)])
    return tables.Table(["setting", "value"], body)


def _setting(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
