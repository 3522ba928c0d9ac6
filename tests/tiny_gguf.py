"""Writes a tiny llama GGUF: Q4_1 layers, Q8_0 embedding, byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from firstlm import embedded_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_gguf(
    file: Path, layers: int = 2, seed: int = 0, context: int = 128
) -> dict[str, np.ndarray]:
    """Write the file; returns the exact float32 values of every tensor in it, by GGUF name."""
    hidden, intermediate, heads, kv_heads, head_dim = 64, 96, 4, 2, 16
    tokens = SPECIAL + sorted(bytes_to_unicode().values()) + ["ĊĊ", "Ġa"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    types = [gguf.TokenType.CONTROL] * len(SPECIAL)
    writer.add_token_types(types + [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ċ Ċ", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)

    rng = np.random.default_rng(seed)
    exact: dict[str, np.ndarray] = {}

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        values = rng.standard_normal(shape).astype(np.float32) * 0.2
        packed = gguf.quantize(values, kind)
        exact[name] = gguf.dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)

    q4_1, q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
    f32 = gguf.GGMLQuantizationType.F32
    add("token_embd.weight", (len(tokens), hidden), q8_0)
    add("output_norm.weight", (hidden,), f32)
    for layer in range(layers):
        add(f"blk.{layer}.attn_norm.weight", (hidden,), f32)
        add(f"blk.{layer}.ffn_norm.weight", (hidden,), f32)
        add(f"blk.{layer}.attn_q.weight", (heads * head_dim, hidden), q4_1)
        add(f"blk.{layer}.attn_k.weight", (kv_heads * head_dim, hidden), q4_1)
        add(f"blk.{layer}.attn_v.weight", (kv_heads * head_dim, hidden), q4_1)
        add(f"blk.{layer}.attn_output.weight", (hidden, heads * head_dim), q4_1)
        add(f"blk.{layer}.ffn_gate.weight", (intermediate, hidden), q4_1)
        add(f"blk.{layer}.ffn_up.weight", (intermediate, hidden), q4_1)
        add(f"blk.{layer}.ffn_down.weight", (hidden, intermediate), q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def tiny_model_folder(folder: Path, layers: int = 6, context: int = 128) -> Path:
    """A tiny llama as an ordinary model folder, with a tokenizer that knows a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_gguf(folder / "tiny.gguf", layers=layers, context=context)
    return embedded_model.convert_gguf(folder / "tiny.gguf", folder / "model", progress=False)


def draw_routers(model, seed: int = 0) -> None:
    """Random router weights, so that prompts get plans of their own."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.decoder_layers:
        with torch.no_grad():
            layer.router.weight.normal_(generator=generator)
            layer.router.bias.zero_()
