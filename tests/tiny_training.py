"""Random examples, and a firstlm.Trainer of one phase on a tiny model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TrainingArguments

from firstlm import RouterConfig, Trainer
from firstlm.adapter import attach_adapter
from firstlm.data import PromptAnswerCollator
from firstlm.phases import Phase
from firstlm.train_config import LoraPhaseConfig
from tiny_models import VOCAB_SIZE, routed_model

COLLATOR = PromptAnswerCollator(SimpleNamespace(pad_token_id=0, eos_token_id=2))


class Rows(list):
    """Encoded examples with the names that an EncodedDataset gives them."""

    @property
    def ids(self) -> list[str]:
        return [f"example-{i}" for i in range(len(self))]


def examples(count: int, seed: int = 0) -> Rows:
    """Prompts of 4-12 random tokens and answers of 2-6: every batch is padded."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    rows = Rows()
    for _ in range(count):
        prompt, answer = draw(4, 13), draw(2, 7)
        ids = torch.randint(3, VOCAB_SIZE, (prompt + answer,), generator=generator).tolist()
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100] * prompt + ids[prompt:],
                "prompt_mask": [1] * prompt + [0] * answer,
            }
        )
    return rows


def model_with_adapter(dtype: torch.dtype = torch.float64, dropout: float = 0.0, **router: Any):
    """A tiny llama with routers that disagree and a LoRA adapter that is not zero."""
    config = RouterConfig(**({"protected": [0], "keep_bias": 0.0} | router))
    model = routed_model("llama", dtype, config)
    attach_adapter(model, LoraPhaseConfig(rank=4, dropout=dropout), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def make_trainer(
    model: Any,
    phase: Phase,
    folder: Path,
    *,
    steps: int = 3,
    batch_size: int = 8,
    accumulation: int = 1,
    rows: Rows | None = None,
    save_every: int = 1000,
    **options: Any,
) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": save_every,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": False,
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False,
        "seed": 0,
    }
    names = set(TrainingArguments.__dataclass_fields__)
    arguments |= {k: options.pop(k) for k in list(options) if k in names}
    return Trainer(
        model,
        phase,
        TrainingArguments(**arguments),
        train_dataset=rows if rows is not None else examples(24),
        data_collator=COLLATOR,
        **options,
    )


def trainable(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the parameters that learn."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def learnt_state(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all router and adapter weights."""
    return {
        n: p.detach().clone() for n, p in model.named_parameters() if "router" in n or "lora_" in n
    }
