"""`firstlm bench perplexity`: every runtime scores the same tokens, the ratios are of the same."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from firstlm import bench_models, bench_perplexity, bench_tables, cli, figures
from firstlm.bench_perplexity import HfScorer, LlamaCppScorer, NativeScorer, log_probabilities
from firstlm.bench_text import Window, windows
from tiny_gguf import tiny_model_folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("bench"), layers=3)


@pytest.fixture(scope="module")
def bench_model(model_folder, tmp_path_factory):
    return bench_models.load(str(model_folder), tmp_path_factory.mktemp("gguf"))


def test_windows_are_chats_of_the_test_split(bench_model):
    found = windows("debian-synopsis", bench_model.tokenizer, length=300, count=4)
    assert [len(window.tokens) for window in found] == [300] * 4
    text = bench_model.tokenizer.decode([t for window in found for t in window.tokens])
    assert text.startswith("<|im_start|>user\n")
    flags = [flag for window in found for flag in window.is_answer]
    answers = [t for w in found for t, a in zip(w.tokens, w.is_answer, strict=True) if a]
    assert 0 < sum(flags) < len(flags)
    first = text.split("<|im_start|>assistant\n")[1].split("<|im_end|>")[0]
    assert bench_model.tokenizer.decode(answers).startswith(first + "<|im_end|>")
    with pytest.raises(ValueError, match="windows of 1000000 need more"):
        windows("debian-synopsis", bench_model.tokenizer, length=10**6, count=100)


def test_log_probabilities_are_of_the_next_token():
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * 5
    tokens = [3, 1, 4, 1, 5, 9, 2]
    expected = logits.double().log_softmax(-1)[torch.arange(6), tokens[1:]]
    torch.testing.assert_close(log_probabilities(logits, tokens), expected)


def test_runtimes_agree_in_float32(bench_model, tmp_path, monkeypatch):
    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path))  # of packed weights
    [window] = windows("debian-en-de", bench_model.tokenizer, length=60, count=1)
    expected = HfScorer(bench_model.hf).score(window.tokens)
    assert expected.shape == (59,) and (expected < 0).all()
    found = NativeScorer(bench_model, "float32", 1).score(window.tokens)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    pytest.importorskip("llama_cpp")
    scorer = LlamaCppScorer(bench_model.gguf(["f32"])["f32"], "f32", 1, 60)
    for _ in range(2):  # the second window does not see the first
        torch.testing.assert_close(scorer.score(window.tokens), expected, atol=0.02, rtol=0.01)


def test_ratios_are_of_means_over_the_same_tokens():
    found = [Window([0] * 4, [False, False, True, True]), Window([0] * 4, [False] * 4)]
    reference = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -2.0])]
    scores = [row - 0.5 for row in reference]
    row = bench_perplexity._row(found, scores, reference)
    assert row["perplexity"] == pytest.approx(math.exp(2.5))
    assert row["ratio"] == pytest.approx(math.exp(0.5)) and row["ratio_error"] == pytest.approx(0)
    assert row["tokens"] == 6 and row["answer_tokens"] == 2
    assert row["answer_perplexity"] == pytest.approx(math.exp(3.0))
    assert row["answer_ratio"] == pytest.approx(math.exp(0.5))
    alone = bench_perplexity._row(found[1:], scores[1:], reference[1:])
    assert alone["answer_perplexity"] is None and alone["ratio_error"] is None


def test_bars_are_for_our_engine():
    def row(runtime, precision, ratio):
        return {"runtime": runtime, "precision": precision, "corpus": "c", "ratio": ratio}

    rows = [row("firstlm", "int8", 1.02), row("firstlm", "int4", 1.02), row("llama.cpp", "q8_0", 9)]
    rows.append(row("firstlm", "int4", 0.7))  # another model, not a better one
    assert [bar["met"] for bar in bench_perplexity.bars(rows)] == [False, True, False]


@pytest.mark.parametrize("against", ["hf", "hf,llama.cpp"])
def test_the_command_prints_and_writes(against, model_folder, tmp_path, monkeypatch, capsys):
    if "llama.cpp" in against:
        pytest.importorskip("llama_cpp")
    path = tmp_path / "perplexity.json"
    options = ["perplexity", "-c", model_folder, "--against", against, "--no-native", "--quick"]
    options += ["--precision", "f32,int8", "--work-dir", tmp_path, "--json", "-o", path]
    monkeypatch.setattr(sys, "argv", ["firstlm", "bench", *map(str, options)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    captured = capsys.readouterr()
    assert not exit.value.code, captured.err
    found = figures.read(path)
    assert json.loads(captured.out) == found
    kinds = ["f32", "q8_0"] if "llama.cpp" in against else []
    assert [row["precision"] for row in found["rows"]] == [
        kind for kind in ("float32", "bfloat16", *kinds) for _ in range(2)
    ]
    reference = found["rows"][0]
    assert reference["ratio"] == 1 and reference["bits_per_weight"] == 32
    assert all(row["ratio"] == pytest.approx(1, abs=0.2) for row in found["rows"])
    assert "**debian-en-de**" in bench_tables.tables(found)
    assert "bits/weight" in bench_perplexity.as_text(found)
