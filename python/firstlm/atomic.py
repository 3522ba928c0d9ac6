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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8 so that `path` never holds a part of it. Parents are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


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
