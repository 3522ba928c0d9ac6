"""SkipCache against a dictionary of tensors, and its books."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.utils._python_dispatch import TorchDispatchMode

from firstlm import SkipCache, SkipPlan
from tiny_models import tiny_config

HEADS, HEAD_DIM, VALUE_DIM, NUM_LAYERS = 2, 8, 6, 6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Reference:
    """The same operations on `{layer: (keys, values)}`, one dictionary a sequence, `[H, T, D]` of
    all tokens; windows are applied when reading. Before the first pass there are no sequences."""

    def __init__(self, windows):
        self.windows = windows
        self.forget()

    def forget(self):
        self.tokens: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = []
        self.keep_prob: torch.Tensor | None = None
        self.length = 0

    def select(self, index):
        self.tokens = [dict(self.tokens[i]) for i in index]
        if self.keep_prob is not None:
            self.keep_prob = self.keep_prob[list(index)]

    def restrict(self, mask):
        for row, kept in zip(self.tokens, mask.tolist(), strict=True):
            for layer in [layer for layer in row if not kept[layer]]:
                del row[layer]

    def kept(self):
        mask = [[layer in row for layer in range(NUM_LAYERS)] for row in self.tokens]
        return torch.tensor(mask, dtype=torch.bool).reshape(-1, NUM_LAYERS)

    def rows(self, layer):
        return [b for b, row in enumerate(self.tokens) if layer in row]

    def start(self, layer, length):
        window = self.windows[layer]
        return 0 if window is None else max(length - window + 1, 0)

    def append(self, layer, keys, values):
        for b, key, value in zip(self.rows(layer), keys, values, strict=True):
            old_key, old_value = self.tokens[b][layer]
            self.tokens[b][layer] = (torch.cat([old_key, key], 1), torch.cat([old_value, value], 1))

    def seen(self, layer, length):
        """What the token after `length` tokens sees: keys and values `[R, H, T, D]`."""
        start = self.start(layer, length)
        held = [self.tokens[b][layer] for b in self.rows(layer)]
        return tuple(torch.stack([pair[i][:, start:] for pair in held]) for i in range(2))

    def memory(self, element_size):
        token = HEADS * (HEAD_DIM + VALUE_DIM) * element_size
        visible = [self.length - self.start(layer, self.length) for layer in range(NUM_LAYERS)]
        kept = [len(self.rows(layer)) for layer in range(NUM_LAYERS)]
        held = sum(count * rows for count, rows in zip(visible, kept, strict=True)) * token
        return held, sum(visible) * len(self.tokens) * token


class CacheMachine(RuleBasedStateMachine):
    """Any sequence of operations on a cache and on its reference."""

    @initialize(
        family=st.sampled_from(["llama", "mistral", "gemma2"]),
        window=st.sampled_from([1, 2, 7, 8]),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**16),
    )
    def begin(self, family, window, dtype, seed):
        overrides = {} if family == "llama" else {"sliding_window": window}
        self.cache = SkipCache(tiny_config(family, **overrides))
        self.reference = Reference([layer.sliding_window for layer in self.cache.layers])
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def draw_mask(self, *shape):
        return torch.rand(shape, generator=self.generator) < 0.6

    def draw_tokens(self, rows, count):
        shape = (rows, HEADS, count, HEAD_DIM + VALUE_DIM)
        states = torch.randn(shape, generator=self.generator).to(self.dtype)
        return states.split([HEAD_DIM, VALUE_DIM], -1)

    def start_batch(self, batch, fixed):
        """Sequences that keep all layers, or (`fixed`) have plans before the first token."""
        empty = torch.empty(HEADS, 0, HEAD_DIM + VALUE_DIM, dtype=self.dtype)
        pair = tuple(empty.split([HEAD_DIM, VALUE_DIM], -1))
        mask = torch.ones(batch, NUM_LAYERS, dtype=torch.bool)
        if fixed:
            mask = self.draw_mask(batch, NUM_LAYERS)
            mask[:, 0] = True
            self.cache.set_plans(mask, batch)
        self.reference.tokens = [
            {layer: pair for layer in range(NUM_LAYERS) if row[layer]} for row in mask.tolist()
        ]

    @rule(count=st.integers(1, 20), batch=st.integers(1, 4), fixed=st.booleans())
    def append(self, count, batch, fixed):
        cache, reference = self.cache, self.reference
        if not reference.tokens and cache.batch_size < 0:
            self.start_batch(batch, fixed)
        before = reference.length
        for layer in range(NUM_LAYERS):
            rows = reference.rows(layer)
            if not rows:
                continue
            keys, values = self.draw_tokens(len(rows), count)
            views = cache.update(keys, values, layer)
            reference.append(layer, keys, values)
            for view, expected in zip(views, reference.seen(layer, before), strict=True):
                assert torch.equal(view, expected)
            reference.length = before + count

    @precondition(lambda self: self.reference.tokens)
    @rule(layer=st.integers(0, NUM_LAYERS - 1))
    def keep_rows(self, layer):
        mask = self.reference.kept()
        keep = self.draw_mask(len(mask))
        self.cache.keep_rows(layer, keep)
        mask[:, layer] &= keep
        self.reference.restrict(mask)

    @precondition(lambda self: self.reference.kept().any(1).all())
    @rule()
    def set_plans(self):
        kept = self.reference.kept()
        mask = self.draw_mask(*kept.shape) & kept
        mask = torch.where(mask.any(1, keepdim=True), mask, kept)
        if len(mask):
            self.cache.set_plans(mask, len(mask))
            self.reference.restrict(mask)

    @precondition(lambda self: self.cache.batch_size >= 0)
    @rule()
    def set_keep_prob(self):
        shape = (self.cache.batch_size, NUM_LAYERS)
        self.cache.keep_prob = torch.rand(shape, generator=self.generator)
        self.reference.keep_prob = self.cache.keep_prob.clone()

    @precondition(lambda self: self.reference.tokens)
    @rule(index=st.lists(st.integers(-4, 3), max_size=5), beams=st.booleans())
    def select(self, index, beams):
        batch = len(self.reference.tokens)
        index = [i % batch - batch * (i < 0) for i in index]
        call = self.cache.reorder_cache if beams else self.cache.batch_select_indices
        call(torch.tensor(index, dtype=torch.long))
        self.reference.select(index)

    @precondition(lambda self: self.reference.tokens)
    @rule()
    def select_by_mask(self):
        mask = self.draw_mask(len(self.reference.tokens))
        self.cache.batch_select_indices(mask)
        self.reference.select(mask.nonzero().flatten().tolist())

    @precondition(lambda self: len(self.reference.tokens) <= 4)
    @rule(repeats=st.integers(0, 3))
    def repeat(self, repeats):
        self.cache.batch_repeat_interleave(repeats)
        self.reference.select(
            [b for b in range(len(self.reference.tokens)) for _ in range(repeats)]
        )

    @rule(count=st.integers(0, 9))
    def crop(self, count):
        reference = self.reference
        count = min(count, reference.length)
        target = reference.length - count
        if count and target == 0:
            self.cache.crop(-count)
            reference.forget()
            return
        try:
            self.cache.crop(-count)
        except RuntimeError as error:
            assert "sliding window" in str(error) and any(reference.windows)
            return
        for row in reference.tokens:
            for layer, pair in row.items():
                row[layer] = tuple(states[:, :target] for states in pair)
        reference.length = target

    @rule()
    def reset(self):
        self.cache.reset()
        self.reference.forget()

    @rule(how=st.sampled_from([copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]))
    def copy(self, how):
        self.cache = how(self.cache)

    @invariant()
    def holds_what_the_reference_holds(self):
        cache, reference = self.cache, self.reference
        assert cache.get_seq_length() == reference.length
        if cache.batch_size >= 0:
            assert cache.batch_size == len(reference.tokens)
        for layer, held in enumerate(cache.layers):
            rows = reference.rows(layer)
            if cache.keep_mask is not None:
                assert cache.kept_rows(layer).tolist() == rows
            if rows and reference.length:
                expected = reference.seen(layer, reference.length)
                assert torch.equal(held.keys, expected[0])
                assert torch.equal(held.values, expected[1])
                assert held.keys.dtype == self.dtype and held.num_rows == len(rows)
            else:
                assert held.num_rows == 0

    @invariant()
    def books_are_those_of_the_reference(self):
        cache, reference = self.cache, self.reference
        memory = cache.memory()
        if reference.length:
            size = torch.empty(0, dtype=self.dtype).element_size()
            assert (memory["bytes"], memory["full"]) == reference.memory(size)
        assert memory["bytes"] <= memory["allocated"] and memory["bytes"] <= memory["full"]
        if cache.keep_mask is None:
            assert cache.skip_plans is None
        else:
            assert torch.equal(cache.keep_mask, reference.kept())
        if reference.keep_prob is not None:
            assert torch.equal(cache.keep_prob, reference.keep_prob)


def test_any_sequence_of_operations_equals_a_dictionary_of_tensors():
    budget = settings(max_examples=60, stateful_step_count=25)
    run_state_machine_as_test(CacheMachine, settings=budget)


def filled_cache(family="llama", batch=3, tokens=5, mask=None, seed=0):
    """A cache after one pass of `tokens` tokens under drawn plans, and its reference."""
    cache = SkipCache(tiny_config(family))
    generator = torch.Generator().manual_seed(seed)
    if mask is None:
        mask = torch.rand(batch, NUM_LAYERS, generator=generator) < 0.6
        mask[:, 0] = True
    cache.set_plans(mask, batch)
    append(cache, tokens, generator)
    return cache


def append(cache, count, generator):
    """Append `count` drawn tokens to every kept pair."""
    for layer in range(NUM_LAYERS):
        rows = len(cache.kept_rows(layer))
        if rows:
            states = torch.randn(rows, HEADS, count, HEAD_DIM, generator=generator)
            cache.update(states, -states, layer)


def snapshot(cache):
    """All that a cache shows, copied."""

    def cloned(tensor):
        return None if tensor is None else tensor.clone()

    layers = [
        (layer.length, layer.num_rows, cloned(layer.keys), cloned(layer.values))
        for layer in cache.layers
    ]
    rows = None if cache.keep_mask is None else [cache.kept_rows(i).tolist() for i in range(6)]
    books = (cache.memory(), cache.get_seq_length(), cache.batch_size, rows)
    return books, cloned(cache.keep_mask), cloned(cache.keep_prob), layers


def assert_same(one, other):
    """Snapshots are equal to the bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, (tuple, list)):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_capacity_grows_geometrically_and_a_window_bounds_it():
    sliding = filled_cache(
        "mistral", batch=1, tokens=1, mask=torch.ones(1, NUM_LAYERS, dtype=torch.bool)
    )
    full = filled_cache(
        "llama", batch=1, tokens=1, mask=torch.ones(1, NUM_LAYERS, dtype=torch.bool)
    )
    sizes = {id(sliding): set(), id(full): set()}
    for _ in range(300):
        for cache in (sliding, full):
            append(cache, 1, torch.Generator())
            sizes[id(cache)].add(cache.memory()["allocated"])
    assert len(sizes[id(full)]) < 12, "storage was copied more often than geometric growth needs"
    token = 2 * HEADS * HEAD_DIM * 4 * NUM_LAYERS
    assert sliding.memory()["allocated"] <= 4 * 8 * token
    append(sliding, 500, torch.Generator())  # as a long prompt
    append(sliding, 1, torch.Generator())
    assert sliding.memory()["allocated"] <= 4 * 8 * token
    assert full.memory()["allocated"] <= 2 * 301 * token


def test_memory_counts_kept_pairs_and_what_a_full_cache_would_hold():
    mask = torch.zeros(2, NUM_LAYERS, dtype=torch.bool)
    mask[0, [0, 1]], mask[1, [0, 2, 3]] = True, True
    cache = filled_cache("llama", batch=2, tokens=7, mask=mask)
    pair = 2 * HEADS * HEAD_DIM * 4 * 7
    assert cache.memory()["bytes"] == 5 * pair
    assert cache.memory()["full"] == 2 * NUM_LAYERS * pair
    assert cache.layers[4].keys is None and cache.get_seq_length(4) == 7


def test_a_freed_row_gives_its_memory_back():
    cache = filled_cache(mask=torch.ones(3, NUM_LAYERS, dtype=torch.bool))
    before = cache.memory()
    for layer in range(1, NUM_LAYERS):
        cache.keep_rows(layer, torch.tensor([True, False, False]))
    share = (3 + (NUM_LAYERS - 1)) / (3 * NUM_LAYERS)
    after = cache.memory()
    assert after["bytes"] == round(share * before["bytes"])
    assert after["allocated"] == round(share * before["allocated"])
    assert after["full"] == before["full"] == before["bytes"]


def test_the_logical_length_does_not_depend_on_the_layer():
    mask = torch.zeros(1, NUM_LAYERS, dtype=torch.bool)
    mask[0, 3] = True
    cache = filled_cache("llama", batch=1, tokens=5, mask=mask)
    assert [cache.get_seq_length(layer) for layer in range(NUM_LAYERS)] == [5] * NUM_LAYERS
    assert {cache.get_mask_sizes(2, layer) for layer in range(NUM_LAYERS)} == {(7, 0)}


def tokens(rows, heads=HEADS, count=1, head_dim=HEAD_DIM, **options):
    return torch.zeros(rows, heads, count, head_dim, **options)


MISUSE = {
    "crop forward": (lambda c: c.crop(3), ValueError, "minus the number of tokens"),
    "crop too far": (lambda c: c.crop(-46), ValueError, "at most 45"),
    "crop past the window": (lambda c: c.crop(-40), RuntimeError, "sliding window"),
    "a row that is not there": (
        lambda c: c.batch_select_indices(torch.tensor([0, 2])), IndexError, "row indices",
    ),
    "a beam that is not there": (
        lambda c: c.reorder_cache(torch.tensor([0, -3])), IndexError, "row indices",
    ),
    "a mask of other rows": (
        lambda c: c.batch_select_indices(torch.ones(3, dtype=torch.bool)), IndexError, r"\[2\]",
    ),
    "row indices with a fraction": (
        lambda c: c.reorder_cache(torch.tensor([0.5, 1.0])), ValueError, "integers",
    ),
    "negative repeats": (lambda c: c.batch_repeat_interleave(-1), ValueError, "repeats"),
    "a skipped layer kept": (
        lambda c: c.set_plans(SkipPlan.full(NUM_LAYERS), 2), ValueError, "cannot be kept later",
    ),
    "plans of other sequences": (
        lambda c: c.set_plans(SkipPlan((0,), NUM_LAYERS), 3), ValueError, "3 sequences",
    ),
    "a decision for other sequences": (
        lambda c: c.keep_rows(0, torch.tensor([True])), ValueError, "1 sequences",
    ),
    "a layer that is not there": (
        lambda c: c.keep_rows(NUM_LAYERS, torch.tensor([True, True])), IndexError, "layer is 6",
    ),
    "other rows": (lambda c: c.update(tokens(3), tokens(3), 0), ValueError, "holds 2 rows"),
    "rows of a layer without any": (
        lambda c: c.update(tokens(2), tokens(2), 5), ValueError, "holds 0 rows",
    ),
    "other heads": (
        lambda c: c.update(tokens(2, heads=1), tokens(2, heads=1), 0), ValueError, "2 of 8",
    ),
    "another head_dim": (
        lambda c: c.update(tokens(2), tokens(2, head_dim=9), 0), ValueError, "2 of 8",
    ),
    "more values than keys": (
        lambda c: c.update(tokens(2), tokens(2, count=2), 0), ValueError, "values have shape",
    ),
    "another device": (
        lambda c: c.update(tokens(2, device="meta"), tokens(2, device="meta"), 0), ValueError,
        "keys are on meta",
    ),
    "a gradient": (
        lambda c: c.update(tokens(2, requires_grad=True), tokens(2), 0), RuntimeError, "autograd",
    ),
    "reset of a layer": (lambda c: c.layers[0].reset(), RuntimeError, "reset together"),
    "reorder of a layer": (
        lambda c: c.layers[0].reorder_cache(torch.tensor([1, 0])), RuntimeError, "all layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_raises_and_changes_nothing(name):
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0]], dtype=torch.bool)
    cache = filled_cache("mistral", tokens=5, batch=2, mask=mask)
    cache.keep_prob = torch.rand(2, NUM_LAYERS)
    for _ in range(40):  # token by token, so that the window moves on
        append(cache, 1, torch.Generator())
    call, error, says = MISUSE[name]
    before = snapshot(cache)
    with pytest.raises(error, match=says):
        call(cache)
    assert_same(snapshot(cache), before)
    append(cache, 1, torch.Generator())
    assert cache.get_seq_length() == 46


def test_a_type_that_no_kernel_takes_leaves_the_cache_empty():
    cache = SkipCache(tiny_config("llama"))
    before = snapshot(cache)
    with pytest.raises(TypeError, match="float32"):
        cache.update(tokens(2, dtype=torch.int32), tokens(2, dtype=torch.int32), 0)
    assert_same(snapshot(cache), before)


class FailsAt(TorchDispatchMode):
    """Lets `count` operations pass, and fails the next one as a full memory would."""

    def __init__(self, count):
        super().__init__()
        self.left = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.left == 0:
            raise MemoryError("no memory is left")
        self.left -= 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    "operation",
    [
        lambda cache: cache.update(tokens(3, count=40), tokens(3, count=40), 0),
        lambda cache: cache.update(tokens(3), tokens(3), 0),
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.set_plans(SkipPlan((0,), NUM_LAYERS), 3),
        lambda cache: cache.keep_rows(0, torch.tensor([True, False, True])),
    ],
    ids=["grow", "append", "reorder", "repeat", "set_plans", "keep_rows"],
)
def test_an_operation_that_fails_half_way_changes_nothing(operation, family):
    cache = filled_cache(family, tokens=16, mask=torch.ones(3, NUM_LAYERS, dtype=torch.bool))
    append(cache, 8, torch.Generator())  # a sliding layer has no slot left
    cache.keep_prob = torch.rand(3, NUM_LAYERS)
    before = snapshot(cache)
    failures = 0
    while True:
        try:
            with FailsAt(failures):
                operation(cache)
            break
        except MemoryError:
            assert_same(snapshot(cache), before)
            failures += 1
    assert failures > 0, "no operation was made to fail"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_its_own_way(how):
    cache = filled_cache("gemma2", tokens=20)
    cache.keep_prob = torch.rand(3, NUM_LAYERS)
    before = snapshot(cache)
    other = how(cache)
    assert other.memory()["allocated"] == other.memory()["bytes"] == cache.memory()["bytes"]
    assert_same(snapshot(other)[1:], before[1:])
    append(other, 9, torch.Generator())
    other.reorder_cache(torch.tensor([1, 1, 0]))
    assert_same(snapshot(cache), before)
    assert [layer._storage is other._storage for layer in other.layers] == [True] * NUM_LAYERS


def test_beams_that_share_a_plan_change_places_without_new_lists(monkeypatch):
    cache = filled_cache(
        batch=4, mask=torch.tensor([[1, 0] * 3, [1, 0] * 3, [1] * 6, [1] * 6]).bool()
    )
    lists = [cache.kept_rows(layer) for layer in range(NUM_LAYERS)]
    cache.reorder_cache(torch.tensor([1, 0, 2, 2]))
    assert all(cache.kept_rows(layer) is own for layer, own in enumerate(lists))
    cache.reorder_cache(torch.tensor([2, 0, 1, -1]))
    expected = [torch.nonzero(kept).squeeze(1) for kept in cache.keep_mask.unbind(1)]
    for layer, rows in enumerate(expected):
        assert torch.equal(cache.kept_rows(layer), rows)


def test_storage_made_in_inference_mode_is_written_outside_it():
    cache = SkipCache(tiny_config("llama"))
    with torch.inference_mode():
        cache.set_plans(SkipPlan.full(NUM_LAYERS), 2)
        append(cache, 3, torch.Generator())
        cache.reorder_cache(torch.tensor([1, 0]))
    append(cache, 3, torch.Generator())
    assert cache.get_seq_length() == 6


def test_tokens_of_another_floating_type_are_converted():
    cache = filled_cache(batch=2, mask=torch.ones(2, NUM_LAYERS, dtype=torch.bool))
    keys, values = cache.update(tokens(2, dtype=torch.float64), tokens(2, dtype=torch.bfloat16), 0)
    assert keys.dtype == values.dtype == torch.float32 and keys.shape[2] == 6


def test_kept_rows_are_on_the_device_that_asks():
    cache = filled_cache()
    assert cache.kept_rows(0).device.type == "cpu"
    assert cache.kept_rows(0, "meta").device.type == "meta"
    assert cache.kept_rows(0) is cache.kept_rows(0, "cpu")


def test_rows_move_before_anything_was_decided():
    cache = SkipCache(tiny_config("llama"))
    states = torch.randn(2, HEADS, 3, HEAD_DIM)
    for layer in range(NUM_LAYERS):
        cache.update(states, -states, layer)
    assert cache.keep_mask is None and cache.batch_size == 2
    with pytest.raises(ValueError, match="holds 2 rows"):
        cache.update(tokens(1), tokens(1), 0)
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    assert torch.equal(cache.layers[3].keys, states[[1, 0, 1]])
    assert cache.skip_plans == [SkipPlan.full(NUM_LAYERS)] * 3


def test_reset_forgets_tokens_and_plans():
    cache = filled_cache()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.skip_plans is None and cache.batch_size == -1
    assert cache.memory() == {"bytes": 0, "allocated": 0, "full": 0}


def test_cropping_nothing_keeps_the_plans_of_an_empty_cache():
    cache = SkipCache(tiny_config("llama"))
    cache.set_plans(SkipPlan((0, 2), NUM_LAYERS), 1)
    cache.crop(0)
    assert cache.skip_plans == [SkipPlan((0, 2), NUM_LAYERS)]


def test_storage_lies_where_the_tokens_are():
    cache = SkipCache(tiny_config("mistral"))
    cache.set_plans(SkipPlan((0, 2), NUM_LAYERS), 2)
    for _ in range(20):
        for layer in (0, 2):
            states = tokens(2, device="meta", dtype=torch.bfloat16)
            keys, values = cache.update(states, states, layer)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    cache.crop(-2)
    assert keys.device.type == values.device.type == cache.layers[2].keys.device.type == "meta"
    assert cache.layers[2].keys.shape == (3, HEADS, 7, HEAD_DIM) and cache.get_seq_length() == 18
