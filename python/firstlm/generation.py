"""What `generate` of a routed model accepts, and what becomes of a kept cache on a later turn."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from firstlm.cache_argument import find_cache
from firstlm.skip_cache import SkipCache

# option -> why it cannot work, and the way out
_UNSUPPORTED = {
    "prefill_chunk_size": "the routers must read the whole prompt in one pass; leave it unset",
    "cache_implementation": "skip plans need a SkipCache; leave it unset",
    "assistant_model": "its rollback would mix the plans of two models; leave it unset",
    "prompt_lookup_num_tokens": "assisted generation is not supported; leave it unset",
    "assistant_early_exit": "early exit needs keys and values that skipped layers do not have; use "
    "budget= or skip_plan= to run fewer layers",
    "dola_layers": "DoLa reads layers that the plan may skip; leave it unset",
    "penalty_alpha": "contrastive search is not supported; use sampling or beams",
    "custom_generate": "a custom decoding loop would bypass the skip plans; leave it unset",
}


def named_arguments(
    inputs: torch.Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """generate's arguments by name: `inputs` as `input_ids`, positional ones by their position."""
    names = [name for name in inspect.signature(GenerationMixin.generate).parameters][2:]
    named = dict(zip(names, args, strict=False)) | dict(kwargs)
    if inputs is not None:
        named["input_ids"] = inputs
    return named


def option_of(defaults: GenerationConfig, kwargs: Mapping[str, Any], name: str) -> Any:
    """As transformers: what neither the call nor its config says, the model's own config does."""
    configs = [c for c in (kwargs.get("generation_config"), defaults) if c is not None]
    values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def check_supported(defaults: GenerationConfig, kwargs: Mapping[str, Any]) -> int:
    """Refuse what cannot work with skip plans, before any work is done.

    Args:
        defaults: the model's generation config.
        kwargs: the arguments of `generate`, by name.

    Returns:
        Rows of the decode batch that stand for one prompt (beams, return sequences).

    Raises:
        ValueError: an unsupported option; the message names the way out.
    """
    option = functools.partial(option_of, defaults, kwargs)
    for name, reason in _UNSUPPORTED.items():
        if option(name) is not None:
            raise ValueError(f"generate({name}={option(name)!r}) is not supported: {reason}")
    if option("use_cache") is False:
        raise ValueError(
            "generate(use_cache=False) is not supported: the plan of the prompt lives with its "
            "cache; leave it unset"
        )
    cache = find_cache(kwargs)
    if cache is not None and not isinstance(cache, SkipCache):
        raise ValueError(
            f"generate(cache={type(cache).__name__}) is not supported: pass a "
            "firstlm.SkipCache, for example the one of the turn before, or none"
        )
    return max(option("num_beams") or 1, option("num_return_sequences") or 1)


def drop_cache_if_replanned(
    cache: SkipCache,
    prompt: torch.Tensor,
    attention_mask: torch.Tensor | None,
    skip_plan: torch.Tensor | None,
    budget: float | None,
    replan: bool,
    rows_per_prompt: int,
) -> None:
    """A later turn keeps the plans of the first; new plans drop the cache.

    Args:
        cache: of the turns before; reset in place when new plans are asked for.
        prompt: `[B, T]` ids or `[B, T, D]` embeddings of this turn.
        skip_plan: keep mask `[B, L]` asked for, or None.
        budget: asked for, or None.
        replan: new plans are asked for.

    Raises:
        ValueError: new plans need the whole conversation, but only its new tokens are given.
    """
    if cache.get_seq_length() == 0:
        if replan or budget is not None or skip_plan is not None:
            cache.reset()  # what SkipCache.set_plans has asked for
        return
    assert cache.keep_mask is not None
    if skip_plan is not None and not replan and budget is None:
        replan = not torch.equal(skip_plan.repeat_interleave(rows_per_prompt, 0), cache.keep_mask)
    if not replan and budget is None:
        return
    length = cache.get_seq_length()
    partial = attention_mask is not None and attention_mask.shape[1] > prompt.shape[1]
    if partial or prompt.shape[1] <= length:
        raise ValueError(
            f"other plans need a fresh prefill of the whole conversation: the cache has {length} "
            f"tokens, only {prompt.shape[1]} were given; pass all of them, or keep the plan"
        )
    cache.reset()
