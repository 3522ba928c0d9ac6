"""One small run of firstlm.train, in a process of its own for test_training.py to kill.

python train_once.py BASE OUTPUT_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import firstlm
from firstlm.interrupt import TrainingInterrupted
from tiny_training import examples

# Changes of `settings` for runs of a few steps.
SMALL = {
    "data": {"validation_prompts": 16, "test_prompts": 16},
    "warmup": {"steps": 2},
    "routers": {"steps": 3, "lr": 0.01},
    "lora": {"steps": 3, "rank": 4, "hold_window": 8},
}


def settings(base: str, output_dir: str) -> dict[str, Any]:
    """All three phases, dropout, moving thresholds; f32 on one thread repeats itself to the bit."""
    return {
        "base": base,
        "output_dir": output_dir,
        "device": "cpu",
        "dtype": "float32",
        "skip_rate": 0.34,
        "save_every": 7,
        "calibrate_rates": [0.5],
        "importance_examples": 4,
        "progress": False,
        "accumulation": 2,
        "batch_size": 2,
        "data": {"validation_prompts": 250, "test_prompts": 250},
        "router": {"protected": [0], "keep_bias": "importance"},
        "warmup": {"steps": 10},
        "routers": {"steps": 30, "lr": 0.01, "hold": "shared", "hold_window": 16},
        "lora": {"steps": 40, "rank": 4, "dropout": 0.1, "hold_window": 16},
    }


def datasets() -> dict[str, Any]:
    return {
        "train_dataset": examples(50, seed=1),
        "validation_dataset": examples(250, seed=2),
        "test_dataset": examples(250, seed=3),
    }


def run(base: str, output_dir: str, **changes: Any) -> firstlm.TrainResult:
    torch.set_num_threads(1)
    return firstlm.train(settings(base, output_dir) | changes, **datasets())


def log_of(folder: Any) -> list[dict[str, Any]]:
    """The lines of a run's train_log.jsonl."""
    return [
        json.loads(line) for line in (Path(folder) / "train_log.jsonl").read_text().splitlines()
    ]


def weights(folder: Any) -> dict[str, bytes]:
    """The files of a checkpoint's routers and adapter."""
    names = ("router.safetensors", "adapter/adapter_model.safetensors")
    return {name: (Path(folder) / name).read_bytes() for name in names}


if __name__ == "__main__":
    try:
        run(sys.argv[1], sys.argv[2])
    except TrainingInterrupted as stop:
        print(stop)
        sys.exit(128 + stop.signal_number)
