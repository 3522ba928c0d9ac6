"""All tensors of an engine in one block of memory, and the same bytes in a safetensors file.

    file:  u64 length of the header | JSON header, padded to a multiple of 64 bytes | the block
    block: tensors one after the other, those of whole 64-byte lines first, so that each of them
           begins with a line

So a load maps the file: what is read for the first token is read then, engines of one file share
its pages, and the system takes them back where memory is short.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_LINE = 64
_NAMES = {torch.uint8: "U8", torch.float32: "F32"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class TensorBlock:
    """Named tensors that are views of one block.

    Attributes:
        data: uint8 [nbytes], 64-byte aligned.
        tensors: uint8 or f32 views of it.
    """

    data: torch.Tensor
    tensors: dict[str, torch.Tensor]

    @classmethod
    def allocate(cls, specs: Mapping[str, Spec]) -> TensorBlock:
        """Room for tensors of these types and shapes, not initialised."""
        order = sorted(specs, key=lambda name: _nbytes(specs[name]) % _LINE != 0)
        data = torch.empty(sum(map(_nbytes, specs.values())), dtype=torch.uint8)
        tensors, offset = {}, 0
        for name in order:
            tensors[name] = _view(data, offset, specs[name])
            offset += _nbytes(specs[name])
        return cls(data, tensors)

    def save(self, path: Path) -> None:
        """Writes the file; not atomic."""
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, tensor in self.tensors.items():
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % _LINE)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.write(memoryview(self.data.numpy()))

    @classmethod
    def load(cls, path: Path) -> TensorBlock:
        """Maps what `save` wrote; the file may be replaced or deleted, but not written to.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be read.
        """
        start, header = _read_header(path)
        specs = {}
        end = 0
        try:
            for name, entry in header.items():
                spec = _DTYPES[entry["dtype"]], tuple(entry["shape"])
                if entry["data_offsets"] != [end, end + _nbytes(spec)]:
                    raise ValueError(f"the place of {name}")
                end += _nbytes(spec)
                specs[name] = spec
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: its header is not firstlm's ({error})") from error
        if path.stat().st_size != start + end:
            raise ValueError(
                f"{path} is damaged: {path.stat().st_size} bytes instead of {start + end}"
            )
        # Private: what would be written to the tensors stays in this process.
        whole = torch.from_file(str(path), shared=False, size=start + end, dtype=torch.uint8)
        data = whole[start:]
        tensors, offset = {}, 0
        for name, spec in specs.items():
            tensors[name] = _view(data, offset, spec)
            offset += _nbytes(spec)
        return cls(data, tensors)


def _read_header(path: Path) -> tuple[int, dict]:
    """(where the block begins, tensor name -> its entry)."""
    with path.open("rb") as file:
        length = file.read(8)
        size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
        text = file.read(size) if size <= path.stat().st_size else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it has no safetensors header") from error
    return 8 + size, header


def _nbytes(spec: Spec) -> int:
    dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


def _view(data: torch.Tensor, offset: int, spec: Spec) -> torch.Tensor:
    dtype, shape = spec
    return data[offset : offset + _nbytes(spec)].view(dtype).view(shape)
