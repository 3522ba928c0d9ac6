"""torch.compile of a routed model under a fixed plan: one graph, the numbers of the eager pass."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from firstlm import SkipPlan, ops
from tiny_models import NUM_LAYERS, pad, prompts, routed_model

LENGTHS = [13, 5, 9, 11]


def keep_mask(seed: int = 3) -> torch.Tensor:
    """bool [B, L]: every layer is skipped by some rows, layer 2 by all and layer 0 by none."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(LENGTHS), NUM_LAYERS, generator=generator) < 0.5
    mask[:, 0], mask[:, 2] = True, False
    return mask


def compiled(model):
    """The model compiled in one graph (a break is an error), and the graphs that were made."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend), graphs


def calls(graph: torch.fx.GraphModule, name: str) -> int:
    return sum(name in str(node.target) for node in graph.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("form", ["plans", "mask"])
@pytest.mark.parametrize("prefill", ["route", "full"])
def test_a_fixed_plan_compiles_without_graph_breaks(form, prefill):
    model = routed_model("llama", dtype=torch.float32)
    model.router_config.prefill = prefill
    mask = keep_mask()
    plan = mask if form == "mask" else [SkipPlan.from_mask(row) for row in mask]
    arguments = pad(prompts(LENGTHS)) | {"skip_plan": plan, "use_cache": False}
    fast, graphs = compiled(model)
    with torch.no_grad():
        actual, expected = fast(**arguments), model(**arguments)
    assert len(graphs) == 1 and calls(graphs[0], "router_pool") == NUM_LAYERS
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.keep_prob, expected.keep_prob)
    assert torch.equal(actual.keep_mask, mask) and actual.skip_plans == expected.skip_plans


def test_plans_are_constants_that_the_graph_skips_layers_for():
    model = routed_model("llama", dtype=torch.float32)
    arguments = pad(prompts(LENGTHS)) | {"use_cache": False}
    fast, graphs = compiled(model)
    # Several of one length: torch makes numbers that change into symbols.
    kept = [(0, 1, 5), (0, 2, 5), (0, 3), (0, 1, 5)]
    plans = [SkipPlan(layers, NUM_LAYERS) for layers in kept]
    with torch.no_grad():
        for plan in [*plans, plans]:
            expected = model(**arguments, skip_plan=plan).logits
            torch.testing.assert_close(fast(**arguments, skip_plan=plan).logits, expected)
    layers_run = [calls(graph, "scaled_dot_product_attention") for graph in graphs]
    assert layers_run == [3, 3, 2, 5]


def test_a_mask_is_an_input_that_one_graph_serves():
    model = routed_model("llama", dtype=torch.float32)
    arguments = pad(prompts(LENGTHS)) | {"use_cache": False}
    fast, graphs = compiled(model)
    with torch.no_grad():
        for seed in range(3):
            mask = keep_mask(seed)
            expected = model(**arguments, skip_plan=mask).logits
            torch.testing.assert_close(fast(**arguments, skip_plan=mask).logits, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("form", ["plans", "mask"])
def test_gradients_of_a_compiled_pass_are_those_of_the_eager_one(form):
    model = routed_model("llama", dtype=torch.float32).requires_grad_(True)
    mask = keep_mask()
    plan = mask if form == "mask" else [SkipPlan.from_mask(row) for row in mask]
    batch = pad(prompts(LENGTHS), "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    gradients = []
    for run in (model, compiled(model)[0]):
        loss = run(**batch, labels=labels, skip_plan=plan, gate="hard").loss
        named = [(n, p) for n, p in model.named_parameters() if ".router." not in n]
        grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        gradients.append({n: g for (n, _), g in zip(named, grads, strict=True)})
    for name, expected in gradients[0].items():
        actual = gradients[1][name]
        if expected is None or actual is None:  # of a layer that no row keeps
            assert ".layers.2." in name
            assert actual is None or not actual.any()
        else:
            torch.testing.assert_close(actual, expected)


def test_a_decode_step_over_the_cache_compiles_without_graph_breaks():
    """Every layer appends and attends; starts and ends are inputs, which one graph serves."""

    def step(caches, query, new, start):
        for keys, values in caches:
            ops.kv_append(keys, values, new, 2 * new, start)
            query = query + ops.decode_attention(
                query, keys, values, torch.zeros_like(start), start + 1
            )
        return query

    fast, graphs = compiled(step)
    generator = torch.Generator().manual_seed(0)
    caches = [[torch.zeros(2, 3, 9, 32) for _ in range(4)] for _ in range(2)]
    pairs = [[(c[0], c[1]), (c[2], c[3])] for c in caches]
    for t in range(4):
        query, new = torch.randn(2, 6, 32, generator=generator), torch.randn(2, 3, 1, 32)
        start = torch.tensor([t, 2 * t])
        expected = step(pairs[0], query, new, start)
        torch.testing.assert_close(fast(pairs[1], query, new, start), expected)
    assert len(graphs) == 1
    assert calls(graphs[0], "kv_append") == calls(graphs[0], "decode_attention") == 2
    torch.testing.assert_close(caches[1], caches[0])
