"""The rows ops beside their float64 references: drawn shapes, types, rows, gates and strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from firstlm import ops
from op_cases import DTYPES, accumulator, drawn, every_device, other_devices

PLAN = torch.ops.firstlm.plan_rows.default
GATHER = torch.ops.firstlm.gather_rows.default
GATHER_BACKWARD = torch.ops.firstlm.gather_rows_backward.default
SCATTER = torch.ops.firstlm.scatter_rows.default
SCATTER_ = torch.ops.firstlm.scatter_rows_.default
SCATTER_ADD_ = torch.ops.firstlm.scatter_add_rows_.default


def assert_rounded(actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """A few operations on numbers of `magnitude`, rounded to actual's type."""
    eps = torch.finfo(actual.dtype).eps
    wrong = (actual.double() - expected).abs() > 4 * eps * magnitude
    assert not wrong.any(), (actual[wrong], expected[wrong])


# --- Cases --------------------------------------------------------------------------------------


def strided(rows: Tensor, layout: str) -> Tensor:
    """The same values as a view of something larger."""
    if layout == "rows apart":
        larger = rows.new_full((2 * rows.shape[0] + 1, *rows.shape[1:]), -7)
        larger[1::2] = rows
        return larger[1::2]
    if layout == "elements apart" and rows.ndim > 1:
        larger = rows.new_full((*rows.shape[:-1], 2 * rows.shape[-1]), -7)
        larger[..., ::2] = rows
        return larger[..., ::2]
    if layout == "batch last":
        return rows.movedim(0, -1).contiguous().movedim(-1, 0)
    return rows


layouts = st.sampled_from(["contiguous", "rows apart", "elements apart", "batch last"])


@st.composite
def row_cases(draw, repeats=False, dtypes=DTYPES):
    """hidden [B, ...], rows [R], values [R, ...], gate [R]."""
    B = draw(st.integers(0, 6))
    inner = draw(st.sampled_from([(), (1,), (0,), (3, 5), (2, 129), (1, 577), (9, 1100)]))
    dtype = draw(st.sampled_from(dtypes))
    named = draw(st.permutations(range(B)))[: draw(st.integers(0, B))]
    if repeats and named:
        named = draw(st.lists(st.sampled_from(named), max_size=8))
    ignored = draw(st.lists(st.integers(0, 6), max_size=3))
    for place in ignored:
        named.insert(place, -1)
    rows = torch.tensor(named, dtype=torch.int64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def randn(count: int) -> Tensor:
        values = torch.randn(count, *inner, generator=generator, dtype=torch.float64)
        return strided((8 * values).to(dtype), draw(layouts))

    gates = st.sampled_from([0.0, 1.0, 0.25, 0.5, 1 / 3, 0.999])
    gate = draw(st.lists(gates, min_size=len(rows), max_size=len(rows)))
    return randn(B), rows, randn(len(rows)), torch.tensor(gate, dtype=accumulator(dtype))


# --- plan_rows ------------------------------------------------------------------------------------


@every_device
@given(B=st.integers(0, 7), L=st.integers(0, 9), seed=st.integers(0, 2**31), share=st.floats(0, 1))
@drawn
def test_plan_is_the_reference(run, B, L, seed, share):
    keep_mask = torch.rand(B, L, generator=torch.Generator().manual_seed(seed)) < share
    for mask in (keep_mask, keep_mask.t().contiguous().t()):
        for actual, expected in zip(run(PLAN, mask), reference.plan_rows(mask), strict=True):
            assert actual.dtype == torch.int64 and torch.equal(actual, expected)


@every_device
@pytest.mark.parametrize("B", [32, 33, 257])
def test_a_plan_of_more_rows_than_a_warp_or_block_has(run, B):
    keep_mask = torch.rand(B, 3, generator=torch.Generator().manual_seed(B)) < 0.5
    for actual, expected in zip(run(PLAN, keep_mask), reference.plan_rows(keep_mask), strict=True):
        assert torch.equal(actual, expected)


# --- gather_rows ----------------------------------------------------------------------------------


@every_device
@given(case=row_cases(repeats=True, dtypes=[*DTYPES, torch.bool, torch.int64, torch.int8]))
@drawn
def test_gathered_rows_are_copies(run, case):
    hidden, rows, _, _ = case
    gathered = run(GATHER, hidden, rows)
    assert gathered.is_contiguous()
    assert torch.equal(gathered, reference.gather_rows(hidden, rows))


@every_device
@given(case=row_cases(repeats=True))
@drawn
def test_the_adjoint_of_gathering_adds_up(run, case):
    hidden, rows, grad, _ = case
    zeros = torch.zeros_like(hidden)
    expected = reference.scatter_add_rows(zeros.double(), rows, grad.double())
    magnitude = reference.scatter_add_rows(zeros.double(), rows, grad.double().abs())
    assert_rounded(run(GATHER_BACKWARD, grad, rows, len(hidden)), expected, 2 * magnitude)

    leaf = hidden.detach().requires_grad_()
    ops.gather_rows(leaf, rows).backward(grad)
    assert leaf.grad.dtype == hidden.dtype
    assert_rounded(leaf.grad, expected, 2 * magnitude)


@every_device
def test_the_adjoint_of_gathering_more_rows_than_a_warp_has(run):
    rows = torch.arange(70) % 37 - 1
    grad = torch.randn(70, 3, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(40, 3, dtype=torch.float64)
    expected = reference.scatter_add_rows(zeros, rows, grad.double())
    magnitude = reference.scatter_add_rows(zeros, rows, grad.double().abs())
    assert_rounded(run(GATHER_BACKWARD, grad, rows, 40), expected, 2 * magnitude)


# --- scatter_rows ---------------------------------------------------------------------------------


@every_device
@given(case=row_cases(), gated=st.booleans())
@drawn
def test_scattered_rows_are_the_reference(run, case, gated):
    hidden, rows, values, gate = case
    gate = gate if gated else None
    before = hidden.clone()
    out = run(SCATTER, hidden, rows, values, gate)
    doubles = hidden.double(), rows, values.double(), gate.double() if gated else None
    expected = reference.scatter_rows(*doubles)
    largest = reference.scatter_rows(doubles[0].abs(), rows, doubles[2].abs(), None)
    assert out.is_contiguous() and torch.equal(hidden, before)
    assert_rounded(out, expected, hidden.double().abs() + largest)

    assert run(SCATTER_, hidden, rows, values, gate) is None
    assert torch.equal(hidden, out)


@every_device
@given(case=row_cases(), g=st.sampled_from([0.0, 1.0, 0.3, 0.5, 0.8]))
@drawn
def test_a_gate_is_torch_lerp(run, case, g):
    hidden, rows, values, gate = case
    out = run(SCATTER, hidden, rows, values, torch.full_like(gate, g))
    old = reference.gather_rows(hidden, rows).to(gate.dtype)
    expected = reference.scatter_rows(
        hidden, rows, torch.lerp(old, values.to(gate.dtype), g).to(hidden.dtype), None
    )
    if g in (0.0, 1.0):
        assert torch.equal(out, expected)
    largest = reference.scatter_rows(hidden.abs(), rows, values.abs(), None)
    assert_rounded(out, expected.double(), (hidden.abs() + largest).double())


@every_device
def test_a_gate_of_0_or_1_is_a_copy_whatever_the_other_side_holds(run):
    hidden, values = torch.tensor([[1.0], [torch.nan]]), torch.tensor([[torch.inf], [2.0]])
    out = run(SCATTER, hidden, torch.tensor([0, 1]), values, torch.tensor([0.0, 1.0]))
    assert out.tolist() == [[1.0], [2.0]]


@every_device
@given(case=row_cases(dtypes=[torch.bool, torch.int64, torch.int8]))
@drawn
def test_any_type_scatters_without_a_gate(run, case):
    hidden, rows, values, _ = case
    expected = reference.scatter_rows(hidden.long(), rows, values.long(), None).to(hidden.dtype)
    assert torch.equal(run(SCATTER, hidden, rows, values, None), expected)


@given(case=row_cases(), gated=st.booleans())
@drawn
def test_scatter_gradients_are_the_references(case, gated):
    hidden, rows, values, gate = case
    tensors = [hidden, values, gate] if gated else [hidden, values]
    weights = torch.linspace(-1, 2, hidden.numel()).double().view(hidden.shape)

    def gradients(function, leaves):
        h, v, *g = leaves
        out = function(h, rows, v, g[0] if g else None)
        grads = torch.autograd.grad(out, leaves, weights.to(out.dtype), allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]

    if hidden.numel() == 0:
        return
    actual = gradients(ops.scatter_rows, [t.detach().requires_grad_() for t in tensors])
    expected = gradients(reference.scatter_rows, [t.double().requires_grad_() for t in tensors])
    eps = torch.finfo(hidden.dtype).eps
    for a, e, t in zip(actual, expected, tensors, strict=True):
        assert a.dtype == t.dtype
        atol = 8 * eps * float(e.abs().max() + 1) if e.numel() else 0
        if t is gate:  # a sum over the row of products of magnitude 50
            atol = 50 * 2 * eps * hidden[0].numel()
        torch.testing.assert_close(a.double(), e, rtol=8 * eps, atol=atol)


def test_what_an_ignored_row_holds_does_not_reach_a_gradient():
    values = torch.full((2, 3), torch.nan)
    values[1] = 1
    leaves = [t.requires_grad_() for t in (torch.randn(2, 3), values, torch.tensor([0.5, 0.5]))]
    hidden, values, gate = leaves
    out = ops.scatter_rows(hidden, torch.tensor([-1, 0]), values, gate)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][0].any() and grads[2][0] == 0


# --- scatter_add_rows_ ----------------------------------------------------------------------------


@every_device
@given(case=row_cases(repeats=True))
@drawn
def test_updates_are_added(run, case):
    hidden, rows, update, _ = case
    expected = reference.scatter_add_rows(hidden.double(), rows, update.double())
    magnitude = reference.scatter_add_rows(hidden.double().abs(), rows, update.double().abs())
    assert run(SCATTER_ADD_, hidden, rows, update) is None
    assert_rounded(hidden, expected, 2 * magnitude)


def test_threads_do_not_change_a_bit():
    hidden, rows = torch.randn(5, 70, 577), torch.tensor([3, -1, 0, 4])
    values, gate = torch.randn(4, 70, 577), torch.rand(4)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            blend = ops.scatter_rows(hidden, rows, values, gate)
            results.append(ops.scatter_add_rows_(blend, torch.tensor([0, 0, 1, 2]), values))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# --- What torch promises about ops ------------------------------------------------------------


def op_samples():
    rows, repeated = torch.tensor([2, -1, 0]), torch.tensor([2, -1, 2, 0])
    yield "plan", PLAN, (torch.tensor([[True, False, True], [False, False, True]]),)
    for dtype in DTYPES:

        def leaf(*shape, dtype=dtype, requires_grad=True):
            return torch.randn(*shape).to(dtype).requires_grad_(requires_grad)

        gate = torch.tensor([0.25, 0.5, 1.0], dtype=accumulator(dtype), requires_grad=True)
        yield f"gather-{dtype}", GATHER, (leaf(3, 2, 4), repeated)
        yield f"gather-backward-{dtype}", GATHER_BACKWARD, (leaf(4, 2, 4), repeated, 3)
        yield f"scatter-{dtype}", SCATTER, (leaf(3, 2, 4), rows, leaf(3, 2, 4), None)
        yield f"scatter-gate-{dtype}", SCATTER, (leaf(3, 2, 4), rows, leaf(3, 2, 4), gate)
        constant = [leaf(3, 2, 4, requires_grad=False) for _ in range(2)]
        in_place = constant[0], rows, constant[1]
        yield f"in-place-{dtype}", SCATTER_, (*in_place, None)
        yield f"in-place-gate-{dtype}", SCATTER_, (*in_place, gate.detach())
        yield f"in-place-add-{dtype}", SCATTER_ADD_, in_place


samples = [pytest.param(*s[1:], id=s[0]) for s in op_samples()]


@pytest.mark.parametrize(
    "op, args",
    [
        pytest.param(*s[1:], id=s[0])
        for s in op_samples()
        if "float64" in s[0] and "in-place" not in s[0]
    ],
)
def test_first_and_second_derivatives(op, args):
    def is_leaf(argument) -> bool:
        return isinstance(argument, Tensor) and argument.requires_grad

    def function(*leaves):
        given_leaves = iter(leaves)
        return op(*[next(given_leaves) if is_leaf(a) else a for a in args])

    if op is SCATTER and args[3] is not None:  # 1 is where the blend becomes a copy
        args = (*args[:3], (args[3].detach() * 0.9).requires_grad_())
    leaves = [a for a in args if is_leaf(a)]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("op, args", samples)
def test_meta_tensors_have_the_shape_and_type_of_the_result(op, args):
    def shapes(result):
        tensors = result if isinstance(result, tuple) else (result,)
        return [None if t is None else (t.shape, t.dtype) for t in tensors]

    on_meta = op(*[a.to("meta") if isinstance(a, Tensor) else a for a in args])
    copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
    assert shapes(on_meta) == shapes(op(*copies))


def test_writing_in_place_is_a_new_version():
    hidden = torch.zeros(2, 3)
    ops.scatter_rows_(hidden, torch.tensor([1]), torch.ones(1, 3))
    ops.scatter_add_rows_(hidden, torch.tensor([1]), torch.ones(1, 3))
    assert hidden._version == 2 and hidden.tolist() == [[0, 0, 0], [2, 2, 2]]


def test_compiles_without_graph_breaks():
    def run(hidden, keep_mask, gate):
        rows, _ = ops.plan_rows(keep_mask)
        for of_layer in rows.unbind():
            states = ops.gather_rows(hidden, of_layer).sin()
            hidden = ops.scatter_rows(hidden, of_layer, states, gate)
        return hidden

    def run_in_place(hidden, keep_mask, gate):
        rows, _ = ops.plan_rows(keep_mask)
        hidden = hidden + 1
        ops.scatter_rows_(hidden, rows[0], ops.gather_rows(hidden, rows[0]).sin(), gate)
        return ops.scatter_add_rows_(hidden, rows[1], hidden.cos())

    for function in (run, run_in_place):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for B, T in [(3, 5), (4, 9)]:
            inputs = torch.randn(B, T, 8), torch.rand(B, 4) < 0.5, torch.rand(B)
            torch.testing.assert_close(function(*inputs), compiled(*inputs))


# --- Errors -------------------------------------------------------------------------------------

HIDDEN, ROWS, VALUES, GATE = (
    torch.zeros(4, 3),
    torch.tensor([0, 2]),
    torch.ones(2, 3),
    torch.ones(2),
)


@every_device
@pytest.mark.parametrize(
    "op, args, error, message",
    [
        (PLAN, (torch.ones(2, 3),), TypeError, "keep_mask is Float; expected bool"),
        (PLAN, (torch.ones(3, dtype=torch.bool),), ValueError, r"shape \[3\]; expected \[B, L\]"),
        (GATHER, (torch.tensor(1.0), ROWS), ValueError, r"no dimensions; expected \[B, \.\.\.\]"),
        (GATHER, (HIDDEN, ROWS.int()), TypeError, "rows is Int; expected int64"),
        (GATHER, (HIDDEN, ROWS[None]), ValueError, r"rows has shape \[1, 2\]; expected \[R\]"),
        (
            SCATTER,
            (HIDDEN, ROWS, VALUES[:1], None),
            ValueError,
            r"values has shape \[1, 3\]; expected \[R, \.\.\.\] = \[2, 3\]",
        ),
        (SCATTER, (HIDDEN, ROWS, VALUES.double(), None), TypeError, "values is Double; expected F"),
        (SCATTER, (HIDDEN, ROWS, VALUES, GATE[:1]), ValueError, r"gate has shape \[1\]"),
        (SCATTER, (HIDDEN, ROWS, VALUES, GATE.double()), TypeError, "gate is Double; expected Fl"),
        (SCATTER, (HIDDEN.int(), ROWS, VALUES.int(), GATE), TypeError, "hidden is Int; expected"),
        (SCATTER_, (HIDDEN, ROWS, VALUES[:1], None), ValueError, "values has shape"),
        (SCATTER_ADD_, (HIDDEN, ROWS, VALUES[:1]), ValueError, "update has shape"),
        (SCATTER_ADD_, (HIDDEN.int(), ROWS, VALUES.int()), TypeError, "hidden is Int; expected"),
    ],
)
def test_errors_name_the_value_and_what_is_accepted(run, op, args, error, message):
    with pytest.raises(error, match=message):
        run(op, *args)


@pytest.mark.parametrize("wrong", [4, -2])
@pytest.mark.parametrize("op", [GATHER, SCATTER, SCATTER_, SCATTER_ADD_])
def test_a_row_outside_of_the_batch_is_an_index_error_and_nothing_is_written(op, wrong):
    hidden, rows = torch.randn(4, 3), torch.tensor([0, wrong])
    before = hidden.clone()
    args = {GATHER: (), SCATTER: (VALUES, None), SCATTER_: (VALUES, None), SCATTER_ADD_: (VALUES,)}
    with pytest.raises(IndexError, match=rf"rows\[1\] is {wrong}; .*a row of a batch of 4"):
        op(hidden, rows, *args[op])
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("op", [SCATTER, SCATTER_])
def test_a_row_named_twice_is_an_error(op):
    with pytest.raises(ValueError, match="rows names 2 twice; expected distinct rows"):
        op(HIDDEN, torch.tensor([2, 2]), VALUES, None)


def test_overlapping_memory_is_refused():
    hidden = torch.zeros(4, 3)
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        ops.scatter_rows_(hidden[:1].expand(4, 3), ROWS, VALUES)
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        ops.scatter_add_rows_(hidden, ROWS, hidden[1:3])
    wide = torch.zeros(4, 6)[:, :3]  # a view with gaps
    for op in (ops.scatter_rows_, ops.scatter_add_rows_):
        with pytest.raises(RuntimeError, match="lie in the same memory"):
            op(wide, ROWS, wide[1:3])
        with pytest.raises(RuntimeError, match="the rows of hidden overlap each other"):
            op(torch.zeros(6).as_strided((4, 3), (1, 1)), ROWS, VALUES)
        op(wide, ROWS, VALUES)


@other_devices
@pytest.mark.parametrize("misfit", [-2, 4, 2**62])
def test_other_devices_leave_out_rows_that_there_are_not(run, misfit):
    rows, other = torch.tensor([2, misfit]), torch.tensor([2, -1])
    expected, found = HIDDEN.clone(), HIDDEN.clone()
    assert torch.equal(run(GATHER, HIDDEN, rows), run(GATHER, HIDDEN, other))
    assert torch.equal(
        run(SCATTER, HIDDEN, rows, VALUES, None), run(SCATTER, HIDDEN, other, VALUES, None)
    )
    for op, more in ((SCATTER_, (None,)), (SCATTER_ADD_, ())):
        run(op, found, rows, VALUES, *more)
        run(op, expected, other, VALUES, *more)
        assert torch.equal(found, expected)


def test_writing_in_place_is_for_inference():
    values = torch.ones(2, 3, requires_grad=True)
    for op in (ops.scatter_rows_, ops.scatter_add_rows_):
        with pytest.raises(RuntimeError, match=rf"{op.__name__} keeps no autograd history"):
            op(torch.zeros(4, 3), ROWS, values)
        with torch.no_grad():
            assert op(torch.zeros(4, 3), ROWS, values).sum() == 6
