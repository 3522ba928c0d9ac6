"""Static plans of an asked size, and what they are measured by."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firstlm import RouterConfig
from firstlm.controls import importance_plan, layers_to_drop, plan_by_position
from firstlm.layer_importance import measure_block_influence
from tiny_models import NUM_LAYERS, routed_model
from tiny_training import COLLATOR, examples

RULES = ["uniform", "first", "last", "random:0", "random:7"]


@st.composite
def sizes(draw):
    """(layers, protected, skip rate) that leave room for the rate."""
    num_layers = draw(st.integers(1, 40))
    protected = draw(st.sets(st.integers(0, num_layers - 1), max_size=num_layers))
    dropped = draw(st.integers(0, num_layers - len(protected)))
    return num_layers, sorted(protected), dropped / num_layers


@given(sizes(), st.sampled_from(RULES))
def test_a_plan_has_the_asked_size_and_keeps_protected_layers(size, rule):
    num_layers, protected, rate = size
    plan = plan_by_position(rule, num_layers, rate, protected)
    assert len(plan) == num_layers
    assert plan.count(False) == round(rate * num_layers) == layers_to_drop(rate, *size[:2])
    assert all(plan[layer] for layer in protected)
    assert plan_by_position(rule, num_layers, rate, protected) == plan


@given(sizes(), st.data())
def test_measured_values_make_plans_of_the_same_size(size, data):
    num_layers, protected, rate = size
    values = data.draw(st.lists(st.floats(-1, 2), min_size=num_layers, max_size=num_layers))
    plan = importance_plan(values, rate, protected)
    assert plan.count(False) == round(rate * num_layers)
    assert all(plan[layer] for layer in protected)
    free = [i for i in range(num_layers) if i not in protected]
    kept = [values[i] for i in free if plan[i]]
    dropped = [values[i] for i in free if not plan[i]]
    assert not kept or not dropped or max(dropped) <= min(kept)


def dropped(rule, num_layers=12, rate=1 / 3, protected=(0, 11)):
    return [
        i for i, kept in enumerate(plan_by_position(rule, num_layers, rate, protected)) if not kept
    ]


def test_where_each_rule_drops():
    assert dropped("uniform") == [2, 4, 7, 9]
    assert dropped("first") == [1, 2, 3, 4]
    assert dropped("last") == [7, 8, 9, 10]
    assert dropped("random:1") != dropped("random:2")
    assert plan_by_position("importance", 12, 1 / 3, []) is None


def test_random_plans_drop_every_free_layer_equally_often():
    draws = [dropped(f"random:{seed}", 6, 1 / 3, (0,)) for seed in range(1000)]
    counts = [sum(i in draw for draw in draws) for i in range(6)]
    assert counts[0] == 0
    assert all(abs(count - 400) < 5 * (1000 * 0.4 * 0.6) ** 0.5 for count in counts[1:])


@torch.no_grad()
def layer_states(model, ids):
    """What enters each layer of an unskipped pass and what leaves the last, before its norm."""
    states = [model.get_input_embeddings()(ids)[0]]
    hooks = [
        layer.register_forward_hook(lambda module, args, output: states.append(output[0]))
        for layer in model.decoder_layers
    ]
    full = torch.ones(1, NUM_LAYERS, dtype=torch.bool)
    model(ids, skip_plan=full, use_cache=False, prompt_mask=torch.ones_like(ids) > 0)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("prefill", ["route", "full"])
def test_block_influence_is_the_turn_of_the_hidden_state(prefill):
    model = routed_model("llama", router=RouterConfig(protected=[0], prefill=prefill))
    rows = examples(7, seed=5)
    done = []
    found = measure_block_influence(model, rows, COLLATOR, batch_size=3, progress=done.append)
    assert sum(done) == 7
    turns = [[] for _ in range(NUM_LAYERS)]
    for row in rows:  # one at a time, so that there is no padding
        states = layer_states(model, torch.tensor([row["input_ids"]]))
        for layer in range(NUM_LAYERS):
            x, y = states[layer], states[layer + 1]
            turns[layer] += (1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).tolist()
    assert found == pytest.approx([sum(turn) / len(turn) for turn in turns], abs=1e-9)
    assert min(found) > 0
