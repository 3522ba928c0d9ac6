"""Plans searched by measuring them, and routers that start from them."""

from __future__ import annotations

import itertools

import pytest
import torch

from firstlm import RouterConfig
from firstlm.plan_search import (
    PlanLoss,
    _clearly_less,
    fit_routers,
    search_plan,
    search_task_plans,
    swap,
)
from firstlm.scoring import score
from tiny_models import NUM_LAYERS, routed_model
from tiny_training import COLLATOR, examples


def model_without(protected=(0,), **config):
    router = RouterConfig(protected=list(protected), keep_bias=0.0, **config)
    return routed_model("llama", router=router)


def loss_of(model, groups, **options):
    return PlanLoss(model, groups, {task: 1.0 for task in groups}, COLLATOR, **options)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_no_swap_improves_the_plan_that_the_search_finds(by_tokens):
    model, rows = model_without(), examples(6)
    loss = loss_of(model, {"all": rows}, by_tokens=by_tokens)
    plan, value = search_plan(loss, 1 / 3, trials=200, seed=0)
    assert plan[0] and plan.count(False) == 2
    found = score(model, rows, COLLATOR, keep_mask=torch.tensor(plan))
    expected = found.loss if by_tokens else found.loss / found.tokens
    assert value == pytest.approx(float(expected.sum()))
    free = range(1, NUM_LAYERS)
    for back, out in itertools.product(free, free):
        if not plan[back] and plan[out]:
            swapped = list(plan)
            swapped[back], swapped[out] = True, False
            assert loss(swapped) >= value - 1e-9


@pytest.mark.parametrize("trade", [0, 1, 2])
def test_tasks_leave_the_common_plan_only_where_the_mixture_gains(trade):
    model = model_without()
    loss = loss_of(model, {"a": examples(4, seed=1), "b": examples(4, seed=2)})
    common, before = search_plan(loss, 1 / 3, trials=30, seed=0)
    plans = search_task_plans(loss, common, trials=30, seed=0, trade=trade)
    assert plans.keys() == loss.groups.keys()
    skipped = [plan.count(False) for plan in plans.values()]
    assert sum(skipped) == 2 * common.count(False)
    assert all(abs(count - common.count(False)) <= trade for count in skipped)
    assert all(plan[0] and any(plan) for plan in plans.values())
    assert sum(float(loss.of_task(task, plan).sum()) for task, plan in plans.items()) <= before
    assert search_task_plans(loss, common, trials=30, seed=0, trade=trade) == plans


def test_a_task_does_not_leave_the_common_plan_for_a_gain_within_noise():
    old = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    assert _clearly_less({"a": torch.tensor([0.9, 1.9, 2.9, 3.9])}, old)  # all gain alike
    assert not _clearly_less({"a": torch.tensor([0.0, 3.0, 2.0, 4.0])}, old)  # one in four decides


def test_fitted_routers_say_the_plans_they_were_fitted_to():
    model, rows = model_without(protected=()), examples(12, seed=3)
    plans = torch.ones(12, NUM_LAYERS, dtype=torch.bool)
    plans[:, 1] = False
    plans[::2, 3] = False
    plans[1::2, 4] = False
    fit_routers(model, rows, COLLATOR, plans, margin=3.0)
    assert torch.equal(score(model, rows, COLLATOR).keep_mask, plans)
    decided = [i for i in range(NUM_LAYERS) if i not in (3, 4)]
    for layer in decided:
        assert not model.decoder_layers[layer].router.weight.any()
    assert model.decoder_layers[3].router.weight.any()


def test_mlp_heads_are_refused():
    model = model_without(head="mlp")
    with pytest.raises(ValueError, match="linear"):
        fit_routers(model, examples(2), COLLATOR, torch.ones(2, NUM_LAYERS) > 0, margin=1.0)


def test_a_swap_needs_no_second_layer_that_may_go():
    """Of two free layers one is skipped: the kept one is the only candidate, and has no spread."""
    cost = torch.tensor([torch.inf, 0.3, 0.1, torch.inf])
    generator = torch.Generator().manual_seed(0)
    assert swap([True, True, False, True], cost, generator) == [True, False, True, True]
