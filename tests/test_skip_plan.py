"""SkipPlan, keep masks, and the rules that make them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firstlm import SkipPlan
from firstlm.skip_plan import (
    exact_budget_mask,
    keep_decision,
    keep_mask_of,
    mask_to_plans,
    plans_to_mask,
)


@st.composite
def plans(draw, num_layers=None):
    size = num_layers or draw(st.integers(1, 40))
    kept = draw(st.sets(st.integers(0, size - 1), min_size=1))
    return SkipPlan(tuple(draw(st.permutations(sorted(kept)))), size)


@given(plans())
def test_a_plan_survives_json_pickle_mask_and_copy(plan):
    assert SkipPlan.from_json(plan.to_json()) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert SkipPlan.from_mask(plan.to_mask()) == plan
    assert copy.deepcopy(plan) == plan and hash(copy.copy(plan)) == hash(plan)


@given(plans())
def test_kept_and_skipped_partition_the_layers(plan):
    assert sorted(plan.kept + plan.skipped) == list(range(plan.num_layers))
    assert plan.skip_rate == pytest.approx(len(plan.skipped) / plan.num_layers)
    assert len(str(plan)) == plan.num_layers and str(plan).count("▮") == len(plan.kept)


def test_a_plan_is_immutable_hashable_and_printable():
    plan = SkipPlan((3, 0, 1), 4)
    assert plan.kept == (0, 1, 3) and plan == SkipPlan([0, 1, 3], 4)
    assert len({plan, SkipPlan((0, 1, 3), 4), SkipPlan((0, 1), 4)}) == 2
    assert str(plan) == "▮▮▯▮"
    assert "layer 2: skipped" in plan._repr_html_() and "3 of 4" in plan._repr_html_()
    with pytest.raises(AttributeError):
        plan.kept = (0,)


@pytest.mark.parametrize(
    ("kept", "num_layers", "says"),
    [((), 4, "at least one"), ((4,), 4, r"\[0, 4\)"), ((-1,), 4, r"\[0, 4\)"), ((1, 1), 4, "once")],
)
def test_an_impossible_plan_is_refused(kept, num_layers, says):
    with pytest.raises(ValueError, match=says):
        SkipPlan(kept, num_layers)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1}', '{"version": 9, "num_layers": 2, "kept": [0]}']
)
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match="skip plan"):
        SkipPlan.from_json(text)


@given(st.lists(plans(num_layers=7), min_size=1, max_size=5))
def test_masks_and_plans_are_the_same_thing(rows):
    mask = plans_to_mask(rows, len(rows), 7)
    assert mask_to_plans(mask) == rows
    assert torch.equal(plans_to_mask(mask, len(rows), 7), mask)


def test_a_keep_decision_includes_the_threshold():
    keep_prob = torch.tensor([0.49, 0.5, 0.51])
    assert keep_decision(keep_prob, 0.5, protected=False).tolist() == [False, True, True]
    assert keep_decision(keep_prob, 0.5, protected=True).all()


def test_decisions_of_all_layers_follow_the_one_rule_and_never_skip_everything():
    keep_prob = torch.tensor([[0.1, 0.6, 0.2], [0.1, 0.1, 0.1], [0.9, 0.3, 0.4]])
    mask = keep_mask_of(keep_prob, [0.5, 0.5, 0.3], protected=[])
    assert mask.tolist() == [[False, True, False], [False, False, True], [True, False, True]]
    assert keep_mask_of(keep_prob, [0.5] * 3, protected=[1])[:, 1].all()


@given(
    st.integers(1, 6),
    st.integers(2, 12),
    st.floats(0, 0.99),
    st.integers(0, 2**16),
    st.sets(st.integers(0, 1)),
)
def test_an_exact_budget_drops_the_lowest_unprotected_scores(
    rows, num_layers, rate, seed, protected
):
    keep_prob = torch.rand(rows, num_layers, generator=torch.Generator().manual_seed(seed))
    count = round(rate * num_layers)
    if count > num_layers - max(len(protected), 1):
        with pytest.raises(ValueError, match="may be skipped"):
            exact_budget_mask(keep_prob, rate, protected)
        return
    mask = exact_budget_mask(keep_prob, rate, protected)
    assert (~mask).sum(1).tolist() == [count] * rows
    assert mask[:, sorted(protected)].all()
    for kept, scores in zip(mask, keep_prob, strict=True):
        free = torch.tensor([i not in protected for i in range(num_layers)])
        if (~kept).any() and (kept & free).any():
            assert scores[~kept].max() <= scores[kept & free].min()
