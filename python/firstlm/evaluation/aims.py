"""What FiRST aimed at, and whether the measurement says that it got there.

An aim is reached, or missed, only where the whole 95 % interval says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from firstlm.budget import nearest_rate

Row = Mapping[str, Any]

# What FiRST should keep of LoRA-only's ROUGE-L when it skips this share of the layers.
QUALITY_AIMS = {0.25: 0.98, 0.35: 0.95, 0.5: 0.90}
TPOT_AIMS = {0.5: 0.35}  # by how much decoding a token should take less time
ACHIEVED_AIM = 0.95  # of the ideal speedup
TOO_FAST = "more than the bytes that it reads account for"


def judge(low: float, high: float, aim: float) -> str:
    """Of a 95 % interval."""
    if low >= aim:
        return "reached"
    return "MISSED" if high < aim else "not decided"


def aim_of(aims: Mapping[float, float], row: Row) -> tuple[float, float] | None:
    """(rate, aim) of the known rate that is nearest to a row's; None where it is more than half a
    layer away."""
    rate = nearest_rate(aims, row["skip_rate_asked"], row["num_layers"])
    return None if rate is None else (rate, aims[rate])


def quality_kept(row: Row) -> list[str]:
    """What is left of LoRA-only's ROUGE-L."""
    entry = row["vs"].get("lora_only-trained", {}).get("rouge_l", {})
    if "share" not in entry:
        return []
    low, high = entry["share_ci95"]
    sentence = f"It keeps {entry['share']:.1%} [{low:.1%}, {high:.1%}] of LoRA-only's ROUGE-L"
    if (found := aim_of(QUALITY_AIMS, row)) is not None:
        rate, aim = found
        sentence += f"; the aim of {aim:.0%} (for {rate:.0%} skipped) is {judge(low, high, aim)}"
    return [sentence + "."]


def time_change(row: Row) -> tuple[float, Literal["less", "more"]]:
    """By what share a token of a timed row takes less, or more, time than with all layers."""
    saved = 1 - 1 / row["speedup"]
    return abs(saved), "less" if saved >= 0 else "more"


def achieved(row: Row) -> tuple[float, float]:
    """95 % interval of measured over ideal speedup; the ideal is counted, not measured."""
    low, high = row["speedup_ci95"]
    return low / row["ideal_speedup"], high / row["ideal_speedup"]


def too_fast(row: Row) -> bool:
    """Whether a timed row is faster than its bytes allow by more than its interval."""
    return achieved(row)[0] > 1


def speed(row: Row) -> list[str]:
    """How much faster it decodes, and of what the bytes allow."""
    timing = row["timing"]
    if timing is None:
        return ["Decoding was not timed."]
    change, word = time_change(row)
    low, high = achieved(row)
    seeds = f" × {timing['seeds']} seeds" if timing["seeds"] > 1 else ""
    sentence = (
        f"Measured in the {timing['engine']} engine ({timing['precision']}, {timing['threads']} "
        f"threads, {timing['prompts']} prompts × {timing['repeats']} repeats{seeds}), a token "
        f"takes {change:.1%} {word} time than with all layers: {row['speedup']:.2f}× of the ideal "
        f"{row['ideal_speedup']:.2f}× ({row['achieved_ratio']:.0%} [{low:.0%}, {high:.0%}])"
    )
    aims = []
    if (found := aim_of(TPOT_AIMS, row)) is not None:
        rate, aim = found
        ends = [1 - 1 / end for end in row["speedup_ci95"]]
        aims.append(f"{aim:.0%} less (for {rate:.0%} skipped) is {judge(ends[0], ends[1], aim)}")
    aims.append(f"{ACHIEVED_AIM:.0%} of the ideal is {judge(low, high, ACHIEVED_AIM)}")
    sentences = [f"{sentence}; of the aims, {' and '.join(aims)}."]
    if too_fast(row):
        sentences.append(
            f"That is {TOO_FAST}: the ideal knows no caches, which fewer layers fit better; where "
            "they cannot explain it, the machine was disturbed."
        )
    return sentences
