"""Engines of tiny models, and what the hf path generates for the same prompts."""

from __future__ import annotations

import torch

from firstlm import Engine
from tiny_models import prompts

LENGTHS = [13, 5, 9, 11]
ROWS = [row.tolist() for row in prompts(LENGTHS)]
NEW = 12


def engine_of(model, **options) -> Engine:
    return Engine.from_model(model, **({"precision": "float32", "num_threads": 2} | options))


def hf_tokens(model, rows, **options) -> list[list[int]]:
    """What the hf path generates, row by row, so that padding plays no part."""
    found = []
    for b, row in enumerate(rows):
        own = {k: v[b] if isinstance(v, list) else v for k, v in options.items()}
        out = model.generate(torch.tensor([row]), max_new_tokens=NEW, pad_token_id=0, **own)
        found.append(out[0, len(row) :].tolist())
    return found


def load_counted(checkpoint, monkeypatch, **options) -> tuple[Engine, int]:
    """The engine, and how many times a model was packed for it."""
    from firstlm.engine import packing

    count = 0

    def counted(*args, own=packing.pack_model, **kwargs):
        nonlocal count
        count += 1
        return own(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack_model", counted)
        options = {"precision": "float32", "progress": False} | options
        engine = Engine.from_pretrained(checkpoint, **options)
    return engine, count


def adapted(model, **options):
    """With a random adapter that bfloat16 holds exactly, if its scale is a power of 2."""
    from peft import LoraConfig

    torch.manual_seed(3)
    options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"} | options
    model.add_adapter(LoraConfig(init_lora_weights=False, exclude_modules=".*router.*", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_((0.5 * parameter).bfloat16())
    return model.eval()


def drawn(config):
    """A random model of a config, its biases too."""
    import transformers

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_()
    return model
