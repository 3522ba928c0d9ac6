"""From the modules of a Hugging Face model to the packed tensors of the native decoder.

Everything is packed in slices of some rows, and a source that the engine owns is given back to the
system as its slices are done, so that source and result never lie in memory together as wholes.
Letters: N outputs, K inputs of a matrix; D hidden_size, I intermediate_size, V vocabulary.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from firstlm import native
from firstlm.engine import lora
from firstlm.engine.config import PANEL_ROWS
from firstlm.engine.tensor_block import Spec, TensorBlock

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
_SLICE_ELEMENTS = 4 << 20


@dataclass(frozen=True)
class Matrix:
    """A matrix [N, K] whose rows are made of its sources when they are needed.

    Attributes:
        rows: (first, last) -> [last - first, K]; both ends are multiples of `unit`, but for N.
        sources: the modules that it is made of.
        low_rank: () -> (A [R, K], B [N, R]) of adapters that are kept apart, None without any.
    """

    N: int
    K: int
    rows: Callable[[int, int], torch.Tensor]
    sources: tuple[nn.Module, ...]
    unit: int = PANEL_ROWS
    low_rank: Callable[[], tuple[torch.Tensor, torch.Tensor] | None] = lambda: None


def check_precision(precision: str, name: str = "precision") -> str:
    """Raises ValueError unless `precision` is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"{name} must be one of {PRECISIONS}, got {precision!r}")
    return precision


def pack_model(
    model: Any,
    precision: str,
    head_precision: str,
    *,
    num_threads: int,
    apart: bool = False,
    owned: bool = False,
    progress: bool = False,
) -> TensorBlock:
    """The decoder's tensors: matrices packed (uint8), norms and biases f32; and the routers'.

    Adapters that are kept apart are `lora_A`, packed as bfloat16 (float32 beside float32), and
    `lora_B`, packed columns.

    Args:
        model: a causal LM that `config.decoder_config` accepts, adapters merged or plain LoRA.
        precision: of the layers.
        head_precision: of the embeddings and the output head.
        apart: adapters are kept apart from the weights.
        owned: nobody else has the model: its weights are freed as they are packed.
        progress: show a bar on stderr.

    Raises:
        ValueError: a module that is no plain linear layer.
    """
    from tqdm.auto import tqdm

    matrices, vectors = _matrices(model, apart), dict(_vectors(model))
    precisions = {n: precision if n.startswith("layers.") else head_precision for n in matrices}
    specs: dict[str, Spec] = {
        name: (torch.uint8, (native.packed_bytes(precisions[name], matrix.N, matrix.K),))
        for name, matrix in matrices.items()
    }
    specs |= {name: (torch.float32, tuple(vector.shape)) for name, vector in vectors.items()}
    adapters = dict(_packed_adapters(matrices, precisions, num_threads))
    specs |= {name: (torch.uint8, (packed.numel(),)) for name, packed in adapters.items()}
    block = TensorBlock.allocate(specs)
    for name, vector in (vectors | adapters).items():
        block.tensors[name].copy_(vector.detach())
    with tqdm(
        total=sum(matrix.N * matrix.K for matrix in matrices.values()),
        desc=f"packing weights as {precision}",
        unit=" weights", unit_scale=True, disable=not progress,
    ) as bar:  # fmt: skip
        users = {name: [m.weight.data_ptr() for m in matrices[name].sources] for name in matrices}
        waiting = Counter(address for addresses in users.values() for address in addresses)
        for name, matrix in matrices.items():
            _pack(matrix, precisions[name], num_threads, block.tensors[name], bar.update)
            waiting.subtract(users[name])
            for module, address in zip(matrix.sources, users[name], strict=True):
                if owned and waiting[address] == 0:  # tied weights have another user
                    _free(module)
    return block


def _pack(
    matrix: Matrix,
    precision: str,
    num_threads: int,
    packed: torch.Tensor,
    done: Callable[[int], Any],
) -> None:
    """Packs by slices: panels lie one after the other, so those of whole panels do as well."""
    step = max(1, _SLICE_ELEMENTS // (matrix.K * matrix.unit)) * matrix.unit
    offset = 0
    for first in range(0, matrix.N, step):
        last = min(first + step, matrix.N)
        rows = matrix.rows(first, last).detach().to("cpu")
        size = native.packed_bytes(precision, last - first, matrix.K)
        native.pack(rows.contiguous(), precision, num_threads, packed[offset : offset + size])
        offset += size
        done(rows.numel())


def _packed_adapters(
    matrices: dict[str, Matrix], precisions: dict[str, str], num_threads: int
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, matrix in matrices.items():
        pair = matrix.low_rank()
        if pair is not None:
            A, B = pair
            module = name.removesuffix(".weight")
            precision = "float32" if precisions[name] == "float32" else "bfloat16"
            yield f"{module}.lora_A", native.pack(A, precision, num_threads)
            yield f"{module}.lora_B", native.pack_columns(B)


# ---- the matrices and vectors of a model ----


def _matrices(model: Any, apart: bool) -> dict[str, Matrix]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = {"embed_tokens.weight": _fused((embedding,), _stacked)}
    if head is not None and not _is_tied(head, embedding):
        matrices["lm_head.weight"] = _fused((head,), _stacked, apart)
    for index, layer in enumerate(model.get_decoder().layers):
        for name, matrix in _layer_matrices(layer, apart):
            matrices[f"layers.{index}.{name}"] = matrix
    return matrices


def _is_tied(head: nn.Module, embedding: nn.Module) -> bool:
    same = head.weight.data_ptr() == embedding.weight.data_ptr()
    return same and not any(map(lora.is_adapted, (head, embedding)))


def _vectors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield "norm.weight", model.get_decoder().norm.weight
    for index, layer in enumerate(model.get_decoder().layers):
        for name, vector in _layer_vectors(layer):
            yield f"layers.{index}.{name}", vector
        if hasattr(layer, "router"):
            for name, parameter in layer.router.named_parameters():
                yield f"layers.{index}.router.{name}", parameter


def _layer_matrices(layer: nn.Module, apart: bool) -> Iterator[tuple[str, Matrix]]:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = attention.q_proj, attention.k_proj, attention.v_proj
    yield "self_attn.qkv_proj.weight", _fused(qkv, _stacked, apart)
    yield "self_attn.o_proj.weight", _fused((attention.o_proj,), _stacked, apart)
    yield "mlp.gate_up_proj.weight", _fused((mlp.gate_proj, mlp.up_proj), _in_turns, apart)
    yield "mlp.down_proj.weight", _fused((mlp.down_proj,), _with_padded_inputs, apart)


def _layer_vectors(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    attention, mlp = layer.self_attn, layer.mlp
    yield "input_layernorm.weight", layer.input_layernorm.weight
    yield "post_attention_layernorm.weight", layer.post_attention_layernorm.weight
    for name in ("q_norm", "k_norm"):
        if getattr(attention, name, None) is not None:
            yield f"self_attn.{name}.weight", getattr(attention, name).weight
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    if any(module.bias is not None for module in qkv):
        yield "self_attn.qkv_proj.bias", torch.cat([_bias(module) for module in qkv])
    if attention.o_proj.bias is not None:
        yield "self_attn.o_proj.bias", attention.o_proj.bias
    if mlp.gate_proj.bias is not None or mlp.up_proj.bias is not None:
        pair = [_bias(module)[:, None] for module in (mlp.gate_proj, mlp.up_proj)]
        yield "mlp.gate_up_proj.bias", _interleaved(*pair)[:, 0]
    if mlp.down_proj.bias is not None:
        yield "mlp.down_proj.bias", mlp.down_proj.bias


def _bias(module: nn.Module) -> torch.Tensor:
    return torch.zeros(module.weight.shape[0]) if module.bias is None else module.bias


@dataclass(frozen=True)
class _Rows:
    """Rows [N, K] that are made of those of some tensors; as in `Matrix`."""

    N: int
    K: int
    rows: Callable[[int, int], torch.Tensor]
    unit: int = PANEL_ROWS


def _fused(
    modules: tuple[nn.Module, ...],
    arrange: Callable[[list[torch.Tensor]], _Rows],
    apart: bool = False,
) -> Matrix:
    """The weights of modules that share their inputs as one matrix, adapters merged or `apart`."""
    made = arrange([_weight_of(module, apart) for module in modules])

    def arranged(blocks: list[torch.Tensor]) -> torch.Tensor:
        return arrange(blocks).rows(0, made.N)

    def low_rank() -> tuple[torch.Tensor, torch.Tensor] | None:
        pair = lora.fused(modules, arranged) if apart else None
        if pair is None:
            return None
        A, B = pair
        return nn.functional.pad(A, (0, made.K - A.shape[1])), B

    return Matrix(made.N, made.K, made.rows, modules, made.unit, low_rank)


def _stacked(weights: list[torch.Tensor]) -> _Rows:
    """The outputs of some modules one after the other."""

    def rows(first: int, last: int) -> torch.Tensor:
        parts, start = [], 0
        for weight in weights:
            begin, end = max(first - start, 0), min(last - start, len(weight))
            if begin < end:
                parts.append(weight[begin:end])
            start += len(weight)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return _Rows(sum(map(len, weights)), weights[0].shape[1], rows)


def _in_turns(pair: list[torch.Tensor]) -> _Rows:
    """[2 I, D]: 16 rows of gate, 16 of up, and so on; I is padded to whole blocks with zeros."""
    blocks = -(-len(pair[0]) // PANEL_ROWS)

    def rows(first: int, last: int) -> torch.Tensor:
        return _interleaved(*(weight[first // 2 : last // 2] for weight in pair))

    return _Rows(2 * blocks * PANEL_ROWS, pair[0].shape[1], rows, 2 * PANEL_ROWS)


def _interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[n, K] twice -> [2 n, K] in turns of 16 rows, n padded to whole blocks."""
    padding = (0, 0, 0, -len(gate) % PANEL_ROWS)
    blocks = [nn.functional.pad(w, padding).unflatten(0, (-1, PANEL_ROWS)) for w in (gate, up)]
    return torch.stack(blocks, 1).flatten(0, 2)


def _with_padded_inputs(weights: list[torch.Tensor]) -> _Rows:
    (weight,) = weights
    padding = -weight.shape[1] % PANEL_ROWS

    def rows(first: int, last: int) -> torch.Tensor:
        return nn.functional.pad(weight[first:last], (0, padding))

    return _Rows(len(weight), weight.shape[1] + padding, rows)


@dataclass(frozen=True)
class _Merged:
    """A weight [N, K] with LoRA adapters merged in f32, slice by slice: no whole one is held."""

    weight: torch.Tensor
    pairs: list[tuple[torch.Tensor, torch.Tensor]]  # A [R, K], B [N, R] times the scale

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        merged = self.weight[rows].float()
        for A, B in self.pairs:
            merged = merged + B[rows] @ A
        return merged


def _weight_of(module: nn.Module, apart: bool) -> torch.Tensor | _Merged:
    """The weight [N, K] of a linear layer or embedding; LoRA adapters are merged, or not.

    Raises:
        ValueError: a module of another kind.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return module.weight.detach()
    if not lora.is_plain(module):
        raise ValueError(
            f"firstlm.Engine takes linear layers, plain or with LoRA, got {type(module).__name__}: "
            "merge the adapter first; or the hf path, firstlm.from_pretrained(...).generate(...)"
        )
    weight = module.base_layer.weight.detach()
    pairs = [] if apart else list(lora.pairs_of(module))
    return _Merged(weight, pairs) if pairs else weight


# ---- giving memory back ----


def _free(module: nn.Module) -> None:
    """Drops the weight of a module; where it is a view of a mapped file, its pages as well."""
    weight = module.weight.data
    if weight.device.type == "cpu" and weight.is_contiguous():
        _drop_pages(weight.data_ptr(), weight.nbytes)
    module.weight.data = torch.empty(0, dtype=weight.dtype)


def _drop_pages(address: int, nbytes: int) -> None:
    """Whole pages of a range that nothing will read again stop counting as ours."""
    if sys.platform != "linux":
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
