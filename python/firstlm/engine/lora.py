"""LoRA adapters: merged into the weights that are packed, or kept apart from them.

An adapter adds B A to a weight. Most of what it adds is less than a step of a 4-bit grid, so that
rounding the sum takes it away again; apart from the weights it stays as it is, in bfloat16, for a
few more bytes a token. Letters: N outputs, K inputs of a weight, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

MODES = ("auto", "merge", "apart")
_PANEL = 16  # rows of A are packed in panels of so many


def check_mode(lora: str) -> str:
    """Returns `lora`; ValueError unless it is one of MODES."""
    if lora not in MODES:
        raise ValueError(f"lora must be one of {MODES}, got {lora!r}")
    return lora


def keeps_apart(lora: str, precision: str) -> bool:
    """Whether adapters stay apart from weights of a precision; "auto": where merging loses them."""
    return lora == "apart" or (lora == "auto" and precision == "int4")


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has put an adapter around a module."""
    return hasattr(module, "base_layer") or hasattr(module, "modules_to_save")


def is_plain(module: nn.Module) -> bool:
    """Whether an adapted module is a linear layer that plain LoRA (W + B A) is added to."""
    return (
        isinstance(getattr(module, "base_layer", None), nn.Linear)
        and hasattr(module, "lora_A")
        and not getattr(module, "lora_variant", None)  # DoRA, aLoRA and others
        and not any(getattr(module, "use_dora", {}).values())
        and not any(getattr(module, "lora_bias", {}).values())
    )


def strange_module(model: nn.Module) -> str | None:
    """The name of a module whose adapter is anything but plain LoRA, if there is one."""
    for name, module in model.named_modules():
        if is_adapted(module) and not is_plain(module):
            return name
    return None


def pairs_of(module: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(A [r, K], B [N, r] with its scale), f32, of the adapters that are active and not merged."""
    if not is_adapted(module) or module.merged or module.disable_adapters:
        return
    for name in module.active_adapters:
        if name in module.lora_A:
            A, B = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
            yield A.float(), B.float() * module.scaling[name]


def fused(
    modules: tuple[nn.Module, ...], arrange: Callable[[list[torch.Tensor]], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One pair for modules that share their inputs; None where no adapter is active.

    Args:
        arrange: of the rows of their weights, [N of a module, ...] each, to those of the fused one.

    Returns:
        A [R, K], R a multiple of 16, and B [N, R], zero but for the columns of a row's module.
    """
    pairs = [list(pairs_of(module)) for module in modules]
    A_rows = [A for own in pairs for A, _ in own]
    if not A_rows:
        return None
    A = torch.cat(A_rows)
    A = nn.functional.pad(A, (0, 0, 0, -len(A) % _PANEL))
    blocks, column = [], 0
    for module, own in zip(modules, pairs, strict=True):
        block = torch.zeros(module.weight.shape[0], len(A))
        for _, B in own:
            block[:, column : column + B.shape[1]] = B
            column += B.shape[1]
        blocks.append(block)
    return A, arrange(blocks)
