"""firstlm: every prompt skips its own decoder layers (FiRST, arXiv 2410.12513)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firstlm.calibration import Calibration, calibrate
    from firstlm.engine import Engine
    from firstlm.evaluation.run import evaluate
    from firstlm.lm_eval_model import LM  # noqa: F401
    from firstlm.loading import from_pretrained
    from firstlm.router import Router, RouterConfig
    from firstlm.skip_cache import SkipCache
    from firstlm.skip_plan import SkipPlan
    from firstlm.train_config import TrainConfig
    from firstlm.trainer import Trainer
    from firstlm.training import TrainResult, train

__version__ = "0.1.0"

# Public name -> its module, in data-flow order. Loaded on first use: torch and transformers take
# seconds to import, which `firstlm --help` should not wait for.
_PUBLIC = {
    "RouterConfig": "router",
    "Router": "router",
    "SkipPlan": "skip_plan",
    "SkipCache": "skip_cache",
    "from_pretrained": "loading",
    "Engine": "engine",
    "TrainConfig": "train_config",
    "TrainResult": "training",
    "Trainer": "trainer",
    "train": "training",
    "Calibration": "calibration",
    "calibrate": "calibration",
    "evaluate": "evaluation.run",
    "LM": "lm_eval_model",
}

# Without "LM", which needs an extra: `from firstlm import *` works without it.
__all__ = [
    "Calibration",
    "Engine",
    "Router",
    "RouterConfig",
    "SkipCache",
    "SkipPlan",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "calibrate",
    "evaluate",
    "from_pretrained",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'firstlm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"firstlm.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
