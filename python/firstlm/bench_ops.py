"""`firstlm bench ops`: every native op beside the best composition of torch's own, in one run.

A *contest* is one op on one case: our op, the torch compositions that do the same, and yardsticks,
such as reading the same bytes. All of them take turns, round by round, so that a slow minute of the
machine hits all alike. Where a bar is set for the op, the contest says how far from it the op is.

Letters: B sequences, T tokens, D hidden size; R rows, Hq query heads, H key/value heads, C slots.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from firstlm import ops
from firstlm.bandwidth import cold_bytes, read_all, read_gb_per_s, rotating
from firstlm.figures import measured

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


@torch.inference_mode()
def run(effort: Effort | None = None, *, threads: int | None = None, seed: int = 0) -> dict:
    """Figures of all contests, for `firstlm.figures`.

    Args:
        effort: default: a minute or two.
        threads: of torch and of our kernels; default: as torch is set.
        seed: of the drawn tensors.

    Returns:
        `{"isa", "threads", "load_average", "read_gb_per_s", "contests": [...]}`; the load is that
        of the minute before. A contest has `op`, `case`, `bytes`, `us` (arm or yardstick ->
        microseconds), `best_torch` (an arm), `speedup` over it, `gb_per_s`, `bandwidth_share` and
        `bars`.
    """
    effort = effort or Effort()
    threads = threads or torch.get_num_threads()
    torch.manual_seed(seed)
    before = torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    torch.set_num_threads(threads)
    try:
        rates = read_gb_per_s(2 * effort.cold_bytes)
        results = []
        for contest in contests(effort):
            results.append(_judge(contest, _measure(contest, effort, threads), rates))
            rates += read_gb_per_s(2 * effort.cold_bytes, repeats=2)  # the machine's mood changes
    finally:
        torch.set_num_threads(before)
    return {
        "isa": ops.isa(),
        "threads": threads,
        "load_average": load,
        "read_gb_per_s": measured(rates),
        "contests": results,
    }


def _measure(contest: Contest, effort: Effort, threads: int) -> dict[str, list[float]]:
    """Microseconds of every arm and yardstick, one value a block of calls."""
    calls = contest.arms | contest.yardsticks
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(effort.rounds):
        for name in calls if turn % 2 == 0 else reversed(calls):
            timer = Timer("call()", globals={"call": calls[name]}, num_threads=threads)
            measurement = timer.blocked_autorange(min_run_time=effort.seconds)
            times[name] += [1e6 * seconds for seconds in measurement.times]
    return times


def _judge(contest: Contest, times: dict[str, list[float]], rates: list[float]) -> dict:
    us = {name: measured(values) for name, values in times.items()}
    medians = {name: value["median"] for name, value in us.items()}
    best = min((name for name in contest.arms if name != OURS), key=medians.__getitem__)
    read = measured(rates)["median"]
    gb_per_s = contest.nbytes / 1e3 / medians[OURS]
    bars = []
    for bar in contest.bars:
        value = bar.value({**medians, "best_torch": medians[best]}, read)
        met = value >= bar.limit if bar.at_least else value <= bar.limit
        bars.append(
            {
                "quantity": bar.quantity,
                "value": value,
                "limit": bar.limit,
                "at_least": bar.at_least,
                "met": met,
            }
        )
    return {
        "op": contest.op,
        "case": contest.case,
        "bytes": contest.nbytes,
        "us": us,
        "best_torch": best,
        "speedup": medians[best] / medians[OURS],
        "gb_per_s": gb_per_s,
        "bandwidth_share": gb_per_s / read,
        "bars": bars,
    }


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures as a table for a terminal."""
    read = figures["read_gb_per_s"]
    lines = [
        f"{figures['isa']}, {figures['threads']} threads, memory read at {read['median']:.1f} GB/s "
        f"({read['p10']:.1f}-{read['p90']:.1f}, n {read['n']}); microseconds: median (p10-p90)",
        *_warnings(figures),
        "",
    ]
    for row in figures["contests"]:
        ours, best = row["us"][OURS], row["us"][row["best_torch"]]
        lines += [
            f"{row['op']}  {row['case']}",
            f"  {'firstlm':<34}{_microseconds(ours)}   {row['gb_per_s']:7.2f} GB/s",
            f"  {'torch: ' + row['best_torch']:<34}{_microseconds(best)}   "
            f"{row['speedup']:7.2f}x as long",
        ]
        for bar in row["bars"]:
            sign = ">=" if bar["at_least"] else "<="
            verdict = "met" if bar["met"] else "MISSED"
            lines.append(
                f"  {bar['quantity']}: {bar['value']:.3g} (bar {sign} {bar['limit']:g}, {verdict})"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _warnings(figures: Mapping[str, Any]) -> list[str]:
    load = figures["load_average"]
    if load is None or load < 0.5:
        return []
    return [f"warning: other work was running (load {load:.1f}): do not quote these figures"]


def _microseconds(value: Mapping[str, float]) -> str:
    return f"{value['median']:10.2f} ({value['p10']:.2f}-{value['p90']:.2f}, n {value['n']})"


# ---- the contests ----


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
    yield plan_contest(8, 30)


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
    lengths = torch.linspace(1, T, B).round().long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
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
