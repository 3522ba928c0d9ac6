"""The routers of an engine: what the native decoder scores prompts with. Letters: L layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from firstlm.router import NORM_EPS, RouterConfig

_PARAMETERS = ("weight", "bias", "out_weight", "out_bias")


class EngineRouters:
    """Routers of all layers.

    Args:
        config: resolved for the model.
        tensors: those of the engine; `layers.N.router.*` are taken.
        trained_prefill: `prefill` of the checkpoint that they came from; None for fresh ones.

    Attributes:
        constant: f32 [L], the keep probabilities of routers that say the same to every prompt, as
            fresh ones do; else None. Such plans are known before the prompt is read.
    """

    def __init__(
        self,
        config: RouterConfig,
        tensors: Mapping[str, torch.Tensor],
        trained_prefill: str | None = None,
    ) -> None:
        self.config = config
        self.trained_prefill = trained_prefill
        assert config.num_layers is not None
        self.layers: list[dict[str, torch.Tensor]] = [
            {
                name: tensors[f"layers.{layer}.router.{name}"]
                for name in _PARAMETERS
                if f"layers.{layer}.router.{name}" in tensors
            }
            for layer in range(config.num_layers)
        ]
        self.constant = self._constant()

    def _constant(self) -> torch.Tensor | None:
        last = [layer.get("out_weight", layer["weight"]) for layer in self.layers]
        if any(bool(weight.any()) for weight in last):
            return None
        biases = [layer.get("out_bias", layer["bias"]) for layer in self.layers]
        return torch.sigmoid(torch.cat(biases))

    def set_on(self, decoder: Any, prefill: str) -> None:
        """Gives them to a native decoder; `prefill` is "route" or "full"."""
        config = self.config
        norm_eps = NORM_EPS if config.normalize else 0.0
        decoder.set_routers(
            config.pooling, config.windows, norm_eps, prefill == "route", self.layers
        )

    def thresholds(self, budget: float | None) -> list[float]:
        """One a layer, for a budget or the config's own; those of protected layers keep always."""
        config = self.config
        values = list(config.thresholds if budget is None else config.thresholds_for(budget))
        for layer in config.protected:
            values[layer] = float("-inf")
        return values
