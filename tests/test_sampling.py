"""The engine's sampler: transformers' probabilities, and draws that follow them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from firstlm import Engine, native
from tiny_models import NUM_LAYERS, VOCAB_SIZE, base_model, prompts


def transformers_probabilities(logits: torch.Tensor, options: dict, seen: list[int]):
    """What transformers would draw from, f32 [V]; its processors run in f64."""
    scores, ids = logits.double()[None], torch.tensor([seen], dtype=torch.long)
    processors = []
    if options["repetition_penalty"] != 1 and seen:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    processors.append(TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"]:
        processors.append(TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        processors.append(TopPLogitsWarper(options["top_p"]))
    if options["min_p"] > 0:
        processors.append(MinPLogitsWarper(options["min_p"]))
    for processor in processors:
        scores = processor(ids, scores)
    return scores.softmax(-1)[0].float()


@given(
    vocab_size=st.sampled_from([1, 2, 7, 101, 1000, 5000]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.5, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 50, 10000]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3, 4.0]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=300)
def test_probabilities_are_transformers(vocab_size, spread, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab_size, generator=generator) * spread
    seen = torch.randint(vocab_size, (seed % 9,), generator=generator).tolist()
    expected = transformers_probabilities(logits, options, seen)
    found = native.probabilities(logits, options, seen)
    dropped = (found == 0) != (expected == 0)
    likely = dropped & (found + expected > 1e-6)
    if likely.any():  # a token at the edge of a cut, where f64 and f32 may round apart
        assert likely.sum() == 1 and (found + expected)[likely] < 1e-3
        return
    # A float32 logit is off by eps times its size, and its probability by as much, relatively.
    penalty = options["repetition_penalty"]
    largest = logits.abs().max().item() * max(penalty, 1 / penalty) / options["temperature"]
    rtol = 2 * torch.finfo(torch.float32).eps * largest
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=rtol)


@pytest.mark.parametrize("options", [{}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_draws_follow_the_probabilities(options):
    """Chi-square of the first tokens of answers with seeds of their own."""
    model = base_model("llama", torch.float32)
    decoder = Engine.from_model(model, "float32").core.decoder
    row, draws = prompts([9])[0].tolist(), 4000
    sequence = decoder.sequence()
    keep = torch.ones(1, NUM_LAYERS, dtype=torch.bool)
    logits, _ = decoder.extend([sequence], [row], keep, None, [1])
    settings = [{"temperature": 1.5, "seed": seed, **options} for seed in range(draws)]
    sequences = [sequence.copy() for _ in settings]
    nothing = [[]] * draws
    rows = logits.repeat(draws, 1)
    found = decoder.decoding(sequences, rows, settings, nothing, [], [1] * draws).advance(1)
    counts = torch.bincount(torch.tensor(found)[:, 0], minlength=VOCAB_SIZE).float()
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0, -1].float()
    whole = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    expected = transformers_probabilities(logits, whole | options, []) * draws
    assert not counts[expected == 0].any()
    often = expected >= 5  # the others are counted together
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 5
