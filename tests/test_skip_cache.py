"""SkipCache against a dictionary of tensors, and its books."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlm import SkipCache, SkipPlan
from tiny_models import tiny_config

HEADS, HEAD_DIM, NUM_LAYERS = 2, 8, 6


class Reference:
    """The same operations on `{(layer, sequence): [H, T, D]}`, windows applied when reading."""

    def __init__(self, windows):
        self.windows = windows
        self.tokens: list[dict[int, torch.Tensor]] = []  # one dict a sequence: layer -> tokens
        self.length = 0

    def append(self, layer, rows, states):
        for b, state in zip(rows, states, strict=True):
            old = self.tokens[b].get(layer, state[:, :0])
            self.tokens[b][layer] = torch.cat([old, state], 1)

    def visible(self, layer, rows, length_before):
        window = self.windows[layer]
        start = 0 if window is None else max(length_before - window + 1, 0)
        return torch.stack([self.tokens[b][layer][:, start:] for b in rows])


def filled_cache(family="llama", batch=3, tokens=5, mask=None, seed=0):
    """A cache after one routed pass of `tokens` tokens, and its reference."""
    cache = SkipCache(tiny_config(family))
    generator = torch.Generator().manual_seed(seed)
    if mask is None:
        mask = torch.rand(batch, NUM_LAYERS, generator=generator) < 0.6
        mask[:, 0] = True
    cache.set_plans(mask, batch)
    reference = Reference([layer.sliding_window for layer in cache.layers])
    reference.tokens = [{} for _ in range(batch)]
    append(cache, reference, tokens, generator)
    return cache, reference


def append(cache, reference, count, generator):
    """Append `count` tokens to every kept pair and compare what attention would see."""
    before = cache.get_seq_length()
    for layer in range(NUM_LAYERS):
        rows = cache.kept_rows(layer).tolist()
        if not rows:
            continue
        shape = (len(rows), HEADS, count, HEAD_DIM)
        keys = torch.randn(shape, generator=generator)
        seen_keys, seen_values = cache.update(keys, -keys, layer)
        reference.append(layer, rows, keys)
        expected = reference.visible(layer, rows, before)
        assert torch.equal(seen_keys, expected) and torch.equal(seen_values, -expected)
    reference.length = before + count
    assert cache.get_seq_length() == reference.length


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 20)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=6)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("crop"), st.integers(0, 8)),
        st.tuples(st.just("drop"), st.integers(1, NUM_LAYERS - 1)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(operations, st.sampled_from(["llama", "mistral", "gemma2"]), st.integers(0, 1000))
def test_any_sequence_of_operations_equals_a_dictionary_of_tensors(steps, family, seed):
    generator = torch.Generator().manual_seed(seed)
    cache, reference = filled_cache(family, seed=seed)
    for name, value in steps:
        batch = cache.batch_size
        if name == "append":
            append(cache, reference, value, generator)
        elif name == "select":
            index = torch.tensor(value) % batch
            cache.reorder_cache(index)
            reference.tokens = [dict(reference.tokens[b]) for b in index.tolist()]
        elif name == "repeat" and batch * value <= 12:
            cache.batch_repeat_interleave(value)
            reference.tokens = [dict(row) for row in reference.tokens for _ in range(value)]
        elif name == "drop":
            keep = torch.rand(batch, generator=generator) < 0.5
            cache.keep_rows(value, keep)
            for b in torch.nonzero(~keep).flatten().tolist():
                reference.tokens[b].pop(value, None)
        elif name == "crop" and value < reference.length:
            target = reference.length - value
            try:
                cache.crop(-value)
            except RuntimeError as error:
                assert "sliding window" in str(error)
                continue
            for row in reference.tokens:
                row.update({layer: states[:, :target] for layer, states in row.items()})
            reference.length = target
        kept = [sorted(row) for row in reference.tokens]
        assert [list(plan.kept) for plan in cache.skip_plans] == kept
    append(cache, reference, 3, generator)


def test_capacity_grows_geometrically_and_a_window_bounds_it():
    cache, _ = filled_cache("mistral", batch=1, tokens=1, mask=torch.ones(1, NUM_LAYERS))
    full, _ = filled_cache("llama", batch=1, tokens=1, mask=torch.ones(1, NUM_LAYERS))
    sizes = {id(cache): set(), id(full): set()}
    state = torch.randn(1, HEADS, 1, HEAD_DIM)
    for _ in range(300):
        for kind in (cache, full):
            for layer in range(NUM_LAYERS):
                kind.update(state, state, layer)
            sizes[id(kind)].add(kind.memory()["allocated"])
    assert len(sizes[id(full)]) < 12, "storage was copied more often than geometric growth needs"
    token = 2 * HEADS * HEAD_DIM * 4 * NUM_LAYERS
    assert cache.memory()["allocated"] <= 4 * 8 * token
    assert full.memory()["allocated"] <= 2 * 301 * token


def test_memory_counts_kept_pairs_and_what_a_full_cache_would_hold():
    mask = torch.zeros(2, NUM_LAYERS, dtype=torch.bool)
    mask[0, [0, 1]], mask[1, [0, 2, 3]] = True, True
    cache, _ = filled_cache("llama", batch=2, tokens=7, mask=mask)
    pair = 2 * HEADS * HEAD_DIM * 4 * 7
    assert cache.memory()["bytes"] == 5 * pair
    assert cache.memory()["full"] == 2 * NUM_LAYERS * pair
    assert cache.layers[4].keys is None and cache.get_seq_length(4) == 7


def test_the_logical_length_does_not_depend_on_the_layer():
    mask = torch.zeros(1, NUM_LAYERS, dtype=torch.bool)
    mask[0, 3] = True
    cache, _ = filled_cache("llama", batch=1, tokens=5, mask=mask)
    assert [cache.get_seq_length(layer) for layer in range(NUM_LAYERS)] == [5] * NUM_LAYERS
    assert {cache.get_mask_sizes(2, layer) for layer in range(NUM_LAYERS)} == {(7, 0)}


def test_misuse_raises_and_changes_nothing():
    cache, reference = filled_cache("mistral", batch=2, tokens=5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):  # token by token, so that the window moves on
        append(cache, reference, 1, generator)
    before = cache.memory()
    with pytest.raises(ValueError, match="minus the number of tokens"):
        cache.crop(3)
    with pytest.raises(ValueError, match="at most 45"):
        cache.crop(-46)
    with pytest.raises(RuntimeError, match="sliding window"):
        cache.crop(-40)
    with pytest.raises(IndexError, match="row indices"):
        cache.batch_select_indices(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="cannot be kept later"):
        cache.set_plans(SkipPlan.full(NUM_LAYERS), 2)
    with pytest.raises(ValueError, match="holds 2 rows"):
        state = torch.zeros(3, HEADS, 1, HEAD_DIM)
        cache.update(state, state, 0)
    assert cache.memory() == before and cache.get_seq_length() == 45
    append(cache, reference, 1, torch.Generator().manual_seed(2))


def test_reset_forgets_tokens_and_plans():
    cache, _ = filled_cache()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.skip_plans is None and cache.batch_size == -1
    assert cache.memory() == {"bytes": 0, "allocated": 0, "full": 0}


def test_a_mask_of_rows_selects_them():
    cache, reference = filled_cache(batch=3)
    plans = cache.skip_plans
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert cache.skip_plans == [plans[0], plans[2]]
    reference.tokens = [reference.tokens[0], reference.tokens[2]]
    append(cache, reference, 2, torch.Generator().manual_seed(3))
