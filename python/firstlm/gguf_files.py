"""GGUF files of a transformers model, so that llama.cpp can run the same weights.

The float32 file is written here. The others are made from it by llama.cpp's own quantisation, so
they are what its users run: q8_0, q4_0 and q4_1 choose the type of the embedding themselves.

The files carry no tokenizer: whoever runs them hands in token ids.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# model_type of a transformers config -> llama.cpp's architecture, and whether its query and key
# rows are interleaved: llama.cpp rotates neighbouring rows there, transformers rotates halves.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "smollm3": ("smollm3", True),
}
QUANTIZED = ("bf16", "q8_0", "q4_0", "q4_1")
TYPES = ("f32", *QUANTIZED)


def write_gguf(model: Any, path: str | os.PathLike[str]) -> Path:
    """Write the weights of a causal LM as a float32 GGUF, whole or not at all.

    Args:
        model: of transformers, of a family in `ARCHITECTURES`; routers are left out, and adapters
            must have been merged.
        path: the file; its folder is made.

    Raises:
        ValueError: another family, or a config that the file could not express.
    """
    import gguf

    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type {config.model_type!r} cannot be written as GGUF; these can: "
            f"{sorted(ARCHITECTURES)}"
        )
    name, interleaved = ARCHITECTURES[config.model_type]
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ValueError(f"llama.cpp's {name} has no sliding window, this config has one")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    try:
        writer = gguf.GGUFWriter(part, name)
        _add_config(writer, config)
        if (factors := _rope_factors(model)) is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        for tensor_name, values in _named_tensors(model, name, interleaved):
            writer.add_tensor(tensor_name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def quantize(source: Path, target: Path, kind: str, num_threads: int = 0) -> Path:
    """Make one of `QUANTIZED` from a float32 GGUF with llama.cpp, whole or not at all.

    Args:
        num_threads: 0: as many as llama.cpp finds.

    Raises:
        RuntimeError: llama.cpp could not.
    """
    import ctypes

    from firstlm.llama_cpp_model import binding

    llama_cpp = binding()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = num_threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    part = _beside(target)
    try:
        status = llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(part), ctypes.byref(params)
        )
        if status != 0:
            raise RuntimeError(f"llama.cpp could not make {kind} of {source} (status {status})")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def gguf_files(
    model: Any, folder: Path, kinds: Sequence[str], *, progress: bool = False, num_threads: int = 0
) -> dict[str, Path]:
    """Files of several `TYPES` in one folder; those that are there already are kept.

    Args:
        model: of transformers, or a call that loads it; only needed if the float32 file is missing.
        folder: of this model alone.

    Returns:
        kind -> file.

    Raises:
        ValueError: an unknown kind.
    """
    from tqdm.auto import tqdm

    if unknown := set(kinds) - set(TYPES):
        raise ValueError(f"unknown GGUF types {sorted(unknown)}: {list(TYPES)} are known")
    files = {kind: Path(folder) / f"{kind}.gguf" for kind in kinds}
    missing = [kind for kind in files if not files[kind].is_file()]
    source = Path(folder) / "f32.gguf"
    for kind in tqdm(missing, desc="GGUF files", disable=not progress or not missing):
        if not source.is_file():
            write_gguf(model if hasattr(model, "config") else model(), source)
        if kind != "f32":
            quantize(source, files[kind], kind, num_threads)
    return files


def tensor_bytes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Bytes of every tensor in a GGUF file, by name."""
    import gguf

    return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}


def _add_config(writer: Any, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(0)  # all float32


def _rope_factors(model: Any) -> np.ndarray | None:
    """What llama.cpp divides the rotary frequencies by, [head_dim / 2]; None: by 1."""
    rotary = model.get_decoder().rotary_emb
    if getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise ValueError("rotary embeddings that scale the attention are not written as GGUF")
    used = rotary.inv_freq.double().cpu()
    theta = model.config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(len(used), dtype=torch.float64) / len(used))
    factors = (plain / used).numpy()
    return None if np.allclose(factors, 1, rtol=1e-4) else factors.astype(np.float32)


def _named_tensors(model: Any, arch: str, interleaved: bool) -> Iterator[tuple[str, np.ndarray]]:
    """(name in the file, float32 values), in llama.cpp's row order."""
    import gguf

    config = model.config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if ".router." in name or (tied and name == "lm_head.weight"):
            continue
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise ValueError(f"tensor {name} has no place in a GGUF of {arch}; is LoRA merged?")
        heads = {
            "q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads
        }.get(name.split(".")[-2])  # fmt: skip
        if interleaved and heads is not None:
            tensor = _interleave_halves(tensor, heads)
        yield new_name, tensor.float().contiguous().cpu().numpy()


def _interleave_halves(rows: Tensor, num_heads: int) -> Tensor:
    """Rows [num_heads * head_dim, ...] of every head: 0, half, 1, half + 1, ..."""
    halves = rows.unflatten(0, (num_heads, 2, -1))  # [heads, 2, head_dim / 2, ...]
    return halves.transpose(1, 2).reshape(rows.shape)


def _beside(path: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    return Path(name)
