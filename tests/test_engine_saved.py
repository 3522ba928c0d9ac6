"""Engines that are saved, loaded, and kept beside their checkpoints."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil

import pytest
import torch
from safetensors import safe_open

import firstlm
from firstlm import Engine, RouterConfig, SkipPlan
from firstlm.engine import saved
from firstlm.engine.text import TOKENIZER_NAME
from tiny_engines import NEW, ROWS, adapted, engine_of, hf_tokens, load_counted
from tiny_models import NUM_LAYERS


def test_a_saved_engine_is_the_same_engine(llama_engine, tmp_path):
    llama_engine.save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine", num_threads=1)
    options = {"max_new_tokens": NEW}
    assert loaded.generate(ROWS, **options) == llama_engine.generate(ROWS, **options)
    assert loaded.generate("a b", **options) == llama_engine.generate("a b", **options)
    assert loaded.plan(ROWS).skip_plans == llama_engine.plan(ROWS).skip_plans
    assert loaded.router_config == llama_engine.router_config
    for name, tensor in loaded._block.tensors.items():
        assert torch.equal(tensor, llama_engine._block.tensors[name])
        assert tensor.dtype != torch.uint8 or tensor.data_ptr() % 64 == 0
    with safe_open(tmp_path / "engine" / saved.WEIGHTS_NAME, "pt") as file:
        assert set(file.keys()) == set(loaded._block.tensors)
        assert torch.equal(file.get_tensor("norm.weight"), loaded._block.tensors["norm.weight"])
    loaded.save(tmp_path / "engine")  # over an engine
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds no engine"):
        loaded.save(tmp_path / "other")
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        loaded.save(tmp_path / "other" / "thesis.tex")
    with pytest.raises(ValueError, match="a saved engine, which takes no router"):
        Engine.from_pretrained(tmp_path / "engine", router=RouterConfig())
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="use save and load"):
            copied(loaded)


def test_a_loaded_engine_outlives_its_folder(llama_engine, tmp_path):
    wanted = llama_engine.generate(ROWS, max_new_tokens=NEW)
    llama_engine.save(tmp_path / "engine")
    loaded, other = (Engine.load(tmp_path / "engine", num_threads=1) for _ in range(2))
    shutil.rmtree(tmp_path / "engine")
    other._block.data.zero_()  # its own memory, not the file's
    assert loaded.generate(ROWS, max_new_tokens=NEW) == wanted


def damage_weights(folder):
    with (folder / saved.WEIGHTS_NAME).open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\xff" * 8)


def cut_weights(folder):
    file = folder / saved.WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-64])


def damage_config(folder):
    (folder / saved.CONFIG_NAME).write_text("{")


def replace_header(folder):
    content = b"[1]" + b" " * 61
    (folder / saved.WEIGHTS_NAME).write_bytes(len(content).to_bytes(8, "little") + content)


def damage_tokenizer(folder):
    (folder / TOKENIZER_NAME).write_text("{")


def lose_weights(folder):
    (folder / saved.WEIGHTS_NAME).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_weights, cut_weights, replace_header, damage_config, damage_tokenizer, lose_weights,
    ],
)  # fmt: skip
def test_a_damaged_cache_entry_is_made_again(llama, llama_checkpoint, monkeypatch, damage, caplog):
    expected = hf_tokens(llama, ROWS)
    assert load_counted(llama_checkpoint, monkeypatch)[1] == 1
    engine, packed = load_counted(llama_checkpoint, monkeypatch)
    assert packed == 0
    assert engine.generate(ROWS, max_new_tokens=NEW) == expected
    (entry,) = (llama_checkpoint.parent / "cache" / "engine" / "float32").iterdir()
    damage(entry)
    with pytest.raises(ValueError, match="damaged"):
        Engine.load(entry)
    with caplog.at_level(logging.WARNING):
        engine, packed = load_counted(llama_checkpoint, monkeypatch)
    assert packed == 1
    assert "packing the weights again" in caplog.text
    assert engine.generate(ROWS, max_new_tokens=NEW) == expected
    assert load_counted(llama_checkpoint, monkeypatch)[1] == 0


def test_changed_routers_and_weights_are_packed_again(llama_checkpoint, monkeypatch):
    assert load_counted(llama_checkpoint, monkeypatch)[1] == 1
    path = llama_checkpoint / "router_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"thresholds": [0.0] * NUM_LAYERS}))
    engine, packed = load_counted(llama_checkpoint, monkeypatch)
    assert packed == 1
    assert engine.plan(ROWS).skip_plans == [SkipPlan.full(NUM_LAYERS)] * 4
    weights = llama_checkpoint.parent / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-8:] = bytes(8)
    weights.write_bytes(content)
    assert load_counted(llama_checkpoint, monkeypatch)[1] == 1
    assert load_counted(llama_checkpoint, monkeypatch)[1] == 0
    assert load_counted(llama_checkpoint, monkeypatch, cache=False)[1] == 1


def test_adapters_are_merged(llama, llama_checkpoint, monkeypatch):
    model = adapted(firstlm.from_pretrained(llama_checkpoint))
    expected = hf_tokens(model, ROWS)
    assert expected != hf_tokens(llama, ROWS)
    assert engine_of(model).generate(ROWS, max_new_tokens=NEW) == expected  # attached
    model.save_pretrained(llama_checkpoint)
    engine, _ = load_counted(llama_checkpoint, monkeypatch)
    assert engine.generate(ROWS, max_new_tokens=NEW) == expected


def test_a_saved_engine_loads_in_its_own_precision(llama, tmp_path):
    engine_of(llama, precision="int8").save(tmp_path / "engine")
    for options in ({}, {"precision": "int8"}, {"head_precision": "int8"}):
        loaded = Engine.from_pretrained(tmp_path / "engine", **options)
        assert loaded.config.decoder["precision"] == "int8"
    with pytest.raises(ValueError, match="has precision='int8'; asked was precision='int4'"):
        Engine.from_pretrained(tmp_path / "engine", "int4")
    with pytest.raises(ValueError, match="head_precision='int8'; asked was head_precision='int4'"):
        Engine.from_pretrained(tmp_path / "engine", head_precision="int4")


def test_another_prefill_than_trained_warns(llama_checkpoint):
    engine = Engine.from_pretrained(llama_checkpoint, "float32", progress=False)
    with pytest.warns(UserWarning, match="trained with prefill='route'"):
        engine.generate(ROWS[0], prefill="full", max_new_tokens=2)


def test_packing_shows_a_bar_where_it_is_asked_for(llama, capsys):
    for progress in (True, False):
        Engine.from_model(llama, precision="int8", progress=progress)
        assert ("packing weights as int8: 100%" in capsys.readouterr().err) == progress
