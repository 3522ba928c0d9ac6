"""`from_pretrained`: a base model, its routers and its adapter, from wherever they are."""

from __future__ import annotations

import dataclasses
import inspect
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from firstlm import attention_interface, checkpoint, embedded_model
from firstlm.base_weights import sample_weights
from firstlm.routed_model import find_decoder_layers, routed_model_class
from firstlm.router import RouterConfig, differences
from firstlm.skip_cache import sliding_windows


def from_pretrained(
    base: str | os.PathLike[str],
    router: RouterConfig | str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | bool | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    merge_adapter: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a decoder-only causal LM and give it routers.

    Args:
        base: a folder or hub id of a Hugging Face model, a `.gguf` file, "embedded" (the model that
            firstlm can obtain by itself), "embedded-first" (that with the routers and the adapter
            that ship with firstlm), or what `save_pretrained` or `push_to_hub` wrote (folder
            or hub id), which names its own base.
        router: a `RouterConfig` for fresh routers, a checkpoint (folder or hub id) to take routers
            from, or None: the checkpoint's own, else fresh ones that keep every layer.
        adapter: folder or hub id of a PEFT adapter; None: the checkpoint's own, if any; False: no
            adapter.
        dtype: of the base's weights, a torch dtype or its name; None as transformers chooses.
        device_map: as transformers takes it.
        merge_adapter: merge the adapter into the weights: faster decode, but no more adapter
            training and no `save_pretrained`, which never writes the base's weights.
        **kwargs: handed to transformers' `from_pretrained` (`attn_implementation`, …; "firstlm":
            decode on the CPU with firstlm's own attention). `revision` is that of `base`, a
            checkpoint on a hub included; with a checkpoint's folder, that of the base it names.

    Returns:
        The model, of a subclass of its own class, in eval mode. Its base is frozen (a checkpoint
        never holds it); routers are not.

    Raises:
        ValueError: a model without decoder layers that can be skipped (encoder-decoder,
            state-space, …), routers of another model, or a folder that is not what it should be.
    """
    hub = {name: kwargs[name] for name in checkpoint.HUB_OPTIONS if name in kwargs}
    folder = checkpoint.find_checkpoint(base, **hub)
    if folder is not None:
        if not Path(base).exists():
            kwargs.pop("revision", None)  # was the checkpoint's
        if isinstance(router, RouterConfig):
            _warn_of_fresh_routers(router, base, folder)
        base, revision = _base_of(folder)
        if revision is not None and not Path(base).exists():  # of a hub, where branches move on
            kwargs.setdefault("revision", revision)
    if folder is not None and adapter is None:
        adapter = folder / checkpoint.ADAPTER_FOLDER
        adapter = adapter if adapter.is_dir() else None
    if router is None:
        router = folder
    routers = None
    if router is not None and not isinstance(router, RouterConfig):
        hub.pop("revision", None)  # was the base's
        routers = checkpoint.find_checkpoint(router, **hub) or Path(router)
    config = checkpoint.read_router_config(routers) if routers else router or RouterConfig()
    source, options = _resolve(base, kwargs)
    options |= {name: kwargs.pop(name) for name in checkpoint.HUB_OPTIONS if name in kwargs}
    sha256 = checkpoint.base_config_sha256(source, **options)
    if routers is not None and config.base_config_sha256 not in (None, sha256):
        raise ValueError(
            f"the routers in {routers} were made for {config.base_model_name_or_path!r}, whose "
            f"config differs from that of {str(base)!r}"
        )
    model = _load_base(source, options, dtype, device_map, kwargs)
    model.requires_grad_(False)  # routers learn, and adapters; the base is never saved
    model.loaded_base = sample_weights(model)
    revision = getattr(model.config, "_commit_hash", None)
    model.attach_routers(
        dataclasses.replace(
            config,
            base_model_name_or_path=_absolute(base),
            base_revision=revision,
            base_config_sha256=sha256,
        )
    )
    if routers is not None:
        checkpoint.load_routers(model, routers)
        model.trained_prefill = config.prefill
    check_layers_are_told(model)
    if adapter:
        hub.pop("revision", None)  # was the base's
        _attach_adapter(model, str(adapter), merge_adapter, hub)
    return model.eval()


def base_config(source: str | os.PathLike[str], **kwargs: Any) -> PretrainedConfig:
    """The config of the base that `from_pretrained(source)` would load; weights are not read."""
    hub = {name: kwargs[name] for name in checkpoint.HUB_OPTIONS if name in kwargs}
    folder = checkpoint.find_checkpoint(source, download=False, **hub)
    if folder is None:
        location, options = _resolve(source, dict(hub))
        return AutoConfig.from_pretrained(location, **(hub | options))
    base, revision = _base_of(folder)
    options = {} if revision is None or Path(base).exists() else {"revision": revision}
    return base_config(base, **options)


def _base_of(folder: Path) -> tuple[str, str | None]:
    """The base that a checkpoint names, and its revision if it came from a hub."""
    config = checkpoint.read_router_config(folder)
    if config.base_model_name_or_path is None:
        raise ValueError(f"{folder / checkpoint.CONFIG_NAME} names no base_model_name_or_path")
    path = Path(config.base_model_name_or_path)
    if path.is_absolute() and not path.exists():
        raise ValueError(
            f"the base model of {folder}, {path}, is not here: load from_pretrained(BASE, "
            f"router={str(folder)!r}, adapter={str(folder / checkpoint.ADAPTER_FOLDER)!r})"
        )
    return config.base_model_name_or_path, config.base_revision


def _warn_of_fresh_routers(
    router: RouterConfig, base: str | os.PathLike[str], folder: Path
) -> None:
    changed = differences(router, checkpoint.read_router_config(folder))
    warnings.warn(
        f"{base} has trained routers, but router=RouterConfig(...) was given, so fresh ones take "
        f"their place{': ' if changed else ''}{', '.join(changed)}. Leave router unset to load the "
        "trained ones",
        stacklevel=3,
    )


def _absolute(base: str | os.PathLike[str]) -> str:
    """What a checkpoint writes down: aliases and hub ids as they are, local paths absolute."""
    return str(Path(base).resolve()) if Path(base).exists() else str(base)


def _resolve(base: str | os.PathLike[str], kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(what transformers loads, extra arguments that find it)."""
    options = {name: kwargs.pop(name) for name in ("revision", "subfolder") if name in kwargs}
    if embedded_model.is_alias(str(base)):
        return str(embedded_model.path()), options
    path = Path(base)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        return str(embedded_model.converted_gguf(path)), options
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is neither a Hugging Face model (no config.json) nor a firstlm checkpoint "
            f"(no {checkpoint.CONFIG_NAME})"
        )
    return str(base), options


def _load_base(
    source: str,
    options: dict[str, Any],
    dtype: torch.dtype | str | None,
    device_map: Any,
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(source, **options)
    base_class = causal_lm_class(config)
    if dtype is not None:
        kwargs["dtype"] = dtype
    if device_map is not None:
        kwargs["device_map"] = device_map
    model = routed_model_class(base_class).from_pretrained(
        source, config=config, **options, **kwargs
    )
    check_routable(model)
    if model.generation_config is not None:
        # Some hub models ask for a static cache, or for none, by default; ours takes their place.
        model.generation_config.cache_implementation = None
        if model.generation_config.use_cache is False:
            model.generation_config.use_cache = True
    return model


def causal_lm_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of a decoder-only causal LM that firstlm can route.

    Raises:
        ValueError: any other kind of model, before its weights are read.
    """
    accepted = "firstlm routes decoder-only causal LMs whose layers are attention layers"
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder model; {accepted}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{kind} is not a causal LM that transformers knows; {accepted}")
    if config.get_text_config(decoder=True) is not config:
        raise ValueError(
            f"{kind} holds several models; load its text model alone (its text config). {accepted}"
        )
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    if model_class._is_stateful or not hasattr(config, "num_attention_heads"):
        raise ValueError(f"{kind} keeps a recurrent state (state-space model); {accepted}")
    sliding_windows(config)
    return model_class


def check_routable(model: PreTrainedModel) -> None:
    """Raises ValueError if the layers of a loaded model cannot be routed."""
    layers = find_decoder_layers(model)
    name = type(model).__name__
    if len(layers) != model.config.num_hidden_layers:
        raise ValueError(
            f"{name} has {len(layers)} decoder layers, its config says "
            f"{model.config.num_hidden_layers}"
        )
    parameters = inspect.signature(type(layers[0]).forward).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"{name}: {type(layers[0]).__name__}.forward takes no **kwargs, through which firstlm "
            "tells a layer its plan; a newer transformers may"
        )
    if hasattr(layers[0], "router"):
        raise ValueError(
            f"{name}: the layers have a router of their own (of experts), whose name firstlm's take"
        )
    attention = model.config._attn_implementation or ""
    if "flex" in attention or attention.startswith("paged"):
        raise ValueError(
            f"attn_implementation={attention!r} builds masks whose rows cannot be selected; load "
            f'with "sdpa", "eager", "{attention_interface.NAME}" or "flash_attention_2"'
        )
    if attention == attention_interface.NAME and not model._supports_attention_backend:
        raise ValueError(
            f"{name} has attention of its own, which attn_implementation={attention!r} cannot "
            'replace; load with "sdpa" or "eager"'
        )


class _FirstLayerReached(Exception):
    """Carries whether the layer was handed a `routing`."""


def check_layers_are_told(model: PreTrainedModel) -> None:
    """Raises ValueError if the model keeps `routing` from its decoder layers.

    Some models' layers take keyword arguments that their decoder does not pass on. One token goes
    as far as the first layer to see that.
    """

    def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _FirstLayerReached(kwargs.get("routing") is not None)

    device = model.get_input_embeddings().weight.device
    if device.type == "meta":  # offloaded: accelerate's hooks move what goes in
        device = torch.device("cpu")
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    handle = find_decoder_layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model(input_ids=token)
    except _FirstLayerReached as reached:
        if not reached.args[0]:
            raise ValueError(
                f"{type(model).__name__} does not pass keyword arguments on to its decoder layers, "
                "through which firstlm tells a layer its plan; a newer transformers may"
            ) from None
    finally:
        handle.remove()


def _attach_adapter(model: PreTrainedModel, adapter: str, merge: bool, hub: dict[str, Any]) -> None:
    if merge:
        from peft import PeftModel

        PeftModel.from_pretrained(model, adapter, **hub).merge_and_unload()
        model.merged_adapter = adapter
    else:
        model.load_adapter(adapter, adapter_kwargs=hub)
