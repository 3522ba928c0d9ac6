"""data.py and corpus.py: what is read, what is refused, and where the prompt ends."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from firstlm.data import (
    IGNORE_INDEX,
    PromptAnswerCollator,
    answer_end,
    encode_dataset,
    encode_prompt,
    load_corpus,
    pad_prompts,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: what precedes a finished answer differs from the generation prompt.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama-2's: the template marks no end but the end of the sequence, and trims.
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ROWS = [
    {"id": "a", "prompt": "Name the capital of France.", "answer": "Paris"},
    {"id": "b", "prompt": "Count to three, slowly please.", "answer": "one two three"},
    {"id": "c", "prompt": "Hi", "answer": "Hello there, how are you?"},
]


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """A byte-level BPE with merges that could cross a boundary; texts start with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["prompt"] + row["answer"] for row in ROWS] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


@pytest.fixture
def make_tokenizer(byte_tokenizer):
    def make(chat_template: str | None = CHATML, eos: str | None = "</s>"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer, eos_token=eos)
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*turns: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(turns)
    return [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]


# --- loading: what is read


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.xz"])
def test_a_jsonl_path_is_read_compressed_or_not(tmp_path, ending):
    text = "".join(json.dumps(row) + "\n\n" for row in ROWS).encode()  # blank lines are no rows
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.xz": lzma.compress}[ending]
    path = tmp_path / f"mine{ending}"
    path.write_bytes(pack(text))
    loaded = load_corpus(path)
    assert loaded.to_list() == [row | {"task": "mine"} for row in ROWS]
    assert load_corpus(str(path), "train").to_list() == loaded.to_list()


def test_a_folder_holds_one_file_a_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "validation.jsonl", ROWS[:1])
    assert len(load_corpus(tmp_path)) == 3
    assert load_corpus(tmp_path, "validation")["task"][:] == [tmp_path.name]
    with pytest.raises(ValueError, match=r"no test\.jsonl.*'train\.jsonl', 'validation\.jsonl'"):
        load_corpus(tmp_path, "test")


def test_a_datasets_object_is_read_with_columns_of_any_name():
    dataset = datasets.Dataset.from_list(
        [{"question": "Why?", "reply": "Because.", "messages": None, "score": 3}]
    )
    loaded = load_corpus(dataset, prompt_column="question", answer_column="reply")
    assert loaded.to_list() == [
        {"id": "dataset/0", "task": "dataset", "prompt": "Why?", "answer": "Because."}
    ]
    splits = datasets.DatasetDict({"train": dataset, "dev": dataset})
    named = {"prompt_column": "question", "answer_column": "reply"}
    assert load_corpus(splits, "dev", **named).to_list() == loaded.to_list()
    with pytest.raises(ValueError, match=r"no split 'test'.*'train', 'dev'"):
        load_corpus(splits, "test", **named)


def test_a_chat_may_have_many_turns_and_only_its_last_answer_is_learned(make_tokenizer):
    messages = chat("Hi", "Hello!", "Name the capital of France.", "Paris")
    loaded = load_corpus(datasets.Dataset.from_list([{"conversation": messages}]),
                         messages_column="conversation")  # fmt: skip
    assert loaded[0]["messages"] == messages
    tokenizer = make_tokenizer()
    row = encode_dataset(loaded, tokenizer, 256)[0]
    learned = [label for label in row["labels"] if label != IGNORE_INDEX]
    assert tokenizer.decode(learned) == "Paris<|im_end|>"
    prompt = row["input_ids"][: sum(row["prompt_mask"])]
    assert "Hello!<|im_end|>" in tokenizer.decode(prompt)


def test_messages_are_read_where_both_kinds_are_present_unless_columns_are_named():
    both = datasets.Dataset.from_list(
        [{"prompt": "plain", "answer": "plain", "messages": chat("chat", "chat")}]
    )
    assert "messages" in load_corpus(both).column_names
    assert load_corpus(both, prompt_column="prompt")["prompt"][:] == ["plain"]
    with pytest.raises(ValueError, match="not both"):
        load_corpus(both, prompt_column="prompt", messages_column="messages")


def test_max_examples_keeps_the_first_ones_in_order(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", ROWS)
    assert load_corpus(path, max_examples=2)["id"][:] == ["a", "b"]
    assert len(load_corpus(path, max_examples=99)) == 3
    with pytest.raises(ValueError, match="at least 1, got 0"):
        load_corpus(path, max_examples=0)


# --- loading: what is refused


def test_missing_columns_are_named_beside_the_present_ones(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", [{"text": "x", "summary": "y"}])
    present = r"its columns are \['summary', 'text'\]"
    with pytest.raises(ValueError, match=rf"line 1 of .*lacks 'messages', or 'prompt'.*{present}"):
        load_corpus(path)
    with pytest.raises(ValueError, match=rf"lacks 'text' and 'answer'; {present}"):
        load_corpus(path, prompt_column="text")
    with pytest.raises(ValueError, match=rf"lacks 'turns'; {present}"):
        load_corpus(path, messages_column="turns")


@pytest.mark.parametrize("column", ["prompt", "answer"])
@pytest.mark.parametrize(("text", "complaint"), [("", "empty"), (" \n", "empty"), (7, "text")])
def test_an_empty_or_untextual_column_is_refused_with_its_line(tmp_path, column, text, complaint):
    path = write_jsonl(tmp_path / "mine.jsonl", [ROWS[0], ROWS[1] | {column: text}])
    with pytest.raises(ValueError, match=rf"line 2 of .*'{column}'.*{complaint}"):
        load_corpus(path)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (chat("only a question"), "two messages or more"),
        (chat("q", "a", "q"), "the assistant's, not the user's"),
        (chat("q", " "), "the answer is empty"),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], "'role' and a 'content'"),
        ([{"role": "user", "content": [1]}, chat("", "a")[1]], "only text messages"),
    ],
)
def test_a_chat_without_a_usable_answer_is_refused(tmp_path, messages, complaint):
    path = write_jsonl(tmp_path / "mine.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=f"line 1 of .*{complaint}"):
        load_corpus(path)


@pytest.mark.parametrize(
    ("line", "complaint"), [("{'prompt': 1}", "is not JSON"), ("[1, 2]", "is a list")]
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, complaint):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=f"line 3 of .*{complaint}"):
        load_corpus(path)


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz", "mine.jsonl.xz"])
def test_a_file_that_is_no_text_of_its_kind_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes('{"prompt": "é", "answer": "b"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name} (is not UTF-8|cannot be unpacked)"):
        load_corpus(path)


def test_unknown_sources_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'debian-synopsis'"):
        load_corpus("debian-synopsys")
    with pytest.raises(ValueError, match=r"should end in one of \.jsonl"):
        load_corpus(write_jsonl(tmp_path / "mine.json", ROWS))
    with pytest.raises(ValueError, match="holds no examples"):
        load_corpus(write_jsonl(tmp_path / "empty.jsonl", []))
    with pytest.raises(TypeError, match="not a IterableDataset; load it without streaming=True"):
        load_corpus(datasets.Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(ValueError, match="no split 'test', only 'train'"):
        load_corpus(write_jsonl(tmp_path / "mine.jsonl", ROWS), "test")


# --- mixtures


def test_a_mixture_takes_every_example_in_an_order_that_only_the_seed_decides(tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", [ROWS[0] | {"id": str(i)} for i in range(7)])
    second = write_jsonl(tmp_path / "second.jsonl", [ROWS[1] | {"id": str(i)} for i in range(5)])
    mixed = load_corpus([first, second], seed=3)
    assert mixed.to_list() == load_corpus([first, second], seed=3).to_list()
    assert mixed.to_list() != load_corpus([first, second], seed=4).to_list()
    expected = [("first", str(i)) for i in range(7)] + [("second", str(i)) for i in range(5)]
    pairs = list(zip(mixed["task"], mixed["id"], strict=True))
    assert sorted(pairs) == expected
    assert pairs != expected


@pytest.mark.parametrize(
    ("weights", "max_examples", "counts"),
    [
        ([1, 1], None, (5, 5)),
        ([2, 1], None, (7, 3)),  # 7 is all there is; 3.5 is rounded down
        ([1, 3], 4, (1, 3)),
        (None, 6, (4, 2)),  # in the proportion of the sizes
    ],
)
def test_weights_are_the_shares_of_a_mixture(tmp_path, weights, max_examples, counts):
    first = write_jsonl(tmp_path / "first.jsonl", [ROWS[0] | {"id": str(i)} for i in range(7)])
    second = write_jsonl(tmp_path / "second.jsonl", [ROWS[1] | {"id": str(i)} for i in range(5)])
    mixed = load_corpus([first, second], weights=weights, max_examples=max_examples)
    assert (mixed["task"][:].count("first"), mixed["task"][:].count("second")) == counts
    taken = sorted(row["id"] for row in mixed if row["task"] == "first")
    assert taken == [str(i) for i in range(counts[0])], "the first of each source"


def test_unusable_weights_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", ROWS)
    for weights in ([1], [1, 0], [1, -1], [1, 1, 1]):
        with pytest.raises(ValueError, match="2 sources need as many positive weights"):
            load_corpus([path, path], weights=weights)
    with pytest.raises(ValueError, match="give a list"):
        load_corpus(path, weights=[1])
    with pytest.raises(ValueError, match="at least one source"):
        load_corpus([])


def test_a_mixture_of_chats_and_plain_prompts_encodes_both_alike(tmp_path, make_tokenizer):
    plain = write_jsonl(tmp_path / "plain.jsonl", ROWS[:1])
    chats = datasets.Dataset.from_list(
        [{"turns": chat(ROWS[0]["prompt"], ROWS[0]["answer"]), "id": "a", "task": "chats"}]
    )
    mixed = load_corpus([plain, load_corpus(chats, messages_column="turns")])
    assert sorted(mixed["task"]) == ["chats", "plain"], "what was loaded before keeps its name"
    encoded = encode_dataset(mixed, make_tokenizer(), 256)
    assert encoded[0] == encoded[1]


# --- encoding


@pytest.mark.parametrize("template", [CHATML, THINKING, INSTRUCT, NO_END, None])
def test_prompt_tokens_are_what_generate_sees_and_the_answer_follows_untouched(
    make_tokenizer, template
):
    tokenizer = make_tokenizer(template)
    dataset = load_corpus(datasets.Dataset.from_list(ROWS))
    encoded = encode_dataset(dataset, tokenizer, 256)
    for example, row in zip(ROWS, (encoded[i] for i in range(3)), strict=True):
        if template is None:
            prompt = tokenizer(example["prompt"])["input_ids"]
        else:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": example["prompt"]}],
                add_generation_prompt=True,
                return_dict=False,
            )
        answer = tokenizer(example["answer"], add_special_tokens=False)["input_ids"]
        n, end = len(prompt), len(prompt) + len(answer)
        assert row["input_ids"][:n] == prompt
        assert row["input_ids"][n:end] == answer
        assert tokenizer.decode(answer) == example["answer"], "no start token inside the row"
        assert row["input_ids"][end:] == answer_end(tokenizer)
        assert row["labels"] == [IGNORE_INDEX] * n + row["input_ids"][n:]
        assert row["prompt_mask"] == [1] * n + [0] * (len(row["input_ids"]) - n)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (THINKING, "<|im_end|>"),
        (INSTRUCT, "</s>"),
        (NO_END, "</s>"),
        (None, "</s>"),
    ],
)
def test_an_answer_ends_as_the_template_ends_a_turn(make_tokenizer, template, end):
    tokenizer = make_tokenizer(template)
    assert tokenizer.convert_ids_to_tokens(answer_end(tokenizer)) == [end]


def test_a_tokenizer_that_cannot_end_an_answer_is_refused(make_tokenizer):
    with pytest.raises(ValueError, match="no eos_token"):
        answer_end(make_tokenizer(None, eos=None))


def test_a_chat_of_many_turns_needs_a_template(make_tokenizer):
    with pytest.raises(ValueError, match="3 messages needs a chat template"):
        encode_prompt(chat("a", "b", "c"), make_tokenizer(None))
    assert encode_prompt(chat("a"), make_tokenizer(None)) == encode_prompt(
        "a", make_tokenizer(None)
    )


def test_too_long_examples_are_left_out_counted_and_reported_but_never_cut(make_tokenizer, caplog):
    tokenizer = make_tokenizer()
    dataset = load_corpus(datasets.Dataset.from_list(ROWS))
    lengths = [len(row["input_ids"]) for row in encode_dataset(dataset, tokenizer, 256)]
    limit = sorted(lengths)[1]  # the longest of the three does not fit by a token or more
    with caplog.at_level(logging.WARNING):
        encoded = encode_dataset(dataset, tokenizer, limit)
    dropped = ROWS[lengths.index(max(lengths))]["id"]
    assert len(encoded) == 2
    assert encoded.too_long == [dropped]
    assert encoded.ids == [row["id"] for row in ROWS if row["id"] != dropped]
    assert sorted(len(row["input_ids"]) for row in encoded) == sorted(lengths)[:2]
    assert f"2 of 3 examples; 1 left out, longer than {limit} tokens" in caplog.text
    with pytest.raises(ValueError, match="no example fits max_length=3: 0 of 3"):
        encode_dataset(dataset, tokenizer, 3)


# --- batches


@pytest.mark.parametrize(("multiple", "length"), [(1, 6), (4, 8)])
def test_the_collator_pads_on_the_right(make_tokenizer, multiple, length):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, 6, 7], "prompt_mask": [1, 0, 0]},
        {"input_ids": [9] * 6, "labels": [IGNORE_INDEX] * 5 + [9], "prompt_mask": [1] * 5 + [0]},
    ]
    tokenizer = make_tokenizer()
    batch = PromptAnswerCollator(tokenizer, pad_to_multiple_of=multiple)(rows)
    pad = length - 3
    assert batch["input_ids"][0].tolist() == [5, 6, 7] + [tokenizer.eos_token_id] * pad
    assert batch["attention_mask"].sum(1).tolist() == [3, 6]
    assert batch["labels"][0].tolist() == [IGNORE_INDEX, 6, 7] + [IGNORE_INDEX] * pad
    assert batch["prompt_mask"].dtype == torch.bool
    assert batch["prompt_mask"].sum(1).tolist() == [1, 5]
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, length)}


def test_generate_takes_a_prompt_batch_and_padding_changes_nothing(make_tokenizer):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=tokenizer.eos_token_id,
        )
    ).double()  # rounding decides no token
    prompts = [encode_prompt(row["prompt"], tokenizer) for row in ROWS]
    padded = pad_prompts(prompts, tokenizer)
    together = model.generate(**padded, max_new_tokens=4, do_sample=False)
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(
            **pad_prompts([prompt], tokenizer), max_new_tokens=4, do_sample=False
        )
        assert row[padded["input_ids"].shape[1] :].tolist() == alone[0, len(prompt) :].tolist()


def test_the_example_of_the_documentation_runs_as_written(make_tokenizer, capsys):
    text = (Path(__file__).parent.parent / "docs" / "corpora.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    names = {"tokenizer": make_tokenizer()}
    exec(code, names)
    assert names["mixture"]["task"][:].count("debian-en-de") == 1000
    assert names["batch"]["input_ids"].shape[0] == 2
    assert " of 6,000 examples; " in capsys.readouterr().out
