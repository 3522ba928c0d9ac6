"""Checkpoints of a routed model: routers and adapter beside an untouched base.

folder/router_config.json    RouterConfig
folder/router.safetensors    layers.N.weight, layers.N.bias, ...
folder/adapter/              PEFT's own files
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file, save_file

from firstlm import embedded_model
from firstlm.atomic import publish_folder
from firstlm.router import RouterConfig

CONFIG_NAME = "router_config.json"
WEIGHTS_NAME = "router.safetensors"
ADAPTER_FOLDER = "adapter"
# The embedded model's routers and adapter that ship with firstlm; shipped/README.md says of what.
SHIPPED = "embedded-first"
_SHIPPED_FOLDER = Path(__file__).parent / "shipped"
# Keys of a config.json that say how a model was saved or loaded, not what it is.
_NOT_IDENTITY = ("transformers_version", "dtype", "torch_dtype", "architectures")
# What a checkpoint's repository on a hub may hold: routers, adapter and tokenizer, no base.
_HUB_FILES = [CONFIG_NAME, WEIGHTS_NAME, f"{ADAPTER_FOLDER}/*", "token*", "*.json", "*.jinja"]
# Arguments of from_pretrained that say how a hub is asked.
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def is_checkpoint(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is a folder that `save_checkpoint` wrote, or a hub id of such a one."""
    return find_checkpoint(source, download=False) is not None


def find_checkpoint(
    source: str | os.PathLike[str], download: bool = True, **hub: Any
) -> Path | None:
    """The folder of a checkpoint, downloaded into the hub's cache if `source` is a hub id.

    Args:
        source: folder, hub id or SHIPPED; the embedded model and GGUF files are no checkpoints.
        download: of all its files; else of its router_config.json alone.
        **hub: those of HUB_OPTIONS.

    Returns:
        None if `source` is no checkpoint, or the hub does not tell: transformers, which then looks
        for a base model of this name, says what is wrong.
    """
    path = Path(source)
    if path.exists():
        return path if (path / CONFIG_NAME).is_file() else None
    if str(source) == SHIPPED:
        return _SHIPPED_FOLDER
    if embedded_model.is_alias(source) or path.suffix == ".gguf":
        return None
    try:
        folder = Path(hf_hub_download(str(source), CONFIG_NAME, **hub)).parent
    except (OSError, HFValidationError):
        return None
    if download:  # the commit that was found, should the branch move on meanwhile
        hub = {**hub, "revision": folder.name, "allow_patterns": _HUB_FILES}
        folder = Path(snapshot_download(str(source), **hub))
    return folder


def name_of(folder: str | os.PathLike[str]) -> str:
    """What a report calls a checkpoint's folder: where firstlm is installed is no part of it."""
    return SHIPPED if Path(folder) == _SHIPPED_FOLDER else str(folder)


def base_config_sha256(base: str | Path, **kwargs: Any) -> str:
    """Hash of what the base's own config says the model is.

    Args:
        base: folder, hub id, or folder of a GGUF (`gguf_file=`).
    """
    from transformers import PretrainedConfig  # a second to import, which the engine does not need

    values, _ = PretrainedConfig.get_config_dict(str(base), **kwargs)
    identity = {
        key: value
        for key, value in values.items()
        if key not in _NOT_IDENTITY and not key.startswith("_")
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def router_state_dict(
    model: Any, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """`layers.N.<parameter>` -> tensor, contiguous on the CPU.

    Args:
        state_dict: the model's, to take values from; None: its own parameters.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for layer_idx, layer in enumerate(model.decoder_layers):
        for name, tensor in layer.router.state_dict().items():
            if state_dict is not None:
                tensor = state_dict[f"{names[id(layer.router)]}.{name}"]
            found[f"layers.{layer_idx}.{name}"] = tensor.detach().to("cpu").contiguous()
    return found


@torch.no_grad()
def load_router_state_dict(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Load the inverse of `router_state_dict`.

    Raises:
        ValueError: missing, unexpected or misshapen tensors, named; nothing is loaded then.
    """
    own = {
        f"layers.{layer_idx}.{name}": tensor
        for layer_idx, layer in enumerate(model.decoder_layers)
        for name, tensor in layer.router.named_parameters()
    }
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misshapen = [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"routers do not fit the model: missing {missing}, unexpected {unexpected}, "
            f"of another shape {sorted(misshapen)}"
        )
    for name, parameter in own.items():
        parameter.copy_(state[name])


def save_checkpoint(
    model: Any, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write routers and, if one is attached, the adapter; each file appears whole or not at all.

    Args:
        state_dict: the model's, to take values from; None: its own parameters.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; a checkpoint is a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as scratch:
        new = Path(scratch)
        save_file(
            router_state_dict(model, state_dict), new / WEIGHTS_NAME, metadata={"format": "pt"}
        )
        text = json.dumps(model.router_config.to_dict(), indent=2) + "\n"
        (new / CONFIG_NAME).write_text(text, encoding="utf-8")
        _save_adapter(model, new / ADAPTER_FOLDER, state_dict)
        adapter = folder / ADAPTER_FOLDER
        if (new / ADAPTER_FOLDER).exists():
            publish_folder(new / ADAPTER_FOLDER, adapter)
        elif adapter.exists():
            shutil.rmtree(adapter)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(new / name, folder / name)


def _save_adapter(model: Any, folder: Path, state_dict: Mapping[str, torch.Tensor] | None) -> None:
    """The active adapter in PEFT's own format, if the model has one."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return
    from peft import get_peft_model_state_dict

    name = model.active_adapters()[0]
    folder.mkdir()
    config = model.peft_config[name]
    state = get_peft_model_state_dict(model, state_dict, adapter_name=name)
    state = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    training, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(folder)
    finally:
        config.inference_mode = training


def load_routers(model: Any, folder: str | Path) -> None:
    """Load `router.safetensors` of a checkpoint into attached routers."""
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has a {CONFIG_NAME} but no {WEIGHTS_NAME}")
    load_router_state_dict(model, load_file(path))


def read_router_config(folder: str | Path) -> RouterConfig:
    """The `RouterConfig` of a checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is not a firstlm checkpoint: it has no {CONFIG_NAME}")
    return RouterConfig.from_file(path)
