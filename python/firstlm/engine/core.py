"""The native decoder behind a lock, with its routers, and what it counts. Letters: B prompts, L
layers, V vocabulary."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from firstlm import native
from firstlm.engine.routers import EngineRouters
from firstlm.engine.stats import EngineStats

T = TypeVar("T")


class DecoderCore:
    """One native decoder; calls from several threads take turns.

    Args:
        config: of `config.decoder_config`, with precision and head_precision.
        tensors: of `weights.pack_model`.
        routers: None: every layer is kept.
        num_threads: of the decoder.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        routers: EngineRouters | None,
        num_threads: int,
    ) -> None:
        own = {name: tensor for name, tensor in tensors.items() if ".router." not in name}
        self.decoder = native.Decoder(dict(config), own, num_threads)
        self.num_layers: int = config["num_layers"]
        self.routers = routers
        self._prefill: str | None = None
        self._lock = threading.Lock()

    def routed(
        self,
        prompts: Sequence[list[int]],
        thresholds: Sequence[float],
        prefill: str,
        stats: EngineStats,
        num_logits: int = 1,
    ) -> tuple[list[Any], torch.Tensor, torch.Tensor]:
        """Runs prompts whose plans the routers find.

        Args:
            thresholds: one a layer.
            prefill: "route" or "full".
            num_logits: of so many last tokens of every prompt.

        Returns:
            sequences, logits [B * num_logits, V], keep_prob [B, L].
        """
        sequences = [self.decoder.sequence() for _ in prompts]

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            if self._prefill != prefill:
                assert self.routers is not None
                self._prefill = None  # unknown, should an interrupt come between the two
                self.routers.set_on(self.decoder, prefill)
                self._prefill = prefill
            wanted = [num_logits] * len(prompts)
            return self.decoder.extend(sequences, list(prompts), None, list(thresholds), wanted)

        logits, keep_prob = self._counted(run, stats, decode=False)
        return sequences, logits, keep_prob

    def planned(
        self, prompts: Sequence[list[int]], keep: torch.Tensor, prefill: str, stats: EngineStats
    ) -> tuple[list[Any], torch.Tensor]:
        """Runs prompts under given plans.

        Args:
            keep: bool [B, L].
            prefill: "full": the prompts run through every layer, and what comes after does not.

        Returns:
            sequences, logits [B, V].
        """
        sequences = [self.decoder.sequence() for _ in prompts]
        first = keep if prefill == "route" else torch.ones_like(keep)
        logits = self.extend(sequences, prompts, [1] * len(prompts), stats, keep=first)
        if prefill == "full":
            restrict(sequences, keep)
        return sequences, logits

    def extend(
        self,
        sequences: Sequence[Any],
        tokens: Sequence[list[int]],
        num_logits: Sequence[int],
        stats: EngineStats,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """More tokens for sequences, which have plans or are given them; logits [sum, V]."""
        run = lambda: self.decoder.extend(  # noqa: E731
            list(sequences), list(tokens), keep, None, list(num_logits)
        )
        return self._counted(run, stats, decode=False)[0]

    def advance(self, decoding: Any, steps: int, stats: EngineStats) -> list[list[int]]:
        """`steps` tokens more for every row that has not ended: [B][<= steps]."""
        return self._counted(lambda: decoding.advance(steps), stats, decode=True)

    def _counted(self, run: Callable[[], T], stats: EngineStats, decode: bool) -> T:
        with self._lock:
            before, start = self.decoder.counters(), time.perf_counter()
            result = run()
            milliseconds = 1e3 * (time.perf_counter() - start)
            counters = self.decoder.counters()
        added = lambda name: counters[name] - before[name]  # noqa: E731
        if decode:
            stats.steps += added("forwards")
            stats.decode_ms += milliseconds
            stats.weight_bytes += added("weight_bytes")
            stats.cache_bytes += added("cache_bytes")
            runs = counters["layer_runs"], before["layer_runs"]
            total = stats.layer_runs or [0] * len(runs[0])
            stats.layer_runs = [n + now - was for n, now, was in zip(total, *runs, strict=True)]
        else:
            stats.prefill_ms += milliseconds
            stats.router_ms += 1e3 * added("router_seconds")
        return result


def restrict(sequences: Sequence[Any], keep: torch.Tensor) -> None:
    """Sequences lose the layers that their row of `keep` [B, L] drops."""
    for sequence, row in zip(sequences, keep, strict=True):
        sequence.restrict(row)
