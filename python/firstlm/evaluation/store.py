"""Measurements on disk: a line a batch of examples, so that a killed evaluation goes on.

OUTPUT/examples/<method>.rank<k>.jsonl    what process k measured of a method; the first line is a
                                          key of everything that the figures depend on
OUTPUT/found/<what>-<key>.json            what else took work to find: plans, self-checks
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firstlm.atomic import write_json
from firstlm.evaluation.records import ExampleResult


def digest(value: Any) -> str:
    """Hex sha256 of plain JSON types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Store:
    """The measurements of one evaluation.

    Args:
        folder: OUTPUT.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank

    def examples(self, method: str, key: str) -> MethodStore:
        """What is measured of one method (its key in file names) under `key`."""
        return MethodStore(self.folder / "examples", method, key, self.rank)

    def read(self, key: Mapping[str, Any]) -> Any | None:
        """What `write` wrote under the same key, or None. `key["what"]` is part of its name."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._file(key).read_text(encoding="utf-8"))
            if found["key"] == key:
                return found["value"]
        return None

    def write(self, key: Mapping[str, Any], value: Any) -> None:
        """Keeps plain JSON types."""
        write_json(self._file(key), {"key": key, "value": value})

    def _file(self, key: Mapping[str, Any]) -> Path:
        return self.folder / "found" / f"{key['what']}-{digest(key)[:16]}.json"


class MethodStore:
    """Batches of one method. Every process appends to a file of its own and reads all of them.

    Args:
        folder: of the files.
        method: in their names.
        key: what was measured on what; lines under another key are not used.
        rank: of this process.
    """

    def __init__(self, folder: Path, method: str, key: str, rank: int) -> None:
        self._folder, self._method, self._key = folder, method, key
        self._own = folder / f"{method}.rank{rank}.jsonl"

    def read(self) -> dict[int, list[ExampleResult]]:
        """Batch number -> its examples, of all processes."""
        found: dict[int, list[ExampleResult]] = {}
        for file in sorted(self._folder.glob(f"{self._method}.rank*.jsonl")):
            for batch, rows in self._lines(file):
                found[batch] = [ExampleResult(**{**r, "kept": tuple(r["kept"])}) for r in rows]
        return found

    def begin(self) -> None:
        """Makes this process's file ready: of this key, and without a torn line."""
        kept = list(self._lines(self._own))
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [{"key": self._key}] + [{"batch": b, "examples": rows} for b, rows in kept]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if not self._own.is_file() or self._own.read_text(encoding="utf-8") != text:
            from firstlm.atomic import write_text

            write_text(self._own, text)

    def append(self, batch: int, examples: Sequence[ExampleResult]) -> None:
        """One batch as one line; it is on its way to the disk when this returns."""
        line = {"batch": batch, "examples": [dataclasses.asdict(e) for e in examples]}
        with open(self._own, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()

    def _lines(self, file: Path) -> list[tuple[int, list[dict[str, Any]]]]:
        """(batch, examples) of the whole lines of a file, if it is of this key."""
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return []
        found = []
        for number, line in enumerate(text.split("\n")[:-1]):  # the last one is empty, or torn
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if number == 0:
                if values.get("key") != self._key:
                    return []
                continue
            found.append((values["batch"], values["examples"]))
        return found
