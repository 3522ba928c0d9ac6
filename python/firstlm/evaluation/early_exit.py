"""Early exit by confidence: a token leaves at the first layer whose state predicts surely enough.

After each layer the model's own final norm and head read the state of a token; where the largest
probability passes a threshold, the token skips the layers above. What is measured is an upper bound
on quality: a later token that goes deeper attends to keys and values of all layers for every token
before it, and these are computed here, so no time is saved. An implementation that saves it has to
approximate them. A skip plan has no such debt: what it skips is never needed.

Letters: N examples, B rows, P positions of a pass, K tokens, E exits, L layers, D hidden_size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from firstlm import measure
from firstlm.data import encode_prompt
from firstlm.evaluation.records import ExampleResult
from firstlm.losses import IGNORED, answer_positions
from firstlm.scoring import Collator, score_batch
from firstlm.skip_plan import SkipPlan

NOTE = (
    "early exit by confidence: keys and values of the layers above an exit are computed all the "
    "same, for later tokens that go deeper; it saves no time, and its quality is an upper bound; "
    "it is measured on the hf path, whatever the others run on"
)


def rates_note(examples: Sequence[ExampleResult], num_layers: int) -> str:
    """Which rates its figures are of: the threshold meets the asked one on validation examples."""
    read = sum(len(e.kept) for e in examples) / len(examples) / num_layers
    answered = sum(e.layers_run for e in examples) / len(examples) / num_layers
    return (
        f"it skips {1 - read:.1%} of the layers, rounded to whole ones a prompt, where it reads "
        f"the reference (cross-entropy) and {1 - answered:.1%} where it answers (ROUGE, BLEU, "
        "chrF); plans are counted by mean depth"
    )


_SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
_NEVER = 2.0  # a threshold that no probability passes


def first_exit(model: Any) -> int:
    """Least number of layers before an exit: at least one, and the first protected ones."""
    protected = set(model.router_config.protected)
    count = 0
    while count in protected:
        count += 1
    return min(max(count, 1), len(model.decoder_layers))


@dataclass
class Exits:
    """What happened in the passes of an `early_exit` block.

    Attributes:
        layers: of each pass, [B, P] int64, layers that each position went through.
        top: of each pass, [B, P, E] f32, the largest probability at every exit; only if asked for.
    """

    layers: list[torch.Tensor] = field(default_factory=list)
    top: list[torch.Tensor] = field(default_factory=list)


@contextlib.contextmanager
def early_exit(model: Any, threshold: float, *, record_top: bool = False) -> Iterator[Exits]:
    """The model's logits are those of each position's exit.

    Run it with every layer kept. Exits lie after `first_exit(model)` to L - 1 layers; a position
    takes the first whose largest probability is at least `threshold`, else all layers.

    Args:
        record_top: note the probabilities of all exits.

    Raises:
        ValueError: a model that changes its logits after the head, or has no single final norm.
    """
    config = model.config.get_text_config()
    for name in _SCALED:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"early exit by confidence reads the head's own logits, and this model scales them "
                f"({name}={getattr(config, name)})"
            )
    pass_ = _Pass(model, threshold, record_top)
    handles = [
        model.register_forward_pre_hook(pass_.start, with_kwargs=True),
        model.get_output_embeddings().register_forward_pre_hook(pass_.leave),
    ]
    handles += [layer.register_forward_hook(pass_.record) for layer in model.decoder_layers]
    try:
        yield pass_.exits
    finally:
        for handle in handles:
            handle.remove()


class _Pass:
    """Hooks of one block; the states of one pass at a time."""

    def __init__(self, model: Any, threshold: float, record_top: bool) -> None:
        self.norm, self.head = _final_norm(model), model.get_output_embeddings()
        self.num_layers, self.first = len(model.decoder_layers), first_exit(model)
        self.threshold, self.record_top = threshold, record_top
        self.states: list[torch.Tensor] = []  # [B, T, D] after every layer
        self.logits_to_keep: int | torch.Tensor = 0
        self.exits = Exits()

    def start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.states.clear()
        self.logits_to_keep = kwargs.get("logits_to_keep", 0)

    def record(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.states.append(output)

    def leave(self, module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """Replaces the head's input [B, P, D] by the normed states of the exits."""
        (full,) = args
        chosen = full.flatten(0, 1).clone()  # [K, D]
        layers = torch.full((len(chosen),), self.num_layers)
        tops = []
        pending = torch.arange(len(chosen), device=chosen.device)
        for count in range(self.first, self.num_layers):
            if len(pending) == 0:
                break
            state = self._kept(self.states[count - 1]).flatten(0, 1)[pending]
            state = self.norm.forward(state)  # not __call__: other hooks are not meant
            logits = self.head.forward(state).float()
            top = (logits.amax(-1) - logits.logsumexp(-1)).exp()  # [K]
            if self.record_top:
                tops.append(top.cpu())
            leaves = top >= self.threshold
            chosen[pending[leaves]] = state[leaves]
            layers[pending[leaves].cpu()] = count
            pending = pending[~leaves]
        self.exits.layers.append(layers.view(full.shape[:2]))
        if self.record_top:
            top = torch.stack(tops, -1) if tops else torch.zeros(len(chosen), 0)
            self.exits.top.append(top.view(*full.shape[:2], -1))
        self.states.clear()
        return (chosen.view_as(full),)

    def _kept(self, state: torch.Tensor) -> torch.Tensor:
        """The positions of [B, T, D] that the head is given."""
        keep = self.logits_to_keep
        return state[:, slice(-keep, None) if isinstance(keep, int) else keep]


def _final_norm(model: Any) -> nn.Module:
    """The norm between the last layer and the head."""
    named = model.get_decoder().named_children()
    found = [module for name, module in named if "norm" in name or name == "ln_f"]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__}: no single final norm beside the decoder layers")
    return found[0]


@dataclass
class EarlyExitScores:
    """Of N examples, in their order.

    Attributes:
        loss: [N] f64, cross-entropy summed over the answer's tokens.
        tokens: [N] int64.
        layers_run: [N] f64, mean over the answer's tokens.
        usual_layers: [N] int64, the number of layers that most of its tokens went through.
    """

    loss: torch.Tensor
    tokens: torch.Tensor
    layers_run: torch.Tensor
    usual_layers: torch.Tensor


def score_early_exit(
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    threshold: float,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> EarlyExitScores:
    """Answers teacher-forced, each token leaving where it is confident. Arguments as of score."""
    parts: list[tuple[Any, ...]] = []
    with early_exit(model, threshold) as exits:
        for found, answer, order in _passes(model, examples, collator, batch_size, progress):
            layers = [row[mask] for row, mask in zip(exits.layers.pop(), answer, strict=True)]
            for i, loss, tokens, own in zip(order, *found[:2], layers, strict=True):
                parts.append((i, loss, tokens, own.double().mean(), own.mode().values))
    parts.sort(key=lambda part: part[0])
    return EarlyExitScores(*(torch.stack(column) for column in list(zip(*parts, strict=True))[1:]))


def calibrate_early_exit(
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    skip_rates: Sequence[float],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> dict[float, float]:
    """Thresholds whose skip rate on these examples comes nearest to the asked ones.

    The rate is that of answer tokens, teacher-forced, every example counting alike: one pass.

    Returns:
        skip rate -> threshold.

    Raises:
        ValueError: a rate that is not reached even if every token leaves at the first exit.
    """
    tops: list[torch.Tensor] = []  # [K, E] an example
    with early_exit(model, _NEVER, record_top=True) as exits:
        for _, answer, _ in _passes(model, examples, collator, batch_size, progress):
            exits.layers.clear()
            tops += [row[mask] for row, mask in zip(exits.top.pop(), answer, strict=True)]
    num_layers, first = len(model.decoder_layers), first_exit(model)
    weight = torch.cat([torch.full((len(top),), 1 / len(top) / len(tops)) for top in tops]).double()
    reached = torch.cat(tops).cummax(1).values  # [K, E]: left by exit e iff at least the threshold
    most = (num_layers - first) / num_layers

    def rate_of(threshold: float) -> float:
        return float((weight @ (reached >= threshold).double()).sum()) / num_layers

    seen = reached.unique().double()
    # Between two values, so that rounding does not decide where a token leaves.
    values = [0.0, *((seen[1:] + seen[:-1]) / 2).tolist(), _NEVER]
    found = {}
    for rate in skip_rates:
        if not 0 <= rate <= most + 1e-9:
            raise ValueError(
                f"skip rate {rate} cannot be reached: the first exit is after {first} of "
                f"{num_layers} layers, so at most {most:.3f} is skipped"
            )
        low, high = 0, len(values) - 1  # rate_of falls: values[low] skips the most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if rate_of(values[middle]) >= rate else (low, middle)
        found[rate] = min(values[low], values[high], key=lambda v: abs(rate_of(v) - rate))
    return found


@torch.no_grad()
def _passes(
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor, list[int]]]:
    """Batches of like length, nothing skipped: (score_batch's result, answer [B, P], indices)."""
    model.eval()
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = collator([examples[i] for i in chosen])
        labels = batch["labels"]
        answer = labels[:, answer_positions(labels) + 1] != IGNORED  # [B, P]
        keep = torch.ones(len(chosen), len(model.decoder_layers), dtype=torch.bool)
        yield score_batch(model, batch, None, keep), answer, chosen
        if progress is not None:
            progress(len(chosen))


@dataclass
class EarlyExitAnswers:
    """Of N prompts, in their order.

    Attributes:
        texts: greedy answers.
        layers_run: mean layers of an answer's tokens.
    """

    texts: list[str]
    layers_run: list[float]


def answer_early_exit(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    threshold: float,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
) -> EarlyExitAnswers:
    """Greedy answers, each token leaving where it is confident. Arguments as of measure.answer."""
    sizes = [len(encode_prompt(prompt, tokenizer)) for prompt in prompts]
    order = sorted(range(len(prompts)), key=sizes.__getitem__)  # the order of measure.answer
    texts, layers_run = [""] * len(prompts), [0.0] * len(prompts)
    full = SkipPlan.full(len(model.decoder_layers))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        with early_exit(model, threshold) as exits:
            found = measure.answer(
                model, tokenizer, [prompts[i] for i in chosen],
                max_new_tokens=max_new_tokens, batch_size=len(chosen), skip_plan=full,
            )  # fmt: skip
        layers = torch.stack([step[:, -1] for step in exits.layers], 1).double()  # [B, steps]
        for row, i in enumerate(chosen):
            texts[i] = found.texts[row]
            layers_run[i] = layers[row, : found.new_tokens[row]].mean().item()
    return EarlyExitAnswers(texts, layers_run)
