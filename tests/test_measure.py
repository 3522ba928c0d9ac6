"""Arms are timed on equal work, layer calls are counted, answers keep the order of the prompts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import firstlm
from firstlm import measure
from firstlm.skip_plan import SkipPlan
from tiny_gguf import draw_routers, tiny_model_folder

PROMPTS = ["a", "What is a package?", "Summarize this: a longer text of words.", "b c", "1 + 1 ="]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("measure"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    model = firstlm.from_pretrained(folder, dtype=torch.float64)
    draw_routers(model)
    return model


def test_answers_keep_the_order_of_the_prompts_whatever_the_batch(model, tokenizer) -> None:
    batched = measure.answer(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2)
    single = [measure.answer(model, tokenizer, [p], max_new_tokens=6) for p in PROMPTS]
    assert batched.texts == [answers.texts[0] for answers in single]
    assert batched.skip_plans == [answers.skip_plans[0] for answers in single]
    assert len(set(batched.skip_plans)) > 1
    assert 0 < batched.layer_calls_per_token < 6


def test_a_model_without_routers_answers_too(folder, tokenizer, model) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    plain = measure.answer(base, tokenizer, PROMPTS, max_new_tokens=6)
    full = measure.answer(model, tokenizer, PROMPTS, max_new_tokens=6, skip_plan=SkipPlan.full(6))
    assert plain.texts == full.texts
    assert plain.skip_plans == [] and plain.layer_calls_per_token is None
    assert full.layer_calls_per_token == 6
    with pytest.raises(ValueError, match="at least one"):
        measure.answer(model, tokenizer, [])


def test_rouge_l_of_known_pairs() -> None:
    scores = measure.rouge_l(["a b c d", "x", ""], ["a b c d", "y", "z"])
    assert scores == [1.0, 0.0, 0.0]
    [half] = measure.rouge_l(["the cat sat"], ["the dog sat"])
    assert half == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="1 answers do not match 2 references"):
        measure.rouge_l(["a"], ["a", "b"])


def test_arms_are_timed_on_equal_work_and_counted(model, tokenizer) -> None:
    plan = SkipPlan((0, 1, 5), 6)
    arms = {"full": {"skip_plan": SkipPlan.full(6)}, "half": {"skip_plan": plan}}
    timings = measure.time_arms(model, tokenizer, PROMPTS[:2], arms, new_tokens=5, repeats=3)
    for timing in timings.values():
        assert len(timing.ttft_ms) == len(timing.tpot_ms) == 2 * 3
        assert min(timing.ttft_ms + timing.tpot_ms) > 0
    assert timings["full"].layer_calls_per_token == [6, 6]
    assert timings["half"].layer_calls_per_token == [3, 3]
    assert timings["full"].kv_bytes == [2 * size for size in timings["half"].kv_bytes]


def test_arms_that_stop_early_are_refused(model, tokenizer) -> None:
    arms = {"short": {"stopping_criteria": [lambda ids, scores, **_: torch.tensor([True])]}}
    with pytest.raises(RuntimeError, match="1 tokens were produced instead of 5"):
        measure.time_arms(model, tokenizer, PROMPTS[:1], arms, new_tokens=5)
    with pytest.raises(ValueError, match="new_tokens must be at least 2"):
        measure.time_arms(model, tokenizer, PROMPTS[:1], arms, new_tokens=1)
