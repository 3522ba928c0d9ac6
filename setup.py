"""Drives CMakeLists.txt, which describes the native build. Everything else is in pyproject.toml."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildWithCMake(build_ext):
    """Builds the native libraries with CMake, against the torch of this interpreter."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] != "_ops":
            return super().get_ext_filename(fullname)
        # A library of torch ops, loaded by torch: no suffix of this Python's ABI.
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        self.native = build_native()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Beside and over: a process that has the old library loaded keeps it.
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(target.name + ".new")
        shutil.copyfile(self.native / target.name, fresh)
        os.replace(fresh, target)


def build_native() -> Path:
    """Runs CMake for all libraries; returns the folder that they are in."""
    import torch

    torch_root = Path(torch.__file__).parent
    # Kept between builds, apart for each torch: an editable install rebuilds what changed.
    key = hashlib.sha256(f"{torch_root} {torch.__version__}".encode()).hexdigest()[:12]
    build = ROOT / "build" / f"native-{key}"
    cmake = find_tool("cmake")
    configure = [
        cmake,
        f"-S{ROOT}",
        f"-B{build}",
        f"-DFIRSTLM_TORCH_ROOT={torch_root}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DFIRSTLM_CUDA={os.environ.get('FIRSTLM_CUDA', '')}",
        f"-DCMAKE_BUILD_TYPE={os.environ.get('FIRSTLM_BUILD_TYPE', 'Release')}",
    ]
    if ninja := find_tool("ninja", required=False):
        configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    subprocess.run(configure, check=True)
    subprocess.run([cmake, "--build", build, "--parallel"], check=True)
    return build


def find_tool(name: str, required: bool = True) -> str | None:
    """Path of a build tool: of this environment first, then of the system."""
    scripts = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([scripts, os.environ.get("PATH", "")]))
    if required and found is None:
        raise SystemExit(f"{name} was not found; install it with: pip install {name}")
    return found


setup(
    ext_modules=[Extension("firstlm._ops", sources=[]), Extension("firstlm._native", sources=[])],
    cmdclass={"build_ext": BuildWithCMake},
)
