"""The contests of `firstlm bench ops`: every native op beside what torch's own do for the same.

A *contest* is one op on one case: our op, the torch compositions that do the same, and yardsticks,
such as reading the same bytes. Letters: B sequences, T tokens, D hidden size; R rows, Hq query
heads, H key/value heads, C slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from firstlm import ops
from firstlm.bandwidth import cold_bytes, read_all, rotating

OURS = "firstlm"


@dataclass(frozen=True)
class Bar:
    """A limit that an op should keep.

    Attributes:
        quantity: what is compared, in words.
        limit: the largest value that is good enough, or the smallest (`at_least`).
        value: from the median microseconds of the contest's arms and the read bandwidth in GB/s.
    """

    quantity: str
    limit: float
    value: Callable[[Mapping[str, float], float], float]
    at_least: bool = False


@dataclass
class Contest:
    """One op on one case.

    Attributes:
        op, case: names for the reader.
        nbytes: bytes that the op must move.
        arms: name -> a call; `firstlm` is ours, the others are torch compositions.
        yardsticks: what the bars compare with, beside the arms.
    """

    op: str
    case: str
    nbytes: int
    arms: dict[str, Callable[[], Any]]
    yardsticks: dict[str, Callable[[], Any]] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: times that the arms of a contest take turns.
        seconds: of one arm in one round.
        cold_bytes: bytes that cold buffers are together.
        scale: tokens and slots are divided by this.
    """

    rounds: int = 8
    seconds: float = 0.06
    cold_bytes: int = field(default_factory=cold_bytes)
    scale: int = 1


QUICK = Effort(rounds=1, seconds=0.001, cold_bytes=2**16, scale=64)


def contests(effort: Effort) -> Iterator[Contest]:
    """All contests, one at a time, so that their buffers do not add up."""
    for dtype in (torch.float32, torch.bfloat16):
        for B, T, D in ((1, 512, 576), (8, 512, 576), (4, 2048, 2048)):
            yield router_contest(B, max(T // effort.scale, 2), D, dtype, effort)
        yield packed_contest(8, max(512 // effort.scale, 2), 576, dtype, effort)
    for dtype in (torch.float32, torch.bfloat16):
        for R, T in ((1, 1), (8, 1), (1, 512), (8, 512)):
            yield kv_append_contest(R, max(T // effort.scale, 1), dtype, effort)
    for dtype in (torch.float32, torch.bfloat16):
        for Hq, H, D in ((9, 3, 64), (32, 8, 128)):
            yield attention_contest(1, Hq, H, max(4096 // effort.scale, 2), D, dtype, effort)
    for B, T in ((2, 1), (8, 1), (8, 128)):
        yield rows_contest(B, max(T // effort.scale, 1), effort)
        yield scatter_add_contest(B, max(T // effort.scale, 1))
    yield plan_contest(8, 30)
    # What training adds.
    T = max(128 // effort.scale, 2)
    yield pool_backward_contest(8, T, 576, torch.float32)
    yield packed_backward_contest(8, T, 576, torch.float32)
    yield blend_contest(8, T)
    yield gather_backward_contest(8, T)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_READ_BAR = Bar(
    "times as long as reading its input", 1.3, lambda us, _: us[OURS] / us["reading the input"]
)


def router_contest(B: int, T: int, D: int, dtype: torch.dtype, effort: Effort) -> Contest:
    """Masked mean and linear head; hidden states [B, T, D] that no cache holds."""
    hidden = torch.empty(B, T, D, dtype=dtype)
    states = rotating(lambda: torch.randn(B, T, D).to(dtype), hidden.nbytes, effort.cold_bytes)
    mask = torch.ones(B, T, dtype=torch.bool)  # no padding: what is masked would not be read
    weight, bias = torch.randn(1, D), torch.zeros(1)
    # What torch needs of the mask is made once a prompt, not once a layer; so here, outside.
    share = (mask / mask.sum(1, keepdim=True)).to(dtype)[:, None]  # [B, 1, T]
    share_f32 = share[:, 0, :, None].float()  # [B, T, 1]

    def ours() -> Tensor:
        return ops.router_score(next(states), mask, weight, bias)

    def by_product() -> Tensor:
        return torch.nn.functional.linear(
            torch.bmm(share, next(states))[:, 0].float(), weight, bias
        )

    def by_sum() -> Tensor:
        return torch.nn.functional.linear((next(states) * share_f32).sum(1), weight, bias)

    return Contest(
        op="router scoring",
        case=f"B {B}, T {T}, D {D}, {_dtype(dtype)}, cold",
        nbytes=hidden.nbytes,
        arms={OURS: ours, "bmm, linear": by_product, "mul, sum, linear": by_sum},
        yardsticks={"reading the input": lambda: read_all(next(states))},
        bars=[_READ_BAR],
    )


def packed_contest(B: int, T: int, D: int, dtype: torch.dtype, effort: Effort) -> Contest:
    """Mean and linear head of B prompts of 1 to T tokens, one after the other in [N, D]."""
    lengths, offsets = _packed(B, T)
    N = int(offsets[-1])
    hidden = torch.empty(N, D, dtype=dtype)
    states = rotating(lambda: torch.randn(N, D).to(dtype), hidden.nbytes, effort.cold_bytes)
    weight, bias = torch.randn(1, D), torch.zeros(1)
    sizes = lengths.tolist()

    def ours() -> Tensor:
        return ops.router_score_packed(next(states), offsets, weight, bias)

    def one_by_one() -> Tensor:
        prompts = next(states).split(sizes)
        pooled = torch.stack([prompt.mean(0, dtype=torch.float32) for prompt in prompts])
        return torch.nn.functional.linear(pooled, weight, bias)

    def by_segments() -> Tensor:
        pooled = torch.segment_reduce(next(states).float(), "mean", lengths=lengths, unsafe=True)
        return torch.nn.functional.linear(pooled, weight, bias)

    return Contest(
        op="router scoring, packed",
        case=f"B {B}, N {N}, D {D}, {_dtype(dtype)}, cold",
        nbytes=hidden.nbytes,
        arms={OURS: ours, "mean a prompt, linear": one_by_one, "segment_reduce": by_segments},
        yardsticks={"reading the input": lambda: read_all(next(states))},
        bars=[_READ_BAR],
    )


def kv_append_contest(R: int, T: int, dtype: torch.dtype, effort: Effort) -> Contest:
    """T new tokens for 3 heads of 64, from the layout that a projection leaves."""
    H, D = 3, 64
    C = max(2 * T, 16)
    start = torch.tensor([C // 4])
    first = C // 4

    def make() -> tuple[Tensor, ...]:
        storage = [torch.zeros(R, H, C, D, dtype=dtype) for _ in range(2)]
        new = [torch.randn(R, T, H, D).to(dtype).transpose(1, 2) for _ in range(2)]
        flat = [torch.zeros(R, H, T, D, dtype=dtype).transpose(1, 2).contiguous() for _ in range(2)]
        return (*storage, *new, *(f.transpose(1, 2) for f in flat))

    nbytes = 2 * R * H * T * D * torch.empty(0, dtype=dtype).element_size()
    cold = T > 1
    buffers = rotating(make, 2 * nbytes, effort.cold_bytes if cold else 1)

    def ours() -> None:
        keys, values, new_keys, new_values, _, _ = next(buffers)
        ops.kv_append(keys, values, new_keys, new_values, start)

    def by_slices() -> None:
        keys, values, new_keys, new_values, _, _ = next(buffers)
        keys[:, :, first : first + T] = new_keys
        values[:, :, first : first + T] = new_values

    def by_concatenation() -> None:
        keys, values, new_keys, new_values, _, _ = next(buffers)
        torch.cat([keys[:, :, :first], new_keys], 2)
        torch.cat([values[:, :, :first], new_values], 2)

    def copy() -> None:
        _, _, new_keys, new_values, flat_keys, flat_values = next(buffers)
        flat_keys.copy_(new_keys)
        flat_values.copy_(new_values)

    return Contest(
        op="kv_append",
        case=f"R {R}, H {H}, T {T}, D {D}, {_dtype(dtype)}, {'cold' if cold else 'warm'}",
        nbytes=2 * nbytes,
        arms={OURS: ours, "slice assignment": by_slices, "cat (DynamicCache)": by_concatenation},
        yardsticks={"copying the bytes": copy},
        bars=[
            Bar(
                "times as long as copying its bytes",
                1.3,
                lambda us, _: us[OURS] / us["copying the bytes"],
            )
        ],
    )


def attention_contest(
    R: int, Hq: int, H: int, C: int, D: int, dtype: torch.dtype, effort: Effort
) -> Contest:
    """One query token over C cached ones that no cache of the CPU holds."""
    query = torch.randn(R, Hq, D).to(dtype)
    begin, end = torch.tensor([0]), torch.tensor([C])

    def make() -> tuple[Tensor, Tensor]:
        keys, values = (torch.randn(R, H, C, D).to(dtype) for _ in range(2))
        return keys, values

    nbytes = 2 * R * H * C * D * query.element_size()
    caches = rotating(make, nbytes, effort.cold_bytes)

    def ours() -> Tensor:
        return ops.decode_attention(query, *next(caches), begin, end)

    def sdpa() -> Tensor:
        keys, values = next(caches)
        return torch.nn.functional.scaled_dot_product_attention(
            query[:, :, None], keys, values, enable_gqa=Hq != H
        )

    def products() -> Tensor:
        keys, values = next(caches)
        grouped = query.view(R, H, Hq // H, D)
        weights = torch.softmax(grouped @ keys.transpose(2, 3) * D**-0.5, -1)
        return weights @ values

    def read() -> None:
        keys, values = next(caches)
        read_all(keys)
        read_all(values)

    return Contest(
        op="decode_attention",
        case=f"R {R}, Hq {Hq}, H {H}, C {C}, D {D}, {_dtype(dtype)}, cold",
        nbytes=nbytes,
        arms={
            OURS: ours,
            "scaled_dot_product_attention": sdpa,
            "matmul, softmax, matmul": products,
        },
        yardsticks={"reading the cache": read},
        bars=[
            Bar(
                "share of read bandwidth",
                0.8,
                lambda us, read: nbytes / 1e3 / us[OURS] / read,
                at_least=True,
            ),
            Bar(
                "times as long as scaled_dot_product_attention",
                1.0,
                lambda us, _: us[OURS] / us["scaled_dot_product_attention"],
            ),
        ],
    )


def rows_contest(B: int, T: int, effort: Effort) -> Contest:
    """Half of the rows gathered, and their outputs scattered back, beside a decoder layer that runs
    them: llama of SmolLM2-135M's shape, at its fastest, without tokens in a cache."""
    layer, config = _smollm2_layer()
    rows = torch.arange(0, B, 2)
    R, D = len(rows), config.hidden_size
    hidden, output = torch.randn(B, T, D), torch.randn(R, T, D)
    states = hidden.clone()
    head_dim = D // config.num_attention_heads
    rotary = (torch.randn(R, T, head_dim), torch.randn(R, T, head_dim))

    def ours() -> None:
        ops.gather_rows(hidden, rows)
        ops.scatter_rows_(states, rows, output)

    def by_index() -> None:
        hidden.index_select(0, rows)
        states.index_copy_(0, rows, output)

    return Contest(
        op="gather_rows + scatter_rows_",
        case=f"B {B}, R {R}, T {T}, D {D}, float32, warm",
        nbytes=4 * output.nbytes,
        arms={OURS: ours, "index_select, index_copy_": by_index},
        yardsticks={"the layer": lambda: layer(output, position_embeddings=rotary)},
        bars=[Bar("share of the layer's time", 0.03, lambda us, _: us[OURS] / us["the layer"])],
    )


def scatter_add_contest(B: int, T: int) -> Contest:
    """The update of half of the rows added to the residual stream."""
    rows = torch.arange(0, B, 2)
    hidden, update = torch.randn(B, T, 576), torch.randn(len(rows), T, 576)
    return Contest(
        op="scatter_add_rows_",
        case=f"B {B}, R {len(rows)}, T {T}, D 576, float32, warm",
        nbytes=3 * update.nbytes,
        arms={
            OURS: lambda: ops.scatter_add_rows_(hidden, rows, update),
            "index_add_": lambda: hidden.index_add_(0, rows, update),
        },
    )


def plan_contest(B: int, L: int) -> Contest:
    """The rows that keep each layer, once a request."""
    keep = torch.rand(B, L) < 0.7

    def by_layer() -> list[Tensor]:
        return [keep[:, layer].nonzero() for layer in range(L)]

    return Contest(
        op="plan_rows",
        case=f"B {B}, L {L}, warm",
        nbytes=B * L * (1 + 8),
        arms={OURS: lambda: ops.plan_rows(keep), "nonzero a layer": by_layer},
    )


def pool_backward_contest(B: int, T: int, D: int, dtype: torch.dtype) -> Contest:
    """What the hidden states [B, T, D] get of the gradient of their masked mean."""
    grad, mask = torch.randn(B, D), torch.ones(B, T, dtype=torch.bool)
    share = (mask / mask.sum(1, keepdim=True))[:, :, None]  # [B, T, 1]
    backward = torch.ops.firstlm.router_pool_backward
    return Contest(
        op="router_pool_backward",
        case=f"B {B}, T {T}, D {D}, {_dtype(dtype)}, warm",
        nbytes=B * T * D * dtype.itemsize,
        arms={
            OURS: lambda: backward(grad, mask, "mean", 1, dtype),
            "mul": lambda: (grad[:, None] * share).to(dtype),
        },
    )


def packed_backward_contest(B: int, T: int, D: int, dtype: torch.dtype) -> Contest:
    """The same for B prompts of 1 to T tokens in [N, D]."""
    lengths, offsets = _packed(B, T)
    N, grad = int(offsets[-1]), torch.randn(B, D)
    backward = torch.ops.firstlm.router_pool_packed_backward

    def repeated() -> Tensor:
        return (grad / lengths[:, None]).repeat_interleave(lengths, 0, output_size=N).to(dtype)

    return Contest(
        op="router_pool_packed_backward",
        case=f"B {B}, N {N}, D {D}, {_dtype(dtype)}, warm",
        nbytes=N * D * dtype.itemsize,
        arms={
            OURS: lambda: backward(grad, offsets, "mean", 1, N, dtype),
            "div, repeat_interleave": repeated,
        },
    )


def blend_contest(B: int, T: int) -> Contest:
    """A copy of the batch in which half of the rows are blended with their layer's output."""
    rows, gate = torch.arange(0, B, 2), torch.full((B // 2,), 0.5)
    hidden, values = torch.randn(B, T, 576), torch.randn(len(rows), T, 576)

    def by_index() -> Tensor:
        return hidden.index_copy(0, rows, torch.lerp(hidden[rows], values, gate[:, None, None]))

    return Contest(
        op="scatter_rows, gate",
        case=f"B {B}, R {len(rows)}, T {T}, D 576, float32, warm",
        nbytes=2 * hidden.nbytes + values.nbytes,
        arms={OURS: lambda: ops.scatter_rows(hidden, rows, values, gate), "index_copy": by_index},
    )


def gather_backward_contest(B: int, T: int) -> Contest:
    """The gradient of half of the rows, back in the batch."""
    rows = torch.arange(0, B, 2)
    grad = torch.randn(len(rows), T, 576)
    backward = torch.ops.firstlm.gather_rows_backward
    return Contest(
        op="gather_rows_backward",
        case=f"B {B}, R {len(rows)}, T {T}, D 576, float32, warm",
        nbytes=3 * grad.nbytes,
        arms={
            OURS: lambda: backward(grad, rows, B),
            "zeros, index_add_": lambda: torch.zeros(B, T, 576).index_add_(0, rows, grad),
        },
    )


def _packed(B: int, T: int) -> tuple[Tensor, Tensor]:
    """(lengths [B], offsets [B + 1]) of prompts of 1 to T tokens."""
    lengths = torch.linspace(1, T, B).round().long()
    return lengths, torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])


def _smollm2_layer():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    return LlamaDecoderLayer(config, 0).eval(), config
