"""losses.py: sums over a micro-batch, against the formulas written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from firstlm.losses import (
    answer_cross_entropy,
    answer_positions,
    distillation,
    router_norm,
)
from tiny_models import routed_model
from tiny_training import COLLATOR, examples

LABELS = torch.tensor(
    [
        [-100, -100, 5, 6, -100, -100],
        [-100, -100, -100, -100, 7, -100],
        [-100, 3, -100, -100, -100, -100],
    ]
)


def test_positions_are_those_before_an_answer_token_in_any_row():
    assert answer_positions(LABELS).tolist() == [0, 1, 2, 3]
    assert answer_positions(LABELS[1:2]).tolist() == [3]
    assert answer_positions(torch.full((2, 5), -100)).tolist() == []
    # the first token is never predicted
    assert answer_positions(torch.tensor([[9, -100, -100]])).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy_is_the_negative_log_probability_summed_over_answer_tokens(dtype):
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 11, dtype=dtype)
    positions = answer_positions(LABELS)
    sums, tokens = answer_cross_entropy(logits[:, positions], LABELS, positions)
    assert tokens.tolist() == [2, 1, 1]
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row in range(3):
        expected = sum(
            -math.log(torch.softmax(logits[row, t].double(), 0)[LABELS[row, t + 1]].item())
            for t in range(5)
            if LABELS[row, t + 1] != -100
        )
        assert sums[row].item() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_equals_that_of_the_model_itself():
    model = routed_model("llama", torch.float64)
    batch = COLLATOR(examples(5))
    labels = batch["labels"]
    positions = answer_positions(labels)
    whole = model(**batch, use_cache=False, gate="soft")
    batch.pop("labels")
    part = model(**batch, use_cache=False, gate="soft", logits_to_keep=positions)
    sums, tokens = answer_cross_entropy(part.logits, labels, positions)
    torch.testing.assert_close(sums.sum() / tokens.sum(), whole.loss, check_dtype=False)


def test_distillation_is_the_kl_from_teacher_to_student_and_zero_for_equal_logits():
    torch.manual_seed(1)
    student = torch.randn(3, 6, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 6, 7, dtype=torch.float64, requires_grad=True)
    positions = answer_positions(LABELS)
    value = distillation(
        student[:, positions], teacher[:, positions], LABELS, positions, temperature=2.0
    )
    expected = 0.0
    for row in range(3):
        for t in range(5):
            if LABELS[row, t + 1] != -100:
                p = torch.softmax(teacher[row, t] / 2, 0)
                q = torch.softmax(student[row, t] / 2, 0)
                expected += (p * (p / q).log()).sum().item() * 4
    assert value.item() == pytest.approx(expected, rel=1e-10)
    value.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    same = distillation(teacher[:, positions], teacher[:, positions], LABELS, positions)
    assert same.item() == pytest.approx(0.0, abs=1e-12)


def test_router_norm_counts_weights_and_leaves_biases_alone():
    parameters = {
        "weight": torch.tensor([[3.0, 4.0]]),
        "bias": torch.tensor([100.0]),
        "out_weight": torch.tensor([[2.0]]),
        "out_bias": torch.tensor([100.0]),
    }
    assert router_norm(parameters.items()).item() == 29.0
    assert router_norm([]).item() == 0.0


def test_cross_entropy_alone_gives_every_router_a_gradient():
    """The paper's equation as printed cancels the gate; ours must not."""
    for gate in ("soft", "straight_through"):
        model = routed_model("llama", torch.float64)
        batch = COLLATOR(examples(6))
        labels = batch.pop("labels")
        positions = answer_positions(labels)
        output = model(**batch, use_cache=False, gate=gate, logits_to_keep=positions)
        answer_cross_entropy(output.logits, labels, positions)[0].sum().backward()
        for index, layer in enumerate(model.decoder_layers):
            if index != 0:  # protected
                for name, parameter in layer.router.named_parameters():
                    assert parameter.grad.abs().max() > 0, (gate, index, name)
