"""What `Engine.stats` says of a call: times, bytes, layers."""

from __future__ import annotations

import time

import pytest

import firstlm
from firstlm import SkipPlan
from tiny_engines import NEW, ROWS, engine_of
from tiny_models import NUM_LAYERS
from tiny_tokenizer import tiny_tokenizer

PLAN = SkipPlan((0, 2, 3), NUM_LAYERS)


def test_layers_that_several_rows_keep_are_read_once_a_step(llama_engine):
    plans = llama_engine.plan(ROWS).skip_plans
    any_row = set().union(*(plan.kept for plan in plans))
    llama_engine.generate(ROWS, max_new_tokens=NEW, ignore_eos=True)
    stats = llama_engine.stats
    assert stats.steps == NEW - 1
    assert stats.layer_runs == [stats.steps * (n in any_row) for n in range(NUM_LAYERS)]
    assert stats.new_tokens == NEW * len(ROWS)


@pytest.mark.parametrize("prefill", ["route", "full"])
def test_keys_and_values_are_held_of_kept_layers_only(llama_engine, prefill):
    """Also where the prompt ran through all of them: what it left in dropped ones is given back."""
    options = {"max_new_tokens": NEW, "ignore_eos": True, "prefill": prefill}
    llama_engine.forget()
    llama_engine.generate(ROWS, skip_plan=PLAN, **options)
    stats = llama_engine.stats
    assert stats.kv_bytes * NUM_LAYERS == stats.kv_bytes_full * len(PLAN.kept)
    config = llama_engine.config.decoder
    of_token = 2 * 4 * config["num_key_value_heads"] * config["head_dim"] * len(PLAN.kept)
    assert stats.kv_bytes >= of_token * sum(len(row) + NEW - 1 for row in ROWS)


def test_times_are_those_of_the_call(llama_engine):
    llama_engine.forget()
    start = time.perf_counter()
    llama_engine.generate(ROWS, max_new_tokens=NEW, ignore_eos=True)
    whole_ms = 1e3 * (time.perf_counter() - start)
    stats = llama_engine.stats
    assert 0 < stats.router_ms < stats.prefill_ms < stats.ttft_ms < whole_ms
    assert stats.ttft_ms + stats.decode_ms < whole_ms
    assert stats.tpot_ms == stats.decode_ms / (NEW - 1)
    decoded, read = len(ROWS) * (NEW - 1), sum(map(len, ROWS))
    assert stats.tokens_per_s == pytest.approx(1e3 * decoded / stats.decode_ms)
    assert stats.prefill_tokens_per_s == pytest.approx(1e3 * read / stats.prefill_ms)


def test_nothing_is_divided_by_zero_before_the_first_call(llama):
    assert engine_of(llama).stats.to_json()["tokens_per_s"] == 0.0


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
    engine = engine_of(llama, tokenizer=tiny_tokenizer())
    engine.measure_bandwidth()
    chat = engine.chat()
    chat.send("a b", max_new_tokens=4, ignore_eos=True)
    assert chat.stats is engine.stats and chat.stats.bandwidth_share > 0
