"""The native ops, typed: what `torch.ops.firstlm` has, with fake kernels and autograd.

One module an idea. The CPU kernels and the composites of torch's ops that serve devices without a
kernel of ours are in `csrc/bindings`.
"""

from firstlm.ops.library import LIBRARY, isa, isa_levels  # first: it registers the ops

# isort: split
from firstlm.ops.attention import decode_attention
from firstlm.ops.kv import kv_append
from firstlm.ops.router import (
    PoolKind,
    router_head,
    router_pool,
    router_pool_packed,
    router_score,
    router_score_packed,
)
from firstlm.ops.rows import (
    gather_rows,
    plan_rows,
    scatter_add_rows_,
    scatter_rows,
    scatter_rows_,
)

__all__ = [
    "LIBRARY",
    "PoolKind",
    "decode_attention",
    "gather_rows",
    "isa",
    "isa_levels",
    "kv_append",
    "plan_rows",
    "router_head",
    "router_pool",
    "router_pool_packed",
    "router_score",
    "router_score_packed",
    "scatter_add_rows_",
    "scatter_rows",
    "scatter_rows_",
]
