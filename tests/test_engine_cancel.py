"""Threads, closed iterators and interrupts."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from firstlm import SkipPlan
from firstlm.engine.settings import settings_of
from firstlm.engine.stats import EngineStats
from tiny_engines import NEW, ROWS, engine_of, hf_tokens
from tiny_models import NUM_LAYERS, VOCAB_SIZE


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


@pytest.mark.parametrize("part", ["prompt", "answer"])
def test_other_threads_run_while_the_engine_does(llama, monkeypatch, part):
    """One call into the decoder, half a second long or so, that no other thread has to wait for."""
    monkeypatch.setattr(llama.config, "max_position_embeddings", 10**6)
    core = engine_of(llama).core
    stats, keep = EngineStats(), torch.ones(1, NUM_LAYERS, dtype=torch.bool)
    sequences, logits = core.planned([ROWS[0]], keep, "route", stats)
    started, ended, beats = threading.Event(), threading.Event(), []

    def beat():
        started.set()
        while not ended.wait(0.001):
            beats.append(time.perf_counter())

    thread = threading.Thread(target=beat)
    thread.start()
    started.wait()
    begin = time.perf_counter()
    if part == "prompt":
        core.extend(sequences, [[5] * 8000], [1], stats)
    else:
        greedy = settings_of(
            {}, None, 1, VOCAB_SIZE, max_new_tokens=1, seed=0, stop=None, ignore_eos=True
        )
        row = greedy.of_row(0)
        core.advance(core.decoder.decoding(sequences, logits, [row], [[]], [], [8000]), 8000, stats)
    end = time.perf_counter()
    ended.set()
    thread.join()
    assert sum(begin < at < end for at in beats) > 10


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
