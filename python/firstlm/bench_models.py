"""One set of weights for all runtimes of a benchmark: transformers, llama.cpp, firstlm's engine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from firstlm import embedded_model, gguf_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from firstlm.engine import Engine

# The engine's precision -> the GGUF types of about as many bits.
EQUAL_GGUF = {
    "float32": ("f32",),
    "bfloat16": ("bf16",),
    "int8": ("q8_0",),
    "int4": ("q4_0", "q4_1"),
}
PRECISIONS = tuple(EQUAL_GGUF)


@dataclass
class BenchModel:
    """What is measured.

    Attributes:
        path: as the user gave it; firstlm's engine loads it from there.
        hf: the plain model of transformers in float32: adapters merged, no routers.
        tokenizer: its tokenizer.
        gguf_folder: where GGUF files of exactly these weights are kept.
    """

    path: str
    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    gguf_folder: Path

    def engine(self, precision: str, num_threads: int) -> Engine:
        """firstlm's engine with these weights."""
        import firstlm

        with without_weight_bars():
            return firstlm.Engine.from_pretrained(
                self.path, precision=precision, num_threads=num_threads
            )

    def gguf(self, kinds: Sequence[str], num_threads: int = 0) -> dict[str, Path]:
        """GGUF files of `gguf_files.TYPES`; those that are not there yet are made."""
        return gguf_files.gguf_files(
            self.hf, self.gguf_folder, kinds, progress=True, num_threads=num_threads
        )


def load(path: str, work_dir: str | os.PathLike[str] | None = None) -> BenchModel:
    """Load what `firstlm.from_pretrained` loads, as a plain float32 model.

    Args:
        path: a base model or a checkpoint of firstlm, whose adapter is merged.
        work_dir: for GGUF files; default: the user's cache.
    """
    import firstlm
    from firstlm.tokenizer import load_tokenizer

    with without_weight_bars():
        routed = firstlm.from_pretrained(path, dtype=torch.float32, merge_adapter=True)
    hf = _plain(routed.config, plain_weights(routed), torch.float32)
    folder = Path(work_dir) if work_dir else embedded_model.cache_dir() / "gguf"
    tokenizer = load_tokenizer(path)
    return BenchModel(path, hf, tokenizer, folder / _digest(hf)[:16])


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a plain model; rotary frequencies stay float32, as when transformers loads it."""
    return _plain(model.config, model.state_dict(), dtype)


def plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict without routers."""
    return {name: t for name, t in model.state_dict().items() if ".router." not in name}


def _plain(config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(weights)
    model.generation_config.eos_token_id = None  # or generate would stop before the others do
    return model.eval()


def _digest(model: PreTrainedModel) -> str:
    """sha256 of what a GGUF file is made of: the config's numbers and the weights."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def without_weight_bars() -> Iterator[None]:
    """transformers loads weights without a progress bar, which would tear ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Sizes:
    """Bytes that a decode step reads.

    Attributes:
        layers: of the weights of each layer, [L].
        head: of the output projection and the last norm.
        kv_token: of the keys and values of one token in one layer.
    """

    layers: tuple[int, ...]
    head: int
    kv_token: int

    @property
    def weights(self) -> int:
        """Of all layers and the head."""
        return sum(self.layers) + self.head

    def step_weights(self, keep: Tensor) -> int:
        """Weights of a step of rows with the plans `keep` [B, L]: layers that any row keeps."""
        used = keep.any(0).tolist()
        return self.head + sum(n for n, any_row in zip(self.layers, used, strict=True) if any_row)

    def step(self, keep: Tensor, cached_tokens: float) -> float:
        """All bytes of a step over caches of so many tokens."""
        return self.step_weights(keep) + int(keep.sum()) * self.kv_token * cached_tokens


def hf_sizes(model: PreTrainedModel) -> Sizes:
    """Of a plain model of transformers, whose cache has the weights' dtype."""
    from firstlm.routed_model import find_decoder_layers

    layers = find_decoder_layers(model)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = model.get_output_embeddings().weight
    return Sizes(
        tuple(sum(p.nbytes for p in layer.parameters()) for layer in layers),
        head.nbytes,
        2 * config.num_key_value_heads * head_dim * head.element_size(),
    )


def gguf_sizes(path: Path, config: Any) -> Sizes:
    """Of a GGUF file in llama.cpp, whose cache is float16."""
    found = gguf_files.tensor_bytes(path)
    layers = [0] * config.num_hidden_layers
    for name, nbytes in found.items():
        if name.startswith("blk."):
            layers[int(name.split(".")[1])] += nbytes
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = found.get("output.weight", found["token_embd.weight"])
    kv_token = 2 * config.num_key_value_heads * head_dim * 2
    return Sizes(tuple(layers), head + found["output_norm.weight"], kv_token)


@dataclass
class Timing:
    """One run: a prompt, then tokens one after the other.

    Attributes:
        ttft_s: to the first token; None: the prompt was there already.
        decode_s: of the tokens after the first, together.
        steps: how many these were.
        tokens: of every row, the first one included.
    """

    ttft_s: float | None
    decode_s: float
    steps: int
    tokens: list[list[int]]


class Stopwatch:
    """Seconds between its calls."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def __call__(self) -> float:
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed
