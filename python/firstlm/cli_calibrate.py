"""`firstlm calibrate`: options and what is printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from firstlm import cli_input


def _option(*names: str, help: str, **kwargs):
    return typer.Option(*names, help=help, **kwargs)


def calibrate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Folder that firstlm trained; its router_config.json is rewritten.",
        ),
    ],
    data: Annotated[
        list[str],
        _option(
            "--data",
            metavar="NAME|PATH",
            help="Held-out examples: debian-synopsis, debian-en-de, a JSONL file, or a folder with "
            "one a split. Several times: a mixture.",
        ),
    ],
    rates: Annotated[
        str | None,
        _option(
            "--rates",
            metavar="LIST",
            help="Asked skip rates; default: 0.1,0.2,…,0.6, as far as protected layers allow.",
        ),
    ] = None,
    tpot_ms: Annotated[
        float | None, _option("--tpot-ms", help="Time per output token, at most, here.")
    ] = None,
    tpot_reduction: Annotated[
        float | None,
        _option("--tpot-reduction", help="Share of the full model's TPOT to go, at least: 0.30."),
    ] = None,
    min_quality: Annotated[
        float | None,
        _option("--min-quality", help="Share of the full model's quality to stay: 0.98."),
    ] = None,
    metric: Annotated[
        Literal["rouge_l", "exact_match", "chrf", "cross_entropy", "perplexity"] | None,
        _option("--metric", help="Of quality; default: rouge_l."),
    ] = None,
    default_rate: Annotated[
        float | None,
        _option("--default-rate", help="Make this rate the default, without measuring."),
    ] = None,
    split: Annotated[
        Literal["validation", "test"],
        _option("--split", help="Of corpora and folders; a single file is taken as a whole."),
    ] = "validation",
    prompt_column: Annotated[str | None, _option("--prompt-column", help="Of the data.")] = None,
    answer_column: Annotated[str | None, _option("--answer-column", help="Of the data.")] = None,
    messages_column: Annotated[
        str | None, _option("--messages-column", help="Of chat data.")
    ] = None,
    engine: Annotated[
        Literal["auto", "native", "hf"],
        _option("--engine", help="What is measured; 'auto': native where it runs the model."),
    ] = "auto",
    precision: Annotated[
        Literal["float32", "bfloat16", "int8", "int4"] | None,
        _option("--precision", help="Of the native engine's weights; default: int8."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None,
        _option("--dtype", help="Of the hf path's weights; default: as stored."),
    ] = None,
    threads: Annotated[
        int | None, _option("--threads", min=1, help="Default: as many as torch uses.")
    ] = None,
    prompts: Annotated[
        int | None, _option("--prompts", min=2, help="Of each part; default: 128.")
    ] = None,
    examples: Annotated[
        int | None, _option("--examples", min=2, help="Of quality; default: 100.")
    ] = None,
    timing_prompts: Annotated[
        int | None, _option("--timing-prompts", min=1, help="Of TPOT; default: 8.")
    ] = None,
    repeats: Annotated[
        int | None, _option("--repeats", min=1, help="Of every timed prompt; default: 3.")
    ] = None,
    new_tokens: Annotated[
        int | None, _option("--new-tokens", min=2, help="Of a timed answer; default: 32.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        _option("--max-new-tokens", "-n", min=1, help="Of a scored answer; default: 64."),
    ] = None,
    max_length: Annotated[
        int | None,
        _option("--max-length", min=1, help="Longer examples are passed over; default: 512."),
    ] = None,
    seed: Annotated[int, _option("--seed", help="Of the draw of examples.")] = 0,
    work_dir: Annotated[
        Path | None,
        _option(
            "--work-dir", help="Where measurements are kept until the end; default: in CHECKPOINT."
        ),
    ] = None,
    as_json: Annotated[bool, _option("--json", help="Machine-readable result on stdout.")] = False,
) -> None:
    """Find thresholds for average skip rates, and choose one for a latency budget by measuring.

    Nothing is trained. With --tpot-ms, --tpot-reduction or --min-quality, TPOT and quality are
    measured on this machine, the full model in turns with every rate, and the chosen thresholds
    become the checkpoint's default. If no rate satisfies the request, the full model does. An
    interrupted calibration goes on when the same command is given again.

    Example: firstlm calibrate runs/mine/checkpoint --data debian-synopsis --tpot-reduction 0.3
    --min-quality 0.98
    """  # fmt: skip
    asked = None if rates is None else cli_input.numbers(rates, "--rates")
    if tpot_ms is None and tpot_reduction is None and min_quality is None:
        _refuse_unless_measured({
            "--engine": engine != "auto", "--precision": precision, "--examples": examples,
            "--timing-prompts": timing_prompts, "--repeats": repeats, "--new-tokens": new_tokens,
            "--max-new-tokens": max_new_tokens,
        })  # fmt: skip
    cli_input.check_model_exists(checkpoint)
    cli_input.quiet_libraries()
    from firstlm.calibration import Effort
    from firstlm.calibration import calibrate as run
    from firstlm.calibration_text import as_text

    given = {
        "prompts": prompts, "examples": examples, "timing_prompts": timing_prompts,
        "repeats": repeats, "new_tokens": new_tokens, "max_new_tokens": max_new_tokens,
        "max_length": max_length,
    }  # fmt: skip
    columns = {
        "prompt_column": prompt_column, "answer_column": answer_column,
        "messages_column": messages_column,
    }  # fmt: skip
    result = run(
        checkpoint, data[0] if len(data) == 1 else data, asked, split=split, columns=columns,
        tpot_ms=tpot_ms, tpot_reduction=tpot_reduction, min_quality=min_quality, metric=metric,
        default_rate=default_rate, engine=engine, precision=precision, dtype=dtype,
        threads=threads, seed=seed, work_dir=work_dir,
        effort=dataclasses.replace(Effort(), **{k: v for k, v in given.items() if v is not None}),
    )  # fmt: skip
    typer.echo(json.dumps(result.to_json(), indent=2) if as_json else as_text(result))
    if result.choice is not None and not result.choice["met"]:
        cli_input.note("the request cannot be met: every layer is kept by default now")


def _refuse_unless_measured(given: Mapping[str, object]) -> None:
    """Of options that say how latency and quality are measured, none may be given in vain."""
    if ignored := [option for option, value in given.items() if value]:
        raise typer.BadParameter(
            f"{', '.join(ignored)}: only with --tpot-ms, --tpot-reduction or --min-quality, "
            "without which nothing is timed or scored"
        )
