"""What the rows of an evaluation say, in sentences: also where FiRST loses.

"Better" and "worse" mean that the paired 95 % interval of the difference excludes 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from firstlm.evaluation.metrics import METRICS
from firstlm.evaluation.statistics import best_rows
from firstlm.evaluation.tables import control_title, difference, is_own, p_value

Row = Mapping[str, Any]
Outcome = Literal["better", "worse", "even"]

# What FiRST should keep of LoRA-only's ROUGE-L when it skips this share of the layers.
QUALITY_AIMS = {0.25: 0.98, 0.35: 0.95, 0.5: 0.90}
TPOT_AIMS = {0.5: 0.35}  # by how much decoding a token should take less time
ACHIEVED_AIM = 0.95  # of the ideal speedup
_LORA_ONLY = "lora_only-trained"
_METRICS = ("cross_entropy", "rouge_l")


@dataclass(frozen=True)
class Verdict:
    """Does adaptivity pay at a skip rate?

    Attributes:
        answer: "yes": by cross-entropy better than every rival of the rate that was trained (than
            every one, where none was), and worse under other prompts' plans; "no": any rival is
            better, or other prompts' plans do as well; "partly": neither; "unknown": no rivals or
            no shuffled plans were measured.
        headline: the answer in a line.
        sentences: what it rests on.
    """

    rate: float
    row: Row
    answer: Literal["yes", "partly", "no", "unknown"]
    headline: str
    sentences: list[str] = field(default_factory=list)


def outcome(entry: Mapping[str, Any], metric: str) -> Outcome:
    """Whether FiRST is better than a control: of one entry of its `vs`."""
    low, high = entry[metric]["ci95"]
    if low <= 0 <= high:
        return "even"
    return "better" if (low > 0) == METRICS[metric].more_is_better else "worse"


def rivals(row: Row, rows: Sequence[Row]) -> dict[str, Mapping[str, Any]]:
    """Entries of FiRST's `vs` at its own rate, without the shuffled plans."""
    keys = {
        f"{r['method']}-{r['weights']}"
        for r in rows
        if abs(r["skip_rate_asked"] - row["skip_rate_asked"]) < 1e-9
    }
    found = {key: entry for key, entry in row["vs"].items() if key in keys}
    return {key: entry for key, entry in found.items() if not key.startswith("shuffled")}


def shuffled(row: Row) -> dict[str, Mapping[str, Any]]:
    """Entries of FiRST's `vs`: its own weights under plans of other prompts."""
    return {
        key: entry
        for key, entry in row["vs"].items()
        if key.startswith("shuffled") and key.endswith("-first")
    }


def trained(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Those trained like FiRST; all where none was."""
    return {k: v for k, v in entries.items() if k.endswith("-trained")} or dict(entries)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """One a skip rate of FiRST, lowest first."""
    firsts = [row for row in best_rows(rows) if is_own(row)]
    firsts.sort(key=lambda row: row["skip_rate_asked"])
    return [_verdict(row, rows) for row in firsts if row["skip_rate_asked"] > 0]


def _verdict(row: Row, rows: Sequence[Row]) -> Verdict:
    against = trained(rivals(row, rows))
    dealt_entries = shuffled(row)
    outcomes = {key: outcome(entry, "cross_entropy") for key, entry in against.items()}
    dealt = {key: outcome(entry, "cross_entropy") for key, entry in dealt_entries.items()}
    lost = [
        key
        for key, entry in rivals(row, rows).items()
        if outcome(entry, "cross_entropy") == "worse"
    ]
    beaten = sum(value == "better" for value in outcomes.values())
    answer: Literal["yes", "partly", "no", "unknown"]
    if row["distinct_plans"] <= 1:
        answer, headline = "no", "One plan serves all prompts: nothing is adaptive."
    elif dealt and "better" not in dealt.values():
        answer, headline = "no", "Plans of other prompts do as well: adaptivity is an illusion."
    elif lost:
        answer, headline = "no", f"Beaten by {_names(lost)}."
    elif not outcomes or not dealt:
        missing = "controls of this rate" if not outcomes else "shuffled plans"
        answer, headline = "unknown", f"No {missing} were measured."
    elif beaten == len(outcomes):
        answer = "yes"
        fit = "their prompts"
        if dealt.get("shuffled_in_task-first", "better") != "better":
            fit = "the task of a prompt, if not the prompt"
        headline = f"Better than all {beaten} rivals of its rate, and plans fit {fit}."
    else:
        answer = "partly"
        even = [key for key, value in outcomes.items() if value == "even"]
        headline = f"Better than {beaten} of {len(outcomes)} rivals, even with {_names(even)}."
    sentences = [
        *_against_rivals(row, rows),
        *_against_shuffled(row, dealt_entries),
        *_plans(row, rows),
        *_quality_kept(row),
        *_speed(row),
    ]
    return Verdict(row["skip_rate_asked"], row, answer, headline, sentences)


def _names(keys: Sequence[str]) -> str:
    return ", ".join(control_title(key) for key in keys)


def _against_rivals(row: Row, rows: Sequence[Row]) -> list[str]:
    found = rivals(row, rows)
    if not found:
        return ["No control of this skip rate was measured, so nothing is said about rivals."]
    sentences = []
    kinds = {
        kind: [key for key in found if key.endswith(f"-{weights}")]
        for kind, weights in (
            ("trained for as many steps", "trained"),
            ("that run on FiRST's weights", "first"),
            ("that are not finetuned", "base"),
        )
    }
    for kind, keys in kinds.items():
        for metric in _METRICS if keys else ():
            by_outcome: dict[str, list[str]] = {"better": [], "even": [], "worse": []}
            for key in keys:
                by_outcome[outcome(found[key], metric)].append(key)
            parts = []
            if better := by_outcome["better"]:
                parts.append(f"better than {len(better)} of {len(keys)} ({_names(better)})")
            if even := by_outcome["even"]:
                parts.append(f"not told apart from {_names(even)}")
            if worse := by_outcome["worse"]:
                losses = "; ".join(
                    f"{control_title(k)}: {difference(found[k][metric], metric)}" for k in worse
                )
                parts.append(f"WORSE than {losses}")
            name = METRICS[metric].title.partition(",")[0].partition(" F1")[0]
            sentences.append(f"By {name}, of the controls {kind}, it is " + ", ".join(parts) + ".")
    if not kinds["trained for as many steps"]:
        sentences.append("No control of this rate was trained: what LoRA would heal is not known.")
    flips = [
        key
        for key in trained(found)
        if outcome(found[key], "cross_entropy") != outcome(found[key], "cross_entropy_by_prompt")
    ]
    if flips:
        each = "; ".join(
            f"{control_title(k)}: {outcome(found[k], 'cross_entropy_by_prompt')}, "
            f"{difference(found[k]['cross_entropy_by_prompt'], 'cross_entropy')}"
            for k in flips
        )
        sentences.append(f"Where every prompt counts alike, not every token, this differs: {each}.")
    return sentences


def _against_shuffled(row: Row, dealt: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not dealt:
        return ["Shuffled plans were not measured, so plans may or may not fit their prompts."]
    sentences = []
    for key, entry in dealt.items():
        value = entry["cross_entropy"]
        cost = (
            f"{difference(value, 'cross_entropy')} nats/token, p {p_value(value['p'])}, with its "
            f"own plans ({entry['same_plans']:.0%} of the prompts got an equal one)"
        )
        within = key.startswith("shuffled_in_task")
        where = ", even within a task" if within else ""
        sentences.append(
            {
                "better": f"Plans dealt to the wrong prompts lose{where}: {cost}.",
                "even": f"Plans dealt to the wrong prompts do as well{where}: {cost}. So "
                + (
                    "within a task the choice of layers does not follow the prompt."
                    if within
                    else "the choice of layers does not follow the prompt in a way that pays."
                ),
                "worse": f"Plans dealt to the wrong prompts are BETTER than its own{where}: "
                f"{cost}.",
            }[outcome(entry, "cross_entropy")]
        )
        by_task = {task: part["vs"].get(key) for task, part in row["tasks"].items()}
        if len(by_task) > 1:
            parts = "; ".join(
                f"{task} {difference(e['cross_entropy'], 'cross_entropy')}"
                for task, e in by_task.items()
                if e
            )
            sentences.append(f"The same by task: {parts}.")
    return sentences


def _plans(row: Row, rows: Sequence[Row]) -> list[str]:
    layer = 1 / row["num_layers"]
    by_task = "; ".join(f"{t}: {p['distinct_plans']:.3g}" for t, p in row["tasks"].items())
    sentences = [
        f"{row['distinct_plans']:.3g} distinct plans over {row['n']} prompts ({by_task}); asked to "
        f"skip {row['skip_rate_asked']:.0%}, it skips {row['skip_rate']:.1%} by prompt and "
        f"{row['skip_rate_by_token']:.1%} by answer token."
    ]
    own = row["skip_rate_by_token"]
    unequal = [
        f"{control_title(key)} {r['skip_rate_by_token']:.1%}"
        for r in best_rows(rows)
        if (key := f"{r['method']}-{r['weights']}") in rivals(row, rows)
        and r["skip_rate_asked"] == row["skip_rate_asked"]
        and r["skip_rate_by_token"] - own > layer / 2
    ]
    if unequal:
        sentences.append(
            f"By answer token it skips less than {', '.join(unequal)}: a part of what it gains is "
            "layers spent, not layers chosen."
        )
    return sentences


def _quality_kept(row: Row) -> list[str]:
    entry = row["vs"].get(_LORA_ONLY, {}).get("rouge_l", {})
    if "share" not in entry:
        return []
    low, high = entry["share_ci95"]
    sentence = f"It keeps {entry['share']:.1%} [{low:.1%}, {high:.1%}] of LoRA-only's ROUGE-L"
    aim = QUALITY_AIMS.get(round(row["skip_rate_asked"], 4))
    if aim is not None:
        met = "reached" if entry["share"] >= aim else "MISSED"
        sentence += f"; the aim of {aim:.0%} is {met}"
    return [sentence + "."]


def time_change(row: Row) -> tuple[float, Literal["less", "more"]]:
    """By what share a token of a timed row takes less, or more, time than with all layers."""
    saved = 1 - 1 / row["speedup"]
    return abs(saved), "less" if saved >= 0 else "more"


def _speed(row: Row) -> list[str]:
    timing = row["timing"]
    if timing is None:
        return ["Decoding was not timed."]
    change, word = time_change(row)
    sentence = (
        f"Measured in the {timing['engine']} engine ({timing['precision']}, {timing['threads']} "
        f"threads, {timing['prompts']} prompts × {timing['repeats']} repeats), a token takes "
        f"{change:.1%} {word} time than with all layers: {row['speedup']:.2f}× of the ideal "
        f"{row['ideal_speedup']:.2f}× ({row['achieved_ratio']:.0%})"
    )
    aims = []
    if (aim := TPOT_AIMS.get(round(row["skip_rate_asked"], 4))) is not None:
        reached = 1 - 1 / row["speedup"] >= aim
        aims.append(f"{aim:.0%} less is {'reached' if reached else 'MISSED'}")
    met = "reached" if row["achieved_ratio"] >= ACHIEVED_AIM else "MISSED"
    aims.append(f"{ACHIEVED_AIM:.0%} of the ideal is {met}")
    return [f"{sentence}; of the aims, {' and '.join(aims)}."]
