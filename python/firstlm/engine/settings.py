"""How an answer is drawn and where it ends."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from firstlm import native
from firstlm.arguments import number, whole_number
from firstlm.engine.prompts import as_list, require_tokenizer
from firstlm.engine.text import EngineTokenizer

# What of a model's generation_config.json is a default of the engine as well.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_OFF = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
_SAMPLED_TOP_K = 50  # of transformers' generate, where neither call nor model names one
# What a generation config may ask for that the engine does not know.
_UNKNOWN = (
    "bad_words_ids", "begin_suppress_tokens", "encoder_repetition_penalty", "epsilon_cutoff",
    "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "guidance_scale", "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beams",
    "sequence_bias", "suppress_tokens", "top_h", "typical_p",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Of one call.

    Attributes:
        sampling: what `firstlm.native.Decoder.decoding` takes, but for the seed.
        seeds: one a prompt.
        end_tokens: ids that end an answer: end of sequence, and those of `stop`.
        stop_strings: texts that end an answer.
    """

    sampling: dict[str, Any]
    seeds: list[int]
    end_tokens: list[int]
    stop_strings: list[str]

    def of_row(self, row: int) -> dict[str, Any]:
        """The sampling settings of one prompt."""
        return self.sampling | {"seed": self.seeds[row]}


def generation_defaults(generation_config: Any) -> dict[str, Any]:
    """What a model's own generation config says, as plain JSON values; unset ones are left out."""
    defaults = {"eos_token_id": [], "do_sample": False}
    if generation_config is None:
        return defaults
    said = generation_config.to_diff_dict()
    ends = generation_config.eos_token_id
    if ends is not None:
        defaults["eos_token_id"] = [ends] if isinstance(ends, int) else list(ends)
    neutral = (None, 0, 1, [])
    ignored = [f"{name}={said[name]!r}" for name in _UNKNOWN if said.get(name) not in neutral]
    if ignored:
        warnings.warn(
            f"the engine does not know what the model's generation config asks for: "
            f"{', '.join(ignored)}; model.generate follows it",
            stacklevel=2,
        )
    names = ("do_sample", *SAMPLING)
    return defaults | {name: said[name] for name in names if said.get(name) is not None}


def settings_of(
    defaults: Mapping[str, Any],
    tokenizer: EngineTokenizer | None,
    num_prompts: int,
    vocab_size: int,
    *,
    max_new_tokens: int,
    seed: int | Sequence[int],
    stop: str | int | Sequence[str | int] | None,
    ignore_eos: bool,
    **sampling: Any,
) -> Settings:
    """The settings of a call: what it gives, else the model's generation config, else greedy.

    Args:
        defaults: from `generation_defaults`.
        num_prompts: of the call.
        vocab_size: tokens of the model.
        max_new_tokens, seed, stop, ignore_eos, **sampling: as in `Engine.generate`.

    Raises:
        TypeError, ValueError: a setting that is not accepted.
    """
    if whole_number("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    strings, tokens = _stops(stop, tokenizer, vocab_size)
    ends = [] if ignore_eos else list(defaults.get("eos_token_id", []))
    found = _sampling(defaults, sampling)
    native.check_sampling(found)
    return Settings(
        sampling=found,
        seeds=_seeds(seed, num_prompts),
        end_tokens=sorted({*ends, *tokens}),
        stop_strings=strings,
    )


def _sampling(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    own = dict(defaults)
    if not own.get("do_sample"):
        own["temperature"] = 0.0
    elif "temperature" not in own:
        own["temperature"] = 1.0
    values = {
        name: own.get(name, _OFF[name]) if given.get(name) is None else given[name]
        for name in SAMPLING
    }
    found = {
        name: _count(name, value) if isinstance(_OFF[name], int) else number(name, value)
        for name, value in values.items()
    }
    if given.get("top_k") is None and "top_k" not in own and found["temperature"]:
        found["top_k"] = _SAMPLED_TOP_K
    return found


def _count(name: str, value: Any) -> int:
    """0 or more. Beyond 2^31 - 1 no vocabulary reaches, and everything is kept."""
    count = min(whole_number(name, value), 2**31 - 1)
    if count < 0:
        raise ValueError(f"{name} is {count}; accepted is 0 (all) or more")
    return count


def _seeds(seed: int | Sequence[int], num_prompts: int) -> list[int]:
    """One a prompt."""
    seed = as_list(seed)
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        seeds = [whole_number("seed", value) for value in seed]
    else:
        seeds = [whole_number("seed", seed) + row for row in range(num_prompts)]
    if len(seeds) != num_prompts:
        raise ValueError(
            f"seed takes one number or one a prompt: got {len(seeds)} for {num_prompts}"
        )
    for value in seeds:
        if not 0 <= value < 2**64:
            raise ValueError(f"seed must lie in [0, 2^64), got {value}")
    return seeds


def _stops(
    stop: str | int | Sequence[str | int] | None,
    tokenizer: EngineTokenizer | None,
    vocab_size: int,
) -> tuple[list[str], list[int]]:
    """(texts, token ids); a text that is one token of its own is that token."""
    if stop is None:
        return [], []
    stop = as_list(stop)
    strings, tokens = [], []
    for value in stop if isinstance(stop, Sequence) and not isinstance(stop, str) else [stop]:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < vocab_size:
                raise ValueError(f"stop takes token ids in [0, {vocab_size}), got {value}")
            tokens.append(value)
        elif isinstance(value, str) and value:
            token = require_tokenizer(tokenizer).special_token_id(value)
            strings.append(value) if token is None else tokens.append(token)
        else:
            raise TypeError(f"stop takes texts, not empty ones, and token ids, got {value!r}")
    return strings, tokens
