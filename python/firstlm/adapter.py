"""The LoRA adapter of a routed model: made in place, its weights read back to the bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from firstlm.train_config import LoraPhaseConfig

_PREFIX = "base_model.model."
_NO_MATCH = "You have passed exclude_modules"


def has_adapter(model: Any) -> bool:
    """Whether an adapter is attached (merged ones are part of the weights and do not count)."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def attach_adapter(model: Any, settings: LoraPhaseConfig, seed: int) -> None:
    """Adds a fresh LoRA adapter through PEFT's own call; routers are never among its targets.

    Args:
        model: from firstlm.from_pretrained, without an adapter.
        settings: rank, alpha, dropout, targets, exclude.
        seed: of the initial weights.

    Raises:
        ValueError: PEFT finds no module of these targets.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        exclude_modules=settings.exclude,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # Routers are plain parameters, which PEFT cannot match anyway: nothing is excluded.
        warnings.filterwarnings("ignore", message=_NO_MATCH)
        model.add_adapter(config)


def load_adapter_weights(model: Any, folder: str | Path) -> None:
    """Copies the weights of a saved adapter into the attached one of the same shape.

    Args:
        folder: PEFT's: adapter_config.json, adapter_model.safetensors.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    name = model.active_adapters()[0]
    saved = load_file(Path(folder) / "adapter_model.safetensors")
    saved = {key.removeprefix(_PREFIX): value for key, value in saved.items()}
    own = get_peft_model_state_dict(model, adapter_name=name)
    wrong = sorted(
        key
        for key in saved.keys() | own.keys()
        if key not in saved or key not in own or saved[key].shape != own[key].shape
    )
    if wrong:
        raise ValueError(
            f"the adapter in {folder} does not fit this model's (rank, targets?): {wrong[:4]}"
        )
    set_peft_model_state_dict(model, saved, adapter_name=name)
