"""What the rows of an evaluation say, in sentences: also where FiRST loses.

"Better" and "worse" mean that the paired 95 % interval of the difference excludes 0, and p < 0.05.
All else is "no difference shown", which is not the same as "no difference".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from firstlm.evaluation import aims
from firstlm.evaluation.metrics import METRICS
from firstlm.evaluation.statistics import best_rows
from firstlm.evaluation.tables import answer_metric, control_title, difference, is_own, p_value

Row = Mapping[str, Any]
Entries = Mapping[str, Mapping[str, Any]]
Outcome = Literal["better", "worse", "even"]
Answer = Literal["yes", "partly", "no", "unknown"]

_STATIC = "static-trained"
_IN_TASK = "shuffled_in_task-first"
_LOSS = "cross_entropy"  # the other metric of a verdict is that of the answers
_LEVEL = 0.05
_HALF_A_LAYER = 0.5 + 1e-6  # rates are sums of float64
_SKIPPED = {"skip_rate": "by prompt", "skip_rate_by_token": "by answer token"}


@dataclass(frozen=True)
class Verdict:
    """Does adaptivity pay at a skip rate?

    Attributes:
        answer: "yes": by cross-entropy and by ROUGE-L or BLEU better than every rival that was
            trained for its plan, a static one among them, at the same skip rate, by the answers'
            metric worse than none, and better than under plans of other prompts; "no": any rival of
            the rate or other prompts' plans are better, or there is one plan only; "partly": better
            than the static one, with limits; else "unknown": what was measured does not show it.
        headline: the answer in a line.
        sentences: what it rests on.
    """

    rate: float
    row: Row
    answer: Answer
    headline: str
    sentences: list[str] = field(default_factory=list)


def outcome(entry: Mapping[str, Any], metric: str) -> Outcome:
    """Whether FiRST is better than a control: of one entry of its `vs`."""
    low, high = entry[metric]["ci95"]
    if low <= 0 <= high or entry[metric]["p"] >= _LEVEL:
        return "even"
    return "better" if (low > 0) == METRICS[metric].more_is_better else "worse"


def rivals(row: Row, rows: Sequence[Row]) -> dict[str, Mapping[str, Any]]:
    """Entries of FiRST's `vs` at its own rate, without the shuffled plans."""
    keys = _of_rate(row, rows).keys()
    found = {key: entry for key, entry in row["vs"].items() if key in keys}
    return {key: entry for key, entry in found.items() if not key.startswith("shuffled")}


def shuffled(row: Row) -> dict[str, Mapping[str, Any]]:
    """Entries of FiRST's `vs`: its own weights under plans of other prompts."""
    return {
        key: entry
        for key, entry in row["vs"].items()
        if key.startswith("shuffled") and key.endswith("-first")
    }


def trained(entries: Entries) -> dict[str, Mapping[str, Any]]:
    """Those trained like FiRST, each for its own plan: the fair rivals."""
    return {key: entry for key, entry in entries.items() if key.endswith("-trained")}


def _of_rate(row: Row, rows: Sequence[Row]) -> dict[str, Row]:
    """The row of every method of the same asked rate, by its key in `vs`."""
    return {
        f"{r['method']}-{r['weights']}": r
        for r in best_rows(rows)
        if abs(r["skip_rate_asked"] - row["skip_rate_asked"]) < 1e-9
    }


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """One a skip rate of FiRST, lowest first."""
    firsts = [row for row in best_rows(rows) if is_own(row)]
    firsts.sort(key=lambda row: row["skip_rate_asked"])
    return [_verdict(row, rows) for row in firsts if row["skip_rate_asked"] > 0]


def _verdict(row: Row, rows: Sequence[Row]) -> Verdict:
    answer, headline = _refuted(row, rows) or _not_measured(row, rows) or _compared(row, rows)
    sentences = [
        *_against_rivals(row, rows),
        *_against_shuffled(row),
        *_plans(row, rows),
        *aims.quality_kept(row),
        *aims.speed(row),
    ]
    return Verdict(row["skip_rate_asked"], row, answer, headline, sentences)


def _refuted(row: Row, rows: Sequence[Row]) -> tuple[Answer, str] | None:
    """What was lost: no other result makes up for it."""
    if row["distinct_plans"] <= 1:
        return "no", "One plan serves all prompts: nothing is adaptive."
    if lost := _with_outcome(rivals(row, rows), _LOSS, "worse"):
        return "no", f"Beaten by {_with_differences(rivals(row, rows), _LOSS, lost)} nats/token."
    dealt = shuffled(row)
    if (worse := _with_outcome(dealt, _LOSS, "worse")) and not _fits(dealt):
        gain = difference(dealt[worse[0]][_LOSS], _LOSS)
        return "no", f"Plans of other prompts are better than its own: {gain} nats/token."
    return None


def _not_measured(row: Row, rows: Sequence[Row]) -> tuple[Answer, str] | None:
    """Without these no result shows that adaptivity pays."""
    against, dealt = trained(rivals(row, rows)), shuffled(row)
    if not against:
        return "unknown", (
            "No rival of this rate was trained for its plan, so it is not shown that FiRST is "
            "better than a rival that had the same chance."
        )
    if _STATIC not in against:
        return "unknown", (
            "No static plan of this rate was trained for, so it is not shown that a plan for each "
            "prompt is better than one for all."
        )
    if not dealt:
        return "unknown", (
            "No shuffled plans were measured, so it is not shown that plans fit their prompts."
        )
    if not _fits(dealt):
        costs = "; ".join(difference(e[_LOSS], _LOSS) for e in dealt.values())
        return "unknown", (
            "It is not shown that plans fit their prompts: no difference shown to plans of other "
            f"prompts, {costs} nats/token."
        )
    return None


def _compared(row: Row, rows: Sequence[Row]) -> tuple[Answer, str]:
    """Of rivals that did not beat FiRST, under plans that fit."""
    found = rivals(row, rows)
    against = trained(found)
    metric = answer_metric(row)
    beaten = _with_outcome(against, _LOSS, "better")
    even = _with_outcome(against, _LOSS, "even")
    if _STATIC not in beaten:  # better layers for all are no adaptivity
        better = (
            f" Better than {', '.join(control_title(key) for key in beaten)}." if beaten else ""
        )
        return (
            "unknown",
            f"No difference shown to {_with_differences(against, _LOSS, even)}.{better}",
        )
    limits = []
    if even:
        limits.append(f"no difference shown to {_with_differences(against, _LOSS, even)}")
    if alike := [
        key for key in _with_outcome(against, metric, "even") if not _better_by_bleu(against[key])
    ]:
        gains = _with_differences(against, metric, alike)
        limits.append(f"by {_short(metric)} no difference shown to {gains}")
    if worse := _with_outcome(found, metric, "worse"):
        limits.append(f"by {_short(metric)} WORSE than {_with_differences(found, metric, worse)}")
    if unequal := _unequal(row, rows, against):
        limits.append(f"not at the same skip rate: it skips {unequal}")
    which = f"all {len(against)}" if not even else f"{len(beaten)} of {len(against)}"
    better = f"By cross-entropy better than {which} trained rivals of its rate"
    if limits:
        return "partly", f"{better}, but {'; '.join(limits)}."
    return "yes", f"{better}, likewise by the answers, and {_what_plans_fit(row)}."


def _better_by_bleu(entry: Mapping[str, Any]) -> bool:
    """Whether FiRST is better than a control by BLEU, which serves where ROUGE-L shows nothing."""
    return "bleu" in entry and outcome(entry, "bleu") == "better"


def _with_outcome(entries: Entries, metric: str, wanted: Outcome) -> list[str]:
    return [key for key, entry in entries.items() if outcome(entry, metric) == wanted]


def _fits(dealt: Entries) -> bool:
    """Whether plans of other prompts lose, of any task or of the same."""
    return bool(_with_outcome(dealt, _LOSS, "better"))


def _what_plans_fit(row: Row) -> str:
    """How far the shuffled plans that were measured reach."""
    if len(row["tasks"]) == 1:
        return "plans fit their prompts"
    entry = shuffled(row).get(_IN_TASK)
    if entry is None:
        return "plans fit their tasks at least (within a task they were not shuffled)"
    if outcome(entry, _LOSS) == "better":
        return "plans fit their prompts, also within a task"
    value = difference(entry[_LOSS], _LOSS)
    return f"plans fit their tasks at least (within a task no gain is shown: {value})"


def _unequal(row: Row, rows: Sequence[Row], against: Entries) -> str:
    """By how many layers FiRST skips less or more than rivals, by over half of one."""
    others = _of_rate(row, rows)
    found = []
    for key in against:
        other = others[key]
        name = max(_SKIPPED, key=lambda name: abs(_layers_less(row, other, name)))
        by = _layers_less(row, other, name)
        if abs(by) > _HALF_A_LAYER:
            word = "less" if by > 0 else "more"
            found.append(
                f"{abs(by):.2f} layers {word} than {control_title(key)} "
                f"({row[name]:.1%} against {other[name]:.1%} {_SKIPPED[name]})"
            )
    return ", ".join(found)


def _layers_less(row: Row, other: Row, name: str) -> float:
    return row["num_layers"] * (other[name] - row[name])


def _with_differences(
    entries: Entries, metric: str, keys: Sequence[str] | None = None, *, short: bool = False
) -> str:
    """ "static plan + LoRA: -0.049 [-0.061, +0.037], …" """
    return ", ".join(
        f"{control_title(key, short=short)}: {difference(entries[key][metric], metric)}"
        for key in (entries if keys is None else keys)
    )


def _short(metric: str) -> str:
    """A metric's name without its unit."""
    return METRICS[metric].title.partition(",")[0].partition(" F1")[0].partition(" (")[0]


def _against_rivals(row: Row, rows: Sequence[Row]) -> list[str]:
    found = rivals(row, rows)
    if not found:
        return ["No control of this skip rate was measured, so nothing is said about rivals."]
    sentences = []
    for kind, weights in (
        ("trained for as many steps", "trained"),
        ("that run on FiRST's weights", "first"),
        ("that are not finetuned", "base"),
    ):
        entries = {key: entry for key, entry in found.items() if key.endswith(f"-{weights}")}
        for metric in (_LOSS, answer_metric(row)) if entries else ():
            sentences.append(
                f"By {_short(metric)}, of the controls {kind}: {_ranked(entries, metric)}."
            )
    sentences += _of_one_seed(row, rows)
    if not trained(found):
        sentences.append("No control of this rate was trained: what LoRA would heal is not known.")
    flips = [
        key
        for key in trained(found)
        if outcome(found[key], _LOSS) != outcome(found[key], "cross_entropy_by_prompt")
    ]
    if flips:
        each = _with_differences(found, "cross_entropy_by_prompt", flips)
        sentences.append(f"Where every prompt counts alike, not every token, this differs: {each}.")
    return sentences


def _of_one_seed(row: Row, rows: Sequence[Row]) -> list[str]:
    """FiRST's mean over its seeds is set against rivals of one: beside it, that seed's own pair."""
    if row["seed"] != "all":
        return []
    alone = {
        (r["seed"],): r
        for r in rows
        if is_own(r) and r["skip_rate_asked"] == row["skip_rate_asked"] and r["seed"] != "all"
    }
    others = _of_rate(row, rows)
    found: dict[tuple[int, ...], list[str]] = {}
    for key in trained(rivals(row, rows)):
        found.setdefault(tuple(others[key]["seeds"]), []).append(key)
    return [
        f"Of seed {seeds[0]} alone, the only one of these rivals, with intervals over prompts "
        f"only: {_with_differences(alone[seeds]['vs'], _LOSS, keys)}."
        for seeds, keys in found.items()
        if seeds in alone
    ]


def _ranked(entries: Entries, metric: str) -> str:
    """Which of controls of the same weights FiRST is better than, and which not, by how much."""
    parts = []
    if better := _with_outcome(entries, metric, "better"):
        names = ", ".join(control_title(key, short=True) for key in better)
        parts.append(f"better than {len(better)} of {len(entries)} ({names})")
    if even := _with_outcome(entries, metric, "even"):
        parts.append(
            f"no difference shown to {_with_differences(entries, metric, even, short=True)}"
        )
    if worse := _with_outcome(entries, metric, "worse"):
        parts.append(f"WORSE than {_with_differences(entries, metric, worse, short=True)}")
    return "; ".join(parts)


def _against_shuffled(row: Row) -> list[str]:
    dealt = shuffled(row)
    if not dealt:
        return ["Shuffled plans were not measured, so plans may or may not fit their prompts."]
    sentences = []
    for key, entry in dealt.items():
        value = entry[_LOSS]
        cost = (
            f"{difference(value, _LOSS)} nats/token, p {p_value(value['p'])}, with its "
            f"own plans ({entry['same_plans']:.0%} of the prompts got an equal one)"
        )
        where = " of the same task" if key == _IN_TASK else ""
        sentences.append(
            {
                "better": f"Plans dealt to wrong prompts{where} lose: {cost}.",
                "even": f"No difference shown to plans dealt to wrong prompts{where}: {cost}. So "
                "it is not shown that the choice of layers follows the prompt in a way that pays.",
                "worse": f"Plans dealt to wrong prompts{where} are BETTER than its own: {cost}.",
            }[outcome(entry, _LOSS)]
        )
        by_task = {task: part["vs"].get(key) for task, part in row["tasks"].items()}
        if len(by_task) > 1:
            parts = "; ".join(
                f"{task} {difference(e[_LOSS], _LOSS)}" for task, e in by_task.items() if e
            )
            sentences.append(f"The same by task: {parts}.")
    return sentences


def _plans(row: Row, rows: Sequence[Row]) -> list[str]:
    by_task = "; ".join(f"{t}: {p['distinct_plans']:.3g}" for t, p in row["tasks"].items())
    sentences = [
        f"{row['distinct_plans']:.3g} distinct plans over {row['n']} prompts ({by_task}); asked to "
        f"skip {row['skip_rate_asked']:.0%}, it skips {row['skip_rate']:.1%} by prompt and "
        f"{row['skip_rate_by_token']:.1%} by answer token."
    ]
    if unequal := _unequal(row, rows, {**rivals(row, rows), **shuffled(row)}):
        sentences.append(
            f"Not at the same skip rate: it skips {unequal}. A part of what lies between them is "
            "layers spent, not layers chosen."
        )
    return sentences
