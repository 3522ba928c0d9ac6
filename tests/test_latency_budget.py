"""The choice of a rate from measurements, and quality beside the full model."""

from __future__ import annotations

import math

import pytest

from firstlm.latency_budget import FULL, Decision, Request, decide
from firstlm.quality import METRICS, Quality, compare

# The full model takes 10 ms; 0.4 is slower than 0.3 here, as may happen.
TPOT = {FULL: [9.0, 10.0, 30.0], 0.2: [8.0, 8.0, 8.0], 0.3: [6.0, 6.0, 6.0],
        0.4: [6.5, 6.5, 6.5], 0.5: [5.0, 5.0, 5.0]}  # fmt: skip
QUALITY = {0.2: 1.01, 0.3: 0.97, 0.4: 0.985, 0.5: 0.8}


def choose(asked: dict[float, float] | None = None, **request: object) -> tuple[Decision, list]:
    looked_at: list[float] = []

    def quality(rate: float) -> Quality:
        looked_at.append(rate)
        return Quality("rouge_l", QUALITY[rate], 1.0, (asked or QUALITY)[rate], None, 10)

    return decide(Request(**request), TPOT, quality), looked_at


def test_with_a_floor_the_fastest_that_holds_it_is_taken() -> None:
    decision, looked_at = choose(tpot_reduction=0.3, min_quality=0.98)
    assert (decision.rate, decision.met) == (0.4, True)
    assert looked_at == [0.5, 0.3, 0.4]  # by time, and no further than needed
    assert "98.5% of rouge_l" in decision.reason and "35.0% less" in decision.reason
    assert choose(min_quality=0.96)[0].rate == 0.3
    assert choose(tpot_ms=5.0, min_quality=0.8)[0].rate == 0.5


def test_a_floor_within_the_interval_is_called_not_certain() -> None:
    def quality(rate: float) -> Quality:
        return Quality("rouge_l", 0.9, 1.0, 0.9, (0.85, 0.95), 10)

    reasons = [decide(Request(min_quality=q), TPOT, quality).reason for q in (0.88, 0.84)]
    assert "not certain: its 95 % interval begins at 85.0%" in reasons[0]
    assert "not certain" not in reasons[1]


def test_a_rate_that_is_slower_than_the_full_model_is_no_choice() -> None:
    def quality(rate: float) -> Quality:
        return Quality("rouge_l", 1.0, 1.0, 1.0, None, 10)

    tpot = {FULL: [10.0], 0.2: [10.4], 0.3: [10.2]}
    decision = decide(Request(min_quality=0.9), tpot, quality)
    assert (decision.rate, decision.met) == (FULL, False)
    assert "the fastest is 0.3: TPOT 10.2 ms, 2.0% more" in decision.reason


def test_without_a_floor_no_more_is_skipped_than_needed() -> None:
    decision, looked_at = choose(tpot_reduction=0.3)
    assert (decision.rate, decision.met, looked_at) == (0.3, True, [])
    assert choose(tpot_ms=8.0)[0].rate == 0.2
    assert choose(tpot_ms=5.5, metric="rouge_l")[1] == [0.5]


def test_the_full_model_is_the_fallback_and_says_why() -> None:
    decision, _ = choose(tpot_reduction=0.45, min_quality=0.98)
    assert (decision.rate, decision.met) == (FULL, False)
    assert "keeps 98.0% of rouge_l; the best is 0.5 with 80.0%" in decision.reason
    slow, looked_at = choose(tpot_reduction=0.9, min_quality=0.5)
    assert (slow.rate, slow.met, looked_at) == (FULL, False, [])
    assert "the fastest is 0.5: TPOT 5 ms, 50.0% less" in slow.reason
    assert choose(tpot_ms=1.0)[0] == Decision(
        FULL, False, "no calibrated rate is fast enough; the fastest is 0.5: TPOT 5 ms, 50.0% less",
        {},
    )  # fmt: skip
    nothing_holds, looked_at = choose(dict.fromkeys(QUALITY, 0.5), min_quality=0.9)
    assert (nothing_holds.rate, nothing_holds.met) == (FULL, False)
    assert sorted(looked_at) == sorted(QUALITY)
    assert nothing_holds.reason.startswith("no rate (0.2, 0.3, 0.4, 0.5) keeps")


def test_a_limit_that_the_full_model_keeps_is_met_by_it() -> None:
    assert choose(tpot_ms=10.0)[0].rate == FULL and choose(tpot_ms=10.0)[0].met
    low = choose(dict.fromkeys(QUALITY, 0.5), tpot_ms=12, min_quality=0.9)[0]
    assert (low.rate, low.met) == (FULL, True) and "the full model is: TPOT 10 ms" in low.reason
    assert choose(tpot_ms=12, min_quality=0.98)[0].rate == 0.4  # faster, and good enough


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"tpot_ms": 5, "tpot_reduction": 0.3}, "give one"),
        ({"tpot_ms": 0}, "above 0"),
        ({"tpot_reduction": 30}, "between 0 and 1"),
        ({"min_quality": 98}, "at most 1"),
        ({"min_quality": 0.9, "metric": "rouge"}, "metric must be one of rouge_l"),
        ({"metric": "rouge_l"}, "metric needs"),
    ],
)
def test_requests_that_mean_nothing_are_refused(request_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**request_)


def test_quality_is_1_where_both_are_alike_and_falls_with_losses() -> None:
    full = [(0.5, 1), (0.25, 1), (0.75, 1)]
    same = compare("rouge_l", full, full, seed=0)
    assert same.relative == 1 and same.ci95 == (1.0, 1.0) and same.n == 3
    half = compare("rouge_l", [(v / 2, w) for v, w in full], full, seed=0)
    assert half.relative == 0.5 and half.value == 0.25 and half.ci95 == pytest.approx((0.5, 0.5))
    # Losses are summed over tokens: 6 / 4 tokens against 4 / 4.
    loss = compare("cross_entropy", [(4.0, 3), (2.0, 1)], [(3.0, 3), (1.0, 1)], seed=0)
    assert (loss.value, loss.full, loss.relative) == (1.5, 1.0, pytest.approx(2 / 3))
    perplexity = compare("perplexity", [(4.0, 3), (2.0, 1)], [(3.0, 3), (1.0, 1)], seed=0)
    assert perplexity.value == pytest.approx(math.exp(1.5))
    assert perplexity.relative == pytest.approx(math.exp(-0.5))


def test_chrf_is_sacrebleus_and_asked_for_only_where_that_is(monkeypatch) -> None:
    scores = METRICS["chrf"](["ein Paket", "nichts"], ["ein Paket", "eine Bibliothek"])
    assert scores[0] == pytest.approx(100) and 0 < scores[1] < 20
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs sacrebleu: pip install"):
        Request(min_quality=0.9, metric="chrf")


def test_the_interval_is_paired_and_holds_the_estimate() -> None:
    full = [(float(i % 7), 1) for i in range(40)]
    own = [(0.9 * v + 0.1 * (i % 3), w) for i, (v, w) in enumerate(full)]
    found = compare("rouge_l", own, full, seed=1)
    assert found.ci95[0] < found.relative < found.ci95[1] < 1.05
    assert found == compare("rouge_l", own, full, seed=1)


def test_a_full_model_that_scores_0_gives_no_share() -> None:
    with pytest.raises(ValueError, match=r"exact_match is 0 on these 2 examples.*another metric"):
        compare("exact_match", [(0, 1), (1, 1)], [(0, 1), (0, 1)], seed=0)
    seldom = [(0, 1)] * 9 + [(1, 1)]
    assert compare("exact_match", seldom, seldom, seed=0).ci95 is None
