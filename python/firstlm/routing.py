"""One forward pass under skip plans: scores, decisions, and the decoder layers that obey them.

Letters: B sequences, T tokens, D hidden_size, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from firstlm import ops
from firstlm.skip_cache import SkipCache
from firstlm.skip_plan import exact_budget_mask, keep_decision, keep_something

GATES = ("soft", "straight_through", "hard")


class Routing:
    """The decisions of one forward pass. Handed to every decoder layer as an argument.

    Args:
        num_layers: L.
        prompt_mask: bool `[B, T]`, true for the tokens that the routers read.
        thresholds: one a layer.
        protected: layers that are always kept.
        prefill: "route" or "full" (`RouterConfig.prefill`).
        gate: None for inference (hard decisions, skipped rows are not computed); "soft" or
            "straight_through" (every layer is computed and blended, for training routers); "hard"
            (as inference, with autograd).
        plan: bool `[B, L]` on the CPU, replaces the routers' decisions.
        plan_rows: what `planned_rows` makes of the plan; without it every row is computed, and
            those that skip are blended away.
        cache: the cache that this pass fills.
        compute_skipped: with the hard gate, compute skipped rows and blend them away: every process
            of a distributed run then calls the same layers.
        rows_per_prompt: rows that stand for one prompt (beams, return sequences) and share a plan.
        exact_budget: skip rate of an exact budget; needs prefill="full".
        unobserved: only the next layer sees the states that a layer returns (`is_unobserved`), so
            that they may be overwritten.
    """

    def __init__(
        self,
        num_layers: int,
        prompt_mask: torch.Tensor,
        thresholds: list[float],
        protected: Iterable[int],
        *,
        prefill: str = "route",
        gate: str | None = None,
        plan: torch.Tensor | None = None,
        plan_rows: list[torch.Tensor] | None = None,
        cache: SkipCache | None = None,
        compute_skipped: bool = False,
        rows_per_prompt: int = 1,
        exact_budget: float | None = None,
        unobserved: bool = False,
    ) -> None:
        if gate is not None and gate not in GATES:
            raise ValueError(f"gate must be None or one of {GATES}, got {gate!r}")
        self.num_layers = num_layers
        self.prompt_mask = prompt_mask
        self.thresholds = thresholds
        self.protected = frozenset(protected)
        self.full = prefill == "full"
        self.gate = gate
        self.plan = plan
        self.plan_rows = plan_rows
        self.cache = cache
        self.compute_skipped = compute_skipped
        self.rows_per_prompt = rows_per_prompt
        self.exact_budget = exact_budget
        self.blend = (
            gate in ("soft", "straight_through")
            or (gate == "hard" and compute_skipped)
            or (plan is not None and plan_rows is None)
        )
        self.follows_cache = cache is not None and cache.get_seq_length() > 0
        # Then no token is gated; torch.compile, which cannot know, gates them all alike.
        self.has_only_prompt = (
            prompt_mask is not None
            and not torch.compiler.is_compiling()
            and bool(prompt_mask.all())
        )
        self.unobserved = unobserved
        # Reentrant checkpointing turns autograd off within layers, so that no gate would be learnt.
        self.gates_learn = (
            gate in ("soft", "straight_through") and plan is None and torch.is_grad_enabled()
        )
        self.called: set[int] = set()
        self.keep_prob: dict[int, torch.Tensor] = {}  # layer -> [B]
        self.keep: dict[int, torch.Tensor] = {}  # layer -> bool [B]
        self.gates: dict[int, torch.Tensor] = {}  # layer -> [B], what multiplies the update
        self._own_states: torch.Tensor | None = None  # [B, T, D], a copy that this pass has made

    def run_layer(
        self,
        layer: Callable[..., torch.Tensor],
        router: nn.Module,
        hidden_states: torch.Tensor,  # [B, T, D]
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Score, decide, and run `layer` for the rows that keep it. Returns `[B, T, D]`."""
        layer_idx = router.layer_idx
        self.called.add(layer_idx)
        if self.follows_cache:
            assert self.cache is not None
            rows = self.cache.kept_rows(layer_idx, hidden_states.device)
            return self._run_rows(layer, rows, hidden_states, args, kwargs)
        if self.gates_learn and not torch.is_grad_enabled():
            raise ValueError(
                "gradient checkpointing with use_reentrant=True hides the layers' gates from the "
                'skip penalty: enable it with {"use_reentrant": False}'
            )
        keep_prob = torch.sigmoid(router(hidden_states, self.prompt_mask))  # [B]
        if self.rows_per_prompt > 1:
            keep_prob = keep_prob[:: self.rows_per_prompt].repeat_interleave(self.rows_per_prompt)
        keep = self._decide(layer_idx, keep_prob)  # [B]
        gate = self._gate(layer_idx, keep_prob, keep)  # [B]
        # A checkpointed layer runs twice; what the first run recorded is part of the graph.
        self.keep_prob.setdefault(layer_idx, keep_prob)
        self.keep.setdefault(layer_idx, keep)
        self.gates.setdefault(layer_idx, gate)
        if self.full or self.blend:
            return self._run_blended(layer, gate, hidden_states, args, kwargs)
        if self.cache is not None:
            self.cache.keep_rows(layer_idx, keep)
        if self.plan_rows is not None:
            rows = self.plan_rows[layer_idx]
        else:
            rows = torch.nonzero(keep).squeeze(1)
        rows = rows.to(hidden_states.device)
        return self._run_rows(layer, rows, hidden_states, args, kwargs)

    def _decide(self, layer_idx: int, keep_prob: torch.Tensor) -> torch.Tensor:
        if self.plan is not None:
            return self.plan[:, layer_idx].to(keep_prob.device)
        keep = keep_decision(
            keep_prob.detach(), self.thresholds[layer_idx], layer_idx in self.protected
        )
        if layer_idx == self.num_layers - 1:
            earlier = [self.keep[i].to(keep.device) for i in range(layer_idx)]
            keep = keep_something(torch.stack([*earlier, keep], 1))[:, -1]
        return keep

    def _gate(self, layer_idx: int, keep_prob: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        hard = keep.to(keep_prob.dtype)
        if self.gate in (None, "hard") or self.plan is not None or layer_idx in self.protected:
            return hard
        if self.gate == "soft":
            return keep_prob
        return hard + (keep_prob - keep_prob.detach())

    def _run_blended(
        self,
        layer: Callable[..., torch.Tensor],
        gate: torch.Tensor,  # [B]
        hidden_states: torch.Tensor,  # [B, T, D]
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """h + g·(layer(h) − h) for every row; lerp is exact at g = 0 and 1."""
        output = layer(hidden_states, *args, **kwargs)  # [B, T, D]
        weight = gate.to(output.device, output.dtype)[:, None]  # [B, 1]
        if self.full:
            if self.has_only_prompt:
                return output
            prompt = self.prompt_mask.to(output.device)
            weight = torch.where(prompt, torch.ones_like(weight), weight)  # [B, T]
        return torch.lerp(hidden_states.to(output.dtype), output, weight[..., None])

    def _run_rows(
        self,
        layer: Callable[..., torch.Tensor],
        rows: torch.Tensor,  # [R]
        hidden_states: torch.Tensor,  # [B, T, D]
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Run `layer` on `rows` of the batch only; the others pass through unchanged."""
        batch_size = hidden_states.shape[0]
        if len(rows) == batch_size:
            return layer(hidden_states, *args, **kwargs)
        if len(rows) == 0:
            return hidden_states
        select = functools.partial(_select_rows, rows=rows, batch_size=batch_size)
        output = layer(select(hidden_states), *select(args), **select(kwargs))  # [R, T, D]
        output = output.to(hidden_states.dtype)
        if hidden_states is self._own_states:
            return ops.scatter_rows_(hidden_states, rows, output)
        scattered = ops.scatter_rows(hidden_states, rows, output)
        if self.unobserved and not torch.is_grad_enabled():
            self._own_states = scattered
        return scattered

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Close the pass: check that every layer obeyed, hand the plans to the cache.

        Returns:
            keep_prob `[B, L]`, keep_mask bool `[B, L]` on the CPU, gates `[B, L]`; None when the
            plans were fixed by an earlier pass.

        Raises:
            RuntimeError: the model did not hand this object to all of its decoder layers.
        """
        if len(self.called) != self.num_layers:
            raise RuntimeError(
                f"only {len(self.called)} of {self.num_layers} decoder layers were routed: firstlm "
                "needs a model that passes keyword arguments on to its decoder layers"
            )
        if self.follows_cache:
            return None
        order = range(self.num_layers)
        device = self.keep_prob[0].device
        keep_prob = torch.stack([self.keep_prob[i].to(device) for i in order], 1)  # [B, L]
        gates = torch.stack([self.gates[i].to(device) for i in order], 1)  # [B, L]
        if self.exact_budget is not None:
            keep_mask = exact_budget_mask(keep_prob, self.exact_budget, self.protected)
        else:
            keep_mask = torch.stack([self.keep[i].to("cpu") for i in order], 1)  # [B, L]
        if self.cache is not None:
            if self.full:
                for layer_idx in order:
                    self.cache.keep_rows(layer_idx, keep_mask[:, layer_idx])
            self.cache.keep_prob = keep_prob.detach()
        return keep_prob, keep_mask, gates


def is_unobserved(layers: Iterable[nn.Module]) -> bool:
    """Whether no hook sees, and could keep, the states between routed decoder layers."""
    modules = [module for layer in layers for module in (layer, layer.router)]
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    hooked = any(getattr(module, name) for module in modules for name in hooks)
    return not hooked and not torch.nn.modules.module._has_any_global_hook()


def _select_rows(value: Any, rows: torch.Tensor, batch_size: int) -> Any:
    """Rows of every batched tensor in a layer's arguments; a leading 1 broadcasts and stays."""
    if isinstance(value, torch.Tensor):
        batched = value.ndim >= 2 and value.shape[0] == batch_size
        return ops.gather_rows(value, rows.to(value.device)) if batched else value
    if isinstance(value, tuple):
        return tuple(_select_rows(item, rows, batch_size) for item in value)
    if isinstance(value, dict):
        return {name: _select_rows(item, rows, batch_size) for name, item in value.items()}
    return value


class RoutedLayer:
    """Mixed into a model's decoder layer class; `router` is one of its submodules."""

    router: nn.Module

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, routing: Routing | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The layer under `routing`; without it, the layer as it was. Returns `[B, T, D]`."""
        layer = super().forward  # type: ignore[misc]
        if routing is None:
            return layer(hidden_states, *args, **kwargs)
        return routing.run_layer(layer, self.router, hidden_states, args, kwargs)


@functools.cache
def routed_layer_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """`layer_class` with routing. Keeps the name, by which FSDP and device maps know layers."""
    return type(
        layer_class.__name__, (RoutedLayer, layer_class), {"__module__": layer_class.__module__}
    )
