"""The router ops beside their float64 references: drawn shapes, types, masks and strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from firstlm import ops
from op_cases import (
    DTYPES,
    LAYOUTS,
    accumulator,
    composite,
    drawn,
    every_device,
    other_devices,
    our_kernels,
    strided,
)

POOL = torch.ops.firstlm.router_pool.default
POOL_BACKWARD = torch.ops.firstlm.router_pool_backward.default
PACKED = torch.ops.firstlm.router_pool_packed.default
PACKED_BACKWARD = torch.ops.firstlm.router_pool_packed_backward.default
HEAD = torch.ops.firstlm.router_head.default
KINDS = ["mean", "windowed_mean", "last"]


def assert_near(actual: Tensor, expected: Tensor, terms: int, magnitude: Tensor) -> None:
    """A sum of `terms` numbers of total magnitude `magnitude`, computed in actual's type."""
    eps = torch.finfo(actual.dtype).eps
    atol = eps * (terms + 8) * float(magnitude.abs().max() if magnitude.numel() else 0)
    torch.testing.assert_close(actual.double(), expected, rtol=eps * 8, atol=atol)


# --- Cases --------------------------------------------------------------------------------------


@st.composite
def pool_cases(draw):
    """hidden [B, T, D], prompt_mask [B, T], kind, windows."""
    B, T = draw(st.integers(0, 4)), draw(st.integers(0, 40) | st.integers(120, 400))
    D = draw(st.sampled_from([1, 3, 16, 31, 64, 129, 1100]))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(dtype)
    prompt_share = torch.tensor(
        draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=B, max_size=B))
    )
    prompt_mask = torch.rand(B, T, generator=generator) < prompt_share.view(B, 1)
    layout = draw(st.sampled_from(LAYOUTS))
    kind, windows = draw(st.sampled_from(KINDS)), draw(st.integers(1, 9))
    return strided(hidden, layout), prompt_mask, kind, windows


@st.composite
def head_cases(draw):
    """pooled [B, F], weight [H, F], bias [H], out_weight [1, H] or None, out_bias, norm_eps."""
    B, F = draw(st.integers(0, 5)), draw(st.sampled_from([1, 5, 64, 130, 577]))
    H = draw(st.sampled_from([None, 1, 7, 16, 33]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    norm_eps = draw(st.sampled_from([0.0, 1e-6, 1e-2]))
    if H is None:
        return randn(B, F), randn(1, F), randn(1), None, None, norm_eps
    return randn(B, F), randn(H, F), randn(H), randn(1, H), randn(1), norm_eps


# --- router_pool ----------------------------------------------------------------------------------


@every_device
@given(case=pool_cases())
@drawn
def test_pool_is_the_reference(run, case):
    hidden, prompt_mask, kind, windows = case
    pooled = run(POOL, *case)
    assert pooled.dtype == accumulator(hidden.dtype)
    magnitude = reference.router_pool(hidden.abs(), prompt_mask, kind, windows)
    assert_near(pooled, reference.router_pool(*case), hidden.shape[1], magnitude)


@every_device
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [4096, 4097, 9000])
def test_states_wider_than_a_block_of_sums(run, kind, dtype, D):
    generator = torch.Generator().manual_seed(D)
    hidden = torch.randn(2, 5, D, generator=generator).to(dtype)
    prompt_mask = torch.tensor([[False, True, True, True, True], [True, True, False, True, False]])
    expected = reference.router_pool(hidden, prompt_mask, kind, 2)
    magnitude = reference.router_pool(hidden.abs(), prompt_mask, kind, 2)
    offsets = torch.tensor([0, 4, 7])
    for pooled in (
        run(POOL, hidden, prompt_mask, kind, 2),
        run(PACKED, hidden[prompt_mask], offsets, kind, 2),
    ):
        assert_near(pooled, expected, 5, magnitude)


@every_device
def test_what_is_not_pooled_may_be_infinite(run):
    hidden = torch.ones(2, 4, 3)
    hidden[0, 0] = float("inf")  # the last token of one prompt, and another prompt, do not read it
    last = run(POOL, hidden, torch.ones(2, 4, dtype=torch.bool), "last", 1)
    assert torch.equal(last, torch.ones(2, 3))
    windows = run(POOL, hidden, torch.ones(2, 4, dtype=torch.bool), "windowed_mean", 2)
    assert torch.equal(windows[:, 3:], torch.ones(2, 3)) and torch.equal(windows[1], torch.ones(6))
    packed = run(PACKED, hidden.flatten(0, 1), torch.tensor([0, 4, 4, 8]), "mean", 1)
    assert torch.equal(packed[1:], torch.tensor([[0.0] * 3, [1.0] * 3]))


def pool_gradient(case) -> tuple[Tensor, Tensor]:
    """grad_pooled, and what gradient the hidden states get from it."""
    hidden, *rest = case
    hidden = hidden.double().requires_grad_()
    pooled = reference.router_pool(hidden, *rest)
    grad_pooled = torch.linspace(-1, 2, pooled.numel()).double().view_as(pooled)
    if not hidden.numel():
        return grad_pooled, torch.zeros_like(hidden)
    return grad_pooled, torch.autograd.grad(pooled, hidden, grad_pooled)[0]


@every_device
@given(case=pool_cases())
@drawn
def test_pool_gradient_is_the_references(run, case):
    hidden, prompt_mask, kind, windows = case
    grad_pooled, expected = pool_gradient(case)
    grad_pooled = grad_pooled.to(accumulator(hidden.dtype))
    grad = run(POOL_BACKWARD, grad_pooled, prompt_mask, kind, windows, hidden.dtype)
    assert grad.dtype == hidden.dtype
    assert_near(grad, expected, windows, expected)


@given(case=pool_cases())
@drawn
def test_autograd_gives_the_pool_gradient(case):
    hidden, prompt_mask, kind, windows = case
    grad_pooled = pool_gradient(case)[0].to(accumulator(hidden.dtype))
    hidden = hidden.detach().requires_grad_()
    ops.router_pool(hidden, prompt_mask, kind, windows).backward(grad_pooled)
    expected = POOL_BACKWARD(grad_pooled, prompt_mask, kind, windows, hidden.dtype)
    assert torch.equal(hidden.grad, expected)


@our_kernels
@given(case=pool_cases(), left=st.integers(0, 5), right=st.integers(0, 5))
@drawn
def test_padding_does_not_change_a_bit(run, case, left, right):
    hidden, prompt_mask, kind, windows = case
    padding = (0, 0, left, right)
    padded = torch.nn.functional.pad(hidden, padding, value=torch.nan)
    padded_mask = torch.nn.functional.pad(prompt_mask, padding[2:], value=False)
    batch = run(POOL, padded, padded_mask, kind, windows)
    for row, mask, pooled in zip(hidden, prompt_mask, batch, strict=True):
        alone = run(POOL, row[mask].unsqueeze(0), mask[mask].unsqueeze(0), kind, windows)
        assert torch.equal(alone[0], pooled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "windows"), [("mean", 1), ("windowed_mean", 8), ("last", 1)])
def test_neither_threads_nor_the_batch_change_a_bit(dtype, kind, windows):
    hidden, prompt_mask = torch.randn(3, 1500, 577).to(dtype), torch.rand(3, 1500) < 0.7
    pooling = (kind, windows)
    offsets = torch.zeros(4, dtype=torch.int64)
    offsets[1:] = prompt_mask.sum(1).cumsum(0)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.router_pool(hidden, prompt_mask, *pooling))
            rows = zip(hidden.split(1), prompt_mask.split(1), strict=True)
            results.append(torch.cat([ops.router_pool(*row, *pooling) for row in rows]))
            results.append(ops.router_pool_packed(hidden[prompt_mask], offsets, *pooling))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_scores_as_the_two_ops_do(dtype, units, requires_grad):
    hidden = torch.randn(2, 7, 5).to(dtype).requires_grad_(requires_grad)
    prompt_mask, offsets = torch.ones(2, 7, dtype=torch.bool), torch.tensor([0, 7, 14])
    head = [torch.randn(units, 10).to(dtype), torch.randn(units)]
    head += [torch.randn(1, units), torch.randn(1)] if units > 1 else [None, None]
    pooled = POOL(hidden, prompt_mask, "windowed_mean", 2)
    expected = ops.router_head(pooled, *head, norm_eps=1e-6)
    options = (*head, 1e-6, "windowed_mean", 2)
    for found in (
        ops.router_score(hidden, prompt_mask, *options),
        ops.router_score_packed(hidden.flatten(0, 1), offsets, *options),
    ):
        assert torch.equal(found, expected) and found.requires_grad is requires_grad
        if requires_grad:
            grads = [
                torch.autograd.grad(y.sum(), hidden, retain_graph=True)[0]
                for y in (found, expected)
            ]
            assert torch.equal(*grads)


def test_tensor_subclasses_see_the_ops():
    seen = []

    class Noting(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    hidden, mask = torch.ones(1, 2, 3).as_subclass(Noting), torch.ones(1, 2, dtype=torch.bool)
    ops.router_score(hidden, mask, torch.ones(1, 3), torch.ones(1))
    assert POOL in seen and HEAD in seen


def test_a_row_without_a_prompt_is_zeros():
    hidden = torch.full((1, 3, 4), torch.nan)
    for kind in KINDS:
        assert not ops.router_pool(hidden, torch.zeros(1, 3, dtype=torch.bool), kind, 2).any()


def test_more_windows_than_tokens_repeat_tokens():
    hidden = torch.tensor([[[1.0], [2.0]]])
    everything = torch.ones(1, 2, dtype=torch.bool)
    assert ops.router_pool(hidden, everything, "windowed_mean", 5).tolist() == [[1, 1, 1, 2, 2]]


# --- router_pool_packed ---------------------------------------------------------------------------


def packed(case):
    """The prompts of a case one after the other: hidden [N, D], offsets [B + 1], kind, windows."""
    hidden, prompt_mask, kind, windows = case
    offsets = torch.zeros(len(hidden) + 1, dtype=torch.int64)
    offsets[1:] = prompt_mask.sum(1).cumsum(0)
    return hidden[prompt_mask], offsets, kind, windows


@our_kernels
@given(case=pool_cases())
@drawn
def test_packed_prompts_are_pooled_to_the_bits_of_padded_ones(run, case):
    assert torch.equal(run(PACKED, *packed(case)), run(POOL, *case))


@our_kernels
@given(case=pool_cases())
@drawn
def test_packed_views_are_read_in_place(run, case):
    hidden, offsets, kind, windows = packed(case)
    larger = hidden.new_full((2 * len(hidden), hidden.shape[1] + 3), torch.nan)
    larger[::2, 1:-2] = hidden
    pooled = run(PACKED, larger[::2, 1:-2], offsets, kind, windows)
    assert torch.equal(pooled, run(PACKED, hidden, offsets, kind, windows))


@given(case=pool_cases())
@drawn
def test_packed_pool_of_other_devices_is_near(case):
    hidden, prompt_mask, kind, windows = case
    pooled = composite(PACKED, *packed(case))
    magnitude = reference.router_pool(hidden.abs(), prompt_mask, kind, windows)
    assert pooled.dtype == accumulator(hidden.dtype)
    assert_near(pooled, reference.router_pool(*case), hidden.shape[1], magnitude)


@every_device
@given(case=pool_cases())
@drawn
def test_packed_gradient_is_the_padded_ones(run, case):
    hidden, prompt_mask, kind, windows = case
    grad_pooled, expected = pool_gradient(case)
    grad_pooled = grad_pooled.to(accumulator(hidden.dtype))
    tokens, offsets, _, _ = packed(case)
    grad = run(PACKED_BACKWARD, grad_pooled, offsets, kind, windows, len(tokens), hidden.dtype)
    assert grad.dtype == hidden.dtype
    assert_near(grad, expected[prompt_mask], windows, expected)


@given(case=pool_cases())
@drawn
def test_autograd_gives_the_packed_gradient(case):
    hidden, prompt_mask, kind, windows = case
    grad_pooled = pool_gradient(case)[0].to(accumulator(hidden.dtype))
    tokens, offsets, _, _ = packed(case)
    leaf = tokens.detach().requires_grad_()
    ops.router_pool_packed(leaf, offsets, kind, windows).backward(grad_pooled)
    padded = POOL_BACKWARD(grad_pooled, prompt_mask, kind, windows, hidden.dtype)
    assert torch.equal(leaf.grad, padded[prompt_mask])


OFFSETS = torch.tensor([0, 1, 3])


@every_device
@pytest.mark.parametrize(
    "args, error, message",
    [
        ((torch.zeros(3), OFFSETS), ValueError, r"hidden has shape \[3\]; expected \[N, D\]"),
        ((torch.zeros(3, 4).int(), OFFSETS), TypeError, "hidden is Int; expected float32"),
        ((torch.zeros(3, 4), OFFSETS.int()), TypeError, "offsets is Int; expected int64"),
        ((torch.zeros(3, 4), OFFSETS[:0]), ValueError, r"shape \[0\]; expected \[B \+ 1\]"),
    ],
)
def test_errors_of_packed_prompts_name_what_is_accepted(run, args, error, message):
    with pytest.raises(error, match=message):
        run(PACKED, *args, "mean", 1)


@pytest.mark.parametrize(
    "offsets, message",
    [
        ([0, 2], "begin with 0 and end with 2; expected 0 and 3"),
        ([1, 3], "begin with 1 and end with 3; expected 0 and 3"),
        ([0, 2, 1, 3], r"offsets\[2\] is 1, less than offsets\[1\] = 2"),
    ],
)
def test_offsets_rise_from_0_to_the_number_of_tokens(offsets, message):
    offsets = torch.tensor(offsets)
    with pytest.raises(ValueError, match=message):
        ops.router_pool_packed(torch.zeros(3, 4), offsets)
    grad = torch.zeros(len(offsets) - 1, 4)
    with pytest.raises(ValueError, match=message):
        PACKED_BACKWARD(grad, offsets, "mean", 1, 3, torch.float32)


@other_devices
@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], [-5, 9], [3, 0], [0]])
def test_other_devices_seek_no_token_that_does_not_exist(run, offsets):
    offsets = torch.tensor(offsets)
    for kind in KINDS:
        assert run(PACKED, torch.ones(3, 4), offsets, kind, 1).shape == (len(offsets) - 1, 4)
        grad = torch.zeros(len(offsets) - 1, 4)
        assert not run(PACKED_BACKWARD, grad, offsets, kind, 1, 3, torch.float32).any()


# --- router_head ----------------------------------------------------------------------------------


@every_device
@given(case=head_cases())
@drawn
def test_head_is_the_reference(run, case):
    pooled, weight, bias, out_weight, out_bias, norm_eps = case
    scale = 1
    if norm_eps > 0:
        scale = torch.rsqrt(pooled.square().mean(1, keepdim=True) + norm_eps)
    magnitude = (pooled * scale).abs() @ weight.abs().T + bias.abs()
    if out_weight is not None:
        magnitude = magnitude @ out_weight.abs().T + out_bias.abs()
    assert_near(run(HEAD, *case), reference.router_head(*case), sum(weight.shape), magnitude)


@given(case=head_cases())
@settings(max_examples=25)
def test_head_gradients_are_the_references(case):
    *tensors, norm_eps = case
    given_tensors = [t for t in tensors if t is not None]

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in given_tensors]
        padded = leaves + [None] * (len(tensors) - len(leaves))
        logit = function(*padded, norm_eps)
        return torch.autograd.grad(logit.sum(), leaves)

    actual = gradients(ops.router_head, tensors[0].dtype)
    expected = gradients(reference.router_head, torch.float64)
    for a, e in zip(actual, expected, strict=True):
        # Normalised features cancel in their own gradient: the magnitude is that of the terms.
        magnitude = e.abs().max() + 1 if e.numel() else e
        assert_near(a, e, 30 * sum(tensors[1].shape), magnitude)


def test_parameters_of_another_type_are_converted():
    pooled = torch.randn(2, 6)
    weight = torch.randn(1, 6, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.bfloat16)
    logit = ops.router_head(pooled, weight, bias)
    assert torch.equal(logit, ops.router_head(pooled, weight.float(), bias.float()))
    logit.sum().backward()
    assert weight.grad.dtype == torch.bfloat16


# --- What torch promises about ops ------------------------------------------------------------


def op_samples():
    prompt_mask = torch.tensor([[False, True, True, False, True], [False] * 5, [True] * 5])
    for dtype in DTYPES:
        for kind in KINDS:
            hidden = torch.randn(3, 5, 6).to(dtype).requires_grad_()
            yield f"pool-{kind}-{dtype}", POOL, (hidden, prompt_mask, kind, 2)
            F = 12 if kind == "windowed_mean" else 6
            grad = torch.randn(3, F, dtype=accumulator(dtype), requires_grad=True)
            yield (
                f"pool-backward-{kind}-{dtype}",
                POOL_BACKWARD,
                (grad, prompt_mask, kind, 2, dtype),
            )
            tokens = torch.randn(7, 6).to(dtype).requires_grad_()
            offsets = torch.tensor([0, 2, 2, 7])
            yield f"packed-{kind}-{dtype}", PACKED, (tokens, offsets, kind, 2)
            yield (
                f"packed-backward-{kind}-{dtype}",
                PACKED_BACKWARD,
                (grad, offsets, kind, 2, 7, dtype),
            )
    for dtype in (torch.float32, torch.float64):

        def leaf(*shape, dtype=dtype):
            return torch.randn(*shape, dtype=dtype, requires_grad=True)

        linear = (leaf(3, 6), leaf(1, 6), leaf(1), None, None, 1e-6)
        bottleneck = (leaf(3, 6), leaf(4, 6), leaf(4), leaf(1, 4), leaf(1), 0.0)
        yield f"head-linear-{dtype}", HEAD, linear
        yield f"head-bottleneck-{dtype}", HEAD, bottleneck


@pytest.mark.parametrize(
    "op, args", [pytest.param(*s[1:], id=s[0]) for s in op_samples() if "float64" in s[0]]
)
def test_first_and_second_derivatives(op, args):
    def function(*leaves):
        given_leaves = iter(leaves)
        return op(*[next(given_leaves) if is_leaf(a) else a for a in args])

    leaves = [a for a in args if is_leaf(a)]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def is_leaf(argument) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


@pytest.mark.parametrize("op, args", [pytest.param(*s[1:], id=s[0]) for s in op_samples()])
def test_meta_tensors_have_the_shape_and_type_of_the_result(op, args):
    on_meta = op(*[a.to("meta") if isinstance(a, Tensor) else a for a in args])
    result = op(*args)
    assert (on_meta.shape, on_meta.dtype) == (result.shape, result.dtype)


def test_compiles_without_graph_breaks():
    def score(hidden, prompt_mask, weight, bias):
        logit = ops.router_score(
            hidden, prompt_mask, weight, bias, norm_eps=1e-6, kind="windowed_mean", windows=2
        )
        return torch.sigmoid(logit)

    compiled = torch.compile(score, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, T in [(2, 5), (3, 9)]:
        inputs = torch.randn(B, T, 8), torch.rand(B, T) < 0.5, torch.randn(1, 16), torch.zeros(1)
        for tensor in (inputs[0], inputs[2]):
            tensor.requires_grad_()
        results = [function(*inputs) for function in (score, compiled)]
        torch.testing.assert_close(*results)
        grads = [torch.autograd.grad(r.sum(), (inputs[0], inputs[2])) for r in results]
        torch.testing.assert_close(*grads)


# --- Errors -------------------------------------------------------------------------------------

HIDDEN, MASK = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
POOLED, WEIGHT, BIAS = torch.zeros(2, 4), torch.zeros(1, 4), torch.zeros(1)
WIDE, WIDE_BIAS = torch.zeros(5, 4), torch.zeros(5)


@every_device
@pytest.mark.parametrize(
    "op, args, error, message",
    [
        (POOL, (HIDDEN[0], MASK, "mean", 1), ValueError, r"hidden has shape \[3, 4\].*\[B, T, D\]"),
        (POOL, (HIDDEN.int(), MASK, "mean", 1), TypeError, "hidden is Int; expected float32"),
        (POOL, (HIDDEN, MASK.int(), "mean", 1), TypeError, "prompt_mask is Int; expected bool"),
        (POOL, (HIDDEN, MASK[0], "mean", 1), ValueError, r"prompt_mask has shape \[3\]"),
        (POOL, (HIDDEN, MASK.T, "mean", 1), ValueError, r"\[3, 2\]; expected \[B, T\] = \[2, 3\]"),
        (POOL, (HIDDEN, MASK, "max", 1), ValueError, "kind is 'max'; expected 'mean', 'windowed"),
        (POOL, (HIDDEN, MASK, "mean", 0), ValueError, "windows is 0; expected 1 or more"),
        (
            POOL_BACKWARD,
            (torch.zeros(2, 3), MASK, "windowed_mean", 2, torch.float32),
            ValueError,
            "grad_pooled has shape .* a multiple of 2",
        ),
        (
            POOL_BACKWARD,
            (POOLED.double(), MASK, "mean", 1, torch.float32),
            TypeError,
            "grad_pooled is Double; expected Float",
        ),
        (HEAD, (POOLED.half(), WEIGHT, BIAS, None, None, 0.0), TypeError, "pooled is Half"),
        (HEAD, (POOLED, WEIGHT.double(), BIAS, None, None, 0.0), TypeError, "weight is Double"),
        (
            HEAD,
            (POOLED, WEIGHT[:, :3], BIAS, None, None, 0.0),
            ValueError,
            r"weight has shape \[1, 3\]; expected \[H, F\] = \[1, 4\]",
        ),
        (HEAD, (POOLED, WIDE, WIDE_BIAS, None, None, 0.0), ValueError, "a linear head expects"),
        (HEAD, (POOLED, WIDE, BIAS, None, None, 0.0), ValueError, r"bias has shape \[1\]"),
        (
            HEAD,
            (POOLED, WIDE, WIDE_BIAS, WIDE_BIAS[None], None, 0.0),
            ValueError,
            "out_weight was given without its out_bias",
        ),
        (
            HEAD,
            (POOLED, WIDE, WIDE_BIAS, WIDE_BIAS, BIAS, 0.0),
            ValueError,
            r"out_weight has shape \[5\]; expected \[1, H\] = \[1, 5\]",
        ),
    ],
)
def test_errors_name_the_value_and_what_is_accepted(run, op, args, error, message):
    with pytest.raises(error, match=message):
        run(op, *args)
