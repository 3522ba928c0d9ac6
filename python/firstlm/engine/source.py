"""Where a model comes from, as files: which ones, and a key that changes when they do.

Nothing here imports transformers, so that weights that are packed already load at once.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from firstlm import checkpoint, embedded_model

# What a model is made of; anything else in its folder (logs, reports, other formats) is not read.
_PATTERNS = (
    "*.json", "*.safetensors", "*.jinja", "*.model", "adapter/*.json", "adapter/*.safetensors",
)  # fmt: skip
_NOT_READ = ("health.json", embedded_model.MANIFEST)
_WHOLE = 16 << 20  # a file up to this size is hashed as a whole, of larger ones samples are
_SAMPLES, _SAMPLE = 256, 4096


def source_folders(source: str | os.PathLike[str]) -> list[Path]:
    """The folders that `firstlm.from_pretrained(source)` reads: a checkpoint's, then its base's.

    A hub id is downloaded first, if it is not in the hub's cache.

    Raises:
        ValueError: no such model.
    """
    folder = checkpoint.find_checkpoint(source)
    if folder is not None:
        config = checkpoint.read_router_config(folder)
        if config.base_model_name_or_path is None:
            raise ValueError(f"{folder} names no base model")
        return [folder, *_base_folders(config.base_model_name_or_path, config.base_revision)]
    return _base_folders(source, None)


def _base_folders(base: str | os.PathLike[str], revision: str | None) -> list[Path]:
    if embedded_model.is_alias(base):
        return [embedded_model.path()]
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        return [embedded_model.converted_gguf(path)]
    if path.is_dir():
        return [path]
    if path.is_absolute() or path.is_file():
        raise ValueError(f"{base} is no model: a folder, a .gguf file, a hub id or 'embedded'")
    from huggingface_hub import snapshot_download

    patterns = [*_PATTERNS, "token*"]
    return [Path(snapshot_download(str(base), revision=revision, allow_patterns=patterns))]


def source_key(folders: list[Path]) -> str:
    """Hex sha256 over what the folders hold: names, sizes, contents.

    Of large files, samples of the contents and the time of the last change.
    """
    digest = hashlib.sha256()
    for folder in folders:
        files = {file for pattern in _PATTERNS for file in folder.glob(pattern)}
        for file in sorted(file for file in files if file.name not in _NOT_READ):
            digest.update(f"{file.relative_to(folder)} ".encode())
            digest.update(fingerprint(file).encode())
            if file.stat().st_size > _WHOLE:
                digest.update(str(file.stat().st_mtime_ns).encode())
    return digest.hexdigest()


def fingerprint(file: Path) -> str:
    """Hex digest of a file's size and contents; of a large file, samples of them."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= _WHOLE:
            digest.update(stream.read())
        else:
            for index in range(_SAMPLES):
                stream.seek((size - _SAMPLE) * index // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()
