"""Every metric of an evaluation as a function of statistics that are summed over examples.

So a metric of any sample of examples, say one of a bootstrap, costs one matrix product. Letters:
N examples, S statistics of a metric.

ROUGE is rouge-score's (stemmed; its tokenizer drops letters outside a-z and digits), BLEU and chrF
are sacrebleu's with its defaults, over all examples of a sample.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from firstlm.evaluation.records import ExampleResult
from firstlm.measure import rouge
from firstlm.quality import exact_match, has_sacrebleu

_BLEU_ORDER, _CHRF_ORDER, _CHRF_BETA = 4, 6, 2
_ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rouge_l": "rougeL"}


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        title: for tables and plots, with its unit or scale.
        more_is_better: otherwise less is.
        statistics: which of `sentence_statistics` it is made from.
        value: sums [..., S] -> [...].
    """

    title: str
    more_is_better: bool
    statistics: str
    value: Callable[[np.ndarray], np.ndarray]


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(_mean(sums), 600.0))


def _bleu(sums: np.ndarray) -> np.ndarray:
    """sacrebleu's corpus BLEU with exponential smoothing.

    Args:
        sums: [..., 10]: length of the answers, of the references, matches and totals of the orders.
    """
    ours, theirs = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + _BLEU_ORDER], sums[..., 2 + _BLEU_ORDER :]
    unmatched = np.cumsum(matches == 0, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(matches > 0, matches, 0.5**unmatched) / totals
        brevity = np.minimum(0.0, 1 - theirs / ours)
        score = 100 * np.exp(brevity + np.log(precisions).mean(-1))
    return np.where(matches.any(-1) & (totals > 0).all(-1), score, 0.0)


def _chrf(sums: np.ndarray) -> np.ndarray:
    """sacrebleu's corpus chrF.

    Args:
        sums: [..., 18]: n-grams of the answers, of the references, and matches, for every order.
    """
    ours, theirs, matches = np.moveaxis(sums.reshape(*sums.shape[:-1], _CHRF_ORDER, 3), -1, 0)
    counted = (ours > 0) & (theirs > 0)  # [..., order]
    orders = np.maximum(counted.sum(-1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(counted, matches / ours, 0).sum(-1) / orders
        recall = np.where(counted, matches / theirs, 0).sum(-1) / orders
        factor = _CHRF_BETA**2
        score = 100 * (1 + factor) * precision * recall / (factor * precision + recall)
    return np.where(precision + recall > 0, score, 0.0)


METRICS: dict[str, Metric] = {
    "cross_entropy": Metric("cross-entropy, nats/token", False, "loss", _mean),
    "cross_entropy_by_prompt": Metric(
        "cross-entropy, mean over prompts, nats/token", False, "loss_by_prompt", _mean
    ),
    "perplexity": Metric("perplexity", False, "loss", _perplexity),
    "rouge1": Metric("ROUGE-1 F1 (0-1)", True, "rouge1", _mean),
    "rouge2": Metric("ROUGE-2 F1 (0-1)", True, "rouge2", _mean),
    "rouge_l": Metric("ROUGE-L F1 (0-1)", True, "rouge_l", _mean),
    "bleu": Metric("BLEU (0-100)", True, "bleu", _bleu),
    "chrf": Metric("chrF (0-100)", True, "chrf", _chrf),
    "exact_match": Metric("exact match (0-1)", True, "exact_match", _mean),
    "token_f1": Metric("token F1 (0-1)", True, "token_f1", _mean),
}


def sentence_statistics(examples: Sequence[ExampleResult]) -> dict[str, np.ndarray]:
    """Statistics of N examples, [N, S] f64 each, under the names that METRICS uses.

    Those of "bleu" and "chrf" are absent where sacrebleu is not installed.
    """
    answers = [example.answer for example in examples]
    references = [example.reference for example in examples]
    loss = np.array([example.loss for example in examples], dtype=np.float64)
    tokens = np.array([example.tokens for example in examples], dtype=np.float64)
    found = {
        "loss": np.stack([loss, tokens], 1),
        "loss_by_prompt": _with_ones(loss / tokens),
        "exact_match": _with_ones(exact_match(answers, references)),
        "token_f1": _with_ones(list(map(token_f1, answers, references))),
    }
    scores = rouge(answers, references, list(_ROUGE.values()))
    found |= {name: _with_ones(scores[kind]) for name, kind in _ROUGE.items()}
    if has_sacrebleu():
        for name, metric in _sacrebleu(tuple(references)).items():
            counts = metric._extract_corpus_statistics(answers, None)
            found[name] = np.asarray(counts, dtype=np.float64)
    return found


@functools.lru_cache(maxsize=4)
def _sacrebleu(references: tuple[str, ...]) -> dict[str, Any]:
    """Its metrics with the n-grams of references, which all methods share."""
    from sacrebleu.metrics import BLEU, CHRF

    return {"bleu": BLEU(references=[references]), "chrf": CHRF(references=[references])}


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words that both have, as often as both have them; case does not count."""
    ours, theirs = (Counter(text.lower().split()) for text in (answer, reference))
    common = (ours & theirs).total()
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * common / (ours.total() + theirs.total())


def _with_ones(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """[N] -> [N, 2], whose sums have the mean as their ratio."""
    values = np.asarray(values, dtype=np.float64)
    return np.stack([values, np.ones_like(values)], 1)
