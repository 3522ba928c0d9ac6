"""The report of an evaluation: `report.md`, and `report.html`, which needs no other file."""

from __future__ import annotations

import base64
import html
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firstlm.atomic import write_text
from firstlm.evaluation import aims, charts, report_notes, tables
from firstlm.evaluation.conclusions import (
    Verdict,
    outcome,
    rivals,
    shuffled,
    trained,
    verdicts,
)
from firstlm.evaluation.records import Evaluation

Row = Mapping[str, Any]

_MARKS = {"yes": "✔", "partly": "≈", "no": "✘", "unknown": "?"}
_ANSWERS = {
    "yes": "adaptivity pays",
    "partly": "adaptivity pays in part",
    "no": "adaptivity does not pay",
    "unknown": "not shown that adaptivity pays",
}


def write(
    evaluation: Evaluation,
    rows: Sequence[Row],
    folder: str | os.PathLike[str],
    machine: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write `report.md` and `report.html`, which has the pictures; returns the paths.

    Args:
        rows: of `statistics.rows(evaluation)`.
        machine: of `figures.machine()` where it was measured; None: not known.
    """
    folder = Path(folder)
    found = verdicts(rows)
    tested = report_notes.what_was_tested(evaluation, rows, machine)
    paths = {"markdown": folder / "report.md", "html": folder / "report.html"}
    write_text(paths["markdown"], markdown(evaluation, rows, found, tested))
    with tempfile.TemporaryDirectory() as drawn:
        pictures = charts.draw_all(evaluation, rows, Path(drawn))
        write_text(paths["html"], page(evaluation, rows, found, tested, pictures))
    return paths


def markdown(
    evaluation: Evaluation,
    rows: Sequence[Row],
    found: Sequence[Verdict],
    tested: str,
) -> str:
    """The report as Markdown, without pictures, so that it stands alone.

    Args:
        tested: of `report_notes.what_was_tested`.
    """
    parts = ["# Does adaptivity pay?", tested, "With pictures: [report.html](report.html)."]
    for verdict in found:
        parts.append(
            f"## {_headline(verdict)}\n\n{verdict.headline}\n\n"
            + "\n".join(f"- {line}" for line in verdict.sentences)
        )
    if not found:
        parts.append("FiRST itself was not measured at any skip rate: rivals only.")
    parts += ["## In short", tables.short_table(rows).markdown()]
    parts += ["## All methods", tables.main_table(rows).markdown()]
    for task in _several_tasks(rows):
        parts += [f"### {task}", tables.main_table(rows, task).markdown()]
    for verdict in found:
        parts += [
            f"## FiRST minus its rivals, {verdict.rate:.0%}",
            tables.comparison_table(verdict.row).markdown(),
        ]
    if any(row["timing"] for row in rows):
        parts += ["## Latency", tables.latency_table(rows).markdown()]
    parts += ["## Every metric", tables.all_metrics_table(rows).markdown()]
    for heading, lines in report_notes.lists(evaluation, rows):
        parts.append(f"## {heading}\n\n" + "\n".join(f"- {line}" for line in lines))
    if evaluation.settings:
        table = report_notes.settings_table(evaluation.settings)
        parts += ["## Settings", table.markdown()]
    return "\n\n".join(parts) + "\n"


def _headline(verdict: Verdict) -> str:
    return f"{_MARKS[verdict.answer]} {verdict.rate:.0%} skipped: {_ANSWERS[verdict.answer]}"


def _several_tasks(rows: Sequence[Row]) -> list[str]:
    tasks = list(rows[0]["tasks"])
    return tasks if len(tasks) > 1 else []


def page(
    evaluation: Evaluation,
    rows: Sequence[Row],
    found: Sequence[Verdict],
    tested: str,
    pictures: Sequence[tuple[str, Path, str]],
) -> str:
    """The report as one HTML file: style and pictures are inside.

    Args:
        tested: of `report_notes.what_was_tested`.
        pictures: of `charts.draw_all`.
    """
    images = {name: _figure(name, path, text) for name, path, text in pictures}
    body = ["<h1>Does adaptivity pay?</h1>", f"<p class='sub'>{html.escape(tested)}</p>"]
    body.append("<div class='cards'>" + "".join(_card(v, rows) for v in found) + "</div>")
    if not found:
        body.append("<p>FiRST itself was not measured at any skip rate: rivals only.</p>")
    body += [_scrolled(tables.short_table(rows)), images.get("gains", "")]
    if found:
        body.append("<h2>What this says</h2>")
    for verdict in found:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in verdict.sentences)
        body.append(f"<h3>{verdict.rate:.0%} of the layers skipped</h3><ul>{lines}</ul>")
    body += ["<h2>Quality and speed</h2>", images.get("quality_tpot", "")]
    body += [images["quality_skip_rate"], _scrolled(tables.main_table(rows))]
    for verdict in found:
        body.append(f"<h3>FiRST minus its rivals, {verdict.rate:.0%}</h3>")
        body.append(_scrolled(tables.comparison_table(verdict.row)))
    if images.keys() & {"plans", "keep_share", "skip_rates"}:
        body.append("<h2>Which layers, for whom</h2>")
        body += [images[name] for name in ("plans", "keep_share", "skip_rates")]
    if "latency" in images:
        body += ["<h2>Latency</h2>", images["latency"], _scrolled(tables.latency_table(rows))]
    if tasks := _several_tasks(rows):
        body.append("<h2>Task by task</h2>")
        for task in tasks:
            body.append(f"<h3>{html.escape(task)}</h3>")
            body.append(_scrolled(tables.main_table(rows, task)))
    body += ["<h2>Every metric</h2>", _scrolled(tables.all_metrics_table(rows))]
    for heading, lines in report_notes.lists(evaluation, rows):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        body.append(f"<h2>{heading}</h2><ul class='small'>{items}</ul>")
    if evaluation.settings:
        table = report_notes.settings_table(evaluation.settings)
        body += ["<h2>Settings</h2>", _scrolled(table)]
    content = "\n".join(body)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>FiRST: does adaptivity pay?</title><style>{_CSS}</style></head>\n"
        f"<body><main>\n{content}\n</main></body></html>\n"
    )


def _card(verdict: Verdict, rows: Sequence[Row]) -> str:
    row = verdict.row
    against = trained(rivals(row, rows))
    facts = []
    if against:
        beaten = sum(outcome(e, "cross_entropy") == "better" for e in against.values())
        facts.append((f"{beaten} of {len(against)}", "trained rivals beaten, by cross-entropy"))
    for key, entry in shuffled(row).items():
        doubt = ": no difference shown" if outcome(entry, "cross_entropy") == "even" else ""
        text = f"nats/token lost with {tables.control_title(key, short=True)}{doubt}"
        facts.append((f"{-entry['cross_entropy']['delta']:+.3f}", text))
    if share := row["vs"].get("lora_only-trained", {}).get("rouge_l", {}).get("share"):
        facts.append((f"{share:.1%}", "of LoRA-only's ROUGE-L kept"))
    if row["timing"]:
        change, word = aims.time_change(row)
        doubt = f"; {aims.TOO_FAST}" if aims.too_fast(row) else ""
        facts.append((f"{change:.0%}", f"{word} time per token, measured{doubt}"))
    cells = "".join(f"<div><b>{value}</b><span>{text}</span></div>" for value, text in facts)
    return (
        f"<section class='card {verdict.answer}'><h2>{_headline(verdict)}</h2>"
        f"<p>{html.escape(verdict.headline)}</p>"
        f"<div class='facts'>{cells}</div></section>"
    )


def _figure(name: str, path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<figure><img alt='{name}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{html.escape(text)}</figcaption></figure>"
    )


def _scrolled(table: tables.Table) -> str:
    return f"<div class='scroll'>{table.html()}</div>"


_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 80px; }
h1 { font-size: 28px; margin: 0; } h2 { margin: 40px 0 8px; } h3 { margin: 24px 0 6px; }
.sub { color: #555; margin: 4px 0 18px; } .small { color: #444; font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 14px; }
.card { border: 1px solid #ddd; border-left: 8px solid #999; border-radius: 6px;
  padding: 12px 16px; }
.card h2 { margin: 0; font-size: 18px; } .card p { margin: 4px 0 10px; }
.card.yes { border-left-color: #0072B2; } .card.partly { border-left-color: #E69F00; }
.card.no { border-left-color: #D55E00; }
.facts { display: flex; flex-wrap: wrap; gap: 8px 22px; }
.facts div { display: flex; flex-direction: column; max-width: 140px; }
.facts b { font-size: 22px; } .facts span { color: #555; font-size: 12px; line-height: 1.3; }
figure { margin: 18px 0; } img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; border-bottom: 2px solid #888; padding: 4px 10px 4px 0;
  vertical-align: bottom; }
td { border-bottom: 1px solid #e5e5e5; padding: 3px 10px 3px 0; white-space: nowrap; }
caption { text-align: left; color: #555; padding: 10px 0 4px; }
tr.group th { border-bottom: 1px solid #bbb; padding-top: 10px; color: #555; font-style: italic;
  font-weight: 400; }
tr.own td { font-weight: 700; background: #eaf3f9; }
"""
