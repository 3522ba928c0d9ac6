"""Appending to the key/value cache beside its reference: drawn shapes, types, slots and strides."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from firstlm import ops
from op_cases import DTYPES, LAYOUTS, drawn, every_device, other_devices, strided

APPEND = torch.ops.firstlm.kv_append.default


def storages(R, H, C, D, D_values, dtype=torch.float32):
    """Keys and values whose every element is another number, as far as the type can tell."""
    keys = torch.arange(R * H * C * D).view(R, H, C, D).to(dtype)
    return keys, -1 - torch.arange(R * H * C * D_values).view(R, H, C, D_values).to(dtype)


@st.composite
def append_cases(draw):
    """keys, values, new_keys, new_values, start."""
    R, H, T = draw(st.integers(0, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 150))
    C = T + draw(st.integers(0, 9))
    D, D_values = (draw(st.sampled_from([1, 3, 16, 80])) for _ in range(2))
    keys, values = storages(R, H, C, D, D_values, draw(st.sampled_from(DTYPES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    new_keys, new_values = (
        strided(
            torch.randn(R, H, T, storage.shape[3], generator=generator).to(storage.dtype),
            draw(st.sampled_from(LAYOUTS)),
        )
        for storage in (keys, values)
    )
    starts = st.integers(0, C - T)
    rows = 1 if draw(st.booleans()) else R
    start = torch.tensor(draw(st.lists(starts, min_size=rows, max_size=rows)), dtype=torch.long)
    return keys, values, new_keys, new_values, start


@every_device
@given(case=append_cases())
@drawn
def test_append_is_the_reference(run, case):
    keys, values, *new, start = case
    expected = reference.kv_append(*case)
    addresses = keys.data_ptr(), values.data_ptr()
    run(APPEND, keys, values, *new, start)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
    assert (keys.data_ptr(), values.data_ptr()) == addresses


@pytest.mark.parametrize("misfit", [-1, 3, 2**62])
def test_a_start_out_of_range_writes_nothing(misfit):
    keys, values = storages(2, 1, 5, 4, 4)
    case = keys, values, torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4), torch.tensor([1, misfit])
    before = keys.clone(), values.clone()
    with pytest.raises(IndexError, match=rf"start of row 1 is {misfit}; expected \[0, 2\]"):
        ops.kv_append(*case)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


@other_devices
@pytest.mark.parametrize("misfit", [-1, 3, 2**62])
def test_other_devices_leave_a_row_out_of_range_as_it_is(run, misfit):
    case = *storages(2, 1, 5, 4, 4), torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    one_row = [tensor[:1].clone() for tensor in case]
    run(APPEND, *case, torch.tensor([1, misfit]))
    run(APPEND, *one_row, torch.tensor([1]))
    untouched = storages(2, 1, 5, 4, 4)
    for stored, alone, before in zip(case[:2], one_row[:2], untouched, strict=True):
        assert torch.equal(stored, torch.cat([alone, before[1:]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_appends_do_not_depend_on_threads(layout):
    threads = torch.get_num_threads()
    new = strided(torch.randn(2, 3, 700, 64), layout), torch.randn(2, 3, 700, 40)
    start = torch.tensor([4, 0])
    expected = reference.kv_append(*storages(2, 3, 710, 64, 40), *new, start)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            keys, values = storages(2, 3, 710, 64, 40)
            ops.kv_append(keys, values, *new, start)
            assert torch.equal(keys, expected[0])
            assert torch.equal(values, expected[1])
    finally:
        torch.set_num_threads(threads)


def op_samples():
    """(name, op, arguments), see test_ops.py."""
    for dtype, rows in itertools.product(DTYPES, (1, 2)):
        new = torch.randn(2, 3, 2, 5).to(dtype), torch.randn(2, 3, 2, 7).to(dtype)
        arguments = *storages(2, 3, 4, 5, 7, dtype), *new, torch.arange(rows)
        yield f"append-{dtype}-{rows}", APPEND, arguments


def test_compiles_without_graph_breaks():
    def append(keys, values, new, start):
        ops.kv_append(keys, values, new, 2 * new, start)
        return keys + values

    compiled = torch.compile(append, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (1, 5):
        new, start = torch.randn(2, 3, T, 8), torch.tensor([3, 1])
        results = [f(*storages(2, 3, 9, 8, 8), new, start) for f in (append, compiled)]
        assert torch.equal(*results)


KEYS, VALUES = storages(2, 3, 5, 4, 6)
NEW_KEYS, NEW_VALUES, START = (
    torch.zeros(2, 3, 1, 4),
    torch.zeros(2, 3, 1, 6),
    torch.zeros(2).long(),
)


@every_device
@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"keys": KEYS[0]}, ValueError, r"keys has shape \[3, 5, 4\]; expected \[R, H, C, D\]"),
        ({"keys": KEYS.int()}, TypeError, "keys is Int; expected float32"),
        ({"keys": KEYS[:, :, :3]}, ValueError, "keys has strides .* expected contiguous storage"),
        ({"values": VALUES[:, :, :3].clone()}, ValueError, r"values has shape \[2, 3, 3, 6\]"),
        ({"values": VALUES.double()}, TypeError, "values is Double; expected Float, .* of keys"),
        ({"new_keys": NEW_KEYS[0]}, ValueError, r"new_keys has shape .* \[R, H, T, D\]"),
        ({"new_keys": NEW_VALUES}, ValueError, r"\[R, H, T, D\] = \[2, 3, 1, 4\]"),
        ({"new_values": NEW_VALUES.half()}, TypeError, "new_values is Half; expected Float"),
        (
            {"new_keys": torch.zeros(2, 3, 6, 4), "new_values": torch.zeros(2, 3, 6, 6)},
            ValueError,
            "new_keys has 6 tokens; expected at most the storage's 5 slots",
        ),
        ({"new_keys": KEYS[:, :, 1:2]}, ValueError, "new_keys overlaps keys; expected memory of"),
        ({"values": KEYS, "new_values": NEW_KEYS}, ValueError, "values overlaps keys"),
        ({"new_keys": VALUES[:, :, 1:2, :4]}, ValueError, "new_keys overlaps values"),
        (
            {"new_values": KEYS.flatten()[:36].view(2, 3, 1, 6)},
            ValueError,
            "new_values overlaps keys",
        ),
        ({"start": START.int()}, TypeError, "start is Int; expected int64"),
        (
            {"start": START.new_zeros(3)},
            ValueError,
            r"start has shape \[3\]; expected \[R\] = \[2\]",
        ),
    ],
)
def test_errors_name_the_value_and_what_is_accepted(run, changed, error, message):
    case = {
        "keys": KEYS,
        "values": VALUES,
        "new_keys": NEW_KEYS,
        "new_values": NEW_VALUES,
        "start": START,
    }
    with pytest.raises(error, match=message):
        run(APPEND, *(case | changed).values())
