"""`firstlm bench decode`, `perplexity` and `start`: options, what is printed and written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from firstlm import cli_input
from firstlm.atomic import check_can_write

AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
BenchedModel = Annotated[
    str,
    typer.Option(
        "--checkpoint", "-c", metavar="MODEL",
        help="A base model or what firstlm trained, its adapter merged: folder, hub id, .gguf, or "
        "'embedded'.",
    ),
]  # fmt: skip
BenchedPrecisions = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="Of the engine: float32 (or f32), bfloat16 (bf16), int8, int4. llama.cpp runs f32; "
        "bf16; q8_0; q4_0 and q4_1.",
    ),
]
BenchedThreads = Annotated[
    int | None, typer.Option(min=1, help="Of every runtime; default: the cores there are.")
]
WorkDir = Annotated[
    Path | None,
    typer.Option(help="For the GGUF files; default: firstlm's cache folder. They are kept."),
]
Native = Annotated[
    bool, typer.Option("--native/--no-native", help="Whether firstlm's engine takes part.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="Write the figures there.")
]
ALL_PRECISIONS = "float32,bfloat16,int8,int4"


def decode(
    checkpoint: BenchedModel = "embedded",
    against: Annotated[
        str, typer.Option(metavar="LIST", help="Rivals: hf, llama.cpp, or both; '' for none.")
    ] = "",
    precision: BenchedPrecisions = ALL_PRECISIONS,
    threads: BenchedThreads = None,
    prompt_tokens: Annotated[
        str | None, typer.Option(metavar="LIST", help="Lengths of prompts; default: 64,256,1024.")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(min=2, help="After each prompt.")] = None,
    context: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens of cache of the long context; default: 4096; 0: none."),
    ] = None,
    kept_layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Numbers of kept layers to time beside the ideal; default: L to L/3; '' for none.",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Batch sizes; default: 1,2,4,8; '' for none."),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds of every contest.")] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Very short, to see that it runs; no figures to quote."),
    ] = False,
    native: Native = True,
    work_dir: WorkDir = None,
    seed: Annotated[int, typer.Option(help="Of the drawn skip plans.")] = 0,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time decode and prefill of firstlm's engine beside llama.cpp and transformers, in one run.

    The same weights, prompts, numbers of tokens and threads for all; they take turns. llama.cpp
    comes with pip install 'firstlm\\[bench]'.

    Example: firstlm bench decode --against hf,llama.cpp --output decode.json
    """
    from firstlm import bench_decode

    given = {
        "prompt_tokens": cli_input.integers(prompt_tokens, "--prompt-tokens"),
        "new_tokens": new_tokens,
        "context": context,
        "kept_layers": cli_input.integers(kept_layers, "--kept-layers"),
        "batches": cli_input.integers(batch, "--batch"),
        "repeats": repeats,
    }
    effort = _replace(bench_decode.QUICK if quick else bench_decode.Effort(), given)
    _check(checkpoint, output)
    found = bench_decode.run(
        checkpoint, against=cli_input.names(against), precisions=cli_input.names(precision),
        effort=effort, threads=threads, work_dir=work_dir, native=native, seed=seed,
    )  # fmt: skip
    _give(found, bench_decode.as_text, seed, output, as_json)


def perplexity(
    checkpoint: BenchedModel = "embedded",
    against: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="llama.cpp, hf (in bfloat16 as well), or both. transformers in float32 is the "
            "reference in any case.",
        ),
    ] = "",
    precision: BenchedPrecisions = ALL_PRECISIONS,
    threads: BenchedThreads = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Of each corpus; default: 16.")] = None,
    window_tokens: Annotated[int | None, typer.Option(min=2, help="Default: 512.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Very few tokens, to see that it runs.")
    ] = False,
    native: Native = True,
    work_dir: WorkDir = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity on the shipped corpora at every precision, beside llama.cpp on the same text.

    Example: firstlm bench perplexity --against llama.cpp --output perplexity.json
    """
    from firstlm import bench_perplexity

    given = {"count": windows, "length": window_tokens}
    effort = _replace(bench_perplexity.QUICK if quick else bench_perplexity.Effort(), given)
    _check(checkpoint, output)
    found = bench_perplexity.run(
        checkpoint, against=cli_input.names(against), precisions=cli_input.names(precision),
        effort=effort, threads=threads, work_dir=work_dir, native=native,
    )  # fmt: skip
    _give(found, bench_perplexity.as_text, 0, output, as_json)


def start(
    checkpoint: BenchedModel = "embedded",
    precision: Annotated[str, typer.Option(help="Of the engine.")] = "int8",
    threads: BenchedThreads = None,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="LIST", help="Lengths of the prompts that are routed.")
    ] = "64,256,1024",
    repeats: Annotated[int, typer.Option(min=1, help="Loads, and prefills of each length.")] = 9,
    seed: Annotated[
        int, typer.Option(help="Of the prompts, and of routers that were never trained.")
    ] = 0,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time what comes before decode: loading a saved engine, and its routers' share of a prefill.

    Example: firstlm bench start --output start.json
    """
    from firstlm import bench_start
    from firstlm.engine.weights import check_precision

    _check(checkpoint, output)
    found = bench_start.run(
        checkpoint, precision=check_precision(precision),
        prompt_tokens=cli_input.integers(prompt_tokens, "--prompt-tokens"), repeats=repeats,
        threads=threads, seed=seed,
    )  # fmt: skip
    _give(found, bench_start.as_text, seed, output, as_json)


def _check(checkpoint: str, output: Path | None) -> None:
    """What can be known before minutes of measurements; raises ValueError."""
    cli_input.check_model_exists(checkpoint)
    if output is not None:
        check_can_write(output)


def _replace(effort: Any, given: Mapping[str, Any]) -> Any:
    """The effort with what the user gave."""
    return dataclasses.replace(effort, **{k: v for k, v in given.items() if v is not None})


def _give(
    found: dict[str, Any],
    as_text: Callable[[Mapping[str, Any]], str],
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    from firstlm import figures

    record = figures.record(found, seed=seed)
    typer.echo(json.dumps(record, indent=2) if as_json else as_text(found))
    if output is not None:
        figures.write(output, found, seed=seed)
