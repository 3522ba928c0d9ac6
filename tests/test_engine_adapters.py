"""Adapters that the engine keeps apart from its weights."""

from __future__ import annotations

import pytest
import torch

import firstlm
from firstlm import Engine, SkipPlan
from tiny_engines import NEW, ROWS, adapted, drawn, engine_of, hf_tokens, load_counted
from tiny_models import NUM_LAYERS, prompts, routed_model, tiny_config


def assert_same_scores(engine, other, tolerance=1e-4):
    continuations = [row.tolist() for row in prompts([7, 1, 20, 3], seed=1)]
    for found, expected in zip(
        engine.score(ROWS, continuations), other.score(ROWS, continuations), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 16, "target_modules": ["q_proj", "up_proj", "down_proj"]},
        {"use_rslora": True, "target_modules": ["v_proj", "gate_proj"], "r": 4, "lora_alpha": 8},
        {
            "rank_pattern": {"k_proj": 21, "gate_proj": 1},
            "alpha_pattern": {"k_proj": 42, "gate_proj": 1, "up_proj": 12},
        },
        {"target_modules": ["o_proj"], "layers_to_transform": [1, 3]},
    ],
    ids=["all", "some", "rslora", "patterns", "some layers"],
)
def test_an_adapter_apart_does_what_the_merged_one_does(options):
    model = adapted(routed_model("llama", torch.float32), **options)
    apart, merged = (engine_of(model, lora=lora) for lora in ("apart", "merge"))
    assert apart.weight_bytes > merged.weight_bytes
    assert apart.generate(ROWS, max_new_tokens=NEW) == hf_tokens(model, ROWS)
    assert_same_scores(apart, merged)


@pytest.mark.parametrize(
    "overrides",
    [
        {"intermediate_size": 41, "head_dim": 6, "num_key_value_heads": 1, "mlp_bias": True},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_adapters_of_odd_shapes_and_of_the_head_stay_apart(overrides):
    model = drawn(tiny_config("llama", **overrides))
    model = adapted(model, target_modules=["q_proj", "k_proj", "gate_proj", "down_proj", "lm_head"])
    apart, merged = (engine_of(model, lora=lora) for lora in ("apart", "merge"))
    assert_same_scores(apart, merged)
    assert apart.generate(ROWS, max_new_tokens=NEW) == hf_tokens(model, ROWS)


def test_beside_4_bits_an_adapter_stays_apart(llama):
    model = adapted(routed_model("llama", torch.float32))
    sizes = {
        (precision, lora): engine_of(model, precision=precision, lora=lora).weight_bytes
        for precision in ("int8", "int4")
        for lora in ("auto", "merge", "apart")
    }
    assert sizes["int4", "auto"] == sizes["int4", "apart"] > sizes["int4", "merge"]
    assert sizes["int8", "auto"] == sizes["int8", "merge"] < sizes["int8", "apart"]
    plain = engine_of(llama, precision="int4", lora="apart")
    assert plain.weight_bytes == engine_of(llama, precision="int4").weight_bytes


def test_4_bits_lose_a_small_adapter_only_if_it_is_merged(llama_checkpoint):
    """The base lies on the grid, and what is added is far smaller than its steps."""
    model = firstlm.from_pretrained(llama_checkpoint)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear) and module.weight.shape[1] % 32 == 0:
                    packed = firstlm.native.pack(module.weight, "int4", 1)
                    N, K = module.weight.shape
                    module.weight.copy_(firstlm.native.unpack(packed, "int4", N, K))
    adapted(model, r=2, lora_alpha=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.25)
    plan, row = SkipPlan.full(NUM_LAYERS), prompts([60])[0].tolist()

    def scores(engine):
        return engine.score([row[:1]], [row[1:]], skip_plan=plan)[0]

    expected = scores(engine_of(model))
    apart, merged = (
        (scores(engine_of(model, precision="int4", head_precision="float32", lora=lora)) - expected)
        for lora in ("apart", "merge")
    )
    assert apart.square().mean() < 0.5 * merged.square().mean()


def test_an_adapter_apart_costs_its_bytes_in_the_layers_that_run(llama):
    model = adapted(routed_model("llama", torch.float32))
    plan = SkipPlan((0, 2), NUM_LAYERS)
    read = []
    for source, lora in ((llama, "merge"), (model, "apart")):
        engine = engine_of(source, precision="int8", lora=lora)
        engine.generate(ROWS[0], max_new_tokens=4, skip_plan=plan, ignore_eos=True)
        read.append(engine.stats.weight_bytes_per_step)
        block = engine._block.tensors
    own = sum(t.nbytes for n, t in block.items() if ".lora_" in n and n.split(".")[1] in ("0", "2"))
    assert read[1] - read[0] == own > 0


def test_an_adapter_apart_is_saved_and_kept(llama_checkpoint, tmp_path, monkeypatch):
    adapted(firstlm.from_pretrained(llama_checkpoint)).save_pretrained(llama_checkpoint)
    engine, packed = load_counted(llama_checkpoint, monkeypatch, precision="int4")
    expected = engine.generate(ROWS, max_new_tokens=NEW)
    assert packed == 1
    again, packed = load_counted(llama_checkpoint, monkeypatch, precision="int4")
    assert packed == 0 and again.generate(ROWS, max_new_tokens=NEW) == expected
    merged, packed = load_counted(llama_checkpoint, monkeypatch, precision="int4", lora="merge")
    assert packed == 1 and merged.weight_bytes < engine.weight_bytes
    engine.save(tmp_path / "engine")
    loaded = Engine.from_pretrained(tmp_path / "engine")
    assert loaded.generate(ROWS, max_new_tokens=NEW) == expected
    with pytest.raises(ValueError, match="lora='apart'; asked was lora='merge'"):
        Engine.from_pretrained(tmp_path / "engine", lora="merge")


def test_adapters_that_are_no_plain_lora_are_merged_by_peft_or_refused(
    llama_checkpoint, monkeypatch
):
    model = adapted(firstlm.from_pretrained(llama_checkpoint), use_dora=True)
    with pytest.raises(ValueError, match="merge the adapter first"):
        engine_of(model)
    expected = hf_tokens(model, ROWS)
    model.save_pretrained(llama_checkpoint)
    engine, _ = load_counted(llama_checkpoint, monkeypatch)
    assert engine.generate(ROWS, max_new_tokens=NEW) == expected
    with pytest.raises(ValueError, match="no plain LoRA"):
        Engine.from_pretrained(llama_checkpoint, lora="apart", progress=False)
    with pytest.raises(ValueError, match="lora must be one of"):
        Engine.from_pretrained(llama_checkpoint, lora="beside", progress=False)
