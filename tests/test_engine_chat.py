"""Text and conversations with the engine, and what a call reuses of an earlier one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from firstlm import SkipPlan
from firstlm.engine.prefix import KeptSequence, PrefixStore
from tiny_engines import NEW, ROWS, engine_of
from tiny_models import NUM_LAYERS, VOCAB_SIZE, base_model, prompts
from tiny_tokenizer import tiny_tokenizer


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


def test_a_stream_that_is_collected_while_a_prefix_is_looked_for_blocks_nothing():
    store, keep = PrefixStore(2), torch.ones(3, dtype=torch.bool)

    class Token(int):
        def __ne__(self, other):  # as a collection of garbage may, at any allocation
            store.put(KeptSequence([8], keep, None))
            return int.__ne__(self, other)

    class Held:
        def crop(self, length):
            pass

    store.put(KeptSequence([Token(3), Token(4)], keep, Held()))
    assert store.take([3, 4, 5], keep) is None  # what the others have pushed out in the meantime
    store.put(KeptSequence([3, 4], keep, Held()))
    assert store.take([3, 4, 5], keep).tokens == [3, 4]


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
    chat.send("h", skip_plan=other.to_mask())  # the same plan again
    assert chat.stats.reused_tokens > 0
    chat.send("h", replan=True)
    assert chat.skip_plan == llama_engine.plan([chat.messages[:-1]]).skip_plans[0]


def test_a_turns_plan_or_budget_takes_the_place_of_the_conversations(llama_engine):
    plan = SkipPlan((0, 2, 3), NUM_LAYERS)
    chat = llama_engine.chat(skip_plan=plan, max_new_tokens=4)
    chat.send("a")
    assert chat.skip_plan == plan
    chat.send("b", budget=0.5, budget_mode="exact")
    assert len(chat.skip_plan.kept) == NUM_LAYERS // 2
    chat = llama_engine.chat(budget=0.5, budget_mode="exact", max_new_tokens=4)
    chat.send("a", skip_plan=plan)
    assert chat.skip_plan == plan


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


def test_a_turn_that_was_interrupted_while_it_was_read_leaves_the_plan(llama_engine, monkeypatch):
    chat = llama_engine.chat(max_new_tokens=NEW)
    chat.send("a b c", skip_plan=SkipPlan((0, 2, 3), NUM_LAYERS))
    said = list(chat.messages)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llama_engine.core, "extend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.send("d")
    assert chat.messages == said and chat.skip_plan == SkipPlan((0, 2, 3), NUM_LAYERS)
    answer = chat.send("d")
    assert chat.stats.reused_tokens == 0 and chat.skip_plan == SkipPlan((0, 2, 3), NUM_LAYERS)
    fresh = llama_engine.generate(chat.messages[:-1], skip_plan=chat.skip_plan, max_new_tokens=NEW)
    assert fresh["content"] == answer


def test_turns_under_a_full_prefill_say_what_generate_says(llama):
    engine = engine_of(llama, tokenizer=tiny_tokenizer())
    options = {"prefill": "full", "max_new_tokens": NEW}
    chat = engine.chat(**options)
    chat.send("a b c", skip_plan=SkipPlan((0, 2, 3), NUM_LAYERS))
    for text, prefill in (("word40 f", "full"), ("g", "route")):
        answer = chat.send(text, prefill=prefill)
        assert chat.stats.reused_tokens == 0
        fresh = engine.generate(
            chat.messages[:-1], skip_plan=chat.skip_plan, **(options | {"prefill": prefill})
        )
        assert fresh["content"] == answer
