"""firstlm: every prompt skips its own decoder layers (FiRST, arXiv 2410.12513)."""

from firstlm.loading import from_pretrained
from firstlm.router import Router, RouterConfig
from firstlm.skip_cache import SkipCache
from firstlm.skip_plan import SkipPlan

__version__ = "0.1.0"

__all__ = ["Router", "RouterConfig", "SkipCache", "SkipPlan", "from_pretrained"]
