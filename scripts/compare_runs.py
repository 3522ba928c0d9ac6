"""Compare finished runs of `firstlm train` on the same held-out examples.

    python scripts/compare_runs.py first=runs/mixture/first static=runs/mixture/static \
        lora=runs/mixture/lora --output results/recipes/smollm2-mixture

The first run named is the one that the others are compared with. Writes OUTPUT.json (one row a run:
cross-entropy, ROUGE-L, skip rate, plans; paired bootstrap intervals of the differences) and prints
a table. A run that is already in OUTPUT.json with the same settings is not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

_ANSWER_TOKENS = {"debian-synopsis": 40}  # a synopsis is one line


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    from firstlm import figures

    path = Path(f"{options.output}.json")
    settings = {"prompts": options.prompts, "data": options.data, "dtype": options.dtype}
    known = figures.read(path) if path.is_file() else {}
    rows = known.get("runs", {}) if known.get("settings") == settings else {}
    examples: dict[str, dict[str, list[float]]] = (
        known.get("examples", {}) if known.get("settings") == settings else {}
    )
    for name, folder in options.runs.items():
        if name not in rows or rows[name]["checkpoint"] != str(folder / "checkpoint"):
            print(f"measuring {name}", flush=True)
            rows[name], examples[name] = measure_run(folder / "checkpoint", options)
            write(path, settings, rows, examples, options)
    record = write(path, settings, rows, examples, options)
    print(table(record))
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="output_dir of a run")
    parser.add_argument("--output", type=Path, required=True, help="without .json")
    parser.add_argument("--data", nargs="+", default=["debian-synopsis", "debian-en-de"])
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--prompts", type=int, default=500, help="test examples of each corpus")
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0, help="of shuffling and of the bootstrap")
    options = parser.parse_args(arguments)
    options.runs = {
        name: Path(folder) for name, _, folder in (r.partition("=") for r in options.runs)
    }
    return options


def measure_run(
    checkpoint: Path, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """One run's row, and its figures for every example."""
    import firstlm
    from firstlm import measure
    from firstlm.corpus import load_corpus
    from firstlm.data import PromptAnswerCollator, encode_dataset
    from firstlm.scoring import score
    from firstlm.tokenizer import load_tokenizer

    dtype = getattr(torch, options.dtype)
    model = firstlm.from_pretrained(checkpoint, dtype=dtype, merge_adapter=True)
    tokenizer = load_tokenizer(checkpoint)
    collator = PromptAnswerCollator(tokenizer)
    rows: list[Any] = []
    tasks: list[str] = []
    for task in options.data:
        corpus = load_corpus(task, "test", max_examples=options.prompts)
        encoded = encode_dataset(corpus, tokenizer, options.max_length, progress=False)
        rows += [encoded[i] for i in range(len(encoded))]
        tasks += [task] * len(encoded)
    own = score(model, rows, collator)
    everyone = torch.arange(len(rows))
    groups = [torch.tensor([i for i, t in enumerate(tasks) if t == task]) for task in options.data]
    dealt = {"any": own.loss, "within": own.loss}
    if own.distinct_plans > 1:
        for name, parts in (("any", [everyone]), ("within", groups)):
            mask = own.keep_mask.clone()
            for part in parts:
                mask[part] = own.keep_mask[part[shuffle(len(part), options.seed)]]
            dealt[name] = score(model, rows, collator, keep_mask=mask).loss
    row = {"checkpoint": str(checkpoint), **summary(own, dealt, everyone), "tasks": {}}
    for task, part in zip(options.data, groups, strict=True):
        row["tasks"][task] = summary(own, dealt, part)
    rouge_l: list[float] = []
    for task in options.data:
        corpus = load_corpus(task, "test", max_examples=options.prompts)
        found = measure.answer(
            model,
            tokenizer,
            list(corpus["prompt"]),
            max_new_tokens=_ANSWER_TOKENS.get(task, 128),
            batch_size=16,
            progress=f"answers to {task}",
        )
        scores = measure.rouge_l(found.texts, list(corpus["answer"]))
        row["tasks"][task] |= {
            "rouge_l": float(np.mean(scores)),
            "layer_calls_per_token": found.layer_calls_per_token,
        }
        rouge_l += scores
    row["rouge_l"] = float(np.mean(rouge_l))
    examples = {
        "loss": own.loss.tolist(),
        "tokens": own.tokens.tolist(),
        "shuffled_loss": dealt["any"].tolist(),
        "rouge_l": rouge_l,
    }
    return row, examples


def shuffle(count: int, seed: int) -> torch.Tensor:
    """An order of `count` examples that leaves none in its place."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.roll(1)[order.argsort()]


def summary(own: Any, dealt: dict[str, torch.Tensor], part: torch.Tensor) -> dict[str, Any]:
    """Figures over the examples `part`; `dealt`: their loss under other examples' plans."""
    loss, tokens, mask = own.loss[part], own.tokens[part], own.keep_mask[part]
    skipped = (~mask).double().mean(1)
    share = mask.double().mean(0)
    return {
        "n": len(part),
        "cross_entropy": (loss.sum() / tokens.sum()).item(),
        "cross_entropy_by_sequence": (loss / tokens).mean().item(),
        "cross_entropy_shuffled": (dealt["any"][part].sum() / tokens.sum()).item(),
        "cross_entropy_shuffled_within": (dealt["within"][part].sum() / tokens.sum()).item(),
        "skip_rate": skipped.mean().item(),
        "skip_rate_by_answer_token": ((skipped * tokens).sum() / tokens.sum()).item(),
        "distinct_plans": len({tuple(keep) for keep in mask.tolist()}),
        "undecided_layers": int(((share > 0.05) & (share < 0.95)).sum()),
        "keep_share": share.tolist(),
    }


def write(
    path: Path,
    settings: dict[str, Any],
    rows: dict[str, Any],
    examples: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    from firstlm import figures

    names = [name for name in options.runs if name in rows]
    differences = {
        other: compare(examples[names[0]], examples[other], options.seed) for other in names[1:]
    }
    own = examples[names[0]]
    differences["shuffled plans"] = {
        "cross_entropy": bootstrap_ratio(
            own["loss"], own["shuffled_loss"], own["tokens"], options.seed
        )
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "runs": rows, "differences": differences, "examples": examples}
    return figures.write(path, content, seed=options.seed)


def compare(first: dict[str, Any], other: dict[str, Any], seed: int) -> dict[str, Any]:
    """Paired differences `first - other`, with 95 % intervals over resampled examples."""
    return {
        "cross_entropy": bootstrap_ratio(first["loss"], other["loss"], first["tokens"], seed),
        "cross_entropy_by_sequence": bootstrap_ratio(
            np.divide(first["loss"], first["tokens"]),
            np.divide(other["loss"], other["tokens"]),
            np.ones(len(first["loss"])),
            seed,
        ),
        "rouge_l": bootstrap_ratio(
            first["rouge_l"], other["rouge_l"], np.ones(len(first["rouge_l"])), seed
        ),
    }


def bootstrap_ratio(
    first: Sequence[float], other: Sequence[float], weights: Sequence[float], seed: int
) -> dict[str, Any]:
    """(sum first - sum other) / sum weights, and its 95 % interval from 2,000 resamples."""
    delta = np.asarray(first, float) - np.asarray(other, float)
    weight = np.asarray(weights, float)
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, len(delta), (2000, len(delta)))
    drawn = delta[chosen].sum(1) / weight[chosen].sum(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = float(delta.sum() / weight.sum())
    return {"delta": value, "ci95": [float(low), float(high)], "n": len(delta)}


def table(record: dict[str, Any]) -> str:
    """The rows and the differences as Markdown."""
    lines = [
        "| run | skip rate, by prompt / answer token | plans | layers kept for 5-95 % "
        "| CE, by token / prompt | shuffled, all / within task | ROUGE-L |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in record["runs"].items():
        parts = {name: run} | {f"… {task}": part for task, part in run["tasks"].items()}
        for title, part in parts.items():
            rouge = f"{part['rouge_l']:.3f}" if "rouge_l" in part else ""
            lines.append(
                f"| {title} | {part['skip_rate']:.1%} / {part['skip_rate_by_answer_token']:.1%} "
                f"| {part['distinct_plans']} | {part['undecided_layers']} "
                f"| {part['cross_entropy']:.3f} / {part['cross_entropy_by_sequence']:.3f} "
                f"| {part['cross_entropy_shuffled']:.3f} / "
                f"{part['cross_entropy_shuffled_within']:.3f} | {rouge} |"
            )
    first = next(iter(record["runs"]))
    for other, parts in record["differences"].items():
        for metric, value in parts.items():
            low, high = value["ci95"]
            lines.append(
                f"\n{first} - {other}, {metric}: {value['delta']:+.3f} "
                f"[{low:+.3f}, {high:+.3f}], "
                f"n = {value['n']}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
