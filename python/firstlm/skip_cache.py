"""The skip-aware KV cache: rows only for the (sequence, layer) pairs that the plans keep.

Letters: B sequences, L layers, R kept rows of one layer, H key/value heads, T tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.configuration_utils import PretrainedConfig

from firstlm.skip_plan import SkipPlan, kept_rows, mask_to_plans, plans_to_mask

_MIN_CAPACITY = 16


class SkipCacheLayer(CacheLayerMixin):
    """Keys and values of the rows that keep one layer.

    Storage is `[R, H, capacity, D]`, growing geometrically; the token at position p of the sequence
    lies in slot `p - base`. A sliding layer lets `base` follow its window whenever it runs out of
    slots, so its capacity stays within a constant of the window.

    Args:
        sliding_window: number of tokens that a query sees, itself included; None = all.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, sliding_window: int | None = None) -> None:
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._keys: torch.Tensor | None = None  # [R, H, capacity, D]
        self._values: torch.Tensor | None = None  # [R, H, capacity, D]
        self.length = 0  # tokens of the sequence, dropped ones of a sliding layer included
        self.base = 0  # position in the sequence of slot 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Adopt row count, heads, head_dim, dtype and device of the first tokens."""
        self._keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
        self._values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[3])
        self.is_initialized = True

    def visible_start(self, length: int) -> int:
        """Position of the first cached token that the token after `length` tokens sees."""
        return 0 if self.sliding_window is None else max(length - self.sliding_window + 1, 0)

    @property
    def num_rows(self) -> int:
        """R, 0 before the first token."""
        return 0 if self._keys is None else self._keys.shape[0]

    def _view(self, storage: torch.Tensor, start: int) -> torch.Tensor:
        return storage[:, :, start - self.base : self.length - self.base]

    @property
    def keys(self) -> torch.Tensor | None:
        """View of the keys that the next token sees, `[R, H, T, D]`; None when nothing is held."""
        return (
            None if self._keys is None else self._view(self._keys, self.visible_start(self.length))
        )

    @property
    def values(self) -> torch.Tensor | None:
        """View of the values that the next token sees, `[R, H, T, D]`."""
        if self._values is None:
            return None
        return self._view(self._values, self.visible_start(self.length))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens.

        Args:
            key_states, value_states: `[R, H, T, D]`.

        Returns:
            Views of the cached and the new keys and values that these T queries may see.

        Raises:
            ValueError: another number of rows than the layer holds.
            RuntimeError: tensors that need a gradient (the cache keeps no autograd history).
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError(
                "a SkipCache keeps no autograd history: run under torch.no_grad(), or pass "
                "use_cache=False for training"
            )
        if self._keys is None:
            self.lazy_initialization(key_states, value_states)
        assert self._keys is not None and self._values is not None
        if key_states.shape[0] != self._keys.shape[0]:
            raise ValueError(
                f"this cache layer holds {self._keys.shape[0]} rows, got {key_states.shape[0]}"
            )
        num_new = key_states.shape[2]
        start = self.visible_start(self.length)
        self._reserve(num_new, start)
        first = self.length - self.base
        self._keys[:, :, first : first + num_new] = key_states
        self._values[:, :, first : first + num_new] = value_states
        self.length += num_new
        return self._view(self._keys, start), self._view(self._values, start)

    def _reserve(self, num_new: int, start: int) -> None:
        """Make room for `num_new` tokens, keeping those from position `start` on."""
        assert self._keys is not None and self._values is not None
        capacity = self._keys.shape[2]
        if self.length - self.base + num_new <= capacity:
            return
        live = self.length - start
        target = max(_MIN_CAPACITY, (live + num_new) * 3 // 2)
        # A storage that is still of the right order is compacted, else replaced.
        fits = target <= capacity <= 4 * target
        self._keys = _moved(self._keys, start - self.base, live, None if fits else target)
        self._values = _moved(self._values, start - self.base, live, None if fits else target)
        self.base = start

    def select_rows(self, index: torch.Tensor) -> None:
        """Replace the rows by rows `index` `[R']` of the present ones; R' = 0 frees the storage."""
        if self._keys is None or self._values is None:
            return
        if index.numel() == 0:
            length, base = self.length, self.base
            self.reset()
            self.length, self.base = length, base
            return
        index = index.to(self._keys.device)
        self._keys = self._keys.index_select(0, index)
        self._values = self._values.index_select(0, index)

    def crop_start(self, length: int) -> None:
        """Raises RuntimeError if this layer cannot go back to `length` tokens."""
        if self._keys is not None and self.visible_start(length) < self.base:
            raise RuntimeError(
                f"cannot crop to {length} tokens: the sliding window of {self.sliding_window} "
                f"has dropped the tokens before {self.base}; prefill again instead"
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

    def nbytes(self) -> tuple[int, int]:
        """(bytes of the visible tokens, bytes allocated)."""
        if self._keys is None or self._values is None:
            return 0, 0
        visible = self.length - self.visible_start(self.length)
        slots = max(self._keys.shape[2], 1)
        allocated = self._keys.nbytes + self._values.nbytes
        return allocated // slots * visible, allocated

    def bytes_per_token(self) -> int | None:
        """Bytes of one token of one row, None while unknown."""
        if self._keys is None or self._values is None:
            return None
        return sum(s.shape[1] * s.shape[3] * s.element_size() for s in (self._keys, self._values))


def _moved(storage: torch.Tensor, first: int, count: int, capacity: int | None) -> torch.Tensor:
    """Slots [first, first + count) moved to the front, in place or into a new storage."""
    live = storage[:, :, first : first + count]
    if capacity is None:
        storage[:, :, :count] = live.clone()
        return storage
    rows, heads, _, head_dim = storage.shape
    grown = storage.new_empty(rows, heads, capacity, head_dim)
    grown[:, :, :count] = live
    return grown


class SkipCache(Cache):
    """A transformers `Cache` that holds only what the skip plans of its sequences keep.

    The plans are decided during the first pass (`keep_rows`, layer by layer) or set before it
    (`set_plans`), stay fixed for the life of the cache, and move with their rows on
    `reorder_cache`, `batch_select_indices` and `batch_repeat_interleave`. The logical length is one
    number for all layers, whatever they hold.

    Args:
        config: config of the model; gives the number of layers and the sliding windows.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(layers=[SkipCacheLayer(window) for window in sliding_windows(config)])
        self._forget()

    def _forget(self) -> None:
        self.keep_mask: torch.Tensor | None = None  # bool [B, L] on the CPU
        self.keep_prob: torch.Tensor | None = None  # [B, L]
        self._rows: dict[torch.device, list[torch.Tensor]] = {}

    # -- plans ------------------------------------------------------------------------------------
    @property
    def skip_plans(self) -> list[SkipPlan] | None:
        """One plan a sequence; None before the first pass."""
        return None if self.keep_mask is None else mask_to_plans(self.keep_mask)

    def set_plans(
        self, plans: SkipPlan | Sequence[SkipPlan] | torch.Tensor, batch_size: int
    ) -> None:
        """Fix the plans of an empty cache, or drop further layers of a filled one.

        Raises:
            ValueError: plans that do not fit, or that keep a layer which the cache no longer has.
        """
        mask = plans_to_mask(plans, batch_size, len(self.layers))
        if self.keep_mask is None:
            self.keep_mask = torch.ones_like(mask)
        if bool((mask & ~self.keep_mask).any()):
            raise ValueError(
                "a layer that was skipped has no keys and values and cannot be kept later; "
                "prefill again (generate(replan=True)) or reset() the cache"
            )
        for layer_idx in range(len(self.layers)):
            self.keep_rows(layer_idx, mask[:, layer_idx])

    def keep_rows(self, layer_idx: int, keep: torch.Tensor) -> None:
        """Keep one layer for the sequences where `keep` `[B]` is true; free the others' rows."""
        keep = keep.detach().to("cpu", torch.bool)
        if self.keep_mask is None:
            self.keep_mask = torch.ones(len(keep), len(self.layers), dtype=torch.bool)
        before = self.keep_mask[:, layer_idx]
        after = before & keep
        layer = self.layers[layer_idx]
        if layer.num_rows and not torch.equal(before, after):
            layer.select_rows(torch.nonzero(after[before]).squeeze(1))
        self.keep_mask[:, layer_idx] = after
        self._rows.clear()

    def kept_rows(self, layer_idx: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Indices `[R]` of the sequences that keep a layer, for all layers planned at once."""
        device = torch.device(device)
        if device not in self._rows:
            assert self.keep_mask is not None
            self._rows[device] = kept_rows(self.keep_mask, device)
        return self._rows[device][layer_idx]

    # -- rows -------------------------------------------------------------------------------------
    def _select(self, index: torch.Tensor) -> None:
        """Row b of the new cache is row `index[b]` of the old one, plan and all."""
        if self.keep_mask is None:
            return
        index = index.detach().to("cpu", torch.long)
        batch_size = self.keep_mask.shape[0]
        if index.numel() and not -batch_size <= int(index.min()) <= int(index.max()) < batch_size:
            raise IndexError(f"row indices must lie in [0, {batch_size}), got {index.tolist()}")
        index = index % batch_size
        position = self.keep_mask.cumsum(0) - 1  # [B, L] sequence -> row of the layer
        for layer_idx, layer in enumerate(self.layers):
            kept = self.keep_mask[index, layer_idx]
            layer.select_rows(position[index[kept], layer_idx])
        self.keep_mask = self.keep_mask[index]
        if self.keep_prob is not None:
            self.keep_prob = self.keep_prob[index.to(self.keep_prob.device)]
        self._rows.clear()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row b becomes the old row `beam_idx[b]` (beam search)."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the sequences `indices` `[B']` (integers, or a bool mask `[B]`)."""
        if indices.dtype == torch.bool:
            indices = torch.nonzero(indices).squeeze(1)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, side by side."""
        if self.keep_mask is not None:
            self._select(torch.arange(self.keep_mask.shape[0]).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """B, -1 before the first pass."""
        return -1 if self.keep_mask is None else self.keep_mask.shape[0]

    # -- tokens -----------------------------------------------------------------------------------
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length in tokens: one number, whatever the layers hold."""
        return max((layer.length for layer in self.layers), default=0)

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
        target = length + tokens_to_remove
        if target == 0:
            self.reset()
            return
        for layer in self.layers:
            layer.crop_start(target)
        for layer in self.layers:
            layer.length = min(layer.length, target)

    def reset(self) -> None:
        """Forget tokens and plans."""
        super().reset()
        self._forget()

    # -- books ------------------------------------------------------------------------------------
    def memory(self) -> dict[str, int]:
        """Bytes: `bytes` held for kept pairs, `allocated` with spare capacity, and `full`, what a
        cache that holds every layer for every sequence would hold."""
        sizes = [layer.nbytes() for layer in self.layers]
        length = self.get_seq_length()
        per_token = [layer.bytes_per_token() for layer in self.layers]
        known = next((size for size in per_token if size is not None), 0)
        full = sum(
            (size if size is not None else known) * (length - layer.visible_start(length))
            for layer, size in zip(self.layers, per_token, strict=True)
        )
        return {
            "bytes": sum(held for held, _ in sizes),
            "allocated": sum(allocated for _, allocated in sizes),
            "full": full * max(self.batch_size, 0),
        }

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
