"""`firstlm bench start`: what an engine takes before it decodes: its loading, and its routers.

Every load is a process of its own that finds the saved engine in the page cache; its time begins
after `import torch` and ends with the first token. The routers' share is of the prefill of prompts
that keep every layer, counted inside the decoder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from firstlm.figures import available_cores, measured

if TYPE_CHECKING:
    from firstlm.engine.engine import Engine

LOAD_BAR_S, ROUTER_BAR = 1.0, 0.01

_LOAD = """
import sys, time
import torch
start = time.perf_counter()
from firstlm.engine import Engine
engine = Engine.load(sys.argv[1], num_threads=int(sys.argv[2]))
engine.generate([[1]], max_new_tokens=1, ignore_eos=True)
print(time.perf_counter() - start)
"""


def run(
    path: str = "embedded",
    *,
    precision: str = "int8",
    prompt_tokens: Sequence[int] = (64, 256, 1024),
    repeats: int = 9,
    threads: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures for `firstlm.figures`.

    Args:
        path: a base model or checkpoint, as `firstlm.from_pretrained` takes it.
        precision: of the engine.
        prompt_tokens: lengths of the prompts that are routed.
        repeats: loads, and prefills of each length.
        threads: of the engine; default: the cores that this process may use.
        seed: of the prompts' tokens, and of routers where the model has none that were trained.

    Returns:
        `{"model", "precision", "threads", "start_s", "weight_bytes", "routing": [{"prompt_tokens",
        "prefill_ms", "router_ms", "share"}], "bars"}`.
    """
    threads = threads or available_cores()
    engine = _routed_engine(path, precision, threads, seed)
    start = measured(_loads(engine, repeats, threads))
    routing = [_routing(engine, T, repeats, seed) for T in prompt_tokens]
    bars = [_bar("seconds from the saved form to the first token", start["median"], LOAD_BAR_S)]
    for row in routing:
        name = f"routers' share of the prefill of {row['prompt_tokens']} tokens"
        bars.append(_bar(name, row["share"]["median"], ROUTER_BAR))
    return {
        "model": path,
        "precision": precision,
        "threads": threads,
        "start_s": start,
        "weight_bytes": engine.weight_bytes,
        "routing": routing,
        "bars": bars,
    }


def _bar(quantity: str, value: float, limit: float) -> dict[str, Any]:
    met = value <= limit
    return {"quantity": quantity, "value": value, "limit": limit, "at_least": False, "met": met}


def _routed_engine(path: str, precision: str, threads: int, seed: int) -> Engine:
    """With routers that read every prompt: fresh ones, which say the same to all, are drawn."""
    import firstlm
    from firstlm.bench_models import without_weight_bars

    with without_weight_bars():
        model = firstlm.from_pretrained(path, dtype=torch.float32, merge_adapter=True)
    engine = firstlm.Engine.from_model(model, precision, num_threads=threads)
    if not engine.is_unrouted:
        return engine
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for parameter in layer.router.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return firstlm.Engine.from_model(model, precision, num_threads=threads)


def _loads(engine: Engine, repeats: int, threads: int) -> list[float]:
    """Seconds of each; the first one, which finds nothing in the page cache, does not count."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "engine"
        engine.save(saved)
        command = [sys.executable, "-c", _LOAD, str(saved), str(threads)]
        outputs = [
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for _ in range(repeats + 1)
        ]
    return [float(output) for output in outputs[1:]]


def _routing(engine: Engine, T: int, repeats: int, seed: int) -> dict[str, Any]:
    from firstlm.engine.stats import EngineStats

    generator = torch.Generator().manual_seed(seed)
    vocab_size = engine.config.decoder["vocab_size"]
    prompt = torch.randint(vocab_size, (T,), generator=generator).tolist()
    keeps_all = [float("-inf")] * engine.num_layers
    found = []
    for _ in range(repeats + 1):
        stats = EngineStats()
        engine.core.routed([prompt], keeps_all, "route", stats)
        found.append(stats)
    timed = found[1:]  # buffers are there
    return {
        "prompt_tokens": T,
        "prefill_ms": measured(stats.prefill_ms for stats in timed),
        "router_ms": measured(stats.router_ms for stats in timed),
        "share": measured(stats.router_ms / stats.prefill_ms for stats in timed),
    }


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures for a terminal."""
    start = figures["start_s"]
    lines = [
        f"{figures['model']}, {figures['precision']}, {figures['weight_bytes'] / 1e6:.1f} MB, "
        f"{figures['threads']} threads; median (p10-p90)",
        f"saved form to first token  {start['median']:.3f} s ({start['p10']:.3f}-"
        f"{start['p90']:.3f}, n {start['n']})",
        *(
            f"prompt of {row['prompt_tokens']:>5}  prefill {row['prefill_ms']['median']:8.2f} ms, "
            f"routers {row['router_ms']['median']:6.3f} ms, {row['share']['median']:.2%}"
            for row in figures["routing"]
        ),
    ]
    for bar in figures["bars"]:
        verdict = "met" if bar["met"] else "MISSED"
        lines.append(f"  {bar['quantity']}: {bar['value']:.3g} (<= {bar['limit']:g}, {verdict})")
    return "\n".join(lines)
