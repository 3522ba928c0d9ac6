"""Rows that decoder layers really compute, counted by hooks inside the layers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from firstlm.cache_argument import find_cache


class LayerCalls:
    """Rows that the decoder layers really computed, counted inside the layers.

    Attributes:
        prefill: rows a layer in passes that start a sequence, int64 `[L]`.
        decode: rows a layer in all later passes, int64 `[L]`.
        decode_steps: later passes.
        decode_rows: rows that the later passes were given, summed.
    """

    def __init__(self, num_layers: int) -> None:
        self.prefill = torch.zeros(num_layers, dtype=torch.int64)
        self.decode = torch.zeros(num_layers, dtype=torch.int64)
        self.decode_steps = 0
        self.decode_rows = 0
        self._counts = self.prefill

    def per_token(self) -> float:
        """Mean number of layers that one generated token of one sequence went through."""
        return float(self.decode.sum()) / max(self.decode_rows, 1)


@contextlib.contextmanager
def counting_layer_calls(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[LayerCalls]:
    """Count the rows that the attention of each of the model's decoder layers computes."""
    calls = LayerCalls(len(layers))

    def start_pass(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = find_cache(kwargs)
        starts = cache is None or cache.get_seq_length() == 0
        calls._counts = calls.prefill if starts else calls.decode
        if not starts:
            calls.decode_steps += 1
            ids = kwargs.get("input_ids")
            calls.decode_rows += (ids if ids is not None else kwargs["inputs_embeds"]).shape[0]

    def count(layer_idx: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        calls._counts[layer_idx] += hidden_states.shape[0]

    handles = [model.register_forward_pre_hook(start_pass, with_kwargs=True)]
    for layer_idx, layer in enumerate(layers):
        hook = functools.partial(count, layer_idx)
        handles.append(_attention_of(layer).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _attention_of(layer: nn.Module) -> nn.Module:
    for module in layer.children():
        if "attention" in type(module).__name__.lower():
            return module
    raise ValueError(f"{type(layer).__name__} has no attention submodule")
