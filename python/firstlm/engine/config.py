"""What the native decoder must know of a Hugging Face model: one mapping for all families.

The families share a structure (RMSNorm, rotary positions, grouped-query attention, gated MLP); what
differs between them is read off the config and the modules. Letters: L layers, D hidden_size.
"""

from __future__ import annotations

from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# Their frequencies change with the length of the sequence, so cached keys would no longer fit.
_ROPE_OF_LENGTH = ("dynamic", "longrope")
PANEL_ROWS = 16  # outputs of a packed panel, csrc/packed_matrix.h


class UnsupportedModel(ValueError):
    """A model that the hf path runs and the engine does not."""


def check_family(config: Any) -> None:
    """Refuses a model that the engine cannot run, from its config alone.

    Args:
        config: a transformers `PretrainedConfig`.

    Raises:
        UnsupportedModel: another family, activation or rotary embedding, or quantised weights; the
            message names what is accepted and the way out.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise _refusal(f"the family {kind!r}", ", ".join(FAMILIES))
    if config.hidden_act != "silu":
        raise _refusal(f"{kind} with hidden_act={config.hidden_act!r}", "'silu'")
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type in _ROPE_OF_LENGTH:
        raise _refusal(
            f"{kind} with rope_type={rope_type!r}",
            "rope types that do not depend on the length: default, linear, llama3, yarn",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise _refusal(f"{kind} with weights that are quantised already", "f32, bf16, f16 weights")


def decoder_config(model: Any) -> dict[str, Any]:
    """The config of `firstlm.native.Decoder`, but for the precisions; plain JSON values.

    Args:
        model: a causal LM of one of FAMILIES, routed or not; its weights are not read.

    Raises:
        UnsupportedModel: as check_family.
    """
    from firstlm.skip_cache import sliding_windows

    config = model.config
    check_family(config)
    layers = model.get_decoder().layers
    attention = layers[0].self_attn
    num_layers = len(layers)
    rotary = type(model.get_decoder().rotary_emb)(config)  # fresh: a cast model has rounded its own
    rotates = getattr(config, "no_rope_layers", None) or [1] * num_layers  # 1: has rope
    intermediate = -(-config.intermediate_size // PANEL_ROWS) * PANEL_ROWS
    return {
        "num_layers": num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": intermediate,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": attention.head_dim,
        "vocab_size": model.get_input_embeddings().weight.shape[0],
        "rms_norm_eps": float(config.rms_norm_eps),
        "attention_scale": float(attention.scaling),
        "inv_freq": rotary.inv_freq.float().tolist(),
        "rope_scaling": float(rotary.attention_scaling),
        "rotates": [bool(flag) for flag in rotates[:num_layers]],
        "windows": sliding_windows(config),
    }


def _refusal(what: str, accepted: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"firstlm.Engine does not run {what}; accepted: {accepted}. The hf path does: "
        "firstlm.from_pretrained(...).generate(...)"
    )
