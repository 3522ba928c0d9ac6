"""Gates, prompt masks and losses of one routed pass."""

from __future__ import annotations

import collections
import re
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

import firstlm
from firstlm import RouterConfig, SkipPlan
from firstlm.prompt import default_prompt_mask, position_ids_of
from tiny_models import (
    NUM_LAYERS,
    assert_adaptive,
    base_model,
    pad,
    prompts,
    routed_model,
    tiny_base_path,
)

LENGTHS = [13, 5, 9, 11]


def training_batch(side="right"):
    """Prompts with answers of 4 tokens: input_ids, attention_mask, labels."""
    batch = pad(prompts(LENGTHS), side)
    labels = torch.full_like(batch["input_ids"], -100)
    for b, mask in enumerate(batch["attention_mask"]):
        last = torch.nonzero(mask).flatten()[-4:]
        labels[b, last] = batch["input_ids"][b, last]
    return batch | {"labels": labels}


def open_model(**config):
    """A model without protected layers, routers drawn, ready for gradients."""
    model = routed_model("llama", router=RouterConfig(protected=[], **config))
    return model.requires_grad_(True)


@pytest.mark.parametrize("gate", ["soft", "straight_through"])
@pytest.mark.parametrize("prefill", ["route", "full"])
def test_cross_entropy_alone_gives_every_router_a_gradient(gate, prefill):
    model = open_model(prefill=prefill)
    model(**training_batch(), gate=gate).loss.backward()
    for layer in model.decoder_layers:
        assert all(p.grad is not None and p.grad.any() for p in layer.router.parameters())


@pytest.mark.parametrize("pooling", ["mean", "windowed_mean", "last"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_every_router_shape_trains_and_plans(pooling, head):
    windows = 3 if pooling == "windowed_mean" else 1
    model = open_model(pooling=pooling, windows=windows, head=head, bottleneck=5)
    out = model(**training_batch(), gate="soft")
    (out.loss + out.skip_loss).backward()
    assert all(p.grad is not None for p in model.router_parameters())
    assert_adaptive(model.plan(**pad(prompts(LENGTHS))).skip_plans)


def test_a_hard_gate_computes_what_inference_computes():
    model = open_model()
    batch = training_batch()
    hard = model(**batch, gate="hard")
    blended = model(**batch, gate="hard", compute_skipped=True)
    inference = model(**batch)
    assert torch.equal(hard.logits, inference.logits)
    torch.testing.assert_close(blended.logits, hard.logits)
    assert torch.equal(hard.keep_mask, blended.keep_mask)
    assert_adaptive(hard.skip_plans)


def test_hard_gated_rows_are_really_skipped_in_training():
    model = open_model()
    with model.count_layer_calls() as calls:
        out = model(**training_batch(), gate="hard")
        out.loss.backward()
    assert calls.prefill.tolist() == out.keep_mask.sum(0).tolist()
    with model.count_layer_calls() as calls:
        model(**training_batch(), gate="hard", compute_skipped=True)
    assert calls.prefill.tolist() == [len(LENGTHS)] * NUM_LAYERS


def test_gradients_of_skipped_and_blended_rows_agree():
    batch, gradients = training_batch(), []
    for compute_skipped in (False, True):
        model = open_model()
        model(**batch, gate="hard", compute_skipped=compute_skipped).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if ".router." not in n})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        torch.testing.assert_close(torch.zeros_like(other) if gradient is None else gradient, other)


def test_straight_through_has_hard_values_and_soft_gradients():
    model = open_model()
    batch = training_batch()
    through = model(**batch, gate="straight_through")
    hard = model(**batch, gate="hard")
    torch.testing.assert_close(through.loss, hard.loss)
    assert through.skip_loss.item() == pytest.approx(through.keep_mask.double().mean().item())
    through.skip_loss.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if n.endswith("router.bias"))


@pytest.mark.parametrize("gate", ["soft", "straight_through", "hard"])
def test_the_skip_loss_is_linear_in_every_sequence(gate):
    model = open_model()
    batch = training_batch()
    together = model(**batch, gate=gate).skip_loss * len(LENGTHS)
    rows = [{name: value[b : b + 1] for name, value in batch.items()} for b in range(len(LENGTHS))]
    alone = [model(**row, gate=gate).skip_loss for row in rows]
    torch.testing.assert_close(together, sum(alone))
    kept = routed_model("llama", router=RouterConfig(protected=list(range(NUM_LAYERS))), draw=False)
    assert kept(**batch, gate=gate).skip_loss == 1


@pytest.mark.parametrize("gate", ["soft", "straight_through"])
def test_the_skip_loss_pulls_at_the_probabilities_of_unprotected_layers(gate):
    model = routed_model("llama", router=RouterConfig(protected=[0])).requires_grad_(True)
    routers = [p for layer in model.decoder_layers[1:] for p in layer.router.parameters()]
    out = model(**training_batch(), gate=gate)
    expected = torch.autograd.grad(
        out.keep_prob[:, 1:].sum() / out.keep_prob.numel(), routers, retain_graph=True
    )
    actual = torch.autograd.grad(out.skip_loss, routers)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_soft_gate_is_the_printed_equation():
    """One layer, by hand: h + g (f(h) - h)."""
    model = open_model()
    base = base_model("llama")
    ids = prompts([7])[0][None]
    seen = {}

    def keep_input(module, args, kwargs):
        seen["h"] = args[0]

    def keep_output(module, args, kwargs, output):
        seen["gated"] = output

    layer = model.decoder_layers[2]
    layer.register_forward_pre_hook(keep_input, with_kwargs=True)
    layer.register_forward_hook(keep_output, with_kwargs=True)
    out = model(input_ids=ids, gate="soft")
    h = seen["h"]
    positions = torch.arange(7)[None]
    update = base.model.layers[2](
        h, position_embeddings=base.model.rotary_emb(h, position_ids=positions)
    )
    expected = h + out.keep_prob[0, 2] * (update - h)
    torch.testing.assert_close(seen["gated"], expected)


def test_prefill_full_gates_answer_tokens_only():
    model = open_model(prefill="full")
    batch = training_batch()
    plan = [SkipPlan((0, 2), NUM_LAYERS)] * len(LENGTHS)
    with torch.no_grad():
        gated, base = (
            model(**batch, skip_plan=plan).logits,
            base_model("llama")(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits,
        )
    prompt = default_prompt_mask(batch["input_ids"], batch["attention_mask"], batch["labels"])
    answer = batch["labels"] != -100
    assert torch.equal(gated[prompt], base[prompt])
    assert (gated[answer] - base[answer]).abs().max() > 1e-3


def test_the_gate_of_training_matches_decoding_with_prefill_full():
    """Teacher-forced logits of the answer equal those of cached decoding, whatever the prefill."""
    for prefill in ("route", "full"):
        model = routed_model("llama", router=RouterConfig(protected=[0], prefill=prefill))
        out = model.generate(
            prompts([9])[0][None],
            max_new_tokens=6,
            min_new_tokens=6,
            return_dict_in_generate=True,
            output_logits=True,
        )
        labels = out.sequences.clone()
        labels[:, :9] = -100
        with torch.no_grad():
            forced = model(input_ids=out.sequences, labels=labels)
        assert forced.skip_plans == out.skip_plans
        torch.testing.assert_close(forced.logits[0, 8:-1], torch.stack(out.logits, 1)[0].double())


def test_routers_read_the_prompt_and_never_the_answer():
    model = routed_model("llama")
    batch = training_batch()
    first = model(**batch).keep_prob
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    answer = batch["labels"] != -100
    changed["input_ids"][answer] = 3
    assert torch.equal(model(**changed).keep_prob, first)


def test_the_default_prompt_is_what_precedes_the_first_label():
    ids = torch.arange(6)[None]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, 7, -100, 7]])
    assert default_prompt_mask(ids, mask, labels).tolist() == [[False, True, True] + [False] * 3]
    assert default_prompt_mask(ids, mask, None).tolist() == [[False] + [True] * 5]
    assert default_prompt_mask(ids, None, None).all()
    with pytest.raises(ValueError, match="pass prompt_mask"):
        default_prompt_mask(ids, torch.ones(1, 1, 6, 6), None)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = open_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        out = model(**training_batch(), gate="straight_through", use_cache=False)
        (out.loss + out.skip_loss).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_reentrant_checkpointing_of_gates_that_learn_is_refused():
    model = open_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match='"use_reentrant": False'):
        model(**training_batch(), gate="soft", use_cache=False)
    out = model(**training_batch(), gate="hard", use_cache=False)  # learns through the layers alone
    assert out.loss.requires_grad


def test_labels_that_leave_no_prompt_are_refused():
    model = routed_model("llama")
    batch = pad(prompts(LENGTHS), "right")
    mask = batch["attention_mask"]
    batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
    with pytest.raises(ValueError, match="leave sequence 0 no prompt"):
        model(**batch)
    read = model(**batch, prompt_mask=mask.bool())
    assert read.skip_plans == model.plan(batch["input_ids"], mask).skip_plans
    model(**batch, skip_plan=SkipPlan.full(NUM_LAYERS))
    padding = {name: torch.zeros_like(value[:1]) for name, value in batch.items()}
    padding["labels"] -= 100
    model(**padding)  # fills up a batch, has no tokens to read


def test_packed_documents_are_refused():
    model = routed_model("llama")
    ids = torch.cat(prompts([7, 5]))[None]
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with pytest.raises(ValueError, match="a row of its own"):
        model(ids, position_ids=positions)
    model(ids, position_ids=positions, skip_plan=SkipPlan.full(NUM_LAYERS))
    for side in ("left", "right"):
        batch = pad(prompts(LENGTHS), side)
        model(**batch, position_ids=position_ids_of(batch["attention_mask"]))


class OpCounter(TorchDispatchMode):
    """Counts the calls of firstlm's ops by name."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.removeprefix("firstlm::")] += 1
        return func(*args, **(kwargs or {}))


def interleaved_plans():
    """bool [B, L]: some rows skip each layer."""
    mask = torch.rand(len(LENGTHS), NUM_LAYERS, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[:, 0], mask[0] = True, True
    mask[1, 1:] = torch.tensor([False, True, False, False, False])
    return mask


@torch.no_grad()
def test_states_are_overwritten_only_where_nobody_else_sees_them():
    model, batch, mask = routed_model("llama"), pad(prompts(LENGTHS)), interleaved_plans()
    partial = int(((mask.sum(0) > 0) & (mask.sum(0) < len(LENGTHS))).sum())
    assert partial > 2

    def run(**options):
        with OpCounter() as counter:
            out = model(**batch, skip_plan=mask, **options)
        assert counter.calls["scatter_rows"] + counter.calls["scatter_rows_"] == partial
        return out, counter.calls["scatter_rows_"]

    plain, in_place = run()
    assert in_place == partial - 1  # the first copy is of the embeddings

    out, in_place = run(output_hidden_states=True)
    assert in_place == 0
    for layer in range(NUM_LAYERS - 1):  # the last of these states is normalised
        before, after = out.hidden_states[layer], out.hidden_states[layer + 1]
        unchanged = (before == after).flatten(1).all(1)
        assert torch.equal(unchanged, ~mask[:, layer])
    assert torch.equal(out.logits, plain.logits)


@torch.no_grad()
@pytest.mark.parametrize("where", ["layer", "layer input", "router", "all modules"])
def test_states_that_a_hook_keeps_stay_what_they_were(where):
    model, batch, mask = routed_model("llama"), pad(prompts(LENGTHS)), interleaved_plans()
    kept = []

    def keep(module, args, output=None):
        for tensor in (*args, output):
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                kept.append((tensor, tensor.clone()))

    layer = model.decoder_layers[2]
    handle = {
        "layer": lambda: layer.register_forward_hook(keep),
        "layer input": lambda: layer.register_forward_pre_hook(keep),
        "router": lambda: layer.router.register_forward_pre_hook(keep),
        "all modules": lambda: register_module_forward_hook(keep),
    }[where]()
    try:
        model(**batch, skip_plan=mask)
    finally:
        handle.remove()
    assert kept and all(torch.equal(tensor, copy) for tensor, copy in kept)


@torch.no_grad()
def test_embeddings_that_are_given_stay_what_they_were():
    model, batch, mask = routed_model("llama"), pad(prompts(LENGTHS)), interleaved_plans()
    mask[:, 0] = torch.tensor([True, False, True, False])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    before = embeds.clone()
    out = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], skip_plan=mask)
    assert torch.equal(embeds, before)
    assert torch.equal(out.logits, model(**batch, skip_plan=mask).logits)


@torch.no_grad()
def test_rows_are_planned_once_a_request():
    model, batch, mask = routed_model("llama"), pad(prompts(LENGTHS)), interleaved_plans()
    with OpCounter() as counter:
        model.generate(**batch, skip_plan=mask, max_new_tokens=5, min_new_tokens=5)
    assert counter.calls["plan_rows"] == 2  # of the plan that is given, and of the cache
    assert counter.calls["aten::nonzero"] == 0


def test_an_unknown_gate_is_refused():
    with pytest.raises(ValueError, match="soft"):
        open_model()(**training_batch(), gate="sigmoid")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"pooling": "max"}, "windowed_mean"),
        ({"head": "tree"}, "mlp"),
        ({"prefill": "none"}, "route"),
        ({"windows": 4}, "windowed_mean"),
        ({"poolin": "mean"}, "did you mean 'pooling'"),
        ({"version": 7}, "version"),
    ],
)
def test_a_wrong_router_config_is_refused(values, says):
    with pytest.raises(ValueError, match=says):
        RouterConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"protected": [6]}, "protected"),
        ({"thresholds": [0.5] * 5}, "thresholds"),
        ({"keep_bias": [0.0] * 7}, "keep_bias"),
        ({"num_layers": 5}, "num_layers"),
        ({"calibration": {"0.3": [0.5]}}, "calibration"),
    ],
)
def test_a_router_config_of_another_model_is_refused(values, says):
    with pytest.raises(ValueError, match=says):
        RouterConfig(**values).resolved(NUM_LAYERS)


def test_the_loop_of_the_documentation_runs_as_written(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    own = text.split("## Your own loop")[1]
    code = re.search(r"```python\n(.*?)```", own, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "firstlm": firstlm, "batches": [training_batch()] * 2}
    exec(code.replace('"embedded"', repr(str(tiny_base_path("llama")))), names)
    before = names["model"].plan(**pad(prompts(LENGTHS))).keep_prob
    assert before.unique().numel() > 1, "the routers have learnt something"
    again = firstlm.from_pretrained("runs/own")
    assert torch.equal(again.plan(**pad(prompts(LENGTHS))).keep_prob, before)
