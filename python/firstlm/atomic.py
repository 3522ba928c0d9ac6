"""Files and folders that are either whole or absent, also after a kill in the middle of a write."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def check_can_write(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """For before the work whose results go to `path`, a file or a folder, parents made.

    Raises:
        ValueError: what is there is of the other kind, or nothing can be written there.
    """
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        is_there, wanted = ("file", "folder") if folder else ("folder", "file")
        raise ValueError(f"{path} is a {is_there}: name a {wanted} to write to")
    place = path if folder else path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{path} cannot be written: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: no permission to write in {place}")


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` so that `path` never holds a part of it. Parents are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`text` as UTF-8, see write_bytes."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`value` as indented JSON, see write_text."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def publish_folder(staging: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Moves a finished folder to its final name, replacing what was there.

    Both must lie on one file system. A kill leaves the old folder, the new one, or neither, and
    never a mixture of the two; what it left of the old one goes when the folder is next published.
    """
    staging, final = Path(staging), Path(final)
    for folder, _, names in os.walk(staging):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        old = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.old."))
        os.replace(final, old / final.name)
    os.replace(staging, final)
    for left in final.parent.glob(f".{glob.escape(final.name)}.old.*"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def staged_folder(final: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, which takes the name `final` when the block ends without an error."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.partial."))
    os.chmod(staging, 0o755)
    try:
        yield staging
        publish_folder(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
