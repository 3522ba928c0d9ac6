"""Plans searched by measuring them, and routers that start from them."""

from __future__ import annotations

import itertools

import pytest
import torch

from firstlm import RouterConfig
from firstlm.plan_search import fit_routers, search_plan, search_task_plans
from firstlm.scoring import score
from tiny_models import NUM_LAYERS, routed_model
from tiny_training import COLLATOR, examples


def model_without(protected=(0,), **config):
    router = RouterConfig(protected=list(protected), keep_bias=0.0, **config)
    return routed_model("llama", router=router)


def cross_entropy(model, rows, keep):
    mask = torch.tensor(keep)
    return score(model, rows, COLLATOR, keep_mask=mask).cross_entropy


def test_no_swap_improves_the_plan_that_the_search_finds():
    model, rows = model_without(), examples(6)
    plan, value = search_plan(model, rows, COLLATOR, 1 / 3, trials=200, seed=0)
    assert plan[0] and plan.count(False) == 2
    assert value == pytest.approx(cross_entropy(model, rows, plan))
    free = range(1, NUM_LAYERS)
    for back, out in itertools.product(free, free):
        if not plan[back] and plan[out]:
            swapped = list(plan)
            swapped[back], swapped[out] = True, False
            assert cross_entropy(model, rows, swapped) >= value - 1e-9


def test_tasks_leave_the_common_plan_only_where_the_mixture_gains():
    model = model_without()
    groups = {"a": examples(4, seed=1), "b": examples(4, seed=2)}
    common, plans = search_task_plans(
        model, groups, {"a": 1.0, "b": 1.0}, COLLATOR, 1 / 3, trials=30, seed=0
    )
    assert plans.keys() == groups.keys()
    assert sum(plan.count(False) for plan in plans.values()) == 2 * common.count(False)
    assert all(plan[0] and any(plan) for plan in plans.values())

    def loss(chosen):
        found = [
            score(model, rows, COLLATOR, keep_mask=torch.tensor(chosen[task]))
            for task, rows in groups.items()
        ]
        return sum(float((scores.loss / scores.tokens).sum()) for scores in found)

    assert loss(plans) <= loss({task: common for task in groups})
    again = search_task_plans(
        model, groups, {"a": 1.0, "b": 1.0}, COLLATOR, 1 / 3, trials=30, seed=0
    )
    assert again == (common, plans)


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
