"""A GGUF file of a transformers model computes in llama.cpp what the model computes."""

from __future__ import annotations

import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from firstlm import RouterConfig, gguf_files
from tiny_models import VOCAB_SIZE, routed_model, tiny_config

WINDOWLESS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": None},
    "qwen3": {},
}
LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_model(family: str, **overrides):
    """A random model whose logits differ visibly from token to token."""
    config = tiny_config(family, **(WINDOWLESS[family] | {"initializer_range": 0.2} | overrides))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokens(count: int) -> list[int]:
    return torch.randint(
        3, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(1)
    ).tolist()


@torch.inference_mode()
def hf_logits(model, ids: list[int]) -> np.ndarray:
    return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("family", WINDOWLESS)
def test_llama_cpp_computes_the_same_logits(family, tied, tmp_path):
    pytest.importorskip("llama_cpp")
    from firstlm.llama_cpp_model import LlamaCppModel

    model = tiny_model(family, tie_word_embeddings=tied)
    file = gguf_files.write_gguf(model, tmp_path / "new" / "tiny.gguf")
    ids = tokens(40)
    expected = hf_logits(model, ids)
    assert expected.std() > 0.1
    llama = LlamaCppModel(file, num_threads=1)
    found = llama.extend(ids, all_logits=True)
    # llama.cpp keeps keys and values in float16
    np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())


def test_scaled_rotary_frequencies_are_written(tmp_path):
    pytest.importorskip("llama_cpp")
    from firstlm.llama_cpp_model import LlamaCppModel

    model = tiny_model("llama", rope_parameters=LLAMA_3_SCALING)
    ids = tokens(200)
    expected = hf_logits(model, ids)
    file = gguf_files.write_gguf(model, tmp_path / "scaled.gguf")
    found = LlamaCppModel(file, num_threads=1).extend(ids, all_logits=True)
    np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())


def test_routers_stay_out_of_the_file(tmp_path):
    model = routed_model("llama", torch.float32, RouterConfig())
    file = gguf_files.write_gguf(model, tmp_path / "routed.gguf")
    names = gguf_files.tensor_bytes(file)
    assert "blk.5.ffn_down.weight" in names
    assert not [name for name in names if "router" in name]


def test_values_are_the_models_and_query_rows_are_interleaved(tmp_path):
    model = tiny_model("llama")
    file = gguf_files.write_gguf(model, tmp_path / "tiny.gguf")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    layer = model.model.layers[2]
    np.testing.assert_array_equal(
        stored["blk.2.ffn_up.weight"], layer.mlp.up_proj.weight.detach().numpy()
    )
    query = layer.self_attn.q_proj.weight.detach().numpy()  # 4 heads of 8
    order = [8 * head + row for head in range(4) for row in (0, 4, 1, 5, 2, 6, 3, 7)]
    np.testing.assert_array_equal(stored["blk.2.attn_q.weight"], query[order])
    assert gguf_files.tensor_bytes(file)["blk.2.ffn_up.weight"] == 4 * 48 * 32


def test_quantised_files_are_made_once_and_are_smaller(tmp_path):
    pytest.importorskip("llama_cpp")
    model = tiny_model("llama")
    files = gguf_files.gguf_files(model, tmp_path, gguf_files.TYPES)
    sizes = {kind: sum(gguf_files.tensor_bytes(file).values()) for kind, file in files.items()}
    assert sizes["f32"] > sizes["bf16"] > sizes["q8_0"] > sizes["q4_1"] > sizes["q4_0"]
    before = {file: file.stat().st_mtime_ns for file in files.values()}

    def refuse():
        raise AssertionError("the files are there")

    again = gguf_files.gguf_files(refuse, tmp_path, gguf_files.TYPES)
    assert {file: file.stat().st_mtime_ns for file in again.values()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        f"{kind}.gguf" for kind in gguf_files.TYPES
    )


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gpt2"):
        gguf_files.write_gguf(routed_model("gpt2", torch.float32), tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="sliding window"):
        gguf_files.write_gguf(routed_model("mistral", torch.float32), tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="q3_k"):
        gguf_files.gguf_files(None, tmp_path, ["q3_k"])
    assert not list(tmp_path.iterdir())


def test_pieces_steps_and_crops_give_the_logits_of_one_pass(tmp_path):
    pytest.importorskip("llama_cpp")
    from firstlm.llama_cpp_model import LlamaCppModel

    file = gguf_files.write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    ids, other = tokens(30), tokens(30)[::-1]
    llama = LlamaCppModel(file, num_threads=1, context=64, sequences=2)
    expected = llama.extend(ids, 0, all_logits=True)
    llama.clear()
    close = {"rtol": 1e-3, "atol": 1e-3 * float(np.abs(expected).max())}
    llama.extend(other, 1)
    np.testing.assert_allclose(llama.extend(ids[:20], 0), expected[19], **close)
    np.testing.assert_allclose(llama.step([ids[20], 5])[0], expected[20], **close)
    llama.crop(10)
    assert llama.lengths == [10, 31]
    np.testing.assert_allclose(llama.extend(ids[10:], 0), expected[-1], **close)


def test_without_the_package_the_error_says_what_to_install(tmp_path):
    program = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "from firstlm.llama_cpp_model import binding\n"
        "try: binding()\nexcept RuntimeError as error: print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "pip install 'firstlm[bench]'" in out.stdout
    assert out.stdout.count("\n") == 1
