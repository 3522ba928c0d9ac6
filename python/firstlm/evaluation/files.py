"""What an evaluation leaves: results.json, examples.jsonl, report.md, report.html."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from firstlm import figures
from firstlm.atomic import write_text
from firstlm.checkpoint import name_of
from firstlm.evaluation.records import Evaluation, ExampleResult, Method, MethodResult, Timing

RESULTS, EXAMPLES = "results.json", "examples.jsonl"


def write_evaluation(evaluation: Evaluation, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Writes all files of an evaluation; returns the rows of results.json."""
    from firstlm.evaluation import report, statistics

    lines = [
        json.dumps({"method": result.method.key, **dataclasses.asdict(example)}, ensure_ascii=False)
        for result in evaluation.methods
        for example in result.examples
    ]
    write_text(folder / EXAMPLES, "".join(line + "\n" for line in lines))
    rows = statistics.rows(evaluation)
    methods = [
        {
            "method": _told(result.method),
            "num_layers": result.num_layers,
            "timing": None if result.timing is None else dataclasses.asdict(result.timing),
            "notes": result.notes,
        }
        for result in evaluation.methods
    ]
    content = {"settings": evaluation.settings, "checks": evaluation.checks, "rows": rows,
               "methods": methods}  # fmt: skip
    written = figures.write(folder / RESULTS, content, seed=seed)
    report.write(evaluation, rows, folder, written["machine"])
    return rows


def read_evaluation(folder: str | Path) -> Evaluation:
    """What write_evaluation wrote, so that a report is made again without running a model."""
    folder = Path(folder)
    found = figures.read(folder / RESULTS)
    examples: dict[str, list[ExampleResult]] = {}
    with open(folder / EXAMPLES, encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            kept = tuple(values.pop("kept"))
            examples.setdefault(values.pop("method"), []).append(ExampleResult(**values, kept=kept))
    results = []
    for one in found["methods"]:
        method = Method(**one["method"])
        timing = None if one["timing"] is None else Timing(**one["timing"])
        results.append(
            MethodResult(method, one["num_layers"], examples[method.key], timing, one["notes"])
        )
    return Evaluation(found["settings"], results, found["checks"])


def _told(method: Method) -> dict[str, Any]:
    told = dataclasses.asdict(method)
    return told if method.checkpoint is None else told | {"checkpoint": name_of(method.checkpoint)}
