"""The source distribution, and the wheel built from it, in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    # Without CUDA: compiling it once is enough for one run of the tests.
    environment = os.environ | {"FIRSTLM_CUDA": "0"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from the sdist of what git has or would add: what a clean checkout holds."""
    folder = tmp_path_factory.mktemp("packaging")
    listed = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT
    ).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy)
    build_sdist = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    sdist = run(sys.executable, "-c", build_sdist, cwd=folder / "source").split()[-1]
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    run(*pip_wheel, folder / "source" / "dist" / sdist, cwd=folder)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_ops_corpora_and_routers_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    native = {"firstlm/_ops.so", f"firstlm/_native{suffix}"}
    assert native | {"firstlm/py.typed", "firstlm/__init__.py"} <= set(names)
    assert {name for name in names if ".so" in name} == native
    for corpus in ("debian-synopsis", "debian-en-de"):
        splits = {f"firstlm/corpora/{corpus}/{s}.jsonl.xz" for s in ("train", "validation", "test")}
        assert {f"firstlm/corpora/{corpus}/README.md", *splits} <= set(names)
    shipped = ("router_config.json", "router.safetensors", "adapter/adapter_model.safetensors")
    assert {f"firstlm/shipped/{name}" for name in shipped} <= set(names)
    assert all(name.startswith(("firstlm/", "firstlm-0.")) for name in names)
    assert wheel.name.endswith(f"{sysconfig.get_platform().replace('-', '_')}.whl")


def test_the_wheel_runs_where_it_is_installed(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=tmp_path
    )
    # Dependencies from here. A path that a .pth file names has its own .pth files ignored, so an
    # editable firstlm is not among them.
    site_packages = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    ).strip()
    here = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    Path(site_packages, "dependencies.pth").write_text("\n".join(here))

    program = "from firstlm import native, ops; print(ops.LIBRARY, native.LIBRARY, ops.isa())"
    *libraries, isa = run(python, "-I", "-c", program, cwd=tmp_path).split()
    assert {Path(library).parent for library in libraries} == {Path(site_packages, "firstlm")}
    assert isa
    assert "train" in run(python.with_name("firstlm"), "--help", cwd=tmp_path)
