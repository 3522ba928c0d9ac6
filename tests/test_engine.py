"""The native engine against the hf path: the same plans, tokens and probabilities."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from firstlm import Engine, RouterConfig, SkipPlan
from tiny_engines import LENGTHS, NEW, ROWS, drawn, engine_of, hf_tokens
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


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return routed_model(request.param, torch.float32)


@pytest.fixture(scope="module")
def engine(model):
    return engine_of(model)


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
    with pytest.raises(ValueError, match="maximum of 256"):
        llama_engine.score("a" + " b" * 256, "", raw=True)


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


# ---- batches, ends, sampling ----


def test_a_batch_gives_what_each_prompt_gives_alone(llama_engine):
    batch = llama_engine.generate(ROWS, max_new_tokens=NEW)
    assert batch == [llama_engine.generate(row, max_new_tokens=NEW) for row in ROWS]


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
        (
            {"prompts": [[3], [5] * 256]},
            ValueError,
            "prompt 1 has 256.*at most 255.*maximum of 256",
        ),
        ({"prompts": [[3], []]}, ValueError, "prompt 1 has no tokens"),
        ({"prompts": [[]]}, ValueError, "prompt 0 has no tokens"),
        ({"prompts": 7}, TypeError, "prompts takes"),
        ({"prompts": b"a"}, TypeError, "prompts takes.*got bytes"),
        ({"prompts": ["a", [1]]}, TypeError, "all of one kind"),
        ({"prompts": [3], "max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"prompts": [3], "temperature": -1.0}, ValueError, "temperature"),
        (
            {"prompts": [3], "temperature": "hot"},
            TypeError,
            "temperature takes a number, got 'hot'",
        ),
        ({"prompts": [3], "temperature": [1.0]}, TypeError, "temperature takes a number"),
        ({"prompts": [3], "temperature": np.ones(2)}, TypeError, "temperature takes a number"),
        ({"prompts": [3], "temperature": 1.0, "top_p": 1.5}, ValueError, "top_p"),
        ({"prompts": [3], "stop": 0.5}, TypeError, "stop"),
        ({"prompts": [3], "max_new_tokens": 3.0}, TypeError, "max_new_tokens"),
        ({"prompts": [3], "top_k": 2.5}, TypeError, "top_k"),
        ({"prompts": [3], "top_k": -1}, ValueError, "top_k is -1; accepted is 0"),
        ({"prompts": [3], "stop": 10**12}, ValueError, "stop takes token ids in"),
        ({"prompts": [3], "stop": [-1]}, ValueError, "stop"),
        ({"prompts": [3], "seed": [1, 2]}, ValueError, "seed"),
        ({"prompts": [3], "seed": -1}, ValueError, "seed"),
        ({"prompts": [3], "seed": 2**64}, ValueError, "seed"),
        ({"prompts": [3], "seed": "7"}, TypeError, "seed"),
        ({"prompts": [3], "budget": 1.0}, ValueError, "skip rate"),
        ({"prompts": [3], "budget": 0.5}, ValueError, "calibrate"),
        ({"prompts": [3], "budget": "half"}, TypeError, "budget takes a number, got 'half'"),
        ({"prompts": [3], "budget_mode": "all"}, ValueError, "budget_mode"),
        ({"prompts": [3], "skip_plan": 3}, TypeError, "skip_plan takes SkipPlan objects.*got int"),
        (
            {"prompts": [3], "skip_plan": torch.ones(6)},
            TypeError,
            "mask must be bool, got",
        ),
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


def test_options_that_no_call_takes_are_named_before_a_turn(llama_engine):
    with pytest.raises(TypeError, match="stream takes no 'max_tokens'; accepted: max_new_tokens"):
        llama_engine.stream([3], max_tokens=3)
    with pytest.raises(TypeError, match="stream takes no 'details'"):
        llama_engine.stream([3], details=True)
    engine = engine_of(routed_model("llama", torch.float32), tokenizer=tiny_tokenizer())
    with pytest.raises(TypeError, match="chat takes no 'max_tokens'"):
        engine.chat(max_tokens=3)
    with pytest.raises(TypeError, match=r"messages takes chat messages.*got 'hello'.*send\(text\)"):
        engine.chat("hello")
    for wrong in (None, [{"role": "user"}], iter([])):
        with pytest.raises(TypeError, match="messages takes chat messages"):
            engine.chat(wrong)
    with pytest.raises(TypeError, match="a turn of a chat takes no 'max_tokens'"):
        engine.chat().send("a", max_tokens=3)


def test_keep_masks_are_plans(llama_engine):
    plans = [SkipPlan((0, layer), NUM_LAYERS) for layer in (1, 2, 3, 4)]
    plans = [SkipPlan((*plan.kept, 5), NUM_LAYERS) for plan in plans]
    masks = torch.stack([plan.to_mask() for plan in plans])
    for plan, mask in ((plans, masks), (plans[1], masks[1]), (plans, masks.numpy())):
        wanted = llama_engine.generate(ROWS, max_new_tokens=NEW, skip_plan=plan)
        assert llama_engine.generate(ROWS, max_new_tokens=NEW, skip_plan=mask) == wanted
        scores = [llama_engine.score(ROWS, ROWS, skip_plan=each) for each in (plan, mask)]
        assert all(torch.equal(a, b) for a, b in zip(*scores, strict=True))


def test_numbers_of_numpy_and_torch_are_numbers(llama_engine):
    options = {
        "max_new_tokens": np.int64(8),
        "temperature": np.float32(1),
        "top_k": torch.tensor(9),
    }
    wanted = llama_engine.generate(
        ROWS[:2], max_new_tokens=8, temperature=1.0, top_k=9, seed=[3, 4], stop=[7]
    )
    for seed, stop in ((np.array([3, 4]), np.array([7])), (torch.tensor([3, 4]), [np.int64(7)])):
        assert llama_engine.generate(ROWS[:2], seed=seed, stop=stop, **options) == wanted
    exact = {"budget_mode": "exact", "max_new_tokens": 4}
    wanted = llama_engine.generate(ROWS[0], budget=0.5, **exact)
    assert llama_engine.generate(ROWS[0], budget=torch.tensor(0.5), **exact) == wanted


def test_no_vocabulary_is_larger_than_top_k_may_be(llama_engine):
    options = {"max_new_tokens": 8, "temperature": 1.0}
    wanted = llama_engine.generate(ROWS[0], top_k=0, **options)
    assert llama_engine.generate(ROWS[0], top_k=10**30, **options) == wanted


def test_a_prompt_as_long_as_the_model_reads_has_a_plan(llama_engine):
    assert len(llama_engine.plan([5] * 256).skip_plans) == 1
    with pytest.raises(ValueError, match="prompt 0 has 257 tokens, at most 256"):
        llama_engine.plan([5] * 257)


def test_one_continuation_is_for_one_prompt(llama_engine):
    with pytest.raises(ValueError, match="prompts is a single one and continuations a list"):
        llama_engine.score([3], [[4]])
    with pytest.raises(ValueError, match="continuations is a single one and prompts a list"):
        llama_engine.score([[3]], [4])
    with pytest.raises(TypeError, match=r"continuations takes.*got int"):
        llama_engine.score([3], 5)
    with pytest.raises(ValueError, match="got 1 for 2"):
        llama_engine.score([[3], [5]], [[4]])


def test_text_needs_a_tokenizer_and_precisions_have_names(llama):
    with pytest.raises(ValueError, match="no tokenizer"):
        engine_of(llama).generate("a b")
    with pytest.raises(TypeError, match="takes a model in memory, got 'embedded'"):
        Engine.from_model("embedded")
    with pytest.raises(ValueError, match="precision must be one of"):
        Engine.from_model(llama, precision="int3")
    with pytest.raises(ValueError, match="num_threads"):
        Engine.from_model(llama, num_threads=0)
    for wrong in ("2", 1.5):
        with pytest.raises(TypeError, match="num_threads takes a whole number"):
            Engine.from_model(llama, num_threads=wrong)
    with pytest.raises(ValueError, match=r"num_threads must lie in \[1, 256\]"):
        Engine.from_model(llama, num_threads=257)
