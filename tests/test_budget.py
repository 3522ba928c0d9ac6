"""budget.py and rate_control.py: thresholds that skip what was asked."""

from __future__ import annotations

import pytest
import torch

from firstlm import RouterConfig
from firstlm.budget import (
    calibrate_thresholds,
    keep_probabilities,
    rate_key,
    skip_rate_of,
)
from firstlm.rate_control import (
    Multiplier,
    Ramp,
    ThresholdFollower,
    keep_logits,
    split_value,
)
from firstlm.skip_plan import keep_mask_of
from tiny_models import prompts, routed_model

LAYERS = 6


def some_prompts(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 15, (count,), generator=generator).tolist()
    return [p.tolist() for p in prompts(lengths, seed=seed)]


def achieved(model, thresholds, held_out) -> float:
    model.set_thresholds(thresholds)
    plans = [model.plan(input_ids=torch.tensor([p])).skip_plans[0] for p in held_out]
    return sum(plan.skip_rate for plan in plans) / len(plans)


@pytest.mark.parametrize("prefill", ["route", "full"])
def test_asked_rates_hold_on_held_out_prompts(prefill):
    model = routed_model("llama", torch.float64, RouterConfig(protected=[0], prefill=prefill))
    rates = [0.1, 0.25, 0.4, 0.6]
    found = calibrate_thresholds(model, some_prompts(160, 1), rates)
    assert list(found) == ["0.10", "0.25", "0.40", "0.60"]
    held_out = some_prompts(120, 2)
    for rate in rates:
        assert achieved(model, found[rate_key(rate)], held_out) == pytest.approx(rate, abs=0.03)


def test_calibration_leaves_the_model_as_it_was_and_is_repeatable():
    model = routed_model("llama", torch.float64)
    before = list(model.router_config.thresholds)
    model.train()
    a = calibrate_thresholds(model, some_prompts(20, 1), [0.3])
    assert model.training and model.router_config.thresholds == before
    assert a == calibrate_thresholds(model, some_prompts(20, 1), [0.3])


def test_rate_zero_keeps_every_layer():
    model = routed_model("llama", torch.float64)
    found = calibrate_thresholds(model, some_prompts(8, 1), [0.0])
    assert achieved(model, found["0.00"], some_prompts(8, 2)) == 0.0


def test_routers_without_weights_split_between_layers_to_come_near():
    """All prompts alike: a shared shift jumps from no layer to all of them."""
    model = routed_model("llama", torch.float64, RouterConfig(protected=[0]), draw=False)
    held_out = some_prompts(10, 2)
    for rate, expected in ((0.17, 1 / 6), (0.35, 2 / 6), (0.5, 3 / 6)):
        found = calibrate_thresholds(model, some_prompts(10, 1), [rate])
        assert achieved(model, found[rate_key(rate)], held_out) == pytest.approx(expected)


def test_rates_that_protected_layers_forbid_are_refused():
    model = routed_model("llama", torch.float64, RouterConfig(protected=[0, 1, -1]))
    with pytest.raises(ValueError, match=r"0\.6 cannot be reached.*at most 0\.500"):
        calibrate_thresholds(model, some_prompts(4, 1), [0.6])
    with pytest.raises(ValueError, match="cannot be reached"):
        calibrate_thresholds(model, some_prompts(4, 1), [1.0])


def test_keep_probabilities_do_not_depend_on_batching_or_order():
    model = routed_model("llama", torch.float64)
    some = some_prompts(9, 3)
    whole = keep_probabilities(model, some, batch_size=9)
    for batch_size in (1, 4):
        torch.testing.assert_close(keep_probabilities(model, some, batch_size), whole)
    reverse = keep_probabilities(model, some[::-1], batch_size=4)
    torch.testing.assert_close(reverse.flip(0), whole)
    with pytest.raises(ValueError, match="empty"):
        keep_probabilities(model, [])


def test_keep_mask_is_the_models_own_decision():
    model = routed_model("llama", torch.float64)
    some = some_prompts(7, 4)
    mask = keep_mask_of(keep_probabilities(model, some), model.router_config.thresholds, [0])
    for row, prompt in zip(mask, some, strict=True):
        plan = model.plan(input_ids=torch.tensor([prompt])).skip_plans[0]
        assert plan.kept == tuple(row.nonzero().flatten().tolist())
    assert skip_rate_of(mask) == pytest.approx(1 - mask.float().mean().item())


def test_rate_keys_have_two_decimals_or_more():
    keys = [rate_key(r) for r in (0.1, 0.25, 0.3, 0.333, 0.0, 0.26666)]
    assert keys == ["0.10", "0.25", "0.30", "0.333", "0.00", "0.2667"]


def test_split_value_cuts_off_the_asked_share():
    values = torch.tensor([3.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    assert split_value(values, 0.5) == 2.5
    assert split_value(values, 0.0) < 1.0
    assert split_value(values, 1.0) > 4.0
    tied = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0], dtype=torch.float64)
    assert split_value(tied, 0.4) == 1.5
    assert split_value(tied, 0.6) == 2.5


def test_ramp_rises_to_its_end_and_stays():
    ramp = Ramp(0.1, 0.5, 0.5, 8)
    assert [round(ramp(s), 3) for s in (0, 2, 4, 7)] == [0.1, 0.3, 0.5, 0.5]
    assert Ramp(0.0, 0.3, 0.0, 10)(0) == 0.3


def test_multiplier_rises_while_too_little_is_skipped_and_stays_in_bounds():
    multiplier = Multiplier(0.0, 2.0, -1.0, 1.0)
    multiplier.step(asked=0.3, achieved=0.1)
    assert multiplier.alpha == pytest.approx(0.4)
    for _ in range(9):
        multiplier.step(0.3, 0.9)
    assert multiplier.alpha == -1.0
    fixed = Multiplier(0.7, 0.0)
    fixed.step(0.3, 0.0)
    assert fixed.alpha == 0.7


def drifting(step: int, rows: int = 8) -> torch.Tensor:
    """keep_prob [rows, L] of routers whose scores rise step by step, as in our trial."""
    generator = torch.Generator().manual_seed(step)
    spread = torch.arange(LAYERS, dtype=torch.float32) * 0.5
    return torch.sigmoid(torch.randn(rows, LAYERS, generator=generator) + spread + 0.02 * step)


@pytest.mark.parametrize("mode", ["shared", "per_layer"])
def test_thresholds_follow_scores_that_drift(mode):
    share = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    asked = 1 - sum(share) / LAYERS
    follower = ThresholdFollower(mode, [0.5] * LAYERS, [0], 32, share)
    rates, kept = [], []
    for step in range(60):
        thresholds = torch.tensor(follower.thresholds, dtype=torch.float32)
        mask = drifting(step) >= thresholds
        mask[:, 0] = True
        rates.append(1 - mask.float().mean().item())
        kept.append(mask.float().mean(0))
        follower.step(drifting(step), asked)
    assert sum(rates[20:]) / 40 == pytest.approx(asked, abs=0.03)
    if mode == "per_layer":
        torch.testing.assert_close(
            torch.stack(kept[20:]).mean(0), torch.tensor(share), atol=0.08, rtol=0
        )
    assert follower.thresholds[0] == 0.5  # protected: left alone


def test_a_follower_waits_until_it_has_seen_enough_and_none_never_moves():
    follower = ThresholdFollower("shared", [0.5] * LAYERS, [0], 64)
    assert follower.step(drifting(0), 0.3) == [0.5] * LAYERS
    assert follower.step(drifting(1), 0.3) != [0.5] * LAYERS
    still = ThresholdFollower("none", [0.5] * LAYERS, [0], 8)
    for step in range(5):
        assert still.step(drifting(step), 0.3) == [0.5] * LAYERS


def test_a_follower_goes_on_from_its_state():
    a = ThresholdFollower("shared", [0.5] * LAYERS, [0], 16)
    for step in range(5):
        a.step(drifting(step), 0.3)
    b = ThresholdFollower("shared", [0.4] * LAYERS, [0], 16)
    b.load_state_dict(a.state_dict())
    assert a.step(drifting(9), 0.3) == b.step(drifting(9), 0.3)


def test_wrong_modes_are_refused():
    with pytest.raises(ValueError, match="none, shared or per_layer"):
        ThresholdFollower("each", [0.5], [], 8)
    with pytest.raises(ValueError, match="keep_share"):
        ThresholdFollower("per_layer", [0.5], [], 8)


def test_keep_logits_stay_finite_at_both_ends():
    logits = keep_logits(torch.tensor([0.0, 0.5, 1.0]))
    assert torch.isfinite(logits).all() and logits[1] == 0.0 and logits.dtype == torch.float64
