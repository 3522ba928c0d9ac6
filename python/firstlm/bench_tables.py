"""Markdown tables of what `firstlm bench decode`, `perplexity`, `ops` and `start` wrote.

python -m firstlm.bench_tables decode.json perplexity.json ops.json
python -m firstlm.bench_tables --summary decode.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from firstlm import figures


def tables(found: Mapping[str, Any]) -> str:
    """The tables of one file.

    Raises:
        ValueError: it holds the figures of something else.
    """
    if "window_tokens" in found:
        return perplexity_tables(found)
    if "read_bandwidth_gb_s" in found:
        return decode_tables(found)
    if "contests" in found:
        return ops_table(found)
    if "start_s" in found:
        return start_table(found)
    raise ValueError("none of firstlm bench decode, perplexity, ops and start wrote this")


def decode_tables(found: Mapping[str, Any]) -> str:
    """A table for each contest, then the bars."""
    parts = [
        f"{_machine(found, found['read_bandwidth_gb_s'])}; {found['model']}; median (10th-90th "
        "percentile)."
    ]
    for case in dict.fromkeys(row["case"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["case"] == case]
        parts.append(f"**{case[0].upper()}{case[1:]}**\n\n{_decode_table(rows)}")
    bars = [(bar["quantity"], *_verdict(bar)) for bar in found["bars"]]
    if bars:
        parts.append(markdown_table(("bar", "limit", "measured", "met"), bars))
    return "\n\n".join(parts)


def _machine(found: Mapping[str, Any], read: Mapping[str, float]) -> str:
    isa = f" ({found['isa']})" if "isa" in found else ""
    return (
        f"{found['machine']['cpu']}{isa}, {found['threads']} threads, memory read at "
        f"{read['median']:.1f} GB/s ({read['p10']:.1f}-{read['p90']:.1f})"
    )


def _verdict(bar: Mapping[str, Any]) -> tuple[str, str, str]:
    """(limit, measured, met): a bar is a least value where it does not say otherwise."""
    sign = "≥" if bar.get("at_least", True) else "≤"
    return f"{sign} {bar['limit']:g}", f"{bar['value']:.3g}", "yes" if bar["met"] else "no"


def ops_table(found: Mapping[str, Any]) -> str:
    """Every op beside the fastest composition of torch's own, with its bars."""
    head = ("op", "case", "µs", "torch's best, µs", "GB/s", "bar", "limit", "measured", "met")
    body = []
    for row in found["contests"]:
        ours, best = (row["us"][name]["median"] for name in ("firstlm", row["best_torch"]))
        figure = (row["op"], row["case"], f"{ours:.1f}", f"{best:.1f}", f"{row['gb_per_s']:.1f}")
        bars = [(bar["quantity"], *_verdict(bar)) for bar in row["bars"]] or [("", "", "", "")]
        body += [(*(figure if i == 0 else ("",) * 5), *bar) for i, bar in enumerate(bars)]
    return f"{_machine(found, found['read_gb_per_s'])}; medians.\n\n{markdown_table(head, body)}"


def start_table(found: Mapping[str, Any]) -> str:
    """Loading and routing, with their bars."""
    head = f"{found['machine']['cpu']}, {found['threads']} threads; {found['model']}, "
    head += f"{found['precision']}, {found['weight_bytes'] / 1e6:.1f} MB; medians."
    bars = [(bar["quantity"], *_verdict(bar)) for bar in found["bars"]]
    return f"{head}\n\n{markdown_table(('bar', 'limit', 'measured', 'met'), bars)}"


def summary_table(found: Mapping[str, Any]) -> str:
    """The engine beside llama.cpp at equal precision, which of several types is the fastest."""
    head = ["precision", "decode, tokens/s", "llama.cpp", "over it", "of read bandwidth"]
    head += ["prefill of 256 over it", "decode at 4,096 over it"]
    body = []
    for own in _rows(found, "prompt of 64", "firstlm"):
        rival = _fastest_rival(found, "prompt of 64", own)
        speed, rival_speed = (r["decode_tokens_per_s"]["median"] for r in (own, rival))
        body.append(
            (
                own["precision"],
                f"{speed:.0f}",
                f"{rival_speed:.0f} ({rival['precision']})",
                f"{speed / rival_speed:.2f}",
                f"{own['bandwidth_share']:.0%}",
                _over_rival(found, "prompt of 256", own, "prefill_tokens_per_s"),
                _over_rival(found, "context of 4096", own, "decode_tokens_per_s"),
            )
        )
    return markdown_table(head, body)


# What llama.cpp calls the types that are compared with the engine's.
_RIVAL_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "int4": "q4"}


def _rows(found: Mapping[str, Any], case: str, runtime: str) -> list[Mapping[str, Any]]:
    return [row for row in found["rows"] if (row["case"], row["runtime"]) == (case, runtime)]


def _fastest_rival(
    found: Mapping[str, Any], case: str, own: Mapping[str, Any]
) -> Mapping[str, Any]:
    kind = _RIVAL_TYPES[own["precision"]]
    rivals = [r for r in _rows(found, case, "llama.cpp") if r["precision"].startswith(kind)]
    if not rivals:
        raise ValueError(f"there is no figure of llama.cpp {kind} for the case {case!r}")
    return max(rivals, key=lambda row: row["decode_tokens_per_s"]["median"])


def _over_rival(found: Mapping[str, Any], case: str, own: Mapping[str, Any], figure: str) -> str:
    (row,) = (r for r in _rows(found, case, "firstlm") if r["precision"] == own["precision"])
    rival = _fastest_rival(found, case, own)
    return f"{row[figure]['median'] / rival[figure]['median']:.2f}"


def _decode_table(rows: Sequence[Mapping[str, Any]]) -> str:
    skips = any(row["plans"] != "full" for row in rows)
    batches = any(row["batch"] > 1 for row in rows)
    prefills = any(row["prefill_tokens_per_s"] is not None for row in rows)
    columns: list[tuple[str, Any]] = [("runtime", lambda r: f"{r['runtime']} {r['precision']}")]
    if batches:
        columns.append(("batch", lambda r: f"{r['batch']}"))
    if skips:
        columns.append(("layers kept", lambda r: f"{r['kept_layers']:g} of {r['layers']}"))
    if batches:
        columns.append(("plans", lambda r: r["plans"]))
    columns.append(("decode, tokens/s", lambda r: _spread(r["decode_tokens_per_s"])))
    columns.append(("GB/s", lambda r: f"{r['step_bytes'] / 1e6 / r['tpot_ms']['median']:.1f}"))
    columns.append(("of read bandwidth", lambda r: f"{r['bandwidth_share']:.0%}"))
    if prefills and not skips:
        columns.append(("prefill, tokens/s", lambda r: _spread(r["prefill_tokens_per_s"])))
    if skips or batches:
        columns.append(("speedup", lambda r: f"{r['speedup']:.2f}"))
        columns.append(("ideal", lambda r: f"{r['ideal_speedup']:.2f}"))
    return markdown_table(
        [name for name, _ in columns], [[value(row) for _, value in columns] for row in rows]
    )


def perplexity_tables(found: Mapping[str, Any]) -> str:
    """A table for each corpus."""
    parts = []
    for corpus in dict.fromkeys(row["corpus"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["corpus"] == corpus]
        head = ("runtime", "bits per weight", "perplexity", "ratio", "answers only", "ratio")
        body = [
            (
                f"{row['runtime']} {row['precision']}",
                f"{row['bits_per_weight']:.2f}",
                f"{row['perplexity']:.3f}",
                _ratio(row["ratio"], row["ratio_error"]),
                _optional(row["answer_perplexity"], ".3f"),
                _optional(row["answer_ratio"], ".4f"),
            )
            for row in rows
        ]
        parts.append(
            f"**{corpus}**, {found['model']}: {rows[0]['tokens']:,} tokens, "
            f"{rows[0]['answer_tokens']:,} of them in answers.\n\n{markdown_table(head, body)}"
        )
    return "\n\n".join(parts)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(value: Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    return f"{value['median']:.1f} ({value['p10']:.1f}-{value['p90']:.1f})"


def _ratio(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(paths: Sequence[str]) -> None:
    """Print the tables of some files, or with --summary the short one of each."""
    form = summary_table if paths[:1] == ["--summary"] else tables
    files = paths[1:] if form is summary_table else paths
    print("\n\n".join(form(figures.read(path)) for path in files))


if __name__ == "__main__":
    main(sys.argv[1:])
