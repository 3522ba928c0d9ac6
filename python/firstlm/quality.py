"""How good a skipping model is beside the full one, on the same examples.

Every metric is a ratio of sums, of one (value, weight) an example: those of answers have weight 1,
losses have the number of answer tokens. Letters: N examples.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from firstlm.measure import rouge_l

Scored = tuple[float, float]  # value, weight
TextScorer = Callable[[Sequence[str], Sequence[str]], list[float]]  # answers, references

_RESAMPLES = 2000


def exact_match(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where the answer is the reference, but for white space around it."""
    return [
        float(answer.strip() == reference.strip())
        for answer, reference in zip(answers, references, strict=True)
    ]


def chrf(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """sacrebleu's chrF of every answer, 0-100.

    Of German, whose words differ in their endings, it says more than ROUGE-L.
    """
    from sacrebleu.metrics import CHRF

    scorer = CHRF()
    return [
        scorer.sentence_score(answer, [reference]).score
        for answer, reference in zip(answers, references, strict=True)
    ]


# Metrics of generated answers; those without a scorer are of the reference's tokens.
METRICS: dict[str, TextScorer | None] = {
    "rouge_l": rouge_l,
    "exact_match": exact_match,
    "chrf": chrf,
    "cross_entropy": None,
    "perplexity": None,
}


def has_sacrebleu() -> bool:
    """Whether BLEU and chrF can be computed: they need the extra `firstlm[eval]`."""
    return importlib.util.find_spec("sacrebleu") is not None


def check_metric(name: str) -> None:
    """Refuse a metric that cannot be measured.

    Raises:
        ValueError: it is none of METRICS, or its package is not installed.
    """
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    if name == "chrf" and not has_sacrebleu():
        raise ValueError("metric chrf needs sacrebleu: pip install 'firstlm[eval]'")


@dataclass(frozen=True)
class Quality:
    """A metric of a skipping model and its share of the full model's.

    Attributes:
        metric: its name.
        value, full: of the two models.
        relative: value / full where more is better, full / value where less is: 1 is as good.
        ci95: of `relative`, from a paired bootstrap over examples; None where `full` may be 0.
        n: examples.
    """

    metric: str
    value: float
    full: float
    relative: float
    ci95: tuple[float, float] | None
    n: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**vars(self), "ci95": None if self.ci95 is None else list(self.ci95)}


def compare(metric: str, scored: Sequence[Scored], full: Sequence[Scored], seed: int) -> Quality:
    """The quality of a skipping model.

    Args:
        scored, full: N examples, in the same order.
        seed: of the bootstrap.

    Raises:
        ValueError: the full model's value is 0, so that no share of it can be kept.
    """
    own, whole = np.asarray(scored, dtype=float), np.asarray(full, dtype=float)  # [N, 2]
    value, full_value = _value(metric, own.sum(0)), _value(metric, whole.sum(0))
    if full_value == 0:
        raise ValueError(
            f"the full model's {metric} is 0 on these {len(whole)} examples, so that no share of "
            "it can be asked for: choose another metric"
        )
    draws = np.random.default_rng(seed).integers(0, len(own), (_RESAMPLES, len(own)))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = _value(metric, own[draws].sum(1).T), _value(metric, whole[draws].sum(1).T)
        ratios = _relative(metric, *values)
    ci95 = None
    if np.isfinite(ratios).all():
        low, high = np.percentile(ratios, [2.5, 97.5])
        ci95 = float(low), float(high)
    relative = float(_relative(metric, value, full_value))
    return Quality(metric, float(value), float(full_value), relative, ci95, len(own))


def _value(metric: str, sums: Any) -> Any:
    """Of (sum of values, sum of weights)."""
    mean = sums[0] / sums[1]
    return np.exp(np.minimum(mean, math.log(1e300))) if metric == "perplexity" else mean


def _relative(metric: str, value: Any, full: Any) -> Any:
    return value / full if METRICS[metric] is not None else full / value
