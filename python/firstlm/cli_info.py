"""What `firstlm info` says, read from files alone."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any


def installation() -> dict[str, Any]:
    """Versions, native build, machine, and the cache folder with the models in it."""
    import torch

    from firstlm import embedded_model, figures, native, ops

    cache = embedded_model.cache_dir()
    models = cache / "models"
    kept = sorted(entry for entry in models.glob("[!.]*") if entry.is_dir())
    return {
        "versions": figures.versions(),
        "native": {
            "ops": str(ops.LIBRARY),
            "classes": str(native.LIBRARY),
            "isa": ops.isa(),
            "isa_levels": ops.isa_levels(),
            "torch_cuda": torch.version.cuda,
        },
        "machine": figures.machine(),
        "cache": {
            "folder": str(cache),
            "models": {entry.name: _megabytes(entry) for entry in kept},
        },
        "corpora": _corpora(),
    }


def model(name: str) -> dict[str, Any]:
    """A checkpoint's or a base model's facts.

    Raises:
        ValueError: there is neither under this name.
    """
    from firstlm import checkpoint
    from firstlm.cli_input import check_model_exists

    check_model_exists(name)
    folder = checkpoint.find_checkpoint(name)
    if folder is not None:
        return {"checkpoint": name, **_checkpoint(folder)}
    return {"model": name, **_base(name), "routers": None}


def as_text(facts: dict[str, Any], indent: str = "") -> str:
    """Facts as aligned lines; nested facts indented."""
    width = max((len(key) for key in facts), default=0)
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}", as_text(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<{width}}  {_short(value)}")
    return "\n".join(lines)


def _checkpoint(folder: Path) -> dict[str, Any]:
    from firstlm import checkpoint

    config = checkpoint.read_router_config(folder)
    weights = folder / checkpoint.WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(f"{folder} has no {checkpoint.WEIGHTS_NAME}: not a whole checkpoint")
    head = config.head if config.head == "linear" else f"mlp of {config.bottleneck}"
    pooling = config.pooling + (f" over {config.windows} windows" if config.windows > 1 else "")
    return {
        "base": {
            "model": config.base_model_name_or_path,
            "revision": config.base_revision,
            "config_sha256": config.base_config_sha256,
            "layers": config.num_layers,
        },
        "routers": {
            "pooling": pooling,
            "head": head,
            "prefill": config.prefill,
            "parameters": _count_parameters(weights),
            "protected": config.protected,
            "thresholds": config.thresholds,
            "calibrated_skip_rates": sorted(float(rate) for rate in config.calibration),
            **_choice(config.choice),
        },
        "adapter": _adapter(folder / checkpoint.ADAPTER_FOLDER),
        "tokenizer": (folder / "tokenizer_config.json").is_file(),
        "megabytes": _megabytes(folder),
    }


def _choice(choice: dict[str, Any] | None) -> dict[str, Any]:
    """How `firstlm calibrate` chose the thresholds, without its table and machine."""
    if choice is None:
        return {}
    told = ("asked", "rate", "met", "reason", "path")
    return {"chosen": {name: choice[name] for name in told if name in choice}}


def _base(name: str) -> dict[str, Any]:
    from transformers import AutoConfig

    from firstlm import embedded_model
    from firstlm.loading import causal_lm_class

    source = name
    if embedded_model.is_alias(name):
        source = str(embedded_model.path())
    elif name.endswith(".gguf"):
        source = str(embedded_model.converted_gguf(name))
    config = AutoConfig.from_pretrained(source)
    return {
        "folder": source if os.path.isdir(source) else None,
        "class": causal_lm_class(config).__name__,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "dtype": str(config.dtype).removeprefix("torch."),
    }


def _adapter(folder: Path) -> dict[str, Any] | None:
    if not (folder / "adapter_config.json").is_file():
        return None
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    weights = folder / "adapter_model.safetensors"
    targets = config.get("target_modules")
    return {
        "kind": config.get("peft_type"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": sorted(targets) if isinstance(targets, list) else targets,
        "parameters": _count_parameters(weights) if weights.is_file() else None,
    }


def _count_parameters(weights: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    from safetensors import safe_open

    total = 0
    with safe_open(weights, framework="pt") as file:
        names = file.keys()
        for name in names:
            size = 1
            for length in file.get_slice(name).get_shape():
                size *= length
            total += size
    return total


def _corpora() -> dict[str, str]:
    from firstlm.corpus import CORPORA_FOLDER, CORPUS_NAMES

    return {
        name: ", ".join(
            file.name.partition(".")[0] for file in sorted((CORPORA_FOLDER / name).glob("*.jsonl*"))
        )
        for name in CORPUS_NAMES
    }


def _megabytes(folder: Path) -> float:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return round(size / 1e6, 1)


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        counts = Counter(round(item, 4) for item in value)
        if len(counts) == 1:
            return f"{value[0]:g} for all"
        return " ".join(f"{item:.3g}" for item in value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)
