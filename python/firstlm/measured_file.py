"""Measurements in a JSON file, written after each of them, so that an interrupted run goes on."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from firstlm.atomic import write_json


class MeasuredFile:
    """Measurements of one calibration, kept in a file after each of them.

    Args:
        folder: of the file.
        key: what was measured on what; a file of another key is not used.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / "measured.json"
        self.values: dict[str, Any] = {"key": key}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if found.get("key") == key:
                self.values = found

    def part(self, *names: str) -> dict[str, Any]:
        """A nested part of the values, to be changed in place and saved."""
        part = self.values
        for name in names:
            part = part.setdefault(name, {})
        return part

    def save(self) -> None:
        write_json(self._path, self.values)

    def delete(self) -> None:
        """What was measured is where it belongs."""
        with contextlib.suppress(OSError):
            self._path.unlink()
            self._path.parent.rmdir()
