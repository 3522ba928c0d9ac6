"""Text of the engine: the tokenizer without transformers, pieces of text, stops, prompts."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from firstlm.engine.answers import Answer
from firstlm.engine.chat_template import render
from firstlm.engine.prompts import Prompts
from firstlm.engine.settings import generation_defaults, settings_of
from firstlm.engine.text import EngineTokenizer, StopStrings, TextStream
from tiny_tokenizer import tiny_tokenizer

TEMPLATES = [
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{% generation %}assistant: {% endgeneration %}{% endif %}",
    "{{ bos_token }}{%- set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}\n    {{- '<' ~ ns.n ~ '>' + m['content'] | tojson }}\n"
    "    {%- if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ strftime_now('%Y') }}{{ messages[-1]['content'] }}{% if tools %}tools{% endif %}",
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, so that most characters of a text have several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece: a word begins with a space, which the first one of a text loses."""
    words = ["<s>", "</s>", "<unk>", "▁a", "▁b", "c", "▁", "é"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = [byte_tokenizer, metaspace_tokenizer, tiny_tokenizer]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_the_pieces_of_a_text_are_the_text(make):
    hf = make()
    tokenizer = EngineTokenizer.of(hf)
    generator = random.Random(0)
    for _ in range(100):
        ids = [generator.randrange(len(hf)) for _ in range(generator.randrange(30))]
        stream = TextStream(tokenizer)
        pieces = [stream.push([token]) for token in ids]
        assert "".join(pieces) + stream.finish() == hf.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=20), st.integers(1, 5))
@settings(max_examples=50)
def test_no_piece_ends_within_a_character(text, size):
    hf = byte_tokenizer()
    ids = hf(text)["input_ids"]
    stream = TextStream(EngineTokenizer.of(hf))
    pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) + stream.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(1, 4),
)
def test_text_ends_before_the_first_stop(text, stops, size):
    found = StopStrings(stops)
    pieces = []
    for start in range(0, len(text), size):
        pieces.append(found.push(text[start : start + size]))
        if found.found:
            text = text[: start + size]  # what comes later has not been said yet
            break
    places = [text.find(stop) for stop in stops if stop in text]
    assert found.found == bool(places)
    assert "".join(pieces) + found.finish() == text[: min(places, default=len(text))]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_say_what_transformers_makes_them_say(template):
    hf = byte_tokenizer()
    hf.chat_template = template
    tokenizer = EngineTokenizer.of(hf)
    messages = [
        {"role": role, "content": content}
        for role, content in [("user", " <ä> \n"), ("assistant", "{{ x }}"), ("user", "é")] * 2
    ]
    for count in range(1, 5):
        for prompt in (False, True):
            expected = hf.apply_chat_template(
                messages[:count], add_generation_prompt=prompt, return_dict=False
            )
            found = tokenizer.apply_chat_template(messages[:count], add_generation_prompt=prompt)
            assert found == expected


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (TEMPLATES[2], "no system"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "__init__"),
        ("{{ messages.append(1) }}", "not safely callable|sandbox|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_templates_may_refuse_and_do_not_leave_the_sandbox(template, error):
    with pytest.raises(ValueError, match=error):
        render(template, [{"role": "system", "content": "a"}], True, {})
    with pytest.raises(TypeError, match="takes texts"):
        render(template, [{"role": "user", "content": ["a"]}], True, {})


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path):
    hf = tiny_tokenizer()
    EngineTokenizer.of(hf).save(tmp_path)
    loaded = EngineTokenizer.load(tmp_path)
    messages = [{"role": "user", "content": "a b <end>"}]
    assert loaded("a b c") == {"input_ids": hf("a b c")["input_ids"]}
    assert loaded.apply_chat_template(messages) == hf.apply_chat_template(
        messages, return_dict=False
    )
    assert loaded.decode([8, 2, 9]) == hf.decode([8, 2, 9], skip_special_tokens=True)
    assert EngineTokenizer.load(tmp_path / "none") is None
    assert EngineTokenizer.of(object()) is None


def test_special_texts_stop_as_tokens_and_others_as_texts():
    tokenizer = EngineTokenizer.of(tiny_tokenizer())
    options = {"max_new_tokens": 1, "seed": 0, "ignore_eos": False}
    found = settings_of(
        {"eos_token_id": [7]}, tokenizer, 2, 16, stop=["<end>", "say", 9], **options
    )
    assert (found.end_tokens, found.stop_strings) == ([2, 7, 9], ["say"])
    assert [found.of_row(row)["seed"] for row in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="no tokenizer"):
        settings_of({}, None, 1, 16, stop="a", **options)
    for stop in ("", [""], [True], 0.5):
        with pytest.raises(TypeError, match="stop takes"):
            settings_of({}, tokenizer, 1, 16, stop=stop, **options)


def test_what_a_model_samples_by_default_is_followed_if_it_samples():
    options = {"max_new_tokens": 1, "seed": 0, "ignore_eos": False, "stop": None}
    defaults = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    greedy = settings_of(defaults, None, 1, 16, **options).sampling
    assert (greedy["temperature"], greedy["repetition_penalty"]) == (0.0, 1.1)
    sampled = settings_of(defaults | {"do_sample": True}, None, 1, 16, top_k=0, **options).sampling
    assert (sampled["temperature"], sampled["top_k"], sampled["top_p"]) == (0.7, 0, 1.0)
    assert settings_of({}, None, 1, 16, temperature=1.0, **options).sampling["top_k"] == 50
    assert settings_of({"top_k": 7}, None, 1, 16, temperature=1.0, **options).sampling["top_k"] == 7
    assert settings_of({}, None, 1, 16, **options).sampling["top_k"] == 0  # greedy


def test_what_of_a_generation_config_the_engine_does_not_know_is_warned_of():
    known = GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=[3], num_beams=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generation_defaults(known) == {
            "do_sample": True, "temperature": 0.5, "eos_token_id": [3],
        }  # fmt: skip
    with pytest.warns(UserWarning, match=r"no_repeat_ngram_size=3, suppress_tokens=\[5\]"):
        generation_defaults(GenerationConfig(no_repeat_ngram_size=3, suppress_tokens=[5]))


def test_prompts_are_told_apart():
    message = {"role": "user", "content": "a"}
    for value, kind in (("a", "text"), ([message], "chat"), ([1, 2], "ids")):
        one, many = Prompts.of(value), Prompts.of([value, value])
        assert (one.kind, one.single, one.values) == (kind, True, [value])
        assert (many.kind, many.single, many.values) == (kind, False, [value, value])
    rows = [[1, 2], [3, 4]]
    for array in (torch.tensor(rows), np.array(rows)):
        assert Prompts.of(array) == Prompts.of(list(array)) == Prompts("ids", False, rows)
    for value in (7, None, {"role": "user"}, [["a", 1]], [[1], "a"], [1.5]):
        with pytest.raises(TypeError, match="prompts takes"):
            Prompts.of(value)


def test_a_stop_that_is_complete_only_when_the_answer_ends_is_the_reason():
    """The limit cuts a character in two, and the half of it is what was waited for."""
    tokenizer = EngineTokenizer.of(byte_tokenizer())
    half = tokenizer("é")["input_ids"][0]
    options = {"max_new_tokens": 2, "seed": 0, "ignore_eos": False, "stop": "\ufffd"}
    settings = settings_of({}, tokenizer, 1, 16, **options)
    answer = Answer(tokenizer, settings, limit=2)
    answer.push([tokenizer("a")["input_ids"][0], half])
    assert (answer.text(), answer.finish_reason) == ("a", "stop")
