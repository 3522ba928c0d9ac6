"""The native engine against the hf path: the same plans, tokens and probabilities."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

import firstlm
from firstlm import Engine, RouterConfig, SkipPlan
from firstlm.engine import saved
from tiny_models import (
    NUM_LAYERS,
    VOCAB_SIZE,
    assert_adaptive,
    base_model,
    pad,
    prompts,
    routed_model,
    tiny_base_path,
    tiny_config,
)
from tiny_tokenizer import tiny_tokenizer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "smollm3"]
LENGTHS = [13, 5, 9, 11]
ROWS = [row.tolist() for row in prompts(LENGTHS)]
NEW = 12


def engine_of(model, **options) -> Engine:
    return Engine.from_model(model, **({"precision": "float32", "num_threads": 2} | options))


def hf_tokens(model, rows, **options) -> list[list[int]]:
    """What the hf path generates, row by row, so that padding plays no part."""
    found = []
    for b, row in enumerate(rows):
        own = {k: v[b] if isinstance(v, list) else v for k, v in options.items()}
        out = model.generate(torch.tensor([row]), max_new_tokens=NEW, pad_token_id=0, **own)
        found.append(out[0, len(row) :].tolist())
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return routed_model(request.param, torch.float32)


@pytest.fixture(scope="module")
def engine(model):
    return engine_of(model)


@pytest.fixture(scope="module")
def llama():
    return routed_model("llama", torch.float32)


@pytest.fixture(scope="module")
def llama_engine(llama):
    return engine_of(llama, tokenizer=tiny_tokenizer())


# ---- every family: tokens, plans, probabilities ----


def test_greedy_tokens_and_plans_are_those_of_the_hf_path(model, engine):
    found = engine.generate(ROWS, max_new_tokens=NEW, details=True)
    plans = model.plan(**pad(prompts(LENGTHS)))
    assert [one.skip_plan for one in found] == plans.skip_plans
    assert_adaptive(plans.skip_plans)
    keep_prob = torch.stack([one.keep_prob for one in found])
    torch.testing.assert_close(keep_prob, plans.keep_prob, atol=1e-5, rtol=0)
    assert [one.tokens for one in found] == hf_tokens(model, ROWS)


def test_a_base_without_routers_runs_every_layer(model):
    base = base_model(model.config.model_type, torch.float32)
    engine = engine_of(base)
    assert engine.generate(ROWS, max_new_tokens=NEW) == hf_tokens(base, ROWS)
    assert engine.plan(ROWS).skip_plans == [SkipPlan.full(NUM_LAYERS)] * 4


def test_scores_are_the_hf_paths_log_probabilities(model, engine):
    continuations = [row.tolist() for row in prompts([7, 1, 150, 3], seed=1)]
    found = engine.score(ROWS, continuations)
    for row, continuation, scores in zip(ROWS, continuations, found, strict=True):
        ids = torch.tensor([row + continuation])
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, : len(row)] = True
        with torch.no_grad():
            logits = model(ids, prompt_mask=mask, use_cache=False).logits[0, len(row) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids[0, len(row) :, None])[:, 0]
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_an_empty_continuation_has_no_scores(llama_engine):
    first, second = llama_engine.score(["a b", "a b"], ["", "c"])
    assert first.shape == (0,) and second.shape == (1,)


@pytest.mark.parametrize("prefill", ["route", "full"])
def test_continuations_of_one_prompt_share_its_prefill(model, prefill):
    engine = engine_of(model)
    continuations = [row.tolist() for row in prompts([7, 1, 4], seed=1)]
    alone = [engine.score(ROWS[0], c, prefill=prefill, details=True) for c in continuations]
    together = engine.score([ROWS[0]] * 3, continuations, prefill=prefill, details=True)
    assert [one.skip_plan for one in together] == [one.skip_plan for one in alone]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=1e-5, rtol=0)
        assert one.is_greedy.tolist() == other.is_greedy.tolist()
    # What a sliding window has dropped is read again.
    sliding = model.config.model_type in ("mistral", "qwen2")
    assert engine.stats.reused_tokens in ({0, 13, 26} if sliding else {26})


def test_a_greedy_answer_is_greedy_and_one_token_may_lie_beyond_the_maximum(llama_engine):
    prompt = prompts([250])[0].tolist()
    answer = llama_engine.generate(prompt, max_new_tokens=6, ignore_eos=True)
    score = llama_engine.score(prompt, answer, details=True)
    assert score.is_greedy.all() and score.log_probs.shape == (6,)
    assert llama_engine.max_length == 256
    assert llama_engine.score(prompt, [*answer, 5]).shape == (7,)
    with pytest.raises(ValueError, match="maximum of 256"):
        llama_engine.score(prompt, [*answer, 5, 5])


@pytest.mark.parametrize("prefill", ["route", "full"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": 0.25},
        {"budget": 0.5, "budget_mode": "exact"},
        {"skip_plan": SkipPlan((0, 2, 5), NUM_LAYERS)},
        {"skip_plan": [SkipPlan(tuple(range(n + 1)), NUM_LAYERS) for n in range(4)]},
    ],
    ids=["routers", "threshold", "exact", "one plan", "a plan each"],
)
def test_plans_and_budgets_do_what_they_do_on_the_hf_path(prefill, options):
    calibration = {"0.20": [0.4] * NUM_LAYERS, "0.40": [0.6] * NUM_LAYERS}
    config = RouterConfig(
        protected=[0], keep_bias=0.0, prefill=prefill, calibration=calibration,
        pooling="windowed_mean", windows=3, head="mlp", bottleneck=4,
    )  # fmt: skip
    model = routed_model("llama", torch.float32, config)
    found = engine_of(model).generate(ROWS, max_new_tokens=NEW, details=True, **options)
    expected = [
        model.generate(
            torch.tensor([row]), max_new_tokens=NEW, pad_token_id=0, return_dict_in_generate=True,
            **{k: v[b] if isinstance(v, list) else v for k, v in options.items()},
        )
        for b, row in enumerate(ROWS)
    ]  # fmt: skip
    assert [one.skip_plan for one in found] == [out.skip_plans[0] for out in expected]
    tokens = [
        out.sequences[0, len(row) :].tolist() for out, row in zip(expected, ROWS, strict=True)
    ]
    assert [one.tokens for one in found] == tokens


@pytest.mark.parametrize("prefill", ["route", "full"])
def test_a_prompt_that_would_skip_everything_keeps_the_last_layer(prefill):
    config = RouterConfig(protected=[], keep_bias=0.0, prefill=prefill)
    model = routed_model("llama", torch.float32, config)
    model.set_thresholds([1.0] * NUM_LAYERS)
    engine = engine_of(model)
    assert engine.plan(ROWS).skip_plans == [SkipPlan((NUM_LAYERS - 1,), NUM_LAYERS)] * 4
    assert engine.generate(ROWS, max_new_tokens=NEW) == hf_tokens(model, ROWS)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_scaled_rotary_embeddings_are_the_models_own(rope):
    config = tiny_config("llama", rope_parameters=rope | {"rope_theta": 10000.0})
    model = drawn(config)
    assert engine_of(model).generate(ROWS, max_new_tokens=NEW) == hf_tokens(model, ROWS)


@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"intermediate_size": 41, "head_dim": 6, "num_key_value_heads": 1},
    ],
    ids=str,
)
def test_what_configs_vary_is_followed(overrides):
    model = drawn(tiny_config("llama", **overrides))
    assert engine_of(model).generate(ROWS, max_new_tokens=NEW) == hf_tokens(model, ROWS)


def drawn(config):
    """A random model of a config, its biases too."""
    import transformers

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_()
    return model


# ---- batches, ends, sampling ----


def test_a_batch_gives_what_each_prompt_gives_alone(llama_engine):
    batch = llama_engine.generate(ROWS, max_new_tokens=NEW)
    assert batch == [llama_engine.generate(row, max_new_tokens=NEW) for row in ROWS]


def test_layers_that_several_rows_keep_are_read_once_a_step(llama_engine):
    plans = llama_engine.plan(ROWS).skip_plans
    any_row = set().union(*(plan.kept for plan in plans))
    llama_engine.generate(ROWS, max_new_tokens=NEW, ignore_eos=True)
    stats = llama_engine.stats
    assert stats.steps == NEW - 1
    assert stats.layer_runs == len(any_row) * stats.steps
    assert stats.new_tokens == NEW * len(ROWS)


def test_rows_end_at_their_own_stop(llama_engine):
    whole = llama_engine.generate(ROWS, max_new_tokens=NEW, ignore_eos=True)
    stops = [whole[0][3], whole[2][6]]
    found = llama_engine.generate(
        ROWS, max_new_tokens=NEW, stop=stops, ignore_eos=True, details=True
    )
    for row, one in zip(whole, found, strict=True):
        end = next((n for n, token in enumerate(row, 1) if token in stops), NEW)
        assert one.tokens == row[:end]
        assert one.finish_reason == ("stop" if row[end - 1] in stops else "length")


def test_the_end_of_sequence_ends_an_answer(llama):
    engine = engine_of(llama)
    whole = engine.generate(ROWS[0], max_new_tokens=NEW, ignore_eos=True)
    llama.generation_config.eos_token_id = [whole[4], VOCAB_SIZE - 1]
    try:
        engine = engine_of(llama)
        assert engine.generate(ROWS[0], max_new_tokens=NEW) == hf_tokens(llama, ROWS[:1])[0]
    finally:
        llama.generation_config.eos_token_id = 2


def test_stop_texts_end_the_text_before_them(llama_engine):
    question = "a b c word30"
    whole = llama_engine.generate(question, max_new_tokens=NEW, ignore_eos=True)
    words = whole.split()
    stop = f"{words[4]} {words[5]}"
    for _ in range(2):  # the second call goes on from what the first has read
        found = llama_engine.generate(
            question, max_new_tokens=NEW, stop=stop, ignore_eos=True, details=True
        )
        assert found.text == whole[: whole.index(stop)]
        assert found.finish_reason == "stop"
    pieces = llama_engine.stream(question, max_new_tokens=NEW, stop=[stop], ignore_eos=True)
    assert "".join(pieces) == found.text


def test_the_same_seed_gives_the_same_answer_and_prompts_differ(llama_engine):
    options = {"max_new_tokens": NEW, "temperature": 2.0, "top_k": 50, "top_p": 0.95}
    first = llama_engine.generate([ROWS[0]] * 3, seed=5, **options)
    assert first == llama_engine.generate([ROWS[0]] * 3, seed=5, **options)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert first[1] == llama_engine.generate(ROWS[0], seed=6, **options)
    assert first[2] == llama_engine.generate([ROWS[0]], seed=[7], **options)[0]


def test_the_repetition_penalty_is_transformers(llama, llama_engine):
    expected = hf_tokens(llama, ROWS, repetition_penalty=1.7)
    assert expected != hf_tokens(llama, ROWS)
    assert llama_engine.generate(ROWS, max_new_tokens=NEW, repetition_penalty=1.7) == expected


def test_the_generation_config_gives_the_defaults(llama):
    llama.generation_config.repetition_penalty = 1.7
    try:
        engine = engine_of(llama)
        assert engine.generate(ROWS, max_new_tokens=NEW) == hf_tokens(llama, ROWS)
    finally:
        llama.generation_config.repetition_penalty = None
    other = engine.generate(ROWS, max_new_tokens=NEW, repetition_penalty=1.0)
    assert other == hf_tokens(llama, ROWS)


def test_an_answer_ends_at_the_models_maximum(llama_engine):
    row = prompts([250])[0].tolist()
    found = llama_engine.generate(row, max_new_tokens=100, ignore_eos=True, details=True)
    assert len(found.tokens) == 6
    assert found.finish_reason == "length"


# ---- text and chats ----


def test_the_same_kind_comes_out_as_went_in(llama_engine):
    tokenizer = tiny_tokenizer()
    message = {"role": "user", "content": "a b c"}
    ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
    options = {"max_new_tokens": NEW, "ignore_eos": True}
    tokens = llama_engine.generate(ids, **options)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert llama_engine.generate("a b c", **options) == text
    assert llama_engine.generate(["a b c"], **options) == [text]
    assert llama_engine.generate([message], **options) == {"role": "assistant", "content": text}
    assert llama_engine.generate([[message]] * 2, **options)[1]["content"] == text
    assert llama_engine.generate(torch.tensor([ids]), **options) == [tokens]
    assert llama_engine.generate([], **options) == []
    raw = tokenizer("a b c")["input_ids"]
    assert llama_engine.generate("a b c", raw=True, **options) == tokenizer.decode(
        llama_engine.generate(raw, **options), skip_special_tokens=True
    )
    assert "".join(llama_engine.stream("a b c", **options)) == text
    assert list(llama_engine.stream(ids, **options)) == tokens


def test_a_later_turn_keeps_the_plan_and_reads_only_what_is_new(llama, llama_engine):
    chat = llama_engine.chat([{"role": "system", "content": "d e"}], max_new_tokens=NEW)
    chat.send("a b c")
    plan, first = chat.skip_plan, chat.stats
    assert plan == llama_engine.plan([chat.messages[:2]]).skip_plans[0]
    assert first.reused_tokens == 0
    answer = chat.send("word40 f")
    assert chat.skip_plan == plan
    assert chat.stats.reused_tokens > first.prompt_tokens
    assert [message["role"] for message in chat.messages[1:]] == ["user", "assistant"] * 2
    fresh = llama_engine.generate(chat.messages[:-1], skip_plan=plan, max_new_tokens=NEW)
    assert fresh == {"role": "assistant", "content": answer}
    other = SkipPlan((0, 1, 2), NUM_LAYERS)
    chat.send("g", skip_plan=other)
    assert chat.skip_plan == other
    assert chat.stats.reused_tokens == 0
    chat.send("h", replan=True)
    assert chat.skip_plan == llama_engine.plan([chat.messages[:-1]]).skip_plans[0]


def test_prompts_under_a_known_plan_reuse_what_was_read(llama_engine):
    plan = SkipPlan((0, 2, 3), NUM_LAYERS)
    options = {"skip_plan": plan, "max_new_tokens": NEW, "ignore_eos": True}
    answer = llama_engine.generate(ROWS[0], **options)
    longer = [*ROWS[0], *answer, *ROWS[1]]
    found = llama_engine.generate(longer, **options)
    assert llama_engine.stats.reused_tokens == len(ROWS[0]) + NEW - 1
    llama_engine.generate(longer, **(options | {"skip_plan": SkipPlan.full(NUM_LAYERS)}))
    assert llama_engine.stats.reused_tokens == 0
    assert llama_engine.generate([longer, ROWS[2]], **options)[0] == found


def test_logits_go_from_prefill_to_decode_as_they_are(llama_engine) -> None:
    """An operation of torch on them would wake its threads, which spin against the engine's."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.shape[-1:] == (VOCAB_SIZE,):
                operations.add(func.__name__.split(".")[0])
            return found

    operations: set[str] = set()
    first, later = ROWS[0], ROWS[0] + [3, 4]
    for rows in (ROWS, [first], [later]):
        if rows != [later]:  # which reuses what was read of the first
            llama_engine.forget()
        with Seen():
            llama_engine.generate(rows, max_new_tokens=1, skip_plan=SkipPlan.full(NUM_LAYERS))
    assert llama_engine.stats.reused_tokens > 0 and operations <= {"empty"}


def test_a_full_prefill_is_no_prefix_of_one_that_skips(llama):
    """Its keys and values come from states that dropped layers have changed."""
    engine, fresh = engine_of(llama), engine_of(llama)
    options = {"skip_plan": SkipPlan((0, 2, 3), NUM_LAYERS), "max_new_tokens": NEW}
    long = prompts([60])[0].tolist()
    engine.generate(long[:-1], prefill="full", **options)
    assert engine.generate(long, **options) == fresh.generate(long, **options)
    assert engine.stats.reused_tokens == 0


def test_a_window_that_has_moved_on_is_no_prefix():
    engine = engine_of(base_model("mistral", torch.float32))
    long = prompts([60])[0].tolist()
    engine.generate(long, max_new_tokens=NEW)
    fresh = engine_of(base_model("mistral", torch.float32))
    assert engine.generate(long[:20], max_new_tokens=NEW) == fresh.generate(
        long[:20], max_new_tokens=NEW
    )


# ---- saved engines and the cache ----


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


def damage_weights(folder):
    with (folder / saved.WEIGHTS_NAME).open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\xff" * 8)


def cut_weights(folder):
    file = folder / saved.WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-64])


def damage_config(folder):
    (folder / saved.CONFIG_NAME).write_text("{")


def lose_weights(folder):
    (folder / saved.WEIGHTS_NAME).unlink()


@pytest.fixture
def checkpoint(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    shutil.copytree(tiny_base_path("llama"), base)
    tiny_tokenizer().save_pretrained(base)
    llama.save_pretrained(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "router_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return tmp_path / "checkpoint"


def load_counted(checkpoint, monkeypatch, **options) -> tuple[Engine, int]:
    """The engine, and how many times a model was packed for it."""
    from firstlm.engine import packing

    count = 0

    def counted(*args, own=packing.pack_model, **kwargs):
        nonlocal count
        count += 1
        return own(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack_model", counted)
        options = {"precision": "float32", "progress": False} | options
        engine = Engine.from_pretrained(checkpoint, **options)
    return engine, count


@pytest.mark.parametrize("damage", [damage_weights, cut_weights, damage_config, lose_weights])
def test_a_damaged_cache_entry_is_made_again(llama, checkpoint, monkeypatch, damage, caplog):
    expected = hf_tokens(llama, ROWS)
    assert load_counted(checkpoint, monkeypatch)[1] == 1
    engine, packed = load_counted(checkpoint, monkeypatch)
    assert packed == 0
    assert engine.generate(ROWS, max_new_tokens=NEW) == expected
    (entry,) = (checkpoint.parent / "cache" / "engine" / "float32").iterdir()
    damage(entry)
    with pytest.raises(ValueError, match="damaged"):
        Engine.load(entry)
    with caplog.at_level(logging.WARNING):
        engine, packed = load_counted(checkpoint, monkeypatch)
    assert packed == 1
    assert "packing the weights again" in caplog.text
    assert engine.generate(ROWS, max_new_tokens=NEW) == expected
    assert load_counted(checkpoint, monkeypatch)[1] == 0


def test_changed_routers_and_weights_are_packed_again(checkpoint, monkeypatch):
    assert load_counted(checkpoint, monkeypatch)[1] == 1
    path = checkpoint / "router_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"thresholds": [0.0] * NUM_LAYERS}))
    engine, packed = load_counted(checkpoint, monkeypatch)
    assert packed == 1
    assert engine.plan(ROWS).skip_plans == [SkipPlan.full(NUM_LAYERS)] * 4
    weights = checkpoint.parent / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-8:] = bytes(8)
    weights.write_bytes(content)
    assert load_counted(checkpoint, monkeypatch)[1] == 1
    assert load_counted(checkpoint, monkeypatch)[1] == 0
    assert load_counted(checkpoint, monkeypatch, cache=False)[1] == 1


def test_adapters_are_merged(llama, checkpoint, monkeypatch):
    model = adapted(firstlm.from_pretrained(checkpoint))
    expected = hf_tokens(model, ROWS)
    assert expected != hf_tokens(llama, ROWS)
    assert engine_of(model).generate(ROWS, max_new_tokens=NEW) == expected  # attached
    model.save_pretrained(checkpoint)
    engine, _ = load_counted(checkpoint, monkeypatch)
    assert engine.generate(ROWS, max_new_tokens=NEW) == expected


# ---- adapters that are kept apart ----


def adapted(model, **options):
    """With a random adapter that bfloat16 holds exactly, if its scale is a power of 2."""
    from peft import LoraConfig

    torch.manual_seed(3)
    options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"} | options
    model.add_adapter(LoraConfig(init_lora_weights=False, exclude_modules=".*router.*", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_((0.5 * parameter).bfloat16())
    return model.eval()


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


def test_4_bits_lose_a_small_adapter_only_if_it_is_merged(checkpoint):
    """The base lies on the grid, and what is added is far smaller than its steps."""
    model = firstlm.from_pretrained(checkpoint)
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


def test_an_adapter_apart_is_saved_and_kept(checkpoint, tmp_path, monkeypatch):
    adapted(firstlm.from_pretrained(checkpoint)).save_pretrained(checkpoint)
    engine, packed = load_counted(checkpoint, monkeypatch, precision="int4")
    expected = engine.generate(ROWS, max_new_tokens=NEW)
    assert packed == 1
    again, packed = load_counted(checkpoint, monkeypatch, precision="int4")
    assert packed == 0 and again.generate(ROWS, max_new_tokens=NEW) == expected
    merged, packed = load_counted(checkpoint, monkeypatch, precision="int4", lora="merge")
    assert packed == 1 and merged.weight_bytes < engine.weight_bytes
    engine.save(tmp_path / "engine")
    loaded = Engine.from_pretrained(tmp_path / "engine")
    assert loaded.generate(ROWS, max_new_tokens=NEW) == expected
    with pytest.raises(ValueError, match="lora='apart'; asked was lora='merge'"):
        Engine.from_pretrained(tmp_path / "engine", lora="merge")


def test_adapters_that_are_no_plain_lora_are_merged_by_peft_or_refused(checkpoint, monkeypatch):
    model = adapted(firstlm.from_pretrained(checkpoint), use_dora=True)
    with pytest.raises(ValueError, match="merge the adapter first"):
        engine_of(model)
    expected = hf_tokens(model, ROWS)
    model.save_pretrained(checkpoint)
    engine, _ = load_counted(checkpoint, monkeypatch)
    assert engine.generate(ROWS, max_new_tokens=NEW) == expected
    with pytest.raises(ValueError, match="no plain LoRA"):
        Engine.from_pretrained(checkpoint, lora="apart", progress=False)
    with pytest.raises(ValueError, match="lora must be one of"):
        Engine.from_pretrained(checkpoint, lora="beside", progress=False)


# ---- threads, cancelling ----


def test_threads_and_engines_do_not_disturb_each_other(llama, llama_engine):
    expected = llama_engine.generate(ROWS, max_new_tokens=64, ignore_eos=True)
    engines = [llama_engine, llama_engine, engine_of(llama)]
    found = [None] * len(engines)

    def work(index):
        plan = SkipPlan((0, 2), NUM_LAYERS)
        for row in ROWS:  # under a known plan, whose sequences are kept for later calls
            engines[index].generate(row, max_new_tokens=8, skip_plan=plan)
        found[index] = engines[index].generate(ROWS, max_new_tokens=64, ignore_eos=True)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(engines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * len(engines)


def test_closing_the_iterator_ends_the_decode(llama_engine):
    whole = llama_engine.generate(ROWS[0], max_new_tokens=8, ignore_eos=True)
    other = llama_engine.generate(ROWS[1], max_new_tokens=4)
    stream = llama_engine.stream(ROWS[0], max_new_tokens=200, ignore_eos=True)
    assert [next(stream) for _ in range(3)] == whole[:3]
    assert llama_engine.generate(ROWS[1], max_new_tokens=4) == other  # meanwhile
    assert [next(stream) for _ in range(5)] == whole[3:]
    stream.close()
    assert llama_engine.stats.new_tokens == 8
    with pytest.raises(StopIteration):
        next(stream)


# ---- what is refused ----


def test_sequences_of_another_decoder_are_refused(llama, llama_engine):
    own, other = engine_of(llama).core.decoder, llama_engine.core.decoder
    keep = torch.ones(1, NUM_LAYERS, dtype=torch.bool)
    sequence = own.sequence()
    with pytest.raises(ValueError, match="sequence 0 is of another decoder"):
        other.extend([sequence], [[5]], keep, None, [1])
    logits, _ = own.extend([sequence], [[5]], keep, None, [1])
    with pytest.raises(ValueError, match="sequence 0 is of another decoder"):
        other.decoding([sequence.copy()], logits, [{}], [[]], [], [3])


def test_an_exact_budget_that_is_too_large_is_refused_before_any_work(llama, monkeypatch):
    engine = engine_of(llama)
    monkeypatch.setattr(engine.core, "routed", None)
    for call in (engine.generate, engine.plan):
        with pytest.raises(ValueError, match="asks to skip 6 of 6 layers, but only 5"):
            call(ROWS, budget=0.95, budget_mode="exact")


def test_a_saved_engine_loads_in_its_own_precision(llama, tmp_path):
    engine_of(llama, precision="int8").save(tmp_path / "engine")
    for options in ({}, {"precision": "int8"}, {"head_precision": "int8"}):
        loaded = Engine.from_pretrained(tmp_path / "engine", **options)
        assert loaded.config.decoder["precision"] == "int8"
    with pytest.raises(ValueError, match="has precision='int8'; asked was precision='int4'"):
        Engine.from_pretrained(tmp_path / "engine", "int4")
    with pytest.raises(ValueError, match="head_precision='int8'; asked was head_precision='int4'"):
        Engine.from_pretrained(tmp_path / "engine", head_precision="int4")


def test_the_share_of_the_bandwidth_is_there_once_it_was_measured(llama, monkeypatch):
    engine = engine_of(llama)
    engine.generate(ROWS[0], max_new_tokens=4, ignore_eos=True)
    assert engine.stats.bandwidth_share is None
    monkeypatch.setattr(firstlm.bandwidth, "read_gb_per_s", lambda: [1.0, 2.0, 9.0])
    assert engine.measure_bandwidth() == 2.0
    engine.generate(ROWS[0], max_new_tokens=4, ignore_eos=True)
    stats = engine.stats
    read = (stats.weight_bytes + stats.cache_bytes) / stats.decode_ms * 1e3
    assert stats.bandwidth_share == pytest.approx(read / 2e9)
    assert stats.to_json()["bandwidth_share"] == stats.bandwidth_share


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt2"])
def test_other_families_are_sent_to_the_hf_path(family):
    with pytest.raises(ValueError, match=rf"{family}.*accepted: llama.*hf path.*from_pretrained"):
        Engine.from_model(base_model(family, torch.float32))
    with pytest.raises(ValueError, match="hf path"):
        Engine.from_pretrained(tiny_base_path(family), progress=False)


def test_rotary_embeddings_that_depend_on_the_length_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match=r"dynamic.*default, linear, llama3, yarn"):
        Engine.from_model(drawn(tiny_config("llama", rope_parameters=rope)))
    with pytest.raises(ValueError, match=r"hidden_act='gelu'.*'silu'"):
        Engine.from_model(drawn(tiny_config("llama", hidden_act="gelu")))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": [[1, VOCAB_SIZE]]}, ValueError, "token ids must lie in"),
        ({"prompts": [[1, -1]]}, ValueError, "token ids must lie in"),
        ({"prompts": list(range(3, 100)) * 4}, ValueError, "maximum of 256"),
        ({"prompts": 7}, TypeError, "prompts takes"),
        ({"prompts": ["a", [1]]}, TypeError, "all of one kind"),
        ({"prompts": [3], "max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"prompts": [3], "temperature": -1.0}, ValueError, "temperature"),
        ({"prompts": [3], "temperature": 1.0, "top_p": 1.5}, ValueError, "top_p"),
        ({"prompts": [3], "stop": 0.5}, TypeError, "stop"),
        ({"prompts": [3], "max_new_tokens": 3.0}, TypeError, "max_new_tokens"),
        ({"prompts": [3], "top_k": 2.5}, TypeError, "top_k"),
        ({"prompts": [3], "stop": [-1]}, ValueError, "stop"),
        ({"prompts": [3], "seed": [1, 2]}, ValueError, "seed"),
        ({"prompts": [3], "seed": -1}, ValueError, "seed"),
        ({"prompts": [3], "seed": 2**64}, ValueError, "seed"),
        ({"prompts": [3], "seed": "7"}, TypeError, "seed"),
        ({"prompts": [3], "budget": 1.0}, ValueError, "skip rate"),
        ({"prompts": [3], "budget": 0.5}, ValueError, "calibrate"),
        ({"prompts": [3], "budget": 0.5, "budget_mode": "all"}, ValueError, "budget_mode"),
        ({"prompts": [3], "prefill": "both"}, ValueError, "prefill"),
        ({"prompts": [3], "skip_plan": SkipPlan((0,), 7)}, ValueError, "7 layers"),
        ({"prompts": [3], "skip_plan": SkipPlan((1,), NUM_LAYERS)}, ValueError, "protected"),
    ],
    ids=str,
)
def test_arguments_that_are_not_accepted_are_named(llama_engine, arguments, error, message):
    before = llama_engine.core.decoder.counters()
    with pytest.raises(error, match=message):
        llama_engine.generate(**arguments)
    assert llama_engine.core.decoder.counters() == before  # before any work


def test_text_needs_a_tokenizer_and_precisions_have_names(llama):
    with pytest.raises(ValueError, match="no tokenizer"):
        engine_of(llama).generate("a b")
    with pytest.raises(ValueError, match="precision must be one of"):
        Engine.from_model(llama, precision="int3")
    with pytest.raises(ValueError, match="num_threads"):
        Engine.from_model(llama, num_threads=0)
    with pytest.raises(ValueError, match=r"num_threads must lie in \[1, 256\]"):
        Engine.from_model(llama, num_threads=257)


def test_another_prefill_than_trained_warns(checkpoint):
    engine = Engine.from_pretrained(checkpoint, "float32", progress=False)
    with pytest.warns(UserWarning, match="trained with prefill='route'"):
        engine.generate(ROWS[0], prefill="full", max_new_tokens=2)


def test_an_interrupt_ends_a_long_answer_and_the_engine_lives_on(llama, monkeypatch):
    """Ctrl-C while an answer is made: the signal's handler runs between two chunks of steps."""
    monkeypatch.setattr(llama.config, "max_position_embeddings", 10**6)
    engine = engine_of(llama)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    # Shells start what runs in the background with the signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.generate(ROWS[0], max_new_tokens=900_000, ignore_eos=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert 0 < engine.stats.new_tokens < 900_000
    assert engine.generate(ROWS, max_new_tokens=NEW) == hf_tokens(llama, ROWS)


def test_an_interrupt_ends_a_long_prompt_and_the_sequence_is_as_it_was(llama, monkeypatch):
    """The signal's handler runs between two chunks of the prompt, not at its end."""

    class Alarm(Exception):
        pass

    def ring(*_):
        raise Alarm

    monkeypatch.setattr(llama.config, "max_position_embeddings", 10**6)
    engine = engine_of(llama)
    decoder = engine.core.decoder
    sequence = decoder.sequence()
    keep = torch.ones(1, NUM_LAYERS, dtype=torch.bool)
    decoder.extend([sequence], [ROWS[0]], keep, None, [1])
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(Alarm):
            decoder.extend([sequence], [[5] * 60_000], None, None, [1])
        assert sequence.length == len(ROWS[0])
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Alarm):
            engine.generate([5] * 60_000, max_new_tokens=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert engine.generate(ROWS, max_new_tokens=NEW) == hf_tokens(llama, ROWS)


@pytest.mark.parametrize(
    ("precision", "head", "tolerance"),
    [
        ("bfloat16", None, 0.05),
        ("int8", None, 0.05),
        ("int4", None, 0.5),
        ("int4", "int8", 0.5),
        ("float32", "int8", 0.05),
    ],
)
def test_other_precisions_are_near_float32(llama, llama_engine, precision, head, tolerance):
    engine = engine_of(llama, precision=precision, head_precision=head)
    plan = SkipPlan((0, 1, 3, 4), NUM_LAYERS)
    continuation = prompts([50], seed=2)[0].tolist()
    expected = llama_engine.score(ROWS[0], continuation, skip_plan=plan)
    found = engine.score(ROWS[0], continuation, skip_plan=plan)
    error = (found - expected).abs().mean().item()
    assert 0 < error < tolerance
    assert engine.weight_bytes < llama_engine.weight_bytes


def test_the_comparison_of_real_models_finds_and_judges_divergences(llama, llama_engine):
    script = Path(__file__).parent.parent / "scripts" / "check_engine.py"
    spec = importlib.util.spec_from_file_location("check_engine", script)
    check = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = check
    spec.loader.exec_module(check)
    same = check.compare(llama, llama_engine, ROWS, NEW)
    assert (same["divergences"], same["not_allowed"]) == (0, 0)
    assert 0 < same["largest_logit_difference"] < 1e-3
    other = engine_of(routed_model("llama", torch.float32, draw=False))  # keeps every layer
    found = check.compare(llama, other, ROWS, NEW)
    assert found["not_allowed"] == found["divergences"] >= 3
