"""An engine as a folder, which loads without transformers, and where such folders are kept.

engine.json           EngineConfig
engine.safetensors    packed weights, norms, biases, routers; see tensor_block.py
tokenizer.json, chat.json
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firstlm import embedded_model
from firstlm.atomic import staged_folder, write_json
from firstlm.engine.source import fingerprint
from firstlm.engine.tensor_block import TensorBlock
from firstlm.engine.text import EngineTokenizer

CONFIG_NAME = "engine.json"
WEIGHTS_NAME = "engine.safetensors"
LAYOUT = "panels-16"  # csrc/packed_matrix.h; the same for every instruction set
# Raise it also when the same weights are packed to other bytes: kept engines are then made again.
_FORMAT_VERSION = 1


@dataclass
class EngineConfig:
    """Everything of an engine but its tensors and its tokenizer.

    Attributes:
        decoder: of `config.decoder_config`, with precision and head_precision.
        max_length: tokens of prompt and answer together.
        generation: of `settings.generation_defaults`.
        router_config: `RouterConfig.to_dict()`, None without routers.
        trained_prefill: of the checkpoint that the routers came from.
        source: what the engine was made of, for a reader.
        source_key: of `source.source_key`, None if it was made of a model in memory.
        weights_fingerprint: of the saved file.
        layout, version: of the saved form.
    """

    decoder: dict[str, Any]
    max_length: int
    generation: dict[str, Any]
    router_config: dict[str, Any] | None = None
    trained_prefill: str | None = None
    source: str = ""
    source_key: str | None = None
    weights_fingerprint: str | None = None
    layout: str = LAYOUT
    version: int = field(default=_FORMAT_VERSION)


@dataclass
class SavedEngine:
    """What a folder holds."""

    config: EngineConfig
    block: TensorBlock
    tokenizer: EngineTokenizer | None


def save(engine: SavedEngine, folder: Path) -> None:
    """Writes a folder that appears whole or not at all, in the place of what was there.

    Raises:
        ValueError: a file, or a folder that holds something other than an engine.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder")
    if folder.exists() and not (folder / CONFIG_NAME).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no engine; choose another folder")
    with staged_folder(folder) as staging:
        engine.block.save(staging / WEIGHTS_NAME)
        if engine.tokenizer is not None:
            engine.tokenizer.save(staging)
        sealed = dataclasses.replace(
            engine.config, weights_fingerprint=fingerprint(staging / WEIGHTS_NAME)
        )
        write_json(staging / CONFIG_NAME, dataclasses.asdict(sealed))


def load(folder: Path) -> SavedEngine:
    """Reads what `save` wrote.

    Raises:
        ValueError: no engine, one of another version, or a damaged one.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is no saved engine: it has no {CONFIG_NAME}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version, layout = values["version"], values["layout"]
        if (version, layout) != (_FORMAT_VERSION, LAYOUT):
            raise ValueError(
                f"{folder} is of version {version}, layout {layout!r}; this release reads version "
                f"{_FORMAT_VERSION}, layout {LAYOUT!r}: pack the model again"
            )
        config = EngineConfig(**values)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    weights = folder / WEIGHTS_NAME
    if not weights.is_file() or fingerprint(weights) != config.weights_fingerprint:
        raise ValueError(f"{weights} is damaged: it is not the file that was written")
    try:
        tokenizer = EngineTokenizer.load(folder)
    except Exception as error:  # the tokenizers package raises nothing more exact
        raise ValueError(f"{folder}: its tokenizer is damaged: {error}") from error
    return SavedEngine(config, TensorBlock.load(weights), tokenizer)


def cache_folder(precision: str, head_precision: str, apart: bool, key: str) -> Path:
    """Where the packed weights of a source are kept: engine/<precision>/ of the user's cache.

    Args:
        apart: with an adapter that is kept apart.
    """
    name = precision if precision == head_precision else f"{precision}-head-{head_precision}"
    name += "-lora" if apart else ""
    return embedded_model.cache_dir() / "engine" / name / key[:32]
