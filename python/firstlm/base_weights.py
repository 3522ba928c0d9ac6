"""Whether a model's base is still what was loaded: a checkpoint names it and never holds it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

# Values of a parameter that are compared: neighbours, so that of a file that is mapped into memory
# one page is read. What merges or trains a parameter changes all of it.
_SAMPLES = 16
_CASTS = (torch.bfloat16, torch.float16)  # of `model.to(dtype)`, which may be cast back

# A parameter's shape, and some of its values.
Sample = tuple[torch.Size, torch.Tensor]


def sample_weights(model: nn.Module) -> dict[str, Sample]:
    """A few values of every parameter that this process holds whole, on the CPU."""
    return {
        name: (parameter.shape, _values(parameter))
        for name, parameter in model.named_parameters()
        if type(parameter) is nn.Parameter and parameter.numel() and not parameter.is_meta
    }


def changed_weights(model: nn.Module, loaded: Mapping[str, Sample]) -> list[str]:
    """Names of the parameters that are not what they were, but for a cast to another dtype.

    Args:
        loaded: what `sample_weights` gave before; a parameter of another name now, as what PEFT
            wraps, is not compared.
    """
    now = sample_weights(model)
    return [name for name in loaded if name in now and not _same(loaded[name], now[name])]


@torch.no_grad()
def _values(parameter: nn.Parameter) -> torch.Tensor:
    flat = parameter.reshape(-1)
    start = max(0, flat.numel() - _SAMPLES) // 2
    return flat[start : start + _SAMPLES].to("cpu", copy=True)


def _same(before: Sample, after: Sample) -> bool:
    if before[0] != after[0]:
        return False
    values = after[1].double()
    return any(
        torch.equal(before[1].to(dtype).double(), values) for dtype in (before[1].dtype, *_CASTS)
    )
