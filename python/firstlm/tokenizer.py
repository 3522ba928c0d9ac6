"""The tokenizer of whatever `firstlm.from_pretrained` loads."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from firstlm import checkpoint, embedded_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(base: str | os.PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model or checkpoint, ready for left-padded generation.

    Args:
        base: as in `firstlm.from_pretrained`. A checkpoint without tokenizer files uses the
            tokenizer of its base.
        **kwargs: handed to transformers' `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: a GGUF that cannot be read, or a checkpoint that names no base.
        OSError: transformers finds no tokenizer.
    """
    from transformers import AutoTokenizer

    source = str(base)
    hub = {name: kwargs[name] for name in checkpoint.HUB_OPTIONS if name in kwargs}
    folder = checkpoint.find_checkpoint(base, **hub)
    if folder is not None and not (folder / "tokenizer_config.json").is_file():
        config = checkpoint.read_router_config(folder)
        if config.base_model_name_or_path is None:
            raise ValueError(f"{source} holds no tokenizer and names no base model to take it from")
        if not os.path.exists(source):
            kwargs.pop("revision", None)  # was the checkpoint's
        source = config.base_model_name_or_path
    if embedded_model.is_alias(source):
        source = str(embedded_model.path())
    elif source.endswith(".gguf"):
        source = str(embedded_model.converted_gguf(source))
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **kwargs)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
