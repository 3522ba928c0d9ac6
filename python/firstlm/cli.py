"""The `firstlm` command: train, calibrate, evaluate, generate, plan, info, lm-eval, bench.

Results go to stdout, everything else (progress, notes, errors) to stderr. Torch and transformers
are imported inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import firstlm
from firstlm import cli_bench, cli_calibrate, cli_evaluate, cli_input

EPILOG = (
    "Exit codes: 0 done, 1 an error (one line on stderr; --debug or FIRSTLM_DEBUG=1 shows the "
    "traceback), 2 wrong usage, 130 interrupted."
)
app = typer.Typer(
    name="firstlm",
    help="Prompt-adaptive layer skipping (FiRST): every prompt runs its own subset of a model's "
    "decoder layers, chosen once by routers while the prompt is read.\n\nStart with: "
    "firstlm generate 'Summarize this Debian package description in one line: ...'",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Checkpoint = Annotated[
    str,
    typer.Option(
        "--checkpoint", "-c", metavar="MODEL",
        help="What firstlm trained, or any base model: folder, hub id, .gguf, or "
        "'embedded'. A base without routers keeps every layer. 'embedded-first': the embedded "
        "model with the routers that ship with firstlm, for package descriptions and German.",
    ),
]  # fmt: skip
Budget = Annotated[
    float | None,
    typer.Option(help="Asked skip rate in [0, 1), instead of the checkpoint's own thresholds."),
]
BudgetMode = Annotated[
    Literal["threshold", "exact"],
    typer.Option(
        help="'threshold': calibrated thresholds, right on average, one prefill. 'exact': the same "
        "number of layers for every prompt; the prompt is prefilled twice."
    ),
]
PromptFile = Annotated[
    str | None,
    typer.Option(
        "--file", "-f", metavar="JSONL",
        help='JSON lines, each {"prompt": text} or {"messages": [...]}; "-" is stdin.',
    ),
]  # fmt: skip
Raw = Annotated[
    bool, typer.Option("--raw", help="Give the text as it is, without the chat template.")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"] | None,
    typer.Option(help="Of the weights; default: as stored."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if version:
        typer.echo(f"firstlm {firstlm.__version__}")
        raise typer.Exit()


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns any failure of a command into one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as error:
            _print_error(f"interrupted. {error}".strip())
            raise typer.Exit(128 + getattr(error, "signal_number", 2)) from None
        except BrokenPipeError:  # the reader of stdout, say `head`, has gone
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if _debugging():
                traceback.print_exc()
            _print_error(_one_line(error))
            raise typer.Exit(1) from None

    return run


# Settings as flags are options that only TrainConfig knows: click hands them over with the rest.
@app.command(context_settings={"ignore_unknown_options": True})
@reports_errors
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE | --NAME VALUE]...",
            help="Settings that replace those of the file, as lora.steps=100, --lora.steps 100 or "
            "--lora.steps=100; see --settings.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with settings, as configs/quickstart.yaml."),
    ] = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="List every setting with its default, and stop.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Check and print the settings, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Finetune: warm-up of LoRA under random layer drop, routers (phase 1), LoRA (phase 2).

    An interrupted run goes on where it stopped when the same command is given again. The result is
    a folder that `firstlm generate --checkpoint` and `firstlm.from_pretrained` take.

    Example: firstlm train --config configs/quickstart.yaml skip_rate=0.3 output_dir=runs/mine
    """
    from firstlm.train_config import TrainConfig

    if settings:
        _print_settings(as_json)
        return
    values = cli_input.settings_of(overrides or [])
    if config is not None:
        chosen = TrainConfig.from_yaml(config, values)
    elif values or print_config:
        chosen = TrainConfig.from_dict({}, values)
    else:
        raise typer.BadParameter(
            "give --config FILE, or settings as NAME=VALUE or --NAME VALUE; see --settings"
        )
    chosen.validate()
    if print_config:
        import yaml

        as_text = json.dumps(chosen.to_dict(), indent=2) if as_json else None
        typer.echo(as_text or yaml.safe_dump(chosen.to_dict(), sort_keys=False).rstrip())
        return
    import firstlm.training

    result = firstlm.training.train(chosen)
    cli_evaluate.leave_process_group()
    typer.echo(json.dumps(result.to_json(), indent=2) if as_json else _training_report(result))


app.command("calibrate")(reports_errors(cli_calibrate.calibrate))
app.command("evaluate")(reports_errors(cli_evaluate.evaluate))


@app.command()
@reports_errors
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The prompt; without it (or with '-') stdin is read, or a conversation begins "
            "if that is a terminal."
        ),
    ] = None,
    checkpoint: Checkpoint = "embedded-first",
    file: PromptFile = None,
    raw: Raw = False,
    skip_plan: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help="Layers to keep, instead of the routers' choice: a plan's "
            "JSON, a file with it, or its text form ▮▮▯▮… ('full': every layer).",
        ),
    ] = None,
    budget: Budget = None,
    budget_mode: BudgetMode = "threshold",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    stream: Annotated[
        bool | None,
        typer.Option(help="Print words as they come; default: on a terminal."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of --file decoded together.")] = 8,
    engine: Annotated[
        Literal["auto", "native", "hf"],
        typer.Option(
            help="'native': firstlm's own decode loop, from packed weights; 'hf': transformers' "
            "generate; 'auto': native where it runs the model."
        ),
    ] = "auto",
    precision: Annotated[
        Literal["float32", "bfloat16", "int8", "int4"] | None,
        typer.Option(help="Of the native engine's weights; default: int8."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: as many as torch uses.")
    ] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, or every line of a JSONL file, each under a skip plan of its own.

    Without a prompt, on a terminal: a conversation. The answer goes to stdout, the plan and the
    path that runs to stderr. With --json: one JSON object a prompt and line, with text, tokens,
    skip_plan, skip_rate and keep_prob.

    Example: firstlm generate -c runs/quickstart/checkpoint --budget 0.3 'Summarize: ...'
    """
    interactive = prompt is None and file is None and sys.stdin.isatty() and not as_json
    if interactive and raw:
        raise typer.BadParameter("--raw needs a prompt: a conversation needs the chat template")
    cli_input.check_plan_options(skip_plan, budget, budget_mode)
    prompts = cli_input.read_prompts([prompt] if prompt is not None else [], file, interactive)
    if stream and (as_json or len(prompts) > 1):
        raise typer.BadParameter("--stream is for the text of one answer: no --json, one prompt")
    sampling: dict[str, Any] = {"temperature": temperature}
    if temperature > 0:
        sampling |= {"top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
    elif top_k is not None or top_p is not None:
        raise typer.BadParameter("--top-k and --top-p need --temperature above 0")
    from firstlm import cli_runner

    options = cli_runner.Options(
        raw, max_new_tokens, sampling, seed, skip_plan, budget, budget_mode
    )
    runner = cli_runner.choose(engine, checkpoint, precision, threads, dtype, options)
    if interactive:
        cli_runner.converse(runner)
        return
    if stream is None:
        stream = sys.stdout.isatty()
    streaming = stream and len(prompts) == 1 and not as_json
    say = functools.partial(typer.echo, nl=False) if streaming else None
    for rows in cli_input.batches(prompts, batch_size):
        for row, answer in zip(rows, runner.answer(rows, say), strict=True):
            if as_json:
                fields = {"prompt": row, "text": answer.text, "tokens": answer.tokens}
                plan_fields = cli_input.plan_fields(answer.skip_plan, answer.keep_prob)
                typer.echo(json.dumps(fields | plan_fields))
                continue
            typer.echo("" if streaming else answer.text)
            rate = f"skip rate {answer.skip_plan.skip_rate:.1%}"
            cli_input.note(f"{answer.skip_plan}  {rate}  {runner.name}")
    if as_json:
        cli_input.note(runner.name)


@app.command()
@reports_errors
def plan(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts; without any (or with '-') stdin is read as one."),
    ] = None,
    checkpoint: Checkpoint = "embedded-first",
    file: PromptFile = None,
    raw: Raw = False,
    budget: Budget = None,
    budget_mode: BudgetMode = "threshold",
    keep_prob: Annotated[
        bool, typer.Option("--keep-prob", help="Also the keep probability of every layer.")
    ] = False,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Show which layers each prompt keeps, without decoding: one line ▮▮▯▮… a prompt.

    With --json: one JSON object a prompt and line, which `generate --skip-plan` takes.

    Example: firstlm plan -c runs/quickstart/checkpoint 'Summarize: ...' 'Translate: ...'
    """
    cli_input.check_plan_options(None, budget, budget_mode)
    texts = cli_input.read_prompts(prompts or [], file)
    model, tokenizer = cli_input.load(checkpoint, dtype)
    choice = cli_input.plan_arguments(len(model.decoder_layers), None, budget, budget_mode)
    for rows in cli_input.batches(texts, 8):
        routing = model.plan(**cli_input.encode(rows, tokenizer, model, raw), **choice)
        for row, skip_plan in enumerate(routing.skip_plans):
            if as_json:
                fields = cli_input.plan_fields(skip_plan, routing.keep_prob[row])
                typer.echo(json.dumps({"prompt": rows[row]} | fields))
                continue
            typer.echo(f"{skip_plan}  {skip_plan.skip_rate:6.1%}  {cli_input.shorten(rows[row])}")
            if keep_prob:
                probabilities = routing.keep_prob[row].tolist()
                kept = set(skip_plan.kept)
                for layer, probability in enumerate(probabilities):
                    mark = "kept" if layer in kept else "skipped"
                    typer.echo(f"  layer {layer:3d}  {probability:.3f}  {mark}")


@app.command()
@reports_errors
def info(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A checkpoint or a base model: folder or hub id."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Describe a checkpoint (base, routers, thresholds, calibration); without one: this install.

    Reads files only; no model is loaded.
    """
    from firstlm import cli_info

    facts = cli_info.installation() if checkpoint is None else cli_info.model(checkpoint)
    typer.echo(json.dumps(facts, indent=2) if as_json else cli_info.as_text(facts))


@app.command(
    "lm-eval",
    add_help_option=False,  # --help is lm-eval's
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@reports_errors
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness with the model "firstlm"; takes lm-eval's own arguments.

    Example: firstlm lm-eval --model firstlm --model_args pretrained=runs/quickstart/checkpoint
    --tasks hellaswag
    """
    from firstlm import lm_eval_command

    lm_eval_command.run(context.args)


bench = typer.Typer(
    name="bench",
    help="Measure this machine. Run it alone: other work on the machine is noise.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(bench)


@bench.callback()
def bench_options() -> None: ...


@bench.command("ops")
@reports_errors
def bench_ops(
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Write the figures there as well.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: as many as torch uses.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the drawn tensors.")] = 0,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Tiny tensors, to see that it runs; no figures to quote."),
    ] = False,
) -> None:
    """Time every native op beside torch's own ops, with the bars that they are held to.

    Example: firstlm bench ops --json ops.json
    """
    from firstlm import bench_contests, bench_ops, figures
    from firstlm.atomic import check_can_write

    if json_path is not None:
        check_can_write(json_path)
    found = bench_ops.run(bench_contests.QUICK if quick else None, threads=threads, seed=seed)
    typer.echo(bench_ops.as_text(found))
    if json_path is not None:
        figures.write(json_path, found, seed=seed)


bench.command("decode")(reports_errors(cli_bench.decode))
bench.command("perplexity")(reports_errors(cli_bench.perplexity))
bench.command("start")(reports_errors(cli_bench.start))


# ---- what is printed ----


def _print_settings(as_json: bool) -> None:
    from firstlm.train_config import config_fields

    fields = config_fields()
    if as_json:
        typer.echo(json.dumps([vars(f) for f in fields], indent=2))
        return
    for f in fields:
        typer.echo(f"{f.name} = {json.dumps(f.default)}\n    {f.help}")


def _training_report(result: Any) -> str:
    """The phases of a finished run and what its health report says, for a reader."""
    lines = [
        f"{phase.name:<8} {phase.steps:5d} steps  validation CE {phase.cross_entropy:.3f}"
        f"  skip rate {phase.skip_rate:.1%} (asked: {phase.skip_rate_asked:.1%})"
        for phase in result.phases
    ]
    for name, count in result.too_long.items():
        if count:
            lines.append(f"{count} {name} examples were longer than data.max_length and left out")
    health = result.health
    lines += [
        f"held-out prompts: skip rate {health.skip_rate:.1%}, {health.distinct_plans} plans over "
        f"{health.prompts} prompts, cross-entropy {health.cross_entropy:.3f} "
        f"({health.cross_entropy_full:.3f} when no layer is skipped)",
        *(f"warning: {warning}" for warning in health.warnings()),
        f"report: {result.output_dir / 'health.md'}",
        f"checkpoint: {result.checkpoint}",
    ]
    return "\n".join(lines)


def _print_error(text: str) -> None:
    typer.echo(f"firstlm: error: {text}", err=True)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).replace(":\n  - ", ": ").replace("\n  - ", "; ").split())
    known = isinstance(error, (ValueError, TypeError, RuntimeError, OSError, ImportError))
    return text if known and text else f"{type(error).__name__}: {text}"


def _debugging() -> bool:
    return os.environ.get("FIRSTLM_DEBUG", "") not in ("", "0")


def main() -> None:
    """Entry point. `--debug` counts wherever it stands, also after the command's name."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" in arguments[:end]:
        os.environ["FIRSTLM_DEBUG"] = "1"
        arguments = [a for i, a in enumerate(arguments) if a != "--debug" or i > end]
    app(args=arguments, prog_name="firstlm")


if __name__ == "__main__":  # for torchrun -m firstlm.cli
    main()
