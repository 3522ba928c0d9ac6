"""What loading an engine costs: memory beside source and result, and what it imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import firstlm
from firstlm.engine.weights import pack_model
from tiny_engines import adapted, drawn
from tiny_models import tiny_base_path, tiny_config

PEAK = """
import sys
from pathlib import Path
import firstlm

def memory(name):
    (line,) = [l for l in open("/proc/self/status") if l.startswith(name)]
    return int(line.split()[1]) * 1024

tiny, source, precision = sys.argv[1:]
firstlm.Engine.from_pretrained(tiny, precision, cache=False, progress=False)  # imports
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
engine = firstlm.Engine.from_pretrained(source, precision, cache=False, progress=False)
print(memory("VmHWM") - before, engine.weight_bytes)
"""

IMPORTS = """
import sys
import firstlm

engine = firstlm.Engine.load(sys.argv[1])
assert engine.generate("a b", max_new_tokens=3)
assert "".join(engine.stream([{"role": "user", "content": "a"}], max_new_tokens=3))
print(sorted({"transformers", "datasets", "peft", "accelerate"} & set(sys.modules)))
"""


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    # Freed memory of the allocator's arenas would count as ours.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def source(request, tmp_path_factory):
    """(folder, bytes) of a model of 30 M weights; a seventh of them are its tied embedding."""
    config = tiny_config(
        "llama", vocab_size=8192, hidden_size=512, intermediate_size=1408, head_dim=64,
        num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, request.param))
    model.save_pretrained(folder)
    return folder, (folder / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def adapted_source(source, tmp_path_factory):
    """(checkpoint of it with an adapter, a tiny one, bytes)."""
    folder, size = source
    checkpoints = []
    for base in (folder, tiny_base_path("llama")):
        model = adapted(firstlm.from_pretrained(base), r=8)
        checkpoints.append(tmp_path_factory.mktemp("checkpoint") / "checkpoint")
        model.save_pretrained(checkpoints[-1])
    return *checkpoints, size


@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])  # of int4, kept apart
def test_an_adapted_model_is_never_in_memory_twice(adapted_source, precision):
    checkpoint, tiny, source_bytes = adapted_source
    peak, result_bytes = map(int, run(PEAK, tiny, checkpoint, precision).split())
    assert peak <= 1.3 * max(source_bytes, result_bytes)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_source_and_result_are_never_in_memory_together(source, precision):
    folder, source_bytes = source
    peak, result_bytes = map(int, run(PEAK, tiny_base_path("llama"), folder, precision).split())
    assert peak <= 1.3 * max(source_bytes, result_bytes)


def test_weights_that_two_modules_share_are_given_back_after_both():
    """An embedding whose weights are the head's too, which has an adapter of its own."""
    config = tiny_config("llama", tie_word_embeddings=True, hidden_size=64, vocab_size=512)
    packed = []
    for owned in (False, True):
        model = adapted(drawn(config), target_modules=["q_proj", "lm_head"])
        block = pack_model(model, "float32", "float32", num_threads=1, apart=True, owned=owned)
        packed.append(block.tensors)
    assert "lm_head.weight" in packed[0]
    for name, expected in packed[0].items():
        assert torch.equal(packed[1][name], expected), name


def test_a_saved_engine_answers_without_transformers(tmp_path):
    from firstlm import Engine
    from tiny_models import routed_model
    from tiny_tokenizer import tiny_tokenizer

    engine = Engine.from_model(routed_model("llama", torch.float32), tokenizer=tiny_tokenizer())
    engine.save(tmp_path / "engine")
    assert run(IMPORTS, tmp_path / "engine").strip() == "[]"
