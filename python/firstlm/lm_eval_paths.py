"""How `firstlm.LM` runs requests of lm-evaluation-harness: on the hf path, or in the engine.

Letters: B rows, T tokens, L layers, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from firstlm.data import pad_prompts
from firstlm.engine import Engine
from firstlm.prompt import position_ids_of
from firstlm.skip_plan import SkipPlan, check_protected, plans_to_mask

Pair = tuple[list[int], list[int]]  # tokens of a context, and of what may follow it
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Scored:
    """A continuation: its log-likelihood, whether greedy decoding gives it, and the plan."""

    log_likelihood: float
    is_greedy: bool
    skip_plan: SkipPlan


class Path(Protocol):
    """What `firstlm.LM` needs of either."""

    name: str

    def score(self, pairs: Sequence[Pair], batch_size: int) -> Iterator[tuple[int, Scored]]:
        """(index, score) of every pair, in an order that saves work."""
        ...


class HfPath:
    """A routed model of transformers.

    Args:
        model: of `firstlm.from_pretrained`.
        tokenizer: of transformers.
        choice: `skip_plan`, or `budget` and `budget_mode`, as `generate` takes them.

    Raises:
        ValueError: a choice that this model cannot follow.
    """

    name = "hf"

    def __init__(self, model: Any, tokenizer: Any, choice: dict[str, Any]) -> None:
        self.model, self.choice = model.eval(), choice
        self._tokenizer = tokenizer
        self._forward_arguments: dict[str, Any] = {}
        if "skip_plan" in choice:
            mask = plans_to_mask(choice["skip_plan"], 1, len(model.decoder_layers))
            check_protected(mask, model.router_config.protected)
            self._forward_arguments = {"skip_plan": choice["skip_plan"]}
        elif choice.get("budget_mode") == "threshold":
            thresholds = model.router_config.thresholds_for(choice["budget"])
            self._forward_arguments = {"thresholds": thresholds}

    def score(self, pairs: Sequence[Pair], batch_size: int) -> Iterator[tuple[int, Scored]]:
        """Longest first; continuations that differ in their last token alone share a row."""
        groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            groups.setdefault((tuple(context), tuple(continuation[:-1])), []).append(i)
        order = sorted(groups, key=lambda group: len(group[0]) + len(group[1]), reverse=True)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            log_probs, plans = self._forward([(list(c), list(read)) for c, read in chosen])
            for row, group in enumerate(chosen):
                own = log_probs[row, -len(group[1]) - 1 :]  # [T, V]
                for i in groups[group]:
                    asked = torch.tensor(pairs[i][1], device=own.device)
                    total = own.gather(1, asked[:, None]).double().sum().item()
                    is_greedy = bool((own.argmax(1) == asked).all())
                    yield i, Scored(total, is_greedy, plans[row])

    @torch.no_grad()
    def _forward(self, rows: list[Pair]) -> tuple[torch.Tensor, list[SkipPlan]]:
        """(log-probabilities [B, T, V] after each context and what is read of its continuation,
        aligned on the right; plans). The routers read the contexts."""
        device = self.model.device
        batch = pad_prompts([context + read for context, read in rows], self._tokenizer)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        prompt_mask = batch["attention_mask"].bool()  # [B, T]
        for row, (_, read) in enumerate(rows):
            prompt_mask[row, prompt_mask.shape[1] - len(read) :] = False
        arguments = dict(self._forward_arguments)
        if self.choice.get("budget_mode") == "exact":
            contexts = pad_prompts([context for context, _ in rows], self._tokenizer)
            on_device = {name: tensor.to(device) for name, tensor in contexts.items()}
            arguments["skip_plan"] = self.model.plan(**on_device, **self.choice).skip_plans
        output = self.model(
            **batch,
            position_ids=position_ids_of(batch["attention_mask"]),
            prompt_mask=prompt_mask,
            use_cache=False,
            logits_to_keep=max(len(read) for _, read in rows) + 1,
            **arguments,
        )
        logits = output.logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.log_softmax(-1), output.skip_plans


class NativePath:
    """firstlm's engine.

    Args:
        engine: with or without a tokenizer of its own.
        choice: as of `HfPath`.

    Raises:
        ValueError: a choice that this engine cannot follow.
    """

    name = "native"

    def __init__(self, engine: Engine, choice: dict[str, Any]) -> None:
        from firstlm.engine.planning import PlanChoice

        PlanChoice.of(engine.core, 1, **choice)
        if engine.router_config is not None and choice.get("budget_mode") == "threshold":
            engine.router_config.thresholds_for(choice["budget"])
        self.engine, self.choice = engine, choice

    def score(self, pairs: Sequence[Pair], batch_size: int) -> Iterator[tuple[int, Scored]]:
        """Continuations of one context share its prefill; `batch_size` plays no part."""
        by_context = sorted(range(len(pairs)), key=lambda i: pairs[i][0])
        for context, group in itertools.groupby(by_context, key=lambda i: pairs[i][0]):
            indices = list(group)
            continuations = [pairs[i][1] for i in indices]
            contexts = [context] * len(indices)
            scores = self.engine.score(contexts, continuations, details=True, **self.choice)
            for i, one in zip(indices, scores, strict=True):
                total = one.log_probs.double().sum().item()
                yield i, Scored(total, bool(one.is_greedy.all()), one.skip_plan)

    def generate(
        self,
        context: torch.Tensor,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        stop: list[str],
        pad_id: int,
        do_sample: bool | None = None,
        **sampling: Any,
    ) -> tuple[torch.Tensor, list[SkipPlan]]:
        """Left-padded prompts and their answers [B, T], as transformers' generate returns them.

        Raises:
            ValueError: an option that the engine does not have.
        """
        unknown = set(sampling) - set(_SAMPLING)
        if unknown:
            raise ValueError(
                f"the engine has no {', '.join(sorted(unknown))} (it has {', '.join(_SAMPLING)}): "
                "use engine=hf"
            )
        if do_sample is False:
            sampling["temperature"] = 0.0
        rows = zip(context, attention_mask, strict=True)
        found = self.engine.generate(
            [row[mask.bool()].tolist() for row, mask in rows],
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=torch.randint(2**31, (len(context),)).tolist(),  # follows torch's seed
            details=True,
            **sampling,
            **self.choice,
        )
        answers = torch.full((len(found), max(len(one.tokens) for one in found)), pad_id)
        for row, one in enumerate(found):
            answers[row, : len(one.tokens)] = torch.tensor(one.tokens)
        return torch.cat([context, answers], 1), [one.skip_plan for one in found]
