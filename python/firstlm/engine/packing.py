"""From a model to the parts of an engine: packed weights, from the cache or made now."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from firstlm.engine import saved
from firstlm.engine.config import check_family, decoder_config
from firstlm.engine.saved import EngineConfig, SavedEngine
from firstlm.engine.settings import generation_defaults
from firstlm.engine.source import source_folders, source_key
from firstlm.engine.text import EngineTokenizer
from firstlm.engine.weights import check_precision, pack_model

logger = logging.getLogger(__name__)


def packed_parts(
    source: str | os.PathLike[str],
    precision: str,
    head_precision: str | None,
    num_threads: int,
    cache: bool,
    progress: bool,
    options: dict[str, Any],
) -> SavedEngine:
    """The parts of an engine; arguments as in `Engine.from_pretrained`."""
    head_precision = _check_precisions(precision, head_precision)
    if (Path(source) / saved.CONFIG_NAME).is_file():
        return _load_of_precision(Path(source), precision, head_precision, num_threads)
    folders = source_folders(source) if not options else []
    key = source_key(folders) if folders else None
    if key is None or not cache:
        return _pack(source, precision, head_precision, num_threads, progress, options, key)
    folder = saved.cache_folder(precision, head_precision, key)
    if folder.exists():
        try:
            return saved.load(folder, num_threads)
        except (ValueError, OSError) as error:
            logger.warning("%s: packing the weights again", error)
    parts = _pack(source, precision, head_precision, num_threads, progress, options, key)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        saved.save(parts, folder)
    except OSError as error:  # a full disk is no reason not to answer
        logger.warning("the packed weights are not kept: %s", error)
    return parts


def parts_of(
    model: Any,
    tokenizer: Any,
    precision: str,
    head_precision: str | None,
    num_threads: int,
    progress: bool,
    owned: bool = False,
    source: str = "",
    key: str | None = None,
) -> SavedEngine:
    """The parts of an engine of a model in memory; arguments as in `Engine.from_model`.

    Args:
        owned: nobody else has the model, which is used up.
        source, key: of `EngineConfig`.
    """
    head_precision = _check_precisions(precision, head_precision)
    decoder = decoder_config(model)
    decoder |= {"precision": precision, "head_precision": head_precision}
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
        model, precision, head_precision, num_threads=num_threads, owned=owned, progress=progress
    )
    own = None if tokenizer is None else EngineTokenizer.of(tokenizer)
    return SavedEngine(config, block, own)


def _pack(
    source: str | os.PathLike[str],
    precision: str,
    head_precision: str,
    num_threads: int,
    progress: bool,
    options: dict[str, Any],
    key: str | None,
) -> SavedEngine:
    from firstlm.loading import base_config, from_pretrained
    from firstlm.tokenizer import load_tokenizer

    check_family(base_config(source, **options))  # before weights are read
    if progress:
        print(f"firstlm: packing {source} as {precision}", file=sys.stderr, flush=True)
    model = from_pretrained(source, merge_adapter=True, **options)
    try:
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer, so the engine takes token ids only: %s", error)
        tokenizer = None
    return parts_of(
        model, tokenizer, precision, head_precision, num_threads, progress,
        owned=True, source=str(source), key=key,
    )  # fmt: skip


def _check_precisions(precision: str, head_precision: str | None) -> str:
    """The precision of the head: of 4 bits only where asked, since they lose most there."""
    check_precision(precision)
    default = "int8" if precision == "int4" else precision
    return check_precision(head_precision or default, "head_precision")


def _load_of_precision(
    folder: Path, precision: str, head_precision: str, num_threads: int
) -> SavedEngine:
    parts = saved.load(folder, num_threads)
    own = parts.config.decoder["precision"], parts.config.decoder["head_precision"]
    if own != (precision, head_precision):
        raise ValueError(
            f"the engine in {folder} is {own[0]} with a head of {own[1]}, asked was {precision} "
            f"and {head_precision}: use Engine.load, or pack the model again"
        )
    return parts
