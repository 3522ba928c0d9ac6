"""Tables of an evaluation's rows, for Markdown and HTML, and the short one for a README.

python -m firstlm.evaluation.tables --summary results.json
"""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from firstlm import figures
from firstlm.bench_tables import markdown_table
from firstlm.evaluation import aims
from firstlm.evaluation.metrics import METRICS
from firstlm.evaluation.statistics import best_rows, is_first

Row = Mapping[str, Any]

TITLES = {
    "first": "FiRST's plans",
    "base": "nothing skipped",
    "lora_only": "nothing skipped",
    "static": "static plan",
    "uniform": "every n-th layer",
    "random": "random layers",
    "first_layers": "first layers dropped",
    "last_layers": "last layers dropped",
    "first_paper": "FiRST as published",
    "shuffled": "plans of other prompts",
    "shuffled_in_task": "plans of other prompts of the task",
    "block_influence": "block influence (ShortGPT)",
    "greedy": "greedy cross-entropy (SLEB-like)",
    "most_kept": "FiRST's most kept layers",
    "exact": "FiRST's choice, one number of layers",
    "length": "plans from prompt length",
    "early_exit": "early exit, fixed layer",
    "early_exit_confidence": "early exit by confidence",
    "oracle": "best of many plans, an upper bound",
}
_WEIGHTS = {"trained": " + LoRA", "first": " (FiRST's weights)", "base": " (not finetuned)"}
_OWN_TITLES = {("first", "first"): "FiRST", ("lora_only", "trained"): "LoRA-only"}
TIME_HEAD = "time per token, against all layers"
_DIGITS = {"perplexity": 2, "bleu": 1, "chrf": 1}


@dataclass(frozen=True)
class Table:
    """Cells as text; a row whose first cell is in `bold` stands out, one of one cell is a heading
    of those below it; the caption says of how many prompts."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[str] = frozenset()
    caption: str = ""

    def markdown(self) -> str:
        """As Markdown, the caption above it."""
        body = [[f"**{c}**" if c and r[0] in self.bold else c for c in r] for r in self.rows]
        blank = [""] * (len(self.head) - 1)
        body = [[f"*{row[0]}*", *blank] if len(row) == 1 else row for row in body]
        table = markdown_table(self.head, body)
        return f"{self.caption}\n\n{table}" if self.caption else table

    def html(self) -> str:
        """As an HTML table."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return (
            f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n"
            + "\n".join(self._html_row(row) for row in self.rows)
            + "\n</tbody></table>"
        )

    def _html_row(self, row: Sequence[str]) -> str:
        if len(row) == 1:
            wide = f"<th colspan='{len(self.head)}'>{html.escape(row[0])}</th>"
            return f"<tr class='group'>{wide}</tr>"
        mark = ' class="own"' if row[0] in self.bold else ""
        return f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"


def title(method: str, weights: str) -> str:
    """What a method is called in a sentence or plot."""
    known = _OWN_TITLES.get((method, weights))
    return known or short_title(method, weights) + _WEIGHTS[weights]


def short_title(method: str, weights: str) -> str:
    """What a method is called under a heading that says whose weights run."""
    plain = TITLES.get(method, method.replace("_", " "))
    return _OWN_TITLES.get((method, weights), plain)


def control_title(key: str, *, short: bool = False) -> str:
    """`title`, or `short_title`, of a key of `vs`."""
    method, _, weights = key.rpartition("-")
    return short_title(method, weights) if short else title(method, weights)


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


def caption(rows: Sequence[Row], task: str = "") -> str:
    """ "n = 24 prompts (12 of debian-synopsis, 12 of debian-en-de)"; it is the same in all rows."""
    tasks = {task: rows[0]["tasks"][task]} if task else rows[0]["tasks"]
    if len(tasks) == 1:
        ((name, part),) = tasks.items()
        return f"n = {part['n']} prompts of {name}"
    parts = ", ".join(f"{part['n']} of {name}" for name, part in tasks.items())
    return f"n = {rows[0]['n']} prompts ({parts})"


def _group(method: str, weights: str) -> str:
    """The heading that a method belongs under. FiRST's weights were trained for its own plans."""
    if weights == "trained" or is_first(method, weights):
        return "trained for its plan"
    return "on FiRST's weights" if weights == "first" else "not finetuned"


def _grouped(keyed: Sequence[tuple[tuple[str, str], list[str]]]) -> list[list[str]]:
    """Cells of methods (name, weights) under headings that say whose weights run."""
    body = []
    for heading in ("trained for its plan", "on FiRST's weights", "not finetuned"):
        cells = [row for key, row in keyed if _group(*key) == heading]
        body += [[heading], *cells] if cells else []
    return body


def _key(row: Row) -> tuple[str, str]:
    return row["method"], row["weights"]


def _label(row: Row) -> str:
    return f"{short_title(*_key(row))}{_at(row)}"


def _table(
    head: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], list[str]], caption: str
) -> Table:
    """A row a method, its name before `cells`, in groups of whose weights run."""
    body = _grouped([(_key(row), [_label(row), *cells(row)]) for row in rows])
    return Table(["method", *head], body, _bold(body), caption)


# Of the methods on FiRST's weights, those that say what its choice is worth.
_SHORT = ("exact", "shuffled", "shuffled_in_task", "length")


def short_table(rows: Sequence[Row]) -> Table:
    """What the verdict rests on: FiRST, its trained rivals, and its weights under other plans."""
    ordered = in_order(rows)
    shown = [
        r for r in ordered
        if _group(*_key(r)) == "trained for its plan"
        or (r["weights"] == "first" and r["method"] in _SHORT)
    ]  # fmt: skip
    answers = answer_metric(rows[0])
    firsts = {row["skip_rate_asked"]: row for row in ordered if is_own(row)}
    head = ["layers kept", METRICS["cross_entropy"].title, METRICS[answers].title,
            "FiRST's cross-entropy minus this one's", "speedup"]  # fmt: skip

    def cells(row: Row) -> list[str]:
        entry = _against(firsts, row)
        return [
            f"{row['num_layers'] * (1 - row['skip_rate']):.1f} of {row['num_layers']}",
            number("cross_entropy", row["metrics"]["cross_entropy"]["mean"]),
            number(answers, row["metrics"][answers]["mean"]),
            difference(entry["cross_entropy"] if entry else None, "cross_entropy"),
            _timing_cells(row)[1],
        ]

    return _table(head, shown, cells, caption(rows))


def _against(firsts: Mapping[float, Row], row: Row) -> Mapping[str, Any] | None:
    """What FiRST of a row's rate says of it; of the only rate there is, also if nothing is skipped
    in the row."""
    first = firsts.get(row["skip_rate_asked"])
    if first is None and len(firsts) == 1 and not row["skip_rate_asked"]:
        (first,) = firsts.values()
    return first["vs"].get(f"{row['method']}-{row['weights']}") if first else None


def main_table(rows: Sequence[Row], task: str = "") -> Table:
    """Every method: what it skips, how good it is, how fast it is."""
    shown = [m for m in ("cross_entropy", "rouge_l", "bleu", "chrf") if m in metrics_of(rows)]
    timed = not task and any(row["timing"] for row in rows)
    head = ["seeds", "skipped, by prompt / token", "plans"]
    head += [METRICS[name].title for name in shown]
    head += [TIME_HEAD, "speedup", "ideal"] if timed else []

    def cells(row: Row) -> list[str]:
        part = row["tasks"][task] if task else row
        return [
            f"{len(row['seeds'])}",
            f"{part['skip_rate']:.1%} / {part['skip_rate_by_token']:.1%}",
            f"{part['distinct_plans']:.3g}",
            *(with_interval(part["metrics"][name], name) for name in shown),
            *(_timing_cells(row) if timed else []),
        ]

    return _table(head, in_order(rows), cells, caption(rows, task))


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
    """Of the time with all layers of the same weights, which took turns: what other weights took,
    was measured at another time."""
    if row["timing"] is None:
        return ["", "", ""]
    low, high = row["speedup_ci95"]
    return [
        f"{1 / row['speedup'] - 1:+.1%}",
        f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]",
        f"{row['ideal_speedup']:.2f}",
    ]


def all_metrics_table(rows: Sequence[Row]) -> Table:
    """Every metric of every method, without intervals."""
    names = metrics_of(rows)

    def cells(row: Row) -> list[str]:
        return [number(name, row["metrics"][name]["mean"]) for name in names]

    return _table([METRICS[name].title for name in names], in_order(rows), cells, caption(rows))


def comparison_table(first: Row, task: str = "") -> Table:
    """FiRST minus each of its controls, at one rate."""
    part = first["tasks"][task] if task else first
    shown = [m for m in ("cross_entropy", "cross_entropy_by_prompt", "rouge_l", "bleu", "chrf")
             if m in part["metrics"]]  # fmt: skip
    head = ["FiRST minus …"]
    for name in shown:
        head += [METRICS[name].title, "p"]
    keyed = []
    for control, entry in part["vs"].items():
        method, _, weights = control.rpartition("-")
        cells = [control_title(control, short=True)]
        for name in shown:
            cells += [difference(entry[name], name), p_value(entry[name]["p"])]
        keyed.append(((method, weights), [*cells, f"{entry['same_plans']:.0%}"]))
    return Table([*head, "same plan"], _grouped(keyed), caption=caption([first], task))


def latency_table(rows: Sequence[Row]) -> Table:
    """What was timed."""
    timed = [row for row in in_order(rows) if row["timing"]]
    counts = dict.fromkeys(f"{r['timing']['prompts']} × {r['timing']['repeats']}" for r in timed)
    head = ["TTFT, ms", "TPOT, ms", "TPOT of all layers, ms", TIME_HEAD, "tokens/s", "speedup",
            "ideal", "achieved / ideal", "KV kept"]  # fmt: skip

    def cells(row: Row) -> list[str]:
        tpot = row["tpot_ms"]
        change, speedup, ideal = _timing_cells(row)
        low, high = aims.achieved(row)
        return [
            f"{row['ttft_ms']['median']:.1f}",
            f"{tpot['median']:.2f} ({tpot['p10']:.2f}-{tpot['p90']:.2f})",
            f"{row['full_tpot_ms']['median']:.2f}",
            change,
            f"{row['tokens_per_s']['median']:.1f}",
            speedup,
            ideal,
            f"{row['achieved_ratio']:.2f} [{low:.2f}, {high:.2f}]",
            f"{row['kv_bytes'] / row['full_kv_bytes']:.0%}",
        ]

    said = (
        f"n = {' or '.join(counts)} (prompts × repeats); milliseconds of different weights were "
        "measured at different times"
    )
    return _table(head, timed, cells, said)


def main(arguments: Sequence[str]) -> None:
    """Print the main table of a `results.json`, or with --summary the short one."""
    summary = list(arguments[:1]) == ["--summary"]
    for path in arguments[summary:]:
        rows = figures.read(path)["rows"]
        print((short_table if summary else main_table)(rows).markdown())


if __name__ == "__main__":
    main(sys.argv[1:])
