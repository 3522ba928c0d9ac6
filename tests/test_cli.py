"""The command: results on stdout, one-line errors on stderr, exit codes that scripts can use."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

import firstlm
from firstlm import cli, cli_input
from firstlm.skip_plan import SkipPlan
from tiny_gguf import draw_routers, tiny_model_folder
from tiny_models import tiny_base_path
from tiny_tokenizer import tiny_tokenizer

LAYERS = 6


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("cli"), layers=LAYERS)


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    model = firstlm.from_pretrained(base)
    draw_routers(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: Path):
    monkeypatch.setenv("FIRSTLM_DEBUG", "")
    monkeypatch.setenv("FIRSTLM_CACHE", str(base.parent / "cache"))

    def run(*arguments: object, stdin: str | io.StringIO = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["firstlm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(exit.value.code or 0), captured.out, captured.err)

    return run


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys\nfrom firstlm import cli\nsys.argv = ['firstlm', 'generate', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--skip-plan" in result.stdout and "--budget" in result.stdout


def test_version_and_no_arguments(command) -> None:
    assert command("--version").out == f"firstlm {firstlm.__version__}\n"
    nothing = command()
    assert nothing.code == 2
    assert "train" in nothing.out + nothing.err


def test_plan_prints_one_line_a_prompt(command, checkpoint: Path) -> None:
    result = command("plan", "-c", checkpoint, "a", "Summarize this description:\nlong")
    lines = result.out.splitlines()
    assert result.code == 0 and len(lines) == 2
    for line in lines:
        assert set(line.split()[0]) <= set("▮▯") and len(line.split()[0]) == LAYERS
    assert lines[1].endswith("Summarize this description: long")
    detailed = command("plan", "-c", checkpoint, "--keep-prob", "a").out.splitlines()
    assert len(detailed) == 1 + LAYERS
    kept = sum(line.endswith(" kept") for line in detailed)
    assert kept == detailed[0].count("▮")


def test_plan_json_feeds_generate(command, checkpoint: Path, tmp_path: Path) -> None:
    row = json.loads(command("plan", "-c", checkpoint, "--json", "--budget", "0.5",
                             "--budget-mode", "exact", "a").out)  # fmt: skip
    assert row["skip_rate"] == 0.5 and len(row["keep_prob"]) == LAYERS
    (tmp_path / "plan.json").write_text(json.dumps(row))
    for plan in (json.dumps(row["skip_plan"]), tmp_path / "plan.json"):
        result = command("generate", "-c", checkpoint, "--skip-plan", plan, "-n", 3, "--json", "b")
        assert json.loads(result.out)["skip_plan"] == row["skip_plan"]


def test_generate_reads_argument_stdin_and_jsonl_alike(
    command, checkpoint: Path, tmp_path: Path
) -> None:
    options = ("generate", "-c", checkpoint, "-n", 4, "--json")
    by_argument = json.loads(command(*options, "hello").out)
    assert 1 <= by_argument["tokens"] <= 4
    assert json.loads(command(*options, stdin="hello\n").out) == by_argument
    assert json.loads(command(*options, "-", stdin="hello\n").out) == by_argument
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "no"}]
    file.write_text(json.dumps({"prompt": "hello"}) + "\n\n" + json.dumps({"messages": chat}))
    rows = [json.loads(line) for line in command(*options, "--file", file).out.splitlines()]
    assert [row["text"] for row in rows] == [by_argument["text"]] * 2
    assert rows[0]["skip_plan"] == by_argument["skip_plan"]


def test_generate_streams_the_same_text(command, checkpoint: Path) -> None:
    plain = command("generate", "-c", checkpoint, "-n", 5, "--no-stream", "hello")
    streamed = command("generate", "-c", checkpoint, "-n", 5, "--stream", "hello")
    assert plain.out.strip() == streamed.out.strip() != ""
    assert "▮" in plain.err and "▮" not in plain.out


def test_sampling_is_seeded(command, checkpoint: Path) -> None:
    options = ("generate", "-c", checkpoint, "-n", 8, "--temperature", 1.5, "--top-k", 50, "x")
    texts = [command(*options, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_top_p_of_0_is_the_likeliest_token(command, checkpoint: Path) -> None:
    options = ("generate", "-c", checkpoint, "-n", 8, "x")
    narrow = command(*options, "--temperature", 5, "--top-p", 0).out
    assert narrow == command(*options).out


def test_a_base_without_routers_keeps_every_layer(command, base: Path) -> None:
    result = command("plan", "-c", base, "--raw", "a")
    assert result.out.split()[0] == "▮" * LAYERS
    assert "no trained routers" in result.err


def test_info_reads_a_checkpoint_a_base_and_the_installation(
    command, checkpoint: Path, base: Path
) -> None:
    facts = json.loads(command("info", checkpoint, "--json").out)
    assert facts["base"]["model"] == str(base) and facts["base"]["layers"] == LAYERS
    assert facts["routers"]["protected"] == [0, 1, LAYERS - 1]
    assert facts["routers"]["parameters"] == LAYERS * (64 + 1)
    assert facts["adapter"] is None and facts["tokenizer"] is True
    assert json.loads(command("info", base, "--json").out)["layers"] == LAYERS
    install = json.loads(command("info", "--json").out)
    assert install["versions"]["torch"] and install["native"]["isa"]
    assert "thresholds" in command("info", checkpoint).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "no/such/folder"], "no/such/folder does not exist"),
        (["plan", "-c", "./nothing", "a"], "./nothing does not exist"),
        (["generate", "-c", "{checkpoint}", "--budget", "1.5", "a"], "1.5"),
        (
            ["generate", "-c", "{checkpoint}", "--budget", "0.3", "a"],
            "no thresholds are calibrated",
        ),
        (["plan", "-c", "{checkpoint}", "--budget", "0.3", "a"], "--budget-mode exact"),
        (["calibrate", "embedded-first", "--data", "debian-synopsis"], "is not rewritten: copy /"),
        (["generate", "-c", "{checkpoint}", "--skip-plan", "▮▯", "a"], "2 layers"),
        (["generate", "-c", "{checkpoint}", "--skip-plan", "none.json", "a"], "none.json"),
        (["generate", "-c", "{checkpoint}", "--file", "none.jsonl"], "none.jsonl"),
        (["generate", "-c", "{checkpoint}"], "stdin holds no prompt"),
        (["train", "skip_rat=0.2"], "did you mean 'skip_rate'"),
        (["train", "--config", "none.yaml"], "none.yaml"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(
    command, checkpoint: Path, arguments: list[str], message: str
) -> None:
    arguments = [argument.format(checkpoint=checkpoint) for argument in arguments]
    result = command(*arguments)
    assert result.code == 1 and result.out == ""
    assert result.err.startswith("firstlm: error: ") and result.err.count("\n") == 1
    assert message in result.err
    debugged = command(*arguments, "--debug")
    assert debugged.code == 1 and "Traceback (most recent call last)" in debugged.err


def test_wrong_usage_exits_with_2(command, checkpoint: Path) -> None:
    for arguments in (
        ["generate", "--no-such-option"],
        ["generate", "-c", checkpoint, "--top-k", 5, "a"],
        ["generate", "-c", checkpoint, "--budget", 0.3, "--skip-plan", "full", "a"],
        ["plan", "--budget-mode", "best", "a"],
        ["plan", "-c", checkpoint, "--budget-mode", "exact", "a"],
        ["generate", "-c", checkpoint, "--budget-mode", "exact", "a"],
        ["generate", "-c", checkpoint, "--stream", "--json", "a"],
        ["generate", "a", "--file", "b"],
        ["train"],
    ):
        result = command(*arguments)
        assert result.code == 2, arguments
        assert "Traceback" not in result.err


def test_options_of_measuring_are_refused_where_nothing_is_measured(
    command, checkpoint: Path
) -> None:
    before = (checkpoint / "router_config.json").read_bytes()
    for option in (["--engine", "hf"], ["--precision", "int8"], ["--examples", 4],
                   ["--timing-prompts", 1], ["--repeats", 1], ["--new-tokens", 3],
                   ["--max-new-tokens", 3]):  # fmt: skip
        result = command("calibrate", checkpoint, "--data", "debian-synopsis", *option)
        assert result.code == 2 and option[0] in result.err, option
    assert (checkpoint / "router_config.json").read_bytes() == before


def test_streaming_is_of_one_answer(command, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    result = command("generate", "-c", checkpoint, "--stream", "--file", file)
    assert result.code == 2 and result.out == ""


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("it began to work")

    for module in ("bench_decode", "bench_perplexity", "bench_start", "bench_ops"):
        monkeypatch.setattr(f"firstlm.{module}.run", work)
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "x"
    for arguments in (
        ["bench", "decode", "-c", checkpoint, "-o", inside],
        ["bench", "perplexity", "-c", checkpoint, "-o", tmp_path],
        ["bench", "start", "-c", checkpoint, "-o", inside],
        ["bench", "ops", "--json", tmp_path],
        ["evaluate", "-c", checkpoint, "--data", "debian-synopsis", "-o", tmp_path / "file"],
        ["calibrate", checkpoint, "--data", "debian-synopsis", "--work-dir", tmp_path / "file"],
    ):
        result = command(*arguments)
        assert result.code == 1 and result.err.count("\n") == 1, arguments
        assert str(arguments[-1]) in result.err and "it began to work" not in result.err


def test_interrupt_exits_with_130(
    command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_input, "load", interrupted)
    result = command("plan", "-c", checkpoint, "a")
    assert result.code == 130 and result.err == "firstlm: error: interrupted.\n"


def test_malformed_jsonl_names_its_line(command, tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    for second, message in (("{", "line 2 of"), ('{"prompt": ""}', "empty prompt")):
        file.write_text('{"prompt": "a"}\n' + second)
        result = command("plan", "-c", checkpoint, "--file", file)
        assert result.code == 1 and message in result.err
    file.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    result = command("plan", "-c", checkpoint, "--file", file)
    assert result.err == f"firstlm: error: {file} is not UTF-8 text\n"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"prompt": 3}', "line 2 of"),
        ('{"prompt": {"text": "a"}}', "line 2 of"),
        ('{"messages": "a", "prompt": ["a"]}', "neither text nor a list"),
        ('{"messages": [{"role": "user"}]}', "neither text nor a list"),
        ('{"messages": [{"role": "user", "content": null}]}', "line 2 of"),
    ],
)
def test_prompts_that_are_neither_text_nor_chat_name_their_line(
    command, tmp_path: Path, checkpoint: Path, second: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + second)
    result = command("generate", "-c", checkpoint, "--file", file)
    assert result.code == 1 and message in result.err and result.err.count("\n") == 1


def test_tokens_are_counted_up_to_any_end_of_the_generation_config(
    command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = cli_input.load
    ids: list[int] = []

    def with_ends(*arguments):
        model, tokenizer = original(*arguments)
        generated = model.generate

        def generate(**kwargs):
            output = generated(**kwargs)
            ids[:] = output.sequences[0, kwargs["input_ids"].shape[1] :].tolist()
            return output

        model.generate = generate
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
        return model, tokenizer

    ends: list[int] = []
    monkeypatch.setattr(cli_input, "load", with_ends)
    options = ("generate", "-c", checkpoint, "--engine", "hf", "-n", 6, "--json", "--file")
    file = checkpoint.parent / "two.jsonl"
    file.write_text('{"prompt": "hello"}\n{"prompt": "another"}\n')
    command(*options, file)
    ends.append(ids[2])
    rows = [json.loads(line) for line in command(*options, file).out.splitlines()]
    assert rows[0]["tokens"] == ids.index(ends[0]) + 1 <= 3


def test_settings_may_be_flags(command) -> None:
    flags = ("--lora.steps", 7, "--skip_rate=0.3", "seed=5", "--router.protected", "[0, -1]")
    config = json.loads(command("train", *flags, "--print-config", "--json", "--lora.lr=1e-4").out)
    assert config["lora"]["steps"] == 7 and config["skip_rate"] == 0.3 and config["seed"] == 5
    assert config["router"]["protected"] == [0, -1] and config["lora"]["lr"] == 1e-4
    near = command("train", "--lora.step", 7)
    assert near.code == 1 and "did you mean 'lora.steps'" in near.err
    assert command("train", "--seed", -1).code == 1  # a negative number is a value
    for arguments in (["--lora.steps"], ["--lora.steps", "--seed=1"]):
        result = command("train", *arguments)
        assert result.code == 2 and "needs a value" in result.err
    assert "--NAME VALUE" in command("train", "--help").out


def test_train_prints_settings_and_config_without_training(command) -> None:
    settings = json.loads(command("train", "--settings", "--json").out)
    assert {"skip_rate", "lora.steps"} <= {setting["name"] for setting in settings}
    assert "lora.steps = " in command("train", "--settings").out
    config = json.loads(command("train", "--print-config", "--json", "skip_rate=0.3").out)
    assert config["skip_rate"] == 0.3


def test_train_generate_and_info_on_its_checkpoint(command, base: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"count {i}", "answer": f"{i} {i + 1}"}) + "\n" for i in range(80)
        )
    )
    (tmp_path / "run.yaml").write_text(
        f"base: {base}\noutput_dir: {tmp_path / 'run'}\nskip_rate: 0.25\nprogress: false\n"
        f"data: {{train: {tmp_path / 'train.jsonl'}, max_length: 128}}\n"
        "warmup: {steps: 1}\nrouters: {steps: 2}\nlora: {steps: 2}\nimportance_examples: 2\n"
    )
    first = command("train", "--config", tmp_path / "run.yaml", "batch_size=2")
    assert first.code == 0, first.err
    checkpoint = first.out.splitlines()[-1].removeprefix("checkpoint: ")
    again = json.loads(
        command("train", "--config", tmp_path / "run.yaml", "batch_size=2", "--json").out
    )
    assert again["checkpoint"] == checkpoint
    assert [phase["name"] for phase in again["phases"]] == ["warmup", "routers", "lora"]
    other = command("train", "--config", tmp_path / "run.yaml", "batch_size=2", "lora.lr=1e-4")
    assert other.code == 1 and "lora.lr" in other.err and other.err.count("\n") == 1
    facts = json.loads(command("info", checkpoint, "--json").out)
    assert facts["adapter"]["rank"] == 16 and 0.25 in facts["routers"]["calibrated_skip_rates"]
    answer = command("generate", "-c", checkpoint, "--budget", 0.25, "-n", 2, "--json", "count 3")
    assert json.loads(answer.out)["tokens"] >= 1


def test_calibrate_prints_what_it_found_and_generate_uses_it(
    command, checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    data = tmp_path / "held-out.jsonl"
    data.write_text("".join(json.dumps({"q": f"count {i}", "a": f"{i}"}) + "\n" for i in range(30)))
    options = ("calibrate", folder, "--data", data, "--prompt-column", "q", "--answer-column", "a",
               "--prompts", 10, "--rates", "0.2,0.4")  # fmt: skip
    table = command(*options)
    assert table.code == 0, table.err
    assert [line.split()[0] for line in table.out.splitlines()[2:]] == ["asked", "0.2", "0.4"]
    assert command("generate", "-c", folder, "--budget", 0.4, "-n", 2, "count 3").code == 0
    short = ("--examples", 4, "--timing-prompts", 1, "--repeats", 1, "--new-tokens", 3)
    found = json.loads(command(*options, *short, "--tpot-ms", 1e6, "--json").out)
    assert found["choice"]["met"] and found["choice"]["rate"] == 0 and found["schema_version"] == 1
    assert found["choice"]["path"]["precision"] == "int8" and len(found["rows"]) == 3
    unmet = command(*options, *short, "--tpot-reduction", 0.9999, "--engine", "hf")
    assert unmet.code == 0 and "fallback: the full model" in unmet.out
    assert "the request cannot be met" in unmet.err
    assert json.loads(command("info", folder, "--json").out)["routers"]["chosen"]["met"] is False
    plan = json.loads(command("plan", "-c", folder, "--json", "count 3").out)
    assert plan["skip_rate"] == 0
    for arguments, code, message in (
        (["calibrate", folder], 2, "--data"),
        ([*options, "--rates", "a"], 2, "takes numbers"),
        ([*options, "--rates", "0.9"], 1, "3 of 6 layers are protected"),
        ([*options, "--tpot-ms", 3, "--tpot-reduction", 0.3], 1, "give one"),
        (["calibrate", folder / "none", "--data", data], 1, "does not exist"),
    ):
        wrong = command(*arguments)
        assert wrong.code == code and message in wrong.err and "Traceback" not in wrong.err


def test_plans_in_every_written_form() -> None:
    plan = SkipPlan((0, 2), 3)
    assert cli_input.parse_plan("▮▯▮", 3) == cli_input.parse_plan(plan.to_json(), 3) == plan
    assert cli_input.parse_plan("full", 3) == SkipPlan.full(3)


@pytest.mark.parametrize("content", [b"[0, 2]", b'{"kept": [0]}\n{"kept": [1]}\n', b"0 2", b"\xff"])
def test_a_file_that_holds_no_plan_is_named_with_what_is_accepted(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(ValueError, match=r"/p is not one JSON object.*one line of.*\"kept\""):
        cli_input.parse_plan(str(tmp_path / "p"), 3)


def test_it_says_which_path_runs_and_both_answer_alike(
    command, checkpoint: Path, tmp_path: Path
) -> None:
    options = ("generate", "-c", checkpoint, "-n", 6)
    native = command(*options, "--engine", "native", "--precision", "float32", "hello")
    hf = command(*options, "--engine", "hf", "hello")
    assert native.out == hf.out != ""
    assert "native engine, float32" in native.err and "hf path, float32" in hf.err
    assert "native engine, int8, 1 threads" in command(*options, "--threads", 1, "hello").err
    firstlm.Engine.from_pretrained(checkpoint, "float32", cache=False).save(tmp_path / "saved")
    saved = command("generate", "-c", tmp_path / "saved", "-n", 6, "hello")
    assert saved.out == hf.out and "native engine, float32" in saved.err
    assert "hf path, float64" in command(*options, "--dtype", "float64", "hello").err
    for wrong in (["--engine", "hf", "--precision", "int8"], ["--engine", "native", "--dtype"]):
        extra = ["float32"] if wrong[-1] == "--dtype" else []
        assert command(*options, *wrong, *extra, "hello").code == 2


def test_other_families_take_the_hf_path(command, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_base_path("gpt2"), folder)
    tiny_tokenizer().save_pretrained(folder)
    options = ("generate", "-c", folder, "-n", 3, "a b")
    result = command(*options)
    assert result.code == 0
    assert "does not run the family 'gpt2'" in result.err and "hf path, float32" in result.err
    assert "without effect" not in result.err
    dropped = command(*options, "--precision", "int4")
    assert dropped.code == 0 and "without effect there: --precision int4" in dropped.err
    refused = command(*options, "--engine", "native")
    assert refused.code == 1 and "'gpt2'" in refused.err


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_without_a_prompt_on_a_terminal_it_converses(
    command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    lines = iter(["hello", "", "and then?", "/new", "hello"])

    def question(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", question)
    result = command("generate", "-c", checkpoint, "--engine", engine, "-n", 4, stdin=Terminal())
    assert result.code == 0
    plans = [line.split()[0] for line in result.err.splitlines() if "▮" in line]
    assert len(plans) == 3 and len(set(plans)) == 1
    answers = [line for line in result.out.splitlines() if line]
    assert answers[0] == answers[-1]
