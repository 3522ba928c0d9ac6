"""`firstlm evaluate`: options and what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from firstlm import cli_input
from firstlm.atomic import check_can_write

# What of the options means something to --oracle, beside itself.
_OF_THE_ORACLE = {
    "oracle", "checkpoint", "data", "output", "skip_rates", "dtype", "candidates", "examples",
    "validation", "plan_examples", "max_length", "batch_size", "seed", "prompt_column",
    "answer_column", "messages_column",
}  # fmt: skip


def _option(*names: str, help: str, **kwargs):
    return typer.Option(*names, help=help, **kwargs)


def evaluate(
    context: typer.Context,
    checkpoint: Annotated[
        list[str],
        _option(
            "--checkpoint",
            "-c",
            metavar="[RATE=]FOLDER[,FOLDER…]",
            help="FiRST's checkpoint, or 'embedded-first'; several: one a training seed. With "
            "RATE=: of this rate only.",
        ),
    ],
    data: Annotated[
        list[str],
        _option(
            "--data",
            metavar="NAME|PATH",
            help="A task: debian-synopsis, debian-en-de, a JSONL file, a folder with one a "
            "split, or lm-eval:TASK, of lm-evaluation-harness or a YAML file of its kind. "
            "Several times: all of them, apart and together.",
        ),
    ],
    output: Annotated[
        Path, _option("--output", "-o", help="Folder of results, report and unfinished work.")
    ],
    skip_rates: Annotated[
        str | None,
        _option(
            "--skip-rates", metavar="LIST", help="Default: that the checkpoint was trained for."
        ),
    ] = None,
    trained: Annotated[
        list[str] | None,
        _option(
            "--trained",
            metavar="NAME=[RATE=]FOLDER[,FOLDER…]",
            help="A control that `firstlm train control=…` made, as static=runs/static/checkpoint, "
            "or under a name of your own any rival whose routers say its plans. "
            "Several folders: one a training seed.",
        ),
    ] = None,
    controls: Annotated[
        str | None,
        _option(
            "--controls",
            metavar="LIST|all|none",
            help="That need no training; default: base,lora_only,shuffled,static,random,uniform.",
        ),
    ] = None,
    weights: Annotated[
        str,
        _option(
            "--weights",
            metavar="LIST",
            help="That these controls run on: 'first' (FiRST's finetuned), 'base', or both.",
        ),
    ] = "first",
    engine: Annotated[
        Literal["hf", "native", "auto"],
        _option("--engine", help="Of quality; 'hf' decodes in batches."),
    ] = "hf",
    timing: Annotated[
        Literal["auto", "native", "hf", "none"],
        _option("--timing", help="Of latency; 'auto': native where it runs the model."),
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
    examples: Annotated[
        int | None, _option("--examples", min=2, help="Tested, of each task; default: 300.")
    ] = None,
    validation: Annotated[
        int | None,
        _option("--validation", min=2, help="Of each task, to find thresholds on; default: 96."),
    ] = None,
    plan_examples: Annotated[
        int | None,
        _option("--plan-examples", min=1, help="Of these, to find plans on; default: 16."),
    ] = None,
    draws: Annotated[
        int | None, _option("--draws", min=1, help="Random plans; default: 2.")
    ] = None,
    batch_size: Annotated[
        int | None, _option("--batch-size", min=1, help="Of the hf path; default: 16.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        _option(
            "--max-new-tokens",
            "-n",
            min=1,
            help="Of a scored answer; default: the longest validation reference of its task.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        _option("--max-length", min=1, help="Longer examples are passed over; default: 512."),
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
    prompt_column: Annotated[str | None, _option("--prompt-column", help="Of the data.")] = None,
    answer_column: Annotated[str | None, _option("--answer-column", help="Of the data.")] = None,
    messages_column: Annotated[
        str | None, _option("--messages-column", help="Of chat data.")
    ] = None,
    oracle: Annotated[
        bool,
        _option(
            "--oracle",
            help="Instead: how much there is to win by choosing layers per prompt, at each rate.",
        ),
    ] = False,
    candidates: Annotated[
        int | None, _option("--candidates", min=2, help="Plans that --oracle tries; default: 48.")
    ] = None,
    seed: Annotated[int, _option("--seed", help="Of examples, shuffling and random plans.")] = 0,
    as_json: Annotated[bool, _option("--json", help="The rows on stdout, as JSON.")] = False,
) -> None:
    """Compare FiRST with rival ways to choose layers, at the same skip rates.

    Quality on test examples, latency in turns with the full model, paired intervals; controls that
    choose plans see validation examples only. Writes results.json, examples.jsonl, report.md and
    report.html. An interrupted evaluation goes on when the same command is given again, and
    `torchrun --nproc-per-node=2 -m firstlm.cli evaluate …` (or accelerate launch) splits it over
    processes.

    Example: firstlm evaluate -c runs/first/checkpoint --trained static=runs/static/checkpoint
    --trained lora_only=runs/lora/checkpoint --data debian-synopsis --skip-rates 0.25 -o runs/eval
    """  # fmt: skip
    check_can_write(output, folder=True)
    first = _merge([_folders(text, "--checkpoint") for text in checkpoint])
    rivals: dict[str, list[dict[float | None, list[str]]]] = {}
    for text in trained or []:
        name, found, rest = text.partition("=")
        if not found:
            raise typer.BadParameter(f"--trained takes NAME=FOLDER, got {text!r}")
        rivals.setdefault(name, []).append(_folders(rest, "--trained"))
    rates = None if skip_rates is None else cli_input.numbers(skip_rates, "--skip-rates")
    cli_input.quiet_libraries()
    columns = {
        "prompt_column": prompt_column, "answer_column": answer_column,
        "messages_column": messages_column,
    }  # fmt: skip
    if candidates is not None and not oracle:
        raise typer.BadParameter("--candidates is the number of plans that --oracle tries")
    if oracle:
        if ignored := _given_in_vain(context):
            raise typer.BadParameter(
                f"--oracle scores plans on one checkpoint, by the hf path, and has no use for "
                f"{', '.join(ignored)}"
            )
        _oracle(first, data, rates, output, dtype, columns, {
            "candidates": candidates, "choosing": validation, "reported": examples,
            "importance_prompts": plan_examples, "max_length": max_length,
            "batch_size": batch_size, "seed": seed,
        })  # fmt: skip
        return
    from firstlm.evaluation import files
    from firstlm.evaluation.methods import CONTROLS, DEFAULT_CONTROLS
    from firstlm.evaluation.run import evaluate as run

    named: Sequence[str] = DEFAULT_CONTROLS
    if controls is not None:
        sets = {"all": CONTROLS, "none": ()}
        named = sets[controls] if controls in sets else cli_input.names(controls)
    if timing == "none" and not timing_prompts == repeats == new_tokens is None:
        raise typer.BadParameter(
            "--timing-prompts, --repeats and --new-tokens are of what --timing none leaves out"
        )
    if draws is not None and "random" not in named:
        raise typer.BadParameter("--draws are of the control random, which --controls leaves out")
    given: dict[str, Any] = {
        "examples": examples, "validation": validation, "plan_examples": plan_examples,
        "draws": draws, "batch_size": batch_size, "max_new_tokens": max_new_tokens,
        "max_length": max_length, "timing_prompts": timing_prompts, "repeats": repeats,
        "new_tokens": new_tokens,
    }  # fmt: skip
    run(
        first, data, rates, output=output,
        trained={name: _merge(parts) for name, parts in rivals.items()},
        controls=named, weights=cli_input.names(weights), columns=columns, engine=engine,
        timing_engine=None if timing == "none" else timing, precision=precision, dtype=dtype,
        threads=threads, seed=seed,
        effort={name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    if not leave_process_group():
        return
    written = "results.json" if as_json else "report.md"
    typer.echo((output / written).read_text(encoding="utf-8").rstrip())
    cli_input.note(f"{output}: {files.RESULTS}, {files.EXAMPLES}, report.md, report.html")


def _given_in_vain(context: typer.Context) -> list[str]:
    """Options on the command line that say nothing to --oracle."""
    found = []
    for option in context.command.params:
        # By its name: some versions of typer bring a click of their own.
        source = context.get_parameter_source(option.name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and option.name not in _OF_THE_ORACLE:
            found.append(option.opts[0])
    return found


def _oracle(
    first: dict[float | None, list[str]],
    data: list[str],
    rates: list[float] | None,
    output: Path,
    dtype: str | None,
    columns: dict[str, str | None],
    given: dict[str, Any],
) -> None:
    """One oracle a rate, in a folder of its own."""
    import os
    import sys

    from firstlm.evaluation import methods
    from firstlm.evaluation.oracle import OracleSettings, run_oracle

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--oracle measures in one process: start it without torchrun")
    first = methods.folders_of(first)
    methods.check_folders(first, "--checkpoint")
    settings = {name: value for name, value in given.items() if value is not None}
    for rate in methods.rates_of(first, rates):
        of_rate = first.get(rate, first.get(None))
        if of_rate is None:
            raise ValueError(f"--checkpoint names no folder for the skip rate {rate:g}")
        if len(of_rate) > 1:
            raise ValueError(
                f"--oracle looks at one checkpoint a skip rate, not {len(of_rate)}: "
                f"{', '.join(of_rate)}"
            )
        (folder,) = of_rate
        own = output / f"oracle-{rate:g}"
        chosen = OracleSettings(rate, **settings)
        run_oracle(
            folder, data, own, chosen,
            columns=columns, dtype=dtype, progress=sys.stderr.isatty(),
        )  # fmt: skip
        typer.echo((own / "oracle.md").read_text(encoding="utf-8").rstrip())


def _folders(text: str, option: str) -> dict[float | None, list[str]]:
    """{rate or None: folders} of [RATE=]FOLDER[,FOLDER…]."""
    rate: float | None = None
    head, found, rest = text.partition("=")
    if found:
        try:
            rate, text = float(head), rest
        except ValueError:
            rate = None  # a folder with = in its name
    folders = cli_input.names(text)
    if not folders:
        raise typer.BadParameter(f"{option} names no folder")
    return {rate: folders}


def _merge(parts: Sequence[dict[float | None, list[str]]]) -> dict[float | None, list[str]]:
    merged: dict[float | None, list[str]] = {}
    for part in parts:
        for rate, folders in part.items():
            merged.setdefault(rate, []).extend(folders)
    return merged


def leave_process_group() -> bool:
    """Ends a group of processes, whose threads could abort the exit; whether this one is main."""
    import torch.distributed

    if not torch.distributed.is_initialized():
        return True
    main = torch.distributed.get_rank() == 0
    torch.distributed.destroy_process_group()
    return main
