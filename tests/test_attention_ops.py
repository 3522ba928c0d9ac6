"""Decode attention beside its float64 reference: drawn heads, ranges, types and strides.

What is allowed between them: a score is a sum of D products kept in the accumulator's type, so it
errs by about eps * (sqrt(D) + c) of the sum of their magnitudes; an error of a score is a relative
error of its weight; sums over n slots add eps * (sqrt(n) + c); the output is rounded once.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from firstlm import ops
from op_cases import (
    DTYPES,
    LAYOUTS,
    accumulator,
    drawn,
    every_device,
    fast_kernels,
    other_devices,
    our_kernels,
    strided,
)

ATTEND = torch.ops.firstlm.decode_attention.default


# --- Cases --------------------------------------------------------------------------------------


def random_case(R, Hq, H, C, D, dtype, seed=0, spread=1.0, layout="contiguous"):
    """query, keys, values; `spread` multiplies the scores."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys, values = (strided(randn(R, H, C, D).to(dtype), layout) for _ in range(2))
    return (spread * randn(R, Hq, D)).to(dtype), keys, values


@st.composite
def attention_cases(draw):
    """query, keys, values, begin, end, scale, soft_cap."""
    R, H, G = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    D = draw(st.sampled_from([1, 20, 32, 64, 80, 96, 100, 128, 256]))
    C = draw(st.integers(0, 40) | st.sampled_from([255, 256, 257, 600]))
    begin = [draw(st.integers(0, C)) for _ in range(R)]
    end = [draw(st.integers(first, C)) for first in begin]
    case = random_case(
        R,
        H * G,
        H,
        C,
        D,
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from([0.1, 1.0, 8.0])),
        draw(st.sampled_from(LAYOUTS)),
    )
    scale, soft_cap = draw(st.sampled_from([D**-0.5, 0.2])), draw(st.sampled_from([0.0, 5.0]))
    return *case, torch.tensor(begin).long(), torch.tensor(end).long(), scale, soft_cap


def allowed_error(query, keys, values, begin, end, scale, soft_cap, expected) -> Tensor:
    """[R, Hq, D], as the file's header says."""
    eps = torch.finfo(accumulator(query.dtype)).eps
    group = query.shape[1] // keys.shape[1]
    bound = torch.zeros(query.shape, dtype=torch.float64)
    for r, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        if first == last:
            continue
        k = keys[r, :, first:last].double().repeat_interleave(group, 0).abs()
        terms = abs(scale) * (k @ query[r].double().abs().unsqueeze(2)).amax((1, 2))  # [Hq]
        of_scores = 2 * (query.shape[2] ** 0.5 + 8) * terms
        bound[r] = eps * (of_scores + (last - first) ** 0.5 + 16).unsqueeze(1)
    magnitude = reference.decode_attention(
        query, keys, values.abs(), begin, end, scale, soft_cap
    )  # of the terms that a value is the sum of
    output = torch.finfo(query.dtype)
    rounding = 0.5 * output.eps * (expected.abs() + output.smallest_normal)
    return bound * magnitude + rounding * (1 + output.eps)


def assert_attends(actual: Tensor, case) -> None:
    expected = reference.decode_attention(*case)
    assert actual.dtype == case[0].dtype and actual.shape == case[0].shape
    error, allowed = (actual.double() - expected).abs(), allowed_error(*case, expected)
    worst = (error / allowed.clamp(min=torch.finfo(torch.float64).tiny)).nan_to_num(nan=torch.inf)
    assert (error <= allowed).all(), f"{worst.max():.3g} times what is allowed"


# --- Values ---------------------------------------------------------------------------------------


@every_device
@given(case=attention_cases())
@drawn
def test_attention_is_the_reference(run, case):
    assert_attends(run(ATTEND, *case), case)


@fast_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
def test_long_and_ragged_rows(run, dtype, soft_cap):
    C = 32768
    case = random_case(3, 4, 2, C, 64, dtype)
    begin, end = torch.tensor([0, 4095, C - 1]), torch.tensor([C, 4097, C])
    case = *case, begin, end, 0.125, soft_cap
    assert_attends(run(ATTEND, *case), case)


@every_device
def test_more_splits_than_a_warp_has_threads(run):
    C = 4500
    case = random_case(2, 2, 1, C, 8, torch.float32)
    case = *case, torch.tensor([0, 100]), torch.tensor([C, C - 1]), 0.3, 0.0
    assert_attends(run(ATTEND, *case), case)


def test_one_range_serves_all_rows():
    query, keys, values = random_case(3, 2, 1, 9, 32, torch.float32)
    one = ops.decode_attention(query, keys, values, torch.tensor([2]), torch.tensor([7]))
    each = ops.decode_attention(query, keys, values, torch.full((3,), 2), torch.full((3,), 7))
    assert torch.equal(one, each)


@every_device
def test_slots_outside_the_range_are_not_read(run):
    query, keys, values = random_case(2, 4, 2, 700, 48, torch.float32)
    case = query, keys, values, torch.tensor([3, 650]), torch.tensor([600, 653]), 48**-0.5, 0.0
    expected = run(ATTEND, *case)
    for r, (first, last) in enumerate([(3, 600), (650, 653)]):
        for cache in (keys, values):
            cache[r, :, :first] = torch.nan
            cache[r, :, last:] = torch.inf
    assert torch.equal(run(ATTEND, *case), expected)


@our_kernels
def test_a_rows_result_depends_on_nothing_else(run):
    """Not on the other rows, the place of its slots, or their strides."""
    query, keys, values = random_case(3, 6, 2, 1000, 64, torch.bfloat16)
    begin, end = torch.tensor([0, 100, 900]), torch.tensor([1000, 700, 950])
    batch = run(ATTEND, query, keys, values, begin, end, 0.125, 0.0)
    for r, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        row = (cache[r : r + 1, :, first:last] for cache in (keys, values))
        whole = torch.tensor([0]), torch.tensor([last - first])
        alone = run(ATTEND, query[r : r + 1], *row, *whole, 0.125, 0.0)
        assert torch.equal(alone[0], batch[r])


def test_threads_do_not_change_a_bit():
    query, keys, values = random_case(3, 6, 2, 1000, 64, torch.bfloat16)
    slots = torch.tensor([0, 100, 900]), torch.tensor([1000, 700, 950])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.decode_attention(query, keys, values, *slots))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@other_devices
@pytest.mark.parametrize("begin, end, seen", [(-1, 3, (0, 3)), (3, 2, (3, 3)), (0, 6, (0, 5))])
def test_other_devices_see_the_slots_that_exist(run, begin, end, seen):
    case = random_case(1, 4, 2, 5, 8, torch.float32)
    first, last = (torch.tensor([slot]) for slot in seen)
    expected = run(ATTEND, *case, first, last, 1.0, 0.0)
    actual = run(ATTEND, *case, torch.tensor([begin]), torch.tensor([end]), 1.0, 0.0)
    assert torch.equal(actual, expected)


@every_device
def test_scores_without_bounds(run):
    """Large scores do not overflow; scores of minus infinity weigh nothing; NaN is not lost."""
    query, keys = torch.ones(1, 1, 32), torch.zeros(1, 1, 600, 32)
    values = torch.arange(600.0).view(1, 1, 600, 1).expand(1, 1, 600, 32)
    keys[:, :, 300] = 1e6
    whole = torch.tensor([0]), torch.tensor([600]), 1.0
    assert (run(ATTEND, query, keys, values, *whole, 0.0) == 300).all()
    keys[:, :, :300] = -torch.inf
    keys[:, :, 300] = 0
    torch.testing.assert_close(run(ATTEND, query, keys, values, *whole, 0.0)[0, 0, 0].item(), 449.5)
    keys[:, :, 5] = torch.nan
    assert run(ATTEND, query, keys, values, *whole, 0.0).isnan().all()
    assert run(ATTEND, query, keys, values, *whole, 5.0).isnan().all()


# --- What torch promises about ops ------------------------------------------------------------


def op_samples():
    """(name, op, arguments), see test_ops.py."""
    for dtype, soft_cap in itertools.product(DTYPES, (0.0, 5.0)):
        case = random_case(2, 6, 3, 7, 32, dtype, layout="transposed")
        slots = torch.tensor([0]), torch.tensor([4, 7])
        yield f"attention-{dtype}-{soft_cap}", ATTEND, (*case, *slots, 0.2, soft_cap)


def test_compiles_without_graph_breaks():
    def attend(query, keys, values, end):
        return ops.decode_attention(query, keys, values, torch.zeros_like(end), end) + 1

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for C in (5, 9):
        inputs = *random_case(2, 4, 2, C, 32, torch.float32), torch.tensor([C, C - 1])
        assert torch.equal(attend(*inputs), compiled(*inputs))


# --- Errors -------------------------------------------------------------------------------------

QUERY, KEYS, VALUES = torch.zeros(2, 4, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8)
ZEROS = torch.zeros(2).long()


@every_device
@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"query": QUERY[0]}, ValueError, r"query has shape \[4, 8\]; expected \[R, Hq, D\]"),
        ({"query": QUERY.int()}, TypeError, "query is Int; expected float32"),
        ({"query": QUERY[..., :0]}, ValueError, "expected a head_dim of 1 or more"),
        ({"query": QUERY[:, :3]}, ValueError, "query has 3 heads and keys has 2; expected a mult"),
        ({"keys": KEYS[0]}, ValueError, r"keys has shape .* \[R, H, C, D\]"),
        ({"keys": KEYS[..., :4]}, ValueError, r"keys has shape .* = \[2, 2, 5, 8\]"),
        ({"keys": KEYS.half()}, TypeError, "keys is Half; expected Float, the type of query"),
        ({"values": VALUES[:, :, :4]}, ValueError, "values has shape .* the shape of keys"),
        ({"values": VALUES.double()}, TypeError, "values is Double; expected Float"),
        ({"begin": ZEROS.int()}, TypeError, "begin is Int; expected int64"),
        ({"end": ZEROS.new_zeros(3)}, ValueError, r"end has shape \[3\]; expected \[R\] = \[2\]"),
        ({"soft_cap": -1.0}, ValueError, r"soft_cap is -1; expected 0 \(none\) or more"),
    ],
)
def test_errors_name_the_value_and_what_is_accepted(run, changed, error, message):
    case = {
        "query": QUERY,
        "keys": KEYS,
        "values": VALUES,
        "begin": ZEROS,
        "end": ZEROS + 5,
        "scale": 1.0,
        "soft_cap": 0.0,
    }
    with pytest.raises(error, match=message):
        run(ATTEND, *(case | changed).values())


@pytest.mark.parametrize("begin, end", [(-1, 3), (3, 2), (0, 6)])
def test_slots_out_of_range_are_an_index_error(begin, end):
    message = rf"row 1 sees slots \[{begin}, {end}\); expected 0 <= begin <= end <= 5"
    with pytest.raises(IndexError, match=message):
        ops.decode_attention(QUERY, KEYS, VALUES, torch.tensor([0, begin]), torch.tensor([5, end]))
