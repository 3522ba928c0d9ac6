"""Thresholds that make a trained model skip the share of layers that was asked.

Layer l is run before the scores of later layers exist, and with prefill="route" the states that
later routers read depend on which layers were skipped before. So thresholds cannot be read off one
pass: `calibrate_thresholds` searches for one shift of all threshold logits, with a routed prefill
of held-out prompts for every value that it tries.

Letters: N prompts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from firstlm.data import pad_prompts
from firstlm.rate_control import keep_logits, split_value, to_thresholds
from firstlm.skip_plan import keep_mask_of

_STRIDE = 1.37  # of logits, while one end is open; odd, so as not to land on a tie
DEFAULT_RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def rate_key(rate: float) -> str:
    """The key of a rate in RouterConfig.calibration: two decimals, more where it has more."""
    text = f"{rate:.4f}".rstrip("0")
    whole, _, decimals = text.partition(".")
    return f"{whole}.{decimals:0<2}"


@torch.no_grad()
def keep_probabilities(
    model: Any,
    prompts: Sequence[Sequence[int]],
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Keep probability of every layer for every prompt, under the model's own plans.

    Args:
        model: from firstlm.from_pretrained; its mode (train/eval) is restored afterwards.
        prompts: N lists of token ids.
        batch_size: prompts of like length are run together.
        progress: called with the number of prompts done since the last call.

    Returns:
        [N, L] f32 (f64 of a f64 model) on the CPU, in the order of `prompts`.
    """
    if not prompts:
        raise ValueError("prompts is empty: at least one prompt is needed")
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[torch.Tensor | None] = [None] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            chosen = by_length[start : start + batch_size]
            batch = pad_prompts([prompts[i] for i in chosen])
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            keep_prob = model.plan(**inputs).keep_prob
            for row, i in enumerate(chosen):
                found[i] = keep_prob[row].cpu()
            if progress is not None:
                progress(len(chosen))
    finally:
        model.train(was_training)
    return torch.stack([p for p in found if p is not None])


def keep_masks(
    model: Any,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """The model's own plans of N prompts, as a bool mask [N, L]; `progress` as above."""
    config = model.router_config
    keep_prob = keep_probabilities(model, prompts, progress=progress)
    return keep_mask_of(keep_prob, config.thresholds, config.protected)


def skip_rate_of(mask: torch.Tensor) -> float:
    """Skipped layers / all layers, of a keep mask [N, L]."""
    return 1.0 - mask.double().mean().item()


@dataclass
class _Trial:
    """One routed prefill of all prompts: thresholds tried, scores, what was skipped."""

    shift: float
    thresholds: list[float]  # [L]
    logits: torch.Tensor  # [N, L] f64
    rate: float


@dataclass
class _Search:
    """Trials along one line of thresholds: logit(threshold) = base + shift on the free layers."""

    run: Callable[[Sequence[float]], torch.Tensor]
    base: torch.Tensor  # [L] f64 logits
    free: list[int]
    protected: list[int]
    routed: bool
    trials: list[_Trial] = field(default_factory=list)

    def thresholds(self, shift: float | torch.Tensor) -> list[float]:
        logits = self.base.clone()
        logits[self.free] += shift
        return to_thresholds(logits)

    def _trial(self, shift: float, thresholds: list[float]) -> _Trial:
        if self.routed or not self.trials:
            keep_prob = self.run(thresholds)
            logits = keep_logits(keep_prob)
        else:  # unskipped states: the scores do not depend on the thresholds
            logits = self.trials[0].logits
            keep_prob = torch.sigmoid(logits)
        mask = keep_mask_of(keep_prob, thresholds, self.protected)
        return _Trial(shift, thresholds, logits, skip_rate_of(mask))

    def try_shift(self, shift: float) -> _Trial:
        trial = self._trial(shift, self.thresholds(shift))
        self.trials.append(trial)
        return trial

    def proposal(self, asked: float) -> float:
        """The shift that would give `asked` if the scores stayed those of the nearest trial."""
        nearest = min(self.trials, key=lambda t: abs(t.rate - asked))
        excess = nearest.logits[:, self.free] - self.base[self.free]
        return split_value(excess, asked * len(self.base) / len(self.free))

    def bracket(self, asked: float) -> tuple[_Trial | None, _Trial | None]:
        """Trials next to `asked`: the highest shift that skips less, the lowest that skips more."""
        under = [t for t in self.trials if t.rate < asked]
        over = [t for t in self.trials if t.rate >= asked]
        low = max(under, key=lambda t: t.shift, default=None)
        high = min(over, key=lambda t: t.shift, default=None)
        return low, high

    def split(self, asked: float, low: _Trial, high: _Trial, tolerance: float) -> _Trial:
        """Between two shifts that nothing lies between: some layers take one, the rest the other.

        Layers that the routers value least move first, so the order has a meaning and no noise.
        """
        value = (low.logits - self.base).mean(0)  # [L]
        order = sorted(self.free, key=lambda layer: (value[layer].item(), layer))
        best, few, many = low, 0, len(order)
        while many - few > 1:
            middle = (few + many) // 2
            thresholds = list(low.thresholds)
            for layer in order[:middle]:
                thresholds[layer] = high.thresholds[layer]
            trial = self._trial(low.shift, thresholds)
            best = min(best, trial, key=lambda t: abs(t.rate - asked))
            if abs(trial.rate - asked) <= tolerance:
                break
            few, many = (middle, many) if trial.rate < asked else (few, middle)
        return min(best, high, key=lambda t: abs(t.rate - asked))


def calibrate_thresholds(
    model: Any,
    prompts: Sequence[Sequence[int]],
    rates: Sequence[float] = DEFAULT_RATES,
    *,
    batch_size: int = 16,
    tolerance: float = 0.005,
    max_passes: int = 6,
    progress: Callable[[float, float], None] | None = None,
    found_one: Callable[[str, list[float]], None] | None = None,
    prompts_done: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Thresholds for every asked skip rate, found on `prompts`.

    The model's thresholds are the starting point and are left as they were; layers keep their
    differences, since all thresholds move by one shift of their logits.

    Args:
        model: from firstlm.from_pretrained.
        prompts: N lists of token ids, held out from training.
        rates: asked skip rates.
        batch_size: prompts per prefill.
        tolerance: a rate this close is good enough.
        max_passes: prefills of all prompts per rate, at most (the nearest trial is taken then).
        progress: called with (asked, achieved) after every rate.
        found_one: called with (rate_key(rate), thresholds) after every rate, to keep them.
        prompts_done: called with the number of prompts prefilled since the last call.

    Returns:
        {rate_key(rate): thresholds [L]}, for RouterConfig.calibration.

    Raises:
        ValueError: a rate outside [0, 1) or above what protected layers leave.
    """
    config = model.router_config
    num_layers = len(model.decoder_layers)
    protected = config.protected
    check_rates(rates, num_layers, protected, tolerance)
    before = list(config.thresholds)

    def run(thresholds: Sequence[float]) -> torch.Tensor:
        model.set_thresholds(list(thresholds))
        return keep_probabilities(model, prompts, batch_size, prompts_done)

    base = keep_logits(torch.tensor(before))
    free = [i for i in range(num_layers) if i not in protected]
    search = _Search(run, base, free, protected, routed=config.prefill == "route")
    found: dict[str, list[float]] = {}
    try:
        for rate in sorted(rates):
            trial = None if rate == 0 else _search_rate(search, rate, tolerance, max_passes)
            thresholds = [0.0] * num_layers if trial is None else list(trial.thresholds)
            for layer in protected:
                thresholds[layer] = before[layer]
            found[rate_key(rate)] = thresholds
            if found_one is not None:
                found_one(rate_key(rate), thresholds)
            if progress is not None:
                progress(rate, 0.0 if trial is None else trial.rate)
    finally:
        model.router_config = config
    return found


def check_rates(
    rates: Sequence[float], num_layers: int, protected: Sequence[int], tolerance: float = 0.005
) -> None:
    """Refuse skip rates that no thresholds can reach.

    Raises:
        ValueError: a rate outside [0, 1) or above what protected layers leave.
    """
    most = 1.0 - len(protected) / num_layers
    for rate in rates:
        if not 0.0 <= rate < 1.0 or (rate > 0 and rate > most + tolerance):
            raise ValueError(
                f"skip rate {rate} cannot be reached: {len(protected)} of {num_layers} layers are "
                f"protected, so at most {most:.3f} can be skipped"
            )


def nearest_rate(rates: Iterable[float], rate: float, num_layers: int) -> float | None:
    """The one of `rates` that means as many layers as `rate`, to half a layer; None: none does.

    Rates are named with three or four digits: 0.267 is 8 of 30 layers.
    """
    found = min(rates, key=lambda known: abs(known - rate), default=None)
    if found is None or (abs(found - rate) - 5e-4) * num_layers > 0.5:
        return None
    return found


def _search_rate(search: _Search, asked: float, tolerance: float, max_passes: int) -> _Trial:
    if not search.trials:
        search.try_shift(0.0)
    for shift in _shifts_to_try(search, asked, tolerance, max_passes):
        search.try_shift(shift)
    best = min(search.trials, key=lambda t: abs(t.rate - asked))
    low, high = search.bracket(asked)
    if abs(best.rate - asked) > tolerance and low is not None and high is not None:
        return search.split(asked, low, high, tolerance)
    return best


def _shifts_to_try(
    search: _Search, asked: float, tolerance: float, max_passes: int
) -> Iterator[float]:
    """Quantile proposals while they fall inside the bracket, halving otherwise."""
    for _ in range(max_passes):
        if min(abs(t.rate - asked) for t in search.trials) <= tolerance:
            return
        low, high = search.bracket(asked)
        shift = search.proposal(asked)
        inside = (low is None or shift > low.shift) and (high is None or shift < high.shift)
        if not inside or any(math.isclose(shift, t.shift, abs_tol=1e-9) for t in search.trials):
            if low is not None and high is not None:
                shift = (low.shift + high.shift) / 2
            else:
                end = low or high
                assert end is not None
                shift = end.shift + (_STRIDE if low is not None else -_STRIDE)
        if low is not None and high is not None and high.shift - low.shift < 1e-6:
            return
        yield shift
