"""Which calibrated skip rate satisfies a request for latency and quality, from measurements.

Of the rates that are fast enough and hold the floor of quality, the fastest is taken; where no
floor is asked, the one that skips least, so that no more quality is spent than the latency asks. If
there is none, every layer is kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from firstlm.quality import Quality, check_metric

FULL = 0.0  # the rate that stands for the full model


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        tpot_ms: time per output token, at most, in milliseconds.
        tpot_reduction: share of the full model's TPOT that is to go, at least.
        min_quality: share of the full model's quality that has to stay, at least.
        metric: of quality; None: rouge_l where there is a floor, else none is measured.
    """

    tpot_ms: float | None = None
    tpot_reduction: float | None = None
    min_quality: float | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.tpot_ms is not None and self.tpot_reduction is not None:
            raise ValueError("tpot_ms and tpot_reduction are two ways to ask: give one")
        if self.tpot_ms is not None and not self.tpot_ms > 0:
            raise ValueError(f"tpot_ms must be above 0, got {self.tpot_ms}")
        if self.tpot_reduction is not None and not 0 < self.tpot_reduction < 1:
            raise ValueError(f"tpot_reduction must lie between 0 and 1, got {self.tpot_reduction}")
        if self.min_quality is not None and not 0 < self.min_quality <= 1:
            raise ValueError(f"min_quality must be above 0, at most 1, got {self.min_quality}")
        if self.metric is not None:
            check_metric(self.metric)
            if not self.is_open():
                raise ValueError("metric needs tpot_ms, tpot_reduction or min_quality")

    def is_open(self) -> bool:
        """Whether anything was asked for."""
        return any(v is not None for v in (self.tpot_ms, self.tpot_reduction, self.min_quality))

    @property
    def limits_speed(self) -> bool:
        """Whether a TPOT can be too slow for it."""
        return self.tpot_ms is not None or self.tpot_reduction is not None

    @property
    def measured_metric(self) -> str | None:
        """The metric that has to be measured, if any."""
        return self.metric or ("rouge_l" if self.min_quality is not None else None)

    def to_json(self) -> dict[str, Any]:
        """What was asked."""
        values = {**vars(self), "metric": self.measured_metric}
        return {name: value for name, value in values.items() if value is not None}

    def is_fast_enough(self, tpot_ms: float, full_tpot_ms: float) -> bool:
        """Whether a TPOT satisfies it."""
        if self.tpot_ms is not None:
            return tpot_ms <= self.tpot_ms
        if self.tpot_reduction is not None:
            return 1 - tpot_ms / full_tpot_ms >= self.tpot_reduction
        return tpot_ms < full_tpot_ms  # a floor alone: skipping that saves nothing is no choice


@dataclass(frozen=True)
class Decision:
    """What was chosen.

    Attributes:
        rate: FULL: every layer is kept.
        met: whether the request is satisfied; if not, `rate` is FULL.
        reason: for the user.
        qualities: of the rates that were looked at.
    """

    rate: float
    met: bool
    reason: str
    qualities: dict[float, Quality]


def decide(
    request: Request,
    tpot_ms: Mapping[float, Sequence[float]],
    measure_quality: Callable[[float], Quality],
) -> Decision:
    """The choice.

    Args:
        tpot_ms: rate -> measured values, FULL among them.
        measure_quality: of a rate; called for no more rates than the choice needs.
    """
    median = {rate: statistics.median(values) for rate, values in tpot_ms.items()}
    full = median[FULL]
    skipping = [rate for rate in median if rate != FULL]
    fast = [rate for rate in skipping if request.is_fast_enough(median[rate], full)]
    qualities: dict[float, Quality] = {}

    def less(rate: float) -> str:
        saved = 1 - median[rate] / full
        return f"TPOT {median[rate]:.3g} ms, {abs(saved):.1%} {'less' if saved >= 0 else 'more'}"

    # The full model satisfies a limit in milliseconds that it keeps by itself.
    full_is_fast = request.tpot_ms is not None and full <= request.tpot_ms
    if request.min_quality is None:
        if full_is_fast:
            reason = f"the full model keeps the limit by itself: TPOT {full:.3g} ms"
            return Decision(FULL, True, reason, {})
        if fast:
            rate = min(fast)
            if request.metric is not None:
                qualities[rate] = measure_quality(rate)
            reason = f"the least skipping that is fast enough: {less(rate)}"
            return Decision(rate, True, reason, qualities)
    else:
        for rate in sorted(fast, key=lambda r: (median[r], r)):
            qualities[rate] = measure_quality(rate)
            if qualities[rate].relative >= request.min_quality:
                kept = f"{qualities[rate].relative:.1%} of {qualities[rate].metric}"
                reason = f"the fastest that holds the floor: {less(rate)}, at {kept}"
                interval = qualities[rate].ci95
                if interval is not None and interval[0] < request.min_quality:
                    reason += f" (not certain: its 95 % interval begins at {interval[0]:.1%})"
                return Decision(rate, True, reason, qualities)
    if not fast and not full_is_fast:
        best = min(skipping, key=lambda r: median[r])
        reason = f"no calibrated rate is fast enough; the fastest is {best:g}: {less(best)}"
        return Decision(FULL, False, reason, {})
    assert request.min_quality is not None
    reason = "no calibrated rate is fast enough"
    if qualities:
        best = max(qualities, key=lambda r: qualities[r].relative)
        rates = ", ".join(f"{rate:g}" for rate in sorted(qualities))
        which = "rate that is fast enough" if request.limits_speed else "rate"
        reason = (
            f"no {which} ({rates}) keeps {request.min_quality:.1%} of "
            f"{qualities[best].metric}; the best is {best:g} with {qualities[best].relative:.1%}"
        )
    if full_is_fast:
        return Decision(FULL, True, f"{reason}; the full model is: TPOT {full:.3g} ms", qualities)
    return Decision(FULL, False, reason, qualities)
