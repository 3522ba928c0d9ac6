"""How much each decoder layer matters: the rise of the answers' cross-entropy without it, or how
far it turns the hidden state (block influence).

Letters: B sequences of a batch, T tokens, D hidden_size, L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from firstlm.scoring import Collator, score_batch


@torch.no_grad()
def measure_importance(
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Rise of the answer cross-entropy (nats per token) when one layer alone is skipped.

    Protected layers are measured too: the table is worth showing. What lies before a layer does not
    depend on whether it is skipped and is not run again, so the cost is about L / 2 forward passes.

    Args:
        model: from firstlm.from_pretrained; its mode (train/eval) is restored afterwards.
        examples: encoded rows.
        collator: rows -> padded tensors.
        batch_size: rows per forward pass.
        progress: called L times in all.

    Returns:
        [L], of `model` as it is, adapter included; its routers play no part.
    """
    num_layers = len(model.decoder_layers)
    sums = torch.zeros(num_layers + 1, dtype=torch.float64)  # without each layer, and with all
    tokens = 0
    by_length = sorted(examples, key=lambda row: len(row["input_ids"]))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(by_length), batch_size):
            batch = collator(by_length[start : start + batch_size])
            keep = torch.ones(len(batch["labels"]), num_layers, dtype=torch.bool)
            with _recorded_inputs(model) as inputs:
                loss, counts, *_ = score_batch(model, batch, None, keep)
            sums[num_layers] += loss.sum()
            tokens += int(counts.sum())
            for layer in range(num_layers):
                sums[layer] += _loss_without(model, batch, layer, inputs[layer])
                if progress is not None and start + batch_size >= len(by_length):
                    progress(1)
    finally:
        model.train(was_training)
    return ((sums[:-1] - sums[-1]) / tokens).tolist()


def _loss_without(
    model: Any, batch: dict[str, torch.Tensor], layer: int, state: torch.Tensor
) -> torch.Tensor:
    """Summed loss of the batch without `layer`, whose input `state` [B, T, D] is known."""
    num_layers = len(model.decoder_layers)
    keep = torch.ones(len(batch["labels"]), num_layers, dtype=torch.bool)
    keep[:, layer] = False
    # With prefill="full" skipped layers still run on the prompt; and after the last layer there is
    # no other one to hand the state to.
    if layer == num_layers - 1 or model.router_config.prefill != "route":
        return score_batch(model, batch, None, keep)[0].sum()
    keep[:, :layer] = False
    with _replaced_input(model.decoder_layers[layer + 1], state):
        return score_batch(model, batch, None, keep)[0].sum()


@torch.no_grad()
def measure_block_influence(
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """ShortGPT's block influence: 1 - cosine of a layer's input and output, mean over all tokens.

    Args:
        model: from firstlm.from_pretrained; its mode (train/eval) is restored afterwards.
        examples: encoded rows; tokens of prompts and answers count alike.
        collator: rows -> padded tensors.
        batch_size: rows per forward pass.
        progress: called with the number of examples done since the last call.

    Returns:
        [L], in [0, 2], of an unskipped pass of `model` as it is, adapter included.
    """
    sums = torch.zeros(len(model.decoder_layers), dtype=torch.float64)
    tokens = 0
    by_length = sorted(examples, key=lambda row: len(row["input_ids"]))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(by_length), batch_size):
            batch = collator(by_length[start : start + batch_size])
            batch.pop("labels")
            batch = {name: value.to(model.device) for name, value in batch.items()}
            real = batch["attention_mask"].bool()  # [B, T]
            keep = torch.ones(len(real), len(sums), dtype=torch.bool)
            with _added_turns(model, real, sums):
                model(**batch, use_cache=False, skip_plan=keep, logits_to_keep=1)
            tokens += int(real.sum())
            if progress is not None:
                progress(len(real))
    finally:
        model.train(was_training)
    return (sums / tokens).tolist()


@contextlib.contextmanager
def _added_turns(model: Any, real: torch.Tensor, sums: torch.Tensor) -> Iterator[None]:
    """Adds to `sums` [L] what each layer of a pass turns the states of `real` [B, T] tokens."""

    def add(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> None:
        state = args[0] if args else kwargs["hidden_states"]  # [B, T, D]
        before, after = state[real].double(), output[real.to(output.device)].double()
        cosine = torch.cosine_similarity(before, after.to(before.device), dim=-1)
        sums[module.router.layer_idx] += (1 - cosine).sum().cpu()

    handles = [layer.register_forward_hook(add, with_kwargs=True) for layer in model.decoder_layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _recorded_inputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """A list that fills with the hidden states [B, T, D] entering each layer."""
    found: list[torch.Tensor] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    handles = [
        layer.register_forward_pre_hook(record, with_kwargs=True) for layer in model.decoder_layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _replaced_input(layer: Any, state: torch.Tensor) -> Iterator[None]:
    """Whatever is handed to `layer`, it reads `state`."""

    def replace(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (state, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}

    handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
