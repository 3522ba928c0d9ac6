"""From a model to the parts of an engine: packed weights, from the cache or made now."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from firstlm.checkpoint import ADAPTER_FOLDER
from firstlm.engine import lora as lora_adapters
from firstlm.engine import saved
from firstlm.engine.config import check_family, decoder_config
from firstlm.engine.saved import EngineConfig, SavedEngine
from firstlm.engine.settings import generation_defaults
from firstlm.engine.source import source_folders, source_key
from firstlm.engine.text import EngineTokenizer
from firstlm.engine.weights import check_precision, pack_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """How weights are packed.

    Attributes:
        precision, head_precision, lora: as in `Engine.from_pretrained`.
    """

    precision: str
    head_precision: str
    lora: str

    @classmethod
    def of(cls, precision: str | None, head_precision: str | None, lora: str) -> Form:
        """With the defaults: int8, and a head of 4 bits only where asked: they lose most there.

        Raises:
            ValueError: unknown names.
        """
        precision = check_precision(precision or "int8")
        default = "int8" if precision == "int4" else precision
        head_precision = check_precision(head_precision or default, "head_precision")
        return cls(precision, head_precision, lora_adapters.check_mode(lora))

    @property
    def keeps_apart(self) -> bool:
        """Whether adapters stay apart from the weights."""
        return lora_adapters.keeps_apart(self.lora, self.precision)


def packed_parts(
    source: str | os.PathLike[str],
    precision: str | None,
    head_precision: str | None,
    lora: str,
    num_threads: int,
    cache: bool,
    progress: bool,
    options: dict[str, Any],
) -> SavedEngine:
    """The parts of an engine; arguments as in `Engine.from_pretrained`."""
    form = Form.of(precision, head_precision, lora)
    if (Path(source) / saved.CONFIG_NAME).is_file():
        if options:
            raise ValueError(
                f"{source} is a saved engine, which takes no {', '.join(options)}: pack the model "
                "again"
            )
        return _load_saved(Path(source), precision, head_precision, lora)
    folders = source_folders(source) if not options else []
    key = source_key(folders) if folders else None
    if key is None or not cache:
        return _pack(source, form, num_threads, progress, options, key)
    apart = form.keeps_apart and any((f / ADAPTER_FOLDER).is_dir() for f in folders)
    folder = saved.cache_folder(form.precision, form.head_precision, apart, key)
    if folder.exists():
        try:
            return saved.load(folder)
        except (ValueError, OSError) as error:
            logger.warning("%s: packing the weights again", error)
    parts = _pack(source, form, num_threads, progress, options, key)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        saved.save(parts, folder)
    except OSError as error:  # a full disk is no reason not to answer
        logger.warning("the packed weights are not kept: %s", error)
    return parts


def parts_of(
    model: Any,
    tokenizer: Any,
    form: Form,
    num_threads: int,
    progress: bool,
    owned: bool = False,
    source: str = "",
    key: str | None = None,
) -> SavedEngine:
    """The parts of an engine of a model in memory; arguments as in `Engine.from_model`.

    Args:
        form: of the weights.
        owned: nobody else has the model, which is used up.
        source, key: of `EngineConfig`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"from_model takes a model in memory, got {model!r:.80}: from_pretrained takes names "
            "and folders"
        )
    decoder = decoder_config(model)
    decoder |= {"precision": form.precision, "head_precision": form.head_precision}
    router_config = getattr(model, "router_config", None)
    config = EngineConfig(
        decoder=decoder,
        max_length=model.config.max_position_embeddings,
        generation=generation_defaults(model.generation_config),
        router_config=None if router_config is None else router_config.to_dict(),
        trained_prefill=getattr(model, "trained_prefill", None),
        source=source or type(model).__name__,
        source_key=key,
    )
    block = pack_model(
        model, form.precision, form.head_precision, apart=form.keeps_apart,
        num_threads=num_threads, owned=owned, progress=progress,
    )  # fmt: skip
    own = None if tokenizer is None else EngineTokenizer.of(tokenizer)
    return SavedEngine(config, block, own)


def _pack(
    source: str | os.PathLike[str],
    form: Form,
    num_threads: int,
    progress: bool,
    options: dict[str, Any],
    key: str | None,
) -> SavedEngine:
    from firstlm.loading import base_config
    from firstlm.tokenizer import load_tokenizer

    check_family(base_config(source, **options))  # before weights are read
    if progress:
        print(f"firstlm: packing {source} as {form.precision}", file=sys.stderr, flush=True)
    model = _load_model(source, form.lora, options)
    try:
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer, so the engine takes token ids only: %s", error)
        tokenizer = None
    return parts_of(
        model, tokenizer, form, num_threads, progress, owned=True, source=str(source), key=key
    )


def _load_model(source: str | os.PathLike[str], lora: str, options: dict[str, Any]) -> Any:
    """A model whose adapter is plain LoRA, or merged by PEFT."""
    from firstlm.loading import from_pretrained

    model = from_pretrained(source, **options)
    strange = lora_adapters.strange_module(model)
    if strange is None:
        return model
    if lora == "apart":
        raise ValueError(f'the adapter of {strange} is no plain LoRA: lora="apart" cannot keep it')
    logger.info("the adapter of %s is no plain LoRA: PEFT merges it", strange)
    del model
    return from_pretrained(source, **(options | {"merge_adapter": True}))


def _load_saved(
    folder: Path, precision: str | None, head_precision: str | None, lora: str
) -> SavedEngine:
    """A saved engine, unless something else was asked for."""
    parts = saved.load(folder)
    has_adapter = any(name.endswith(".lora_A") for name in parts.block.tensors)
    own = {
        "precision": parts.config.decoder["precision"],
        "head_precision": parts.config.decoder["head_precision"],
        "lora": "apart" if has_adapter else "merge",
    }
    asked = {
        "precision": precision or own["precision"],
        "head_precision": head_precision or own["head_precision"],
        "lora": own["lora"] if lora == "auto" else lora,
    }
    wrong = [name for name in own if own[name] != asked[name]]
    if wrong:
        is_of = ", ".join(f"{name}={own[name]!r}" for name in wrong)
        was_asked = ", ".join(f"{name}={asked[name]!r}" for name in wrong)
        raise ValueError(
            f"the engine in {folder} has {is_of}; asked was {was_asked}: leave it unset, or pack "
            "the model again"
        )
    return parts
