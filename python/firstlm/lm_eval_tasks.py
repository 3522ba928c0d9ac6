"""Tasks for lm-evaluation-harness from a shipped corpus, which need no hub.

    python -m firstlm.lm_eval_tasks tasks
    firstlm lm-eval --include_path tasks --tasks firstlm_synopsis,firstlm_synopsis_choice ...

- firstlm_synopsis: write the synopsis of a package description; ROUGE-L and exact match.
- firstlm_synopsis_choice: which of four synopses is that of a description; acc and acc_norm.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

CORPUS = "debian-synopsis"
CHOICES = 4
_METRICS = """from firstlm.lm_eval_tasks import process_synopsis
"""


def write_tasks(folder: str | Path, examples: int = 300, seed: int = 0) -> list[str]:
    """Write tasks for `--include_path`: YAML files, and JSON lines beside them.

    Args:
        folder: made if need be.
        examples: of the corpus's test split; the first ones. Few-shot examples come from the
            validation split.
        seed: of the order of choices, and of wrong ones that are equally good.

    Returns:
        The names of the tasks.
    """
    from firstlm.corpus import load_corpus

    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "test": list(load_corpus(CORPUS, "test", max_examples=examples)),
        "validation": list(load_corpus(CORPUS, "validation", max_examples=100)),
    }
    generator = random.Random(seed)
    choices = {split: _with_choices(found, generator) for split, found in rows.items()}
    (folder / "firstlm_synopsis.py").write_text(_METRICS, encoding="utf-8")
    _write_task(
        folder,
        rows,
        {
            "task": "firstlm_synopsis",
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "\n\n",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 48},
            "process_results": _Function("firstlm_synopsis.process_synopsis"),
            "metric_list": [_mean_of("rouge_l"), _mean_of("exact_match")],
        },
    )
    _write_task(
        folder,
        choices,
        {
            "task": "firstlm_synopsis_choice",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": "\n\n",
            "metric_list": [_mean_of("acc"), _mean_of("acc_norm")],
        },
    )
    return ["firstlm_synopsis", "firstlm_synopsis_choice"]


def process_synopsis(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The metrics of one answer, as lm-eval's `process_results`."""
    from firstlm.measure import rouge_l

    answer = results[0].strip()
    return {
        "rouge_l": rouge_l([answer], [doc["answer"]])[0],
        "exact_match": float(answer == doc["answer"]),
    }


class _Function(str):
    """A function beside the YAML file, by lm-eval's tag."""


yaml.SafeDumper.add_representer(
    _Function, lambda dumper, value: dumper.represent_scalar("!function", str(value))
)


def _mean_of(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _with_choices(rows: Sequence[dict[str, Any]], generator: random.Random) -> list[dict[str, Any]]:
    """Each row with `choices`, its answer among three of other rows, and the `label` of it.

    The wrong ones are those that share most words with the description: random ones are too easy.
    """
    found = []
    for row in rows:
        described = _words(row["prompt"])
        others = [other["answer"] for other in rows if other["answer"] != row["answer"]]
        generator.shuffle(others)  # among equals
        others.sort(key=lambda answer: len(_words(answer) & described), reverse=True)
        choices = [row["answer"], *others[: CHOICES - 1]]
        generator.shuffle(choices)
        found.append({**row, "choices": choices, "label": choices.index(row["answer"])})
    return found


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def _write_task(
    folder: Path, rows: dict[str, list[dict[str, Any]]], config: dict[str, Any]
) -> None:
    files = {}
    for split, found in rows.items():
        path = folder / f"{config['task']}-{split}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        path.write_text("".join(lines), encoding="utf-8")
        files[split] = str(path)
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "validation_split": "validation",
        "fewshot_split": "validation",
        "metadata": {"version": 1.0},
    }
    text = yaml.safe_dump(config | data, sort_keys=False, allow_unicode=True)
    (folder / f"{config['task']}.yaml").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write offline tasks for lm-evaluation-harness.")
    parser.add_argument("folder", type=Path, help="for --include_path")
    parser.add_argument("--examples", type=int, default=300, help="of each task (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the wrong choices")
    arguments = parser.parse_args()
    print(",".join(write_tasks(arguments.folder, arguments.examples, arguments.seed)))


if __name__ == "__main__":
    main()
