"""The CUDA kernels on the host: csrc/cuda built against tests/emulation, as ops for CPU tensors."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "emulation"


def run(op, *args, backward: bool):
    """What the CUDA kernel of `op` does; `backward`: with the threads in descending order."""
    namespace = library()
    namespace.set_backward(backward)
    return getattr(namespace, op._schema.name.removeprefix("firstlm::"))(*args)


@functools.cache
def library():
    """torch.ops.firstlm_emulated, built if its sources are newer."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build()
    torch.ops.load_library(BUILD / "firstlm_emulated.so")
    return torch.ops.firstlm_emulated


def build() -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    assert cmake, "cmake was not found; install it with: pip install cmake"
    configure = [
        cmake,
        f"-S{ROOT}",
        f"-B{BUILD}",
        "-DFIRSTLM_BUILD_BINDINGS=OFF",
        "-DFIRSTLM_BUILD_EMULATION=ON",
        f"-DFIRSTLM_TORCH_ROOT={Path(torch.__file__).parent}",
    ]
    if ninja := shutil.which("ninja", path=path):
        configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (configure, [cmake, "--build", BUILD, "--target", "firstlm_emulated"]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
