"""Tables of an evaluation's rows, for Markdown and HTML, and the short one for a README.

python -m firstlm.evaluation.tables --summary results.json
"""

from __future__ import annotations

import html
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from firstlm import figures
from firstlm.bench_tables import markdown_table
from firstlm.evaluation.metrics import METRICS
from firstlm.evaluation.statistics import best_rows, is_first

Row = Mapping[str, Any]

TITLES = {
    "first": "FiRST's plans",
    "base": "nothing skipped",
    "lora_only": "nothing skipped",
    "static": "best static plan",
    "uniform": "every n-th layer",
    "random": "random layers",
    "first_layers": "first layers dropped",
    "last_layers": "last layers dropped",
    "shuffled": "plans of other prompts",
    "shuffled_in_task": "plans of other prompts of the task",
    "block_influence": "block influence (ShortGPT)",
    "greedy": "greedy cross-entropy (SLEB-like)",
    "most_kept": "FiRST's most kept layers",
    "length": "plans from prompt length",
    "early_exit": "early exit, fixed layer",
    "early_exit_confidence": "early exit by confidence",
    "oracle": "best of many plans, an upper bound",
}
_WEIGHTS = {"trained": " + LoRA", "first": " (FiRST's weights)", "base": " (not finetuned)"}
_OWN_TITLES = {("first", "first"): "FiRST", ("lora_only", "trained"): "LoRA-only"}
_DIGITS = {"perplexity": 2, "bleu": 1, "chrf": 1}


@dataclass(frozen=True)
class Table:
    """Cells as text; a row whose first cell is in `bold` stands out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[str] = frozenset()

    def markdown(self) -> str:
        """As Markdown."""
        body = [[f"**{c}**" if c and r[0] in self.bold else c for c in r] for r in self.rows]
        return markdown_table(self.head, body)

    def html(self) -> str:
        """As an HTML table."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        body = []
        for row in self.rows:
            mark = ' class="own"' if row[0] in self.bold else ""
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            body.append(f"<tr{mark}>{cells}</tr>")
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>\n"
            + "\n".join(body)
            + "\n</tbody></table>"
        )


def title(method: str, weights: str) -> str:
    """What a method is called in a table or plot."""
    name = TITLES.get(method, method.replace("_", " ")) + _WEIGHTS[weights]
    return _OWN_TITLES.get((method, weights), name)


def control_title(key: str) -> str:
    """`title` of a key of `vs`."""
    method, _, weights = key.rpartition("-")
    return title(method, weights)


def number(metric: str, value: float, sign: str = "") -> str:
    """A value, or with sign "+" a difference, of a metric."""
    return format(value, f"{sign}.{_DIGITS.get(metric, 3)}f")


def difference(entry: Mapping[str, Any] | None, metric: str) -> str:
    """ "-0.049 [-0.061, -0.037]" """
    if entry is None:
        return ""
    return with_interval({**entry, "mean": entry["delta"]}, metric, "+")


def p_value(p: float) -> str:
    """ "0.013", or "<0.001"."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def is_own(row: Row) -> bool:
    """Whether it is FiRST's."""
    return is_first(row["method"], row["weights"])


def in_order(rows: Sequence[Row]) -> list[Row]:
    """One row a method and rate: by rate, FiRST first, then by cross-entropy."""
    return sorted(
        best_rows(rows),
        key=lambda r: (
            r["skip_rate_asked"], not is_own(r), r["metrics"]["cross_entropy"]["mean"],
        ),
    )  # fmt: skip


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """The metrics that were computed."""
    return [name for name in METRICS if name in rows[0]["metrics"]]


def answer_metric(row: Row) -> str:
    """By which answers are judged: ROUGE-L, or BLEU where there is no ROUGE-L."""
    return "rouge_l" if "rouge_l" in row["metrics"] else "bleu"


def main_table(rows: Sequence[Row], task: str = "") -> Table:
    """Every method: what it skips, how good it is, how fast it is."""
    shown = [m for m in ("cross_entropy", "rouge_l", "bleu", "chrf") if m in metrics_of(rows)]
    timed = not task and any(row["timing"] for row in rows)
    head = ["method", "seeds", "n", "skipped, by prompt / token", "plans"]
    head += [METRICS[name].title for name in shown]
    head += ["TPOT, ms", "speedup", "ideal"] if timed else []
    body = []
    for row in in_order(rows):
        part = row["tasks"][task] if task else row
        cells = [
            f"{title(row['method'], row['weights'])}{_at(row)}",
            f"{len(row['seeds'])}",
            f"{part['n']}",
            f"{part['skip_rate']:.1%} / {part['skip_rate_by_token']:.1%}",
            f"{part['distinct_plans']:.3g}",
        ]
        cells += [with_interval(part["metrics"][name], name) for name in shown]
        if timed:
            cells += _timing_cells(row)
        body.append(cells)
    return Table(head, body, _bold(body))


def with_interval(value: Mapping[str, Any], metric: str, sign: str = "") -> str:
    """ "1.927 [1.888, 1.969]" """
    low, high = (number(metric, end, sign) for end in value["ci95"])
    return f"{number(metric, value['mean'], sign)} [{low}, {high}]"


def _at(row: Row) -> str:
    rate = row["skip_rate_asked"]
    return f", {rate:.3g}" if rate else ""


def _bold(body: Sequence[Sequence[str]]) -> frozenset[str]:
    return frozenset(row[0] for row in body if row[0].startswith("FiRST, 0"))


def _timing_cells(row: Row) -> list[str]:
    if row["timing"] is None:
        return ["", "", ""]
    tpot = row["tpot_ms"]
    low, high = row["speedup_ci95"]
    return [
        f"{tpot['median']:.2f} ({tpot['p10']:.2f}-{tpot['p90']:.2f})",
        f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]",
        f"{row['ideal_speedup']:.2f}",
    ]


def all_metrics_table(rows: Sequence[Row]) -> Table:
    """Every metric of every method, without intervals."""
    names = metrics_of(rows)
    body = [
        [f"{title(row['method'], row['weights'])}{_at(row)}"]
        + [number(name, row["metrics"][name]["mean"]) for name in names]
        for row in in_order(rows)
    ]
    return Table(["method", *(METRICS[name].title for name in names)], body, _bold(body))


def comparison_table(first: Row, task: str = "") -> Table:
    """FiRST minus each of its controls, at one rate."""
    part = first["tasks"][task] if task else first
    shown = [m for m in ("cross_entropy", "cross_entropy_by_prompt", "rouge_l", "bleu", "chrf")
             if m in part["metrics"]]  # fmt: skip
    head = ["FiRST minus …"]
    for name in shown:
        head += [METRICS[name].title, "p"]
    body = []
    for key, entry in part["vs"].items():
        cells = [control_title(key)]
        for name in shown:
            cells += [difference(entry[name], name), p_value(entry[name]["p"])]
        body.append([*cells, f"{entry['same_plans']:.0%}"])
    return Table([*head, "same plan"], body)


def latency_table(rows: Sequence[Row]) -> Table:
    """What was timed."""
    head = ["method", "TTFT, ms", "TPOT, ms", "TPOT of all layers, ms", "tokens/s", "speedup",
            "ideal", "achieved / ideal", "KV kept", "prompts × repeats"]  # fmt: skip
    body = []
    for row in in_order(rows):
        if row["timing"] is None:
            continue
        tpot, speedup, ideal = _timing_cells(row)
        body.append(
            [
                f"{title(row['method'], row['weights'])}{_at(row)}",
                f"{row['ttft_ms']['median']:.1f}",
                tpot,
                f"{row['full_tpot_ms']['median']:.2f}",
                f"{row['tokens_per_s']['median']:.1f}",
                speedup,
                ideal,
                f"{row['achieved_ratio']:.2f}",
                f"{row['kv_bytes'] / row['full_kv_bytes']:.0%}",
                f"{row['timing']['prompts']} × {row['timing']['repeats']}",
            ]
        )
    return Table(head, body, _bold(body))


def summary_table(rows: Sequence[Row]) -> str:
    """For a README: what each method keeps of LoRA-only's quality, and how fast it decodes."""
    head = ["method", "skipped", "cross-entropy", "ROUGE-L", "of LoRA-only's", "chrF",
            "FiRST's cross-entropy minus this one's", "TPOT, ms", "speedup (ideal)"]  # fmt: skip
    ordered = in_order(rows)
    firsts = {r["skip_rate_asked"]: r for r in ordered if is_own(r)}
    body = []
    for row in ordered:
        metrics, first = row["metrics"], firsts.get(row["skip_rate_asked"])
        share = row["vs"].get("lora_only-trained", {}).get("rouge_l", {}).get("share")
        entry = first["vs"].get(f"{row['method']}-{row['weights']}") if first else None
        timed = row["timing"] is not None
        body.append(
            [
                f"{title(row['method'], row['weights'])}{_at(row)}",
                f"{row['skip_rate']:.1%}",
                number("cross_entropy", metrics["cross_entropy"]["mean"]),
                number("rouge_l", metrics["rouge_l"]["mean"]),
                "" if share is None else f"{share:.1%}",
                number("chrf", metrics["chrf"]["mean"]) if "chrf" in metrics else "",
                difference(entry["cross_entropy"] if entry else None, "cross_entropy"),
                f"{row['tpot_ms']['median']:.2f}" if timed else "",
                f"{row['speedup']:.2f} ({row['ideal_speedup']:.2f})" if timed else "",
            ]
        )
    return Table(head, body, _bold(body)).markdown()


def main(arguments: Sequence[str]) -> None:
    """Print the tables of a `results.json`, or with --summary the short one."""
    summary = list(arguments[:1]) == ["--summary"]
    for path in arguments[summary:]:
        rows = figures.read(path)["rows"]
        print(summary_table(rows) if summary else main_table(rows).markdown())


if __name__ == "__main__":
    main(sys.argv[1:])
