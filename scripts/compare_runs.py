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


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    from firstlm import figures

    path = Path(f"{options.output}.json")
    settings = {"prompts": options.prompts, "answers": options.answers, "data": options.data}
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
    parser.add_argument("--prompts", type=int, default=500, help="test examples of each corpus")
    parser.add_argument(
        "--answers", type=int, default=500, help="... that are answered for ROUGE-L"
    )
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

    model = firstlm.from_pretrained(checkpoint, dtype=torch.float32, merge_adapter=True)
    tokenizer = load_tokenizer(checkpoint)
    row: dict[str, Any] = {"checkpoint": str(checkpoint), "tasks": {}}
    all_scores, all_rouge = {}, {}
    for task in options.data:
        corpus = load_corpus(task, "test", max_examples=options.prompts)
        encoded = encode_dataset(corpus, tokenizer, options.max_length, progress=False)
        all_scores[task] = score(model, encoded, PromptAnswerCollator(tokenizer))
        found = measure.answer(
            model,
            tokenizer,
            [example["prompt"] for example in corpus.select(range(options.answers))],
            max_new_tokens=96,
            batch_size=16,
            progress=f"answers to {task}",
        )
        references = [example["answer"] for example in corpus.select(range(options.answers))]
        all_rouge[task] = measure.rouge_l(found.texts, references)
        row["tasks"][task] = {
            "cross_entropy": all_scores[task].cross_entropy,
            "rouge_l": float(np.mean(all_rouge[task])),
            "skip_rate": all_scores[task].skip_rate,
            "layer_calls_per_token": found.layer_calls_per_token,
            "n": len(all_scores[task].loss),
            "n_rouge_l": len(references),
        }
        shuffled = shuffled_within(all_scores[task].keep_mask, options.seed)
        other = score(model, encoded, PromptAnswerCollator(tokenizer), keep_mask=shuffled)
        row["tasks"][task]["cross_entropy_shuffled_within"] = other.cross_entropy
    loss = torch.cat([s.loss for s in all_scores.values()])
    tokens = torch.cat([s.tokens for s in all_scores.values()])
    mask = torch.cat([s.keep_mask for s in all_scores.values()])
    shuffled_loss = shuffled_over_all(model, tokenizer, options, mask)
    share = mask.double().mean(0)
    skipped = (~mask).double().mean(1)
    row |= {
        "cross_entropy": (loss.sum() / tokens.sum()).item(),
        "cross_entropy_by_sequence": (loss / tokens).mean().item(),
        "cross_entropy_shuffled": (shuffled_loss.sum() / tokens.sum()).item(),
        "rouge_l": float(np.mean([np.mean(values) for values in all_rouge.values()])),
        "skip_rate": skipped.mean().item(),
        "skip_rate_by_answer_token": ((skipped * tokens).sum() / tokens.sum()).item(),
        "distinct_plans": len({tuple(keep) for keep in mask.tolist()}),
        "undecided_layers": int(((share > 0.05) & (share < 0.95)).sum()),
        "keep_share": share.tolist(),
    }
    examples = {
        "loss": loss.tolist(),
        "tokens": tokens.tolist(),
        "shuffled_loss": shuffled_loss.tolist(),
        "rouge_l": [value for values in all_rouge.values() for value in values],
    }
    return row, examples


def shuffled_within(mask: torch.Tensor, seed: int) -> torch.Tensor:
    """The rows of `mask` dealt to other examples."""
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    return mask[order.roll(1)][order.argsort()]


def shuffled_over_all(
    model: Any, tokenizer: Any, options: argparse.Namespace, mask: torch.Tensor
) -> torch.Tensor:
    """Loss of every example under the plan of another example of any task."""
    from firstlm.corpus import load_corpus
    from firstlm.data import PromptAnswerCollator, encode_dataset
    from firstlm.scoring import score

    rows = []
    for task in options.data:
        corpus = load_corpus(task, "test", max_examples=options.prompts)
        encoded = encode_dataset(corpus, tokenizer, options.max_length, progress=False)
        rows += [encoded[i] for i in range(len(encoded))]
    shuffled = shuffled_within(mask, options.seed)
    return score(model, rows, PromptAnswerCollator(tokenizer), keep_mask=shuffled).loss


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
        "rouge_l": bootstrap_ratio(
            first["rouge_l"], other["rouge_l"], [1] * len(first["rouge_l"]), seed
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
        "| run | skip rate | plans | undecided layers | cross-entropy | by sequence | shuffled "
        "| ROUGE-L |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in record["runs"].items():
        lines.append(
            f"| {name} | {row['skip_rate']:.1%} | {row['distinct_plans']} | "
            f"{row['undecided_layers']} | {row['cross_entropy']:.3f} | "
            f"{row['cross_entropy_by_sequence']:.3f} | {row['cross_entropy_shuffled']:.3f} | "
            f"{row['rouge_l']:.3f} |"
        )
        for task, part in row["tasks"].items():
            lines.append(
                f"| … {task} | {part['skip_rate']:.1%} | | | {part['cross_entropy']:.3f} | | "
                f"{part['cross_entropy_shuffled_within']:.3f} | {part['rouge_l']:.3f} |"
            )
    first = next(iter(record["runs"]))
    for other, parts in record["differences"].items():
        for metric, value in parts.items():
            low, high = value["ci95"]
            lines.append(
                f"\n{first} - {other}, {metric}: {value['delta']:+.3f} [{low:+.3f}, {high:+.3f}], "
                f"n = {value['n']}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
