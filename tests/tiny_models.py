"""Tiny random models of every family that firstlm is tested with, and routers that disagree."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

import firstlm
from firstlm import RouterConfig

NUM_LAYERS = 6
VOCAB_SIZE = 101
_COMMON = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_MHA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GPT2 = {"n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 256}
_OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}

# family -> (config class, arguments); a sliding window of 8 is shorter than the tests' prompts
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "mistral": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": 8}),
    "qwen2": (
        "Qwen2Config",
        _LLAMA_LIKE | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE),
    "smollm3": ("SmolLM3Config", _LLAMA_LIKE | {"no_rope_layer_interval": 3}),
    "gemma2": ("Gemma2Config", _LLAMA_LIKE | {"sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", _LLAMA_LIKE | {"sliding_window": 8}),
    "phi3": ("Phi3Config", _LLAMA_LIKE | {"sliding_window": 8}),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),
    "gpt_neox": ("GPTNeoXConfig", _MHA),
    "gpt2": ("GPT2Config", _GPT2),
    "opt": ("OPTConfig", _OPT),
}


def tiny_config(family: str, **overrides) -> PretrainedConfig:
    """The tiny config of a family."""
    name, arguments = FAMILIES[family]
    return getattr(transformers, name)(**(_COMMON | arguments | overrides))


@functools.cache
def tiny_base_path(family: str) -> Path:
    """Folder of a tiny random float32 model of a family, saved by transformers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    with torch.no_grad():  # initial weights are so small that layers hardly matter
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(4.0)
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    model.save_pretrained(folder)
    return folder


def _masked_in_float32(module, query, key, value, attention_mask, **kwargs):
    """gemma2's eager attention, which casts its float64 mask to float32: there the lowest float64
    is -inf, and a padding row that sees nothing becomes NaN (in transformers itself)."""
    if attention_mask is not None:
        attention_mask = attention_mask.clamp(min=torch.finfo(torch.float32).min / 2)
    return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("eager_float64", _masked_in_float32)
AttentionMaskInterface.register("eager_float64", eager_mask)


def attention_options(family: str, dtype: torch.dtype) -> dict[str, str]:
    """How transformers loads a family with its own attention."""
    double = family == "gemma2" and dtype == torch.float64
    return {"attn_implementation": "eager_float64"} if double else {}


def base_model(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The tiny model as transformers loads it."""
    options = attention_options(family, dtype)
    return AutoModelForCausalLM.from_pretrained(
        tiny_base_path(family), dtype=dtype, **options
    ).eval()


def routed_model(
    family: str,
    dtype: torch.dtype = torch.float64,
    router: RouterConfig | None = None,
    draw: bool = True,
) -> PreTrainedModel:
    """The tiny model with routers; `draw`: random ones, whose plans differ from row to row."""
    router = router or RouterConfig(protected=[0], keep_bias=0.0)
    model = firstlm.from_pretrained(
        tiny_base_path(family), router=router, dtype=dtype, **attention_options(family, dtype)
    )
    return draw_routers(model) if draw else model


@torch.no_grad()
def draw_routers(model: PreTrainedModel) -> PreTrainedModel:
    """Random router weights: the first draw under which plans differ and a third is skipped."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.router_parameters():
            scale = 3.0 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        plans = model.plan(**pad(prompts([13, 5, 9, 11]))).skip_plans
        if len(set(plans)) == 4 and sum(plan.skip_rate for plan in plans) / 4 > 1 / 3:
            return model
    raise AssertionError("no draw of the routers gives four different plans")


def prompts(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Random token ids, one 1-D tensor a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in lengths]


def pad(rows: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[B, T]`, padded on one side."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, where], mask[b, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_adaptive(plans: list[firstlm.SkipPlan]) -> None:
    """The drawn routers do what the test needs: rows differ, a quarter of the layers is skipped."""
    assert len(set(plans)) > 1, "the drawn routers give every row the same plan"
    rate = sum(plan.skip_rate for plan in plans) / len(plans)
    assert rate >= 0.25, f"the drawn routers skip only {rate:.0%}"
