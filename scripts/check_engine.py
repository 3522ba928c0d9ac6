"""Greedy answers of the native engine beside the hf path's, token by token, in float32.

    python scripts/check_engine.py --checkpoint runs/quickstart/checkpoint --prompts 50 --tokens 256

Every answer is as long as was asked; the end of sequence does not end it.

A divergence is allowed where the two best tokens of the hf path are closer than twice the largest
difference between the logits of the two paths (measured teacher-forced on all answers), or where
the keep probability of the first layer that the plans disagree on lies within 1e-5 of its
threshold. Exit code 1 if there is any other, or if logits differ by more than rounding explains.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import firstlm
from firstlm.atomic import write_json
from firstlm.corpus import CORPUS_NAMES, load_corpus
from firstlm.data import encode_prompt
from firstlm.engine.stats import EngineStats
from firstlm.skip_plan import SkipPlan
from firstlm.tokenizer import load_tokenizer

_NEAR_THRESHOLD = 1e-5
_MOST_DIFFERENCE = 1e-2  # of logits: float32 rounding through 30 layers stays far below


@dataclass
class Divergence:
    """Of one prompt.

    Attributes:
        prompt: its index.
        position: of the first token that differs; None if the plans differ.
        gap: between the hf path's two best logits there.
        distance: of the first differing layer's keep probability to its threshold, where plans
            differ; layers after it read other states.
        allowed: see above.
    """

    prompt: int
    position: int | None = None
    gap: float | None = None
    distance: float | None = None
    allowed: bool = False


def hf_answer(model: Any, row: list[int], tokens: int) -> tuple[list[int], SkipPlan, torch.Tensor]:
    """(answer, plan, keep_prob [L]) of the hf path."""
    out = model.generate(
        torch.tensor([row]), max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True,
        eos_token_id=model.config.vocab_size, pad_token_id=0,  # no token has this id
    )  # fmt: skip
    return out.sequences[0, len(row) :].tolist(), out.skip_plans[0], out.keep_prob[0]


def hf_logits(model: Any, row: list[int], answer: list[int], plan: SkipPlan) -> torch.Tensor:
    """[T, V], before each token of the answer."""
    ids = torch.tensor([row + answer[:-1]])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, : len(row)] = True
    with torch.no_grad():
        out = model(
            ids, prompt_mask=mask, skip_plan=plan, use_cache=False, logits_to_keep=len(answer)
        )
    return out.logits[0]


def engine_logits(
    engine: firstlm.Engine, row: list[int], answer: list[int], plan: SkipPlan
) -> torch.Tensor:
    """[T, V], before each token of the answer."""
    stats, config = EngineStats(), engine.router_config
    prefill = "route" if config is None else config.prefill
    sequences, first = engine.core.planned([row], plan.to_mask()[None], prefill, stats)
    if len(answer) == 1:
        return first
    rest = engine.core.extend(sequences, [answer[:-1]], [len(answer) - 1], stats)
    return torch.cat([first, rest])


def compare(
    model: Any, engine: firstlm.Engine, rows: list[list[int]], tokens: int
) -> dict[str, Any]:
    """What was found over all prompts, as plain values."""
    found: list[Divergence] = []
    largest, count = 0.0, 0
    for index, row in enumerate(tqdm(rows, unit="prompt")):
        answer, plan, keep_prob = hf_answer(model, row, tokens)
        own = engine.generate(
            row, max_new_tokens=tokens, temperature=0, ignore_eos=True, details=True
        )
        count += len(answer)
        if own.skip_plan != plan:
            thresholds = torch.tensor(model.router_config.thresholds)
            layer = int((own.skip_plan.to_mask() != plan.to_mask()).int().argmax())
            distance = abs(keep_prob[layer] - thresholds[layer]).item()
            allowed = distance <= _NEAR_THRESHOLD
            found.append(Divergence(index, distance=distance, allowed=allowed))
            continue
        theirs = hf_logits(model, row, answer, plan)
        ours = engine_logits(engine, row, answer, plan)
        largest = max(largest, (theirs - ours).abs().max().item())
        if own.tokens != answer:
            pairs = zip(own.tokens, answer, strict=False)
            at = next(n for n, (a, b) in enumerate(pairs) if a != b)
            best = theirs[at].topk(2).values
            found.append(Divergence(index, position=at, gap=(best[0] - best[1]).item()))
    for one in found:
        one.allowed = one.allowed or (one.gap is not None and one.gap < 2 * largest)
    return {
        "prompts": len(rows),
        "tokens": count,
        "largest_logit_difference": largest,
        "divergences": len(found),
        "not_allowed": sum(not one.allowed for one in found),
        "details": [asdict(one) for one in found],
    }


def prompts_of(tokenizer: Any, count: int, length: int | None) -> list[list[int]]:
    """Prompts of both corpora in equal parts; of `length` tokens each, if given, one after the
    other joined."""
    each = -(-count // len(CORPUS_NAMES)) if length is None else None
    rows = [
        encode_prompt(example["prompt"], tokenizer)
        for name in CORPUS_NAMES
        for example in itertools.islice(load_corpus(name, "test"), each)
    ]
    if length is None:
        return rows[:count]
    tokens = list(itertools.chain.from_iterable(rows))
    if len(tokens) < count * length:
        raise SystemExit(f"the corpora have {len(tokens)} tokens, fewer than were asked for")
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="embedded")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, help="of every prompt, joined from several")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = firstlm.from_pretrained(options.checkpoint, merge_adapter=True, dtype=torch.float32)
    tokenizer = load_tokenizer(options.checkpoint)
    engine = firstlm.Engine.from_model(model, "float32", num_threads=options.threads)
    rows = prompts_of(tokenizer, options.prompts, options.prompt_tokens)
    result = compare(model, engine, rows, options.tokens)
    print(json.dumps(result, indent=2))
    if options.json is not None:
        write_json(options.json, result)
    far = result["largest_logit_difference"] > _MOST_DIFFERENCE
    return 1 if result["not_allowed"] or far else 0


if __name__ == "__main__":
    sys.exit(main())
