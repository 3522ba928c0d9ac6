"""A calibration as a table and a sentence, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from firstlm.latency_budget import FULL

if TYPE_CHECKING:
    from firstlm.calibration import Calibration


def as_text(result: Calibration) -> str:
    """All of a result."""
    prompts = result.record["prompts"]
    lines = [
        f"thresholds from {prompts['calibration']} held-out prompts, checked on others; "
        f"{result.record['too_long']} examples passed over as too long",
        "",
        _header(result),
        *(_line(row, result.choice) for row in result.rows),
    ]
    if result.choice is not None:
        lines += ["", *_chosen(result.choice)]
    return "\n".join(lines)


def _header(result: Calibration) -> str:
    text = f"{'asked':>7} {'achieved':>9} {'plans':>6}"
    if "tpot_ms" not in result.rows[0]:
        return text
    qualities = [row["quality"] for row in result.rows if "quality" in row]
    name = qualities[0]["metric"] if qualities else ""
    share = f"of full (95 %, n {qualities[0]['n']})" if qualities else ""
    return f"{text} {'TPOT ms (p10-p90)':>24} {'less':>7} {name:>14} {share:>26}".rstrip()


def _line(row: Mapping[str, Any], choice: Mapping[str, Any] | None) -> str:
    text = f"{row['asked']:>7.3g} {row['achieved']:>9.3f} {row['distinct_plans']:>6}"
    if "tpot_ms" in row:
        t = row["tpot_ms"]
        tpot = f"{t['median']:.2f} ({t['p10']:.2f}-{t['p90']:.2f})"
        text += f" {tpot:>24} {row['tpot_reduction']:>7.1%}"
    if q := row.get("quality"):
        ci95 = "-" if q["ci95"] is None else f"{q['ci95'][0]:.1%}-{q['ci95'][1]:.1%}"
        share = f"{q['relative']:.1%} ({ci95})"
        text += f" {q['value']:>14.4g} {share:>26}"
    return text + ("  <- default" if choice and choice["rate"] == row["asked"] else "")


def _chosen(choice: Mapping[str, Any]) -> list[str]:
    if "reason" not in choice:
        return [f"the default is now the skip rate {choice['rate']:g}"]
    path = choice["path"]
    where = f"({path['engine']}, {path['precision']}, {path['threads']} threads, this machine)"
    if not choice["met"]:
        return [
            f"the request cannot be met: {choice['reason']} {where}",
            "fallback: the full model, every layer is kept unless a budget is given",
        ]
    if choice["rate"] == FULL:
        return [f"the full model is the default: {choice['reason']} {where}"]
    return [f"the default is now the skip rate {choice['rate']:g}, {choice['reason']} {where}"]
