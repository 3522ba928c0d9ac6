"""The skip-aware KV cache: rows only for the (sequence, layer) pairs that the plans keep.

Storage and books are native (`csrc/skip_cache.h`, `csrc/bindings/skip_cache.h`); this is their face
towards transformers. Letters: B sequences, L layers, R kept rows of one layer, H key/value heads,
T tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.configuration_utils import PretrainedConfig

from firstlm.native import SkipCacheStorage
from firstlm.skip_plan import SkipPlan, kept_rows, mask_to_plans, plans_to_mask


class SkipCacheLayer(CacheLayerMixin):
    """One layer of a `SkipCache`: the keys and values of the rows that keep it.

    Storage is `[R, H, capacity, D]`, growing geometrically; that of a layer with a sliding window
    stays within a constant of the window.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, storage: SkipCacheStorage, layer_idx: int) -> None:
        self._storage = storage
        self._layer_idx = layer_idx

    @property
    def sliding_window(self) -> int | None:
        """Number of tokens that a query sees, itself included; None = all."""
        return self._storage.window(self._layer_idx)

    @property
    def is_sliding(self) -> bool:
        """Whether there is a window."""
        return self.sliding_window is not None

    @property
    def is_initialized(self) -> bool:
        """Whether the layer holds storage."""
        return self._storage.is_initialized(self._layer_idx)

    @property
    def num_rows(self) -> int:
        """R, 0 before the first token."""
        return self._storage.num_rows(self._layer_idx)

    @property
    def length(self) -> int:
        """Tokens of the sequence that went through this layer."""
        return self._storage.layer_length(self._layer_idx)

    def visible_start(self, length: int) -> int:
        """Position of the first cached token that the token after `length` tokens sees."""
        return self._storage.visible_start(self._layer_idx, length)

    @property
    def keys(self) -> torch.Tensor | None:
        """View of the keys that the next token sees, `[R, H, T, D]`; None when nothing is held."""
        return self._storage.visible(self._layer_idx)[0]

    @property
    def values(self) -> torch.Tensor | None:
        """View of the values that the next token sees, `[R, H, T, D]`."""
        return self._storage.visible(self._layer_idx)[1]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Adopt row count, heads, head_dim, dtype and device of the first tokens."""
        self._storage.initialize(self._layer_idx, key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens.

        Args:
            key_states, value_states: `[R, H, T, D]`, on the device of the tokens before; another
                floating type is converted.

        Returns:
            Views of the cached and the new keys and values that these T queries may see, valid
            until the layer is changed again.

        Raises:
            ValueError: a shape or device that does not fit, as another number of rows than the
                layer holds.
            RuntimeError: tensors that need a gradient (the cache keeps no autograd history).
        """
        return self._storage.append(self._layer_idx, key_states, value_states)

    def reset(self) -> None:
        """Not of one layer alone.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("the layers of a SkipCache are reset together: use SkipCache.reset()")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Not of one layer alone.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "plans move with the rows of all layers: use SkipCache.reorder_cache(beam_idx)"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number, first position) of the keys that a query of `query_length` tokens meets."""
        start = self.visible_start(self.length)
        return self.length - start + query_length, start

    def get_seq_length(self) -> int:
        """Tokens of the sequence that went through this layer."""
        return self.length

    def get_max_length(self) -> int:
        """-1: no maximum; the window of a sliding layer."""
        return -1 if self.sliding_window is None else self.sliding_window

    get_max_cache_shape = get_max_length  # its name in transformers before 5.18


class SkipCache(Cache):
    """A transformers `Cache` that holds only what the skip plans of its sequences keep.

    The plans are decided during the first pass (`keep_rows`, layer by layer) or set before it
    (`set_plans`), stay fixed for the life of the cache, and move with their rows on
    `reorder_cache`, `batch_select_indices` and `batch_repeat_interleave`. The logical length is one
    number for all layers, whatever they hold. A call that raises changes nothing.

    `copy.deepcopy` and pickle copy the visible tokens and the plans, not the spare capacity.

    Args:
        config: config of the model; gives the number of layers and the sliding windows.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self._storage = SkipCacheStorage(sliding_windows(config))
        num_layers = self._storage.num_layers
        super().__init__(layers=[SkipCacheLayer(self._storage, i) for i in range(num_layers)])
        self.keep_prob: torch.Tensor | None = None  # [B, L]
        self._plans_changed()

    def _plans_changed(self) -> None:
        self._rows: dict[torch.device, list[torch.Tensor]] = {}  # device -> [R] of each layer

    # -- plans ------------------------------------------------------------------------------------
    @property
    def keep_mask(self) -> torch.Tensor | None:
        """What the sequences keep, bool `[B, L]` on the CPU; None before the first decision."""
        return self._storage.keep_mask

    @property
    def skip_plans(self) -> list[SkipPlan] | None:
        """One plan a sequence; None before the first pass."""
        mask = self.keep_mask
        return None if mask is None else mask_to_plans(mask)

    def set_plans(
        self, plans: SkipPlan | Sequence[SkipPlan] | torch.Tensor, batch_size: int
    ) -> None:
        """Fix the plans of an empty cache, or drop further layers of a filled one.

        Raises:
            ValueError: plans that do not fit, or that keep a layer which the cache no longer has.
        """
        self._storage.restrict_to(plans_to_mask(plans, batch_size, len(self.layers)))
        self._plans_changed()

    def keep_rows(self, layer_idx: int, keep: torch.Tensor) -> None:
        """Keep one layer for the sequences where `keep` `[B]` is true; free the others' rows.

        Raises:
            ValueError: another number of sequences.
        """
        self._storage.restrict_layer(layer_idx, keep.detach().to("cpu", torch.bool))
        self._plans_changed()

    def kept_rows(self, layer_idx: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Indices `[R]` of the sequences that keep a layer, for all layers planned at once.

        Raises:
            RuntimeError: nothing was decided yet.
        """
        device = torch.device(device)
        if device not in self._rows:
            mask = self.keep_mask
            if mask is None:
                raise RuntimeError("this cache has no plans before the first pass")
            self._rows[device] = kept_rows(mask, device)
        return self._rows[device][layer_idx]

    # -- rows -------------------------------------------------------------------------------------
    def _select(self, index: torch.Tensor) -> None:
        """Row b of the new cache is row `index[b]` of the old one, plan and all."""
        if index.ndim != 1 or index.dtype.is_floating_point or index.dtype.is_complex:
            raise ValueError(
                f"row indices must be integers [B], got {index.dtype} {list(index.shape)}"
            )
        index = index.detach().to("cpu", torch.long)
        keep_prob = self.keep_prob
        if keep_prob is not None:
            inside = index.clamp(-len(keep_prob), len(keep_prob) - 1)  # the storage raises if not
            keep_prob = keep_prob[inside.to(keep_prob.device)]
        before = None if self.keep_mask is None else self.keep_mask.tolist()
        rows = index.tolist()
        self._storage.select(rows)  # raises for a row that is not there
        self.keep_prob = keep_prob
        if before is None or [before[row] for row in rows] != before:
            self._plans_changed()  # beams of one prompt, which share a plan, may change places

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row b becomes the old row `beam_idx[b]` (beam search).

        Raises:
            IndexError: an index outside [-B, B).
        """
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the sequences `indices` `[B']` (integers, or a bool mask `[B]`).

        Raises:
            IndexError: an index outside [-B, B), or a mask of another length.
        """
        if indices.dtype == torch.bool:
            if self.batch_size >= 0 and indices.shape != (self.batch_size,):
                raise IndexError(
                    f"a mask of rows must be [{self.batch_size}], got {list(indices.shape)}"
                )
            indices = torch.nonzero(indices).squeeze(1)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, side by side.

        Raises:
            ValueError: a negative number.
        """
        keep_prob = self.keep_prob
        if keep_prob is not None:
            keep_prob = keep_prob.repeat_interleave(max(repeats, 0), 0)  # the storage raises if < 0
        self._storage.repeat(repeats)
        self.keep_prob = keep_prob
        self._plans_changed()

    @property
    def batch_size(self) -> int:
        """B, -1 before the first pass."""
        return self._storage.batch_size

    def check_batch(self, batch_size: int) -> None:
        """Raises ValueError if the plans are those of another number of sequences."""
        if self.batch_size != batch_size:
            raise ValueError(
                f"the cache has {self.batch_size} sequences, the batch {batch_size}: repeat the "
                "cache's with batch_repeat_interleave, or select some with batch_select_indices"
            )

    # -- tokens -----------------------------------------------------------------------------------
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length in tokens: one number, whatever the layers hold."""
        return self._storage.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next token."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(number, first position) of the keys that a layer of this kind shows to a query."""
        length = self.get_seq_length()
        start = self.layers[layer_idx].visible_start(length)
        return length - start + query_length, start

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; nothing changes if a layer cannot.

        Raises:
            ValueError: a positive number (its meaning has changed between transformers releases),
                or more tokens than there are.
            RuntimeError: a sliding layer has already dropped tokens that would be needed.
        """
        length = self.get_seq_length()
        if tokens_to_remove > 0 or -tokens_to_remove > length:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, at most {length}, "
                f"got {tokens_to_remove}"
            )
        if length and length + tokens_to_remove == 0:
            self.reset()
        else:
            self._storage.crop(length + tokens_to_remove)

    def reset(self) -> None:
        """Forget tokens and plans."""
        self._storage.reset()
        self.keep_prob = None
        self._plans_changed()

    # -- books ------------------------------------------------------------------------------------
    def memory(self) -> dict[str, int]:
        """Bytes: `bytes` held for kept pairs, `allocated` with spare capacity, and `full`, what a
        cache that holds every layer for every sequence would hold."""
        return self._storage.memory()

    def __repr__(self) -> str:
        return (
            f"SkipCache(sequences={self.batch_size}, tokens={self.get_seq_length()}, "
            f"memory={self.memory()})"
        )


def sliding_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window of every decoder layer, None for full attention.

    Raises:
        ValueError: layers that are not attention layers, or that share another layer's cache.
    """
    layers = DynamicCache(config=config).layers
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    kinds = {type(layer).__name__ for layer in layers}
    if len(layers) != num_layers or kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise ValueError(
            f"{config.model_type}: firstlm needs one attention cache a decoder layer, this model "
            f"has {num_layers} layers with caches {sorted(kinds)} ({len(layers)} in all)"
        )
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]
