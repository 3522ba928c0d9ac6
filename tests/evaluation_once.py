"""One evaluation of a tiny model in processes of its own, for test_evaluation.py to split or kill.

python evaluation_once.py CHECKPOINT DATA OUTPUT
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from firstlm.cli_evaluate import leave_process_group
from firstlm.evaluation.methods import CONTROLS
from firstlm.evaluation.records import Evaluation
from firstlm.evaluation.run import evaluate

EFFORT = {
    "examples": 11, "validation": 16, "plan_examples": 4, "batch_size": 3, "max_new_tokens": 5,
    "timing_prompts": 2, "repeats": 2, "new_tokens": 4, "max_length": 100, "draws": 4,
}  # fmt: skip


def run(
    checkpoint: Any, data: Any, output: Any, effort: dict[str, Any] | None = None, **changes: Any
) -> Evaluation:
    """All controls in float32 on one thread, which repeats itself to the bit."""
    options: dict[str, Any] = {
        "skip_rates": [0.34],
        "controls": CONTROLS,
        "weights": ("first", "base"),
        "dtype": "float32",
        "timing_engine": None,
        "threads": 1,
        "progress": False,
    }
    options |= changes
    return evaluate(checkpoint, data, output=output, effort=EFFORT | (effort or {}), **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(*sys.argv[1:4])
    leave_process_group()
