"""Which parameters of a routed model learn, and the model without its adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from firstlm.phases import Phase


def choose_trainable(model: Any, phase: Phase) -> None:
    """Sets requires_grad of every parameter as the phase asks; the base never learns.

    Raises:
        ValueError: the phase trains an adapter and the model has none.
    """
    protected = set(model.router_config.protected)
    routers = {
        id(p): index not in protected
        for index, layer in enumerate(model.decoder_layers)
        for p in layer.router.parameters()
    }
    adapters = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in routers:
            # A protected layer's router decides nothing, so nothing can teach it.
            parameter.requires_grad_(phase.train_routers and routers[id(parameter)])
        elif is_adapter(name):
            adapters += 1
            parameter.requires_grad_(phase.train_adapter)
        else:
            parameter.requires_grad_(False)
    if phase.train_adapter and not adapters:
        raise ValueError(
            f"phase {phase.name!r} trains a LoRA adapter and the model has none: call "
            "model.add_adapter(LoraConfig(...)) first"
        )


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of a PEFT LoRA weight."""
    return "lora_" in name


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The model without its adapter; PEFT's own switch would also turn on its gradients."""
    learns = [(p, p.requires_grad) for n, p in model.named_parameters() if is_adapter(n)]
    if learns:
        model.disable_adapters()
    try:
        yield
    finally:
        if learns:
            model.enable_adapters()
        for parameter, flag in learns:
            parameter.requires_grad_(flag)
