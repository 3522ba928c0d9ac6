"""lm-evaluation-harness: as its own hf model where every layer is kept; plans of contexts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

import firstlm
from firstlm import Engine, RouterConfig, SkipPlan, cli
from firstlm.corpus import load_corpus
from firstlm.lm_eval_tasks import write_tasks
from tiny_models import (
    NUM_LAYERS,
    assert_adaptive,
    draw_routers,
    routed_model,
    tiny_base_path,
)
from tiny_tokenizer import tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'firstlm[eval]'")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"word{n}" for n in range(60)] + list("abcdefgh")


def text(length: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))


CONTEXTS = [text(n, n) for n in (13, 5, 9, 11, 30)]
PAIRS = [
    *((context, f" {text(n, 100 + n)}") for context in CONTEXTS for n in (1, 4)),
    *((CONTEXTS[0], f" {letter}") for letter in "abcd"),  # share a row
    (CONTEXTS[1] + " a", " b c"),  # the same tokens, divided elsewhere
    (CONTEXTS[1], " a b c"),
    (CONTEXTS[2] + "  ", "a b"),  # white space goes to the continuation
    ("", "a b c"),
    (text(300, 7), " a b"),  # longer than the model's maximum
]
ROLLING = [("a b c d",), (text(600, 8),), ("word1",)]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def generations(until: list[str], **options) -> list[tuple]:
    return [(c, {"until": until, "max_gen_toks": 12, **options}) for c in CONTEXTS]


def scores(lm, pairs=PAIRS) -> tuple[list[float], list[bool]]:
    found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    return [f[0] for f in found], [f[1] for f in found]


def generated(lm, until: list[str], **options) -> list[str]:
    return lm.generate_until(requests("generate_until", generations(until, **options)), True)


def close(found: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lm-eval") / "base"
    shutil.copytree(tiny_base_path("llama"), folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf(base) -> HFLM:
    # Its cache of logits mixes up requests of the same tokens that are divided in different places.
    return HFLM(str(base), dtype="float32", device="cpu", batch_size=1, logits_cache=False)


@pytest.fixture(scope="module")
def routed():
    calibration = {"0.20": [0.4] * NUM_LAYERS, "0.40": [0.6] * NUM_LAYERS}
    config = RouterConfig(protected=[0], keep_bias=0.0, calibration=calibration)
    return routed_model("llama", torch.float32, config)


@pytest.fixture(scope="module")
def engine(routed) -> Engine:
    return Engine.from_model(routed, "float32", tokenizer=tiny_tokenizer(), num_threads=2)


def routed_lm(routed, **options):
    return firstlm.LM(routed, tokenizer=tiny_tokenizer(), **options)


# ---- every layer kept: the harness's own model ----


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "batch_size": 7},
        {"dtype": "float32", "batch_size": "auto", "max_batch_size": 4},
        {"engine": "native", "precision": "float32", "batch_size": 3},
    ],
    ids=["batch 1", "batch 7", "auto", "native"],
)
def test_with_all_layers_it_is_the_harness_hf_model(base, hf, options):
    lm = firstlm.LM(str(base), **options)
    assert lm.max_length == hf.max_length == 256
    log_likelihoods, greedy = scores(lm)
    expected, expected_greedy = scores(hf)
    close(log_likelihoods, expected)
    assert greedy == expected_greedy
    rolling = requests("loglikelihood_rolling", ROLLING)
    close(lm.loglikelihood_rolling(rolling, True), hf.loglikelihood_rolling(rolling, True))
    assert generated(lm, ["word7"]) == generated(hf, ["word7"])
    assert set(lm.plan_counts) == {SkipPlan.full(NUM_LAYERS)}


def test_what_greedy_decoding_gives_is_greedy(routed, engine):
    for lm in (routed_lm(routed), routed_lm(engine)):
        answers = zip(CONTEXTS, generated(lm, []), strict=True)
        # Texts do not show special tokens: only answers without them.
        pairs = [(c, f" {answer}") for c, answer in answers if len(lm.tok_encode(answer)) == 12]
        assert len(pairs) >= 2
        assert all(scores(lm, pairs)[1])


# ---- routed: plans of contexts ----


def encoded(lm, pairs) -> list[tuple[list[int], list[int]]]:
    return [lm._encode_pair(*pair) for pair in pairs if pair[0]]


def test_the_context_decides_the_plan_and_the_continuation_does_not(routed, engine):
    lm = routed_lm(routed, batch_size=5)
    pairs = [lm._fit(*pair) for pair in encoded(lm, PAIRS)]
    expected = [routed.plan(torch.tensor([context])).skip_plans[0] for context, _ in pairs]
    assert_adaptive(expected)
    for path in (lm._path, routed_lm(engine)._path):
        found = dict(path.score(pairs, 5))
        assert [found[i].skip_plan for i in range(len(pairs))] == expected
        for i, (context, continuation) in enumerate(pairs):
            ids = torch.tensor([context + continuation])[:, -257:]
            logits = routed(ids[:, :-1], skip_plan=expected[i], use_cache=False).logits[0]
            asked = torch.tensor(continuation)
            log_probs = logits[-len(continuation) :].log_softmax(-1).gather(1, asked[:, None])
            assert found[i].log_likelihood == pytest.approx(log_probs.sum().item(), abs=1e-4)


def test_a_batch_gives_what_single_requests_give(routed, engine):
    one, batch, native = routed_lm(routed), routed_lm(routed, batch_size=8), routed_lm(engine)
    for lm in (batch, native):
        close(scores(lm)[0], scores(one)[0])
        assert generated(lm, []) == generated(one, [])
    assert batch.plan_counts == native.plan_counts
    assert one.plan_counts == {plan: 2 * n for plan, n in batch.plan_counts.items()}
    assert len(batch.plan_counts) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.3},
        {"budget": 0.5, "budget_mode": "exact"},
        {"skip_plan": SkipPlan((0, 2, 5), NUM_LAYERS)},
        {"skip_plan": "▮▯▮▯▯▮"},
    ],
    ids=["threshold", "exact", "plan", "its text"],
)
def test_budgets_and_plans_do_in_the_engine_what_they_do_on_the_hf_path(routed, engine, options):
    lm, native = routed_lm(routed, batch_size=4, **options), routed_lm(engine, **options)
    close(scores(native)[0], scores(lm)[0])
    assert generated(native, []) == generated(lm, [])
    assert native.plan_counts == lm.plan_counts
    if options.get("budget_mode") == "exact":
        assert {plan.skip_rate for plan in lm.plan_counts} == {0.5}
    if "skip_plan" in options:
        assert set(lm.plan_counts) == {SkipPlan((0, 2, 5), NUM_LAYERS)}
    else:
        routing = routed.plan(torch.tensor([lm.tok_encode(CONTEXTS[0])]), **options)
        assert routing.skip_plans[0] in lm.plan_counts


def test_texts_without_a_prompt_run_under_the_plan_of_the_token_before_them(routed):
    lm = routed_lm(routed)
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", ROLLING[:1]), True)
    plan = routed.plan(torch.tensor([[lm.prefix_token_id]])).skip_plans[0]
    assert lm.plan_counts == {plan: 1}


@pytest.mark.parametrize("path", ["hf", "native"])
def test_stop_strings_end_an_answer(routed, engine, path):
    lm = routed_lm(routed if path == "hf" else engine, batch_size=3)
    free = generated(lm, [])
    stop = max(free, key=lambda answer: len(set(answer.split()))).split()[-1]
    stopped = generated(lm, [stop])
    assert stopped != free
    assert [s.strip() for s in stopped] == [answer.split(stop)[0].strip() for answer in free]


def test_sampling_follows_the_seed_and_engine_names_what_it_lacks(engine):
    lm = routed_lm(engine)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(generated(lm, [], do_sample=True, temperature=1.0, top_k=20))
    assert found[0] == found[1] != generated(lm, [])
    with pytest.raises(ValueError, match="no num_beams"):
        generated(lm, [], num_beams=2)


# ---- the harness ----


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    assert write_tasks(folder, examples=5) == ["firstlm_synopsis", "firstlm_synopsis_choice"]
    return folder


def evaluate(lm, tasks: Path, **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=lm, tasks=["firstlm_synopsis", "firstlm_synopsis_choice"], task_manager=manager,
        bootstrap_iters=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat template"])
def test_simple_evaluate_gives_what_the_hf_model_gives(base, hf, tasks, chat):
    lm = firstlm.LM(str(base), dtype="float32", batch_size=3)
    found = evaluate(lm, tasks, apply_chat_template=chat)
    expected = evaluate(hf, tasks, apply_chat_template=chat)
    assert found["results"] == expected["results"]
    for task, samples in expected["samples"].items():
        for own, sample in zip(found["samples"][task], samples, strict=True):
            if task == "firstlm_synopsis":
                assert own["resps"] == sample["resps"]
                continue
            close(*([float(r[0][0]) for r in s["resps"]] for s in (own, sample)))
            assert [r[0][1] for r in own["resps"]] == [r[0][1] for r in sample["resps"]]
    facts = found["config"]["firstlm"]
    assert facts["engine"] == "hf" and facts["skip_rate"] == 0 and facts["distinct_plans"] == 1
    assert facts["requests"] == 5 + 5 * 4


def test_the_right_choice_is_among_four_different_ones(tasks):
    rows = [
        json.loads(line)
        for line in (tasks / "firstlm_synopsis_choice-test.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 5
    for row in rows:
        assert len(set(row["choices"])) == 4 and row["choices"][row["label"]] == row["answer"]


def test_the_command_evaluates_a_checkpoint(base, tasks, tmp_path):
    model = firstlm.from_pretrained(base, RouterConfig(protected=[0], keep_bias=0.0))
    draw_routers(model).save_pretrained(tmp_path / "checkpoint")
    command = [
        sys.executable, "-m", "firstlm.cli", "lm-eval", "--model", "firstlm",
        "--model_args", f"pretrained={tmp_path / 'checkpoint'},budget=0.5,budget_mode=exact",
        "--include_path", tasks, "--tasks", "firstlm_synopsis_choice", "--limit", "3",
        "--batch_size", "4", "--output_path", tmp_path / "results",
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "firstlm_synopsis_choice" in run.stdout and "acc_norm" in run.stdout
    assert "firstlm skipped 50.0 % of the layers in 12 requests" in run.stderr
    (results,) = (tmp_path / "results").rglob("results_*.json")
    facts = json.loads(results.read_text())["config"]["firstlm"]
    assert facts["skip_rate"] == 0.5 and facts["budget"] == 0.5 and facts["requests"] == 12


def test_the_command_without_lm_eval_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.setattr(sys, "argv", ["firstlm", "lm-eval", "--tasks", "x"])
    monkeypatch.setenv("FIRSTLM_DEBUG", "")
    with pytest.raises(SystemExit) as exit:
        cli.main()
    captured = capsys.readouterr()
    assert exit.value.code == 1 and captured.err.count("\n") == 1
    assert "pip install 'firstlm[eval]'" in captured.err


def test_the_entry_point_is_the_class():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lm_eval.models"]["firstlm"].split(":")
    assert getattr(import_module(module), name) is firstlm.LM
    assert lm_eval.api.registry.get_model("firstlm") is firstlm.LM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "gpu"}, "engine must be hf or native"),
        ({"engine": "native", "dtype": "float32"}, "takes precision"),
        ({"precision": "int8"}, "takes dtype"),
        ({"budget": 0.2, "skip_plan": "full"}, "not both"),
        ({"budget": 0.2}, "no thresholds are calibrated"),
        ({"skip_plan": "▮▯▮"}, "layers"),
        ({"trust_remote_code": True}, "no remote code"),
        ({"pretrained": "./nowhere"}, "does not exist"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_arguments_that_cannot_be_followed_are_refused(base, options, message):
    with pytest.raises(ValueError, match=message):
        firstlm.LM(**{"pretrained": str(base)} | options)


def test_models_of_another_kind_are_refused(routed, engine, hf):
    with pytest.raises(TypeError, match="or a firstlm"):
        firstlm.LM(hf.model)
    with pytest.raises(ValueError, match="does not fit"):
        firstlm.LM(routed, engine="native")
    with pytest.raises(ValueError, match="give tokenizer="):
        firstlm.LM(engine)
    with pytest.raises(ValueError, match="protected"):
        routed_lm(routed, skip_plan="▯▮▮▮▮▮")
    with pytest.raises(ValueError, match="dtype, attn_implementation: of how a model is loaded"):
        routed_lm(routed, dtype="float32", attn_implementation="eager")
    with pytest.raises(ValueError, match="precision, num_threads: of how a model is loaded"):
        firstlm.LM(engine, tokenizer="x", precision="float32", num_threads=1)


# ---- its tasks as examples ----


def test_tasks_are_corpora(tasks):
    answers = load_corpus(f"lm-eval:{tasks / 'firstlm_synopsis.yaml'}", "test")
    own = load_corpus("debian-synopsis", "test", max_examples=5)
    assert [row["answer"] for row in answers] == [row["answer"] for row in own]
    assert [row["prompt"] for row in answers] == [row["prompt"].strip() for row in own]
    assert (
        answers[0]["task"] == "firstlm_synopsis" and answers[0]["id"] == "firstlm_synopsis/test/0"
    )
    choices = load_corpus(f"lm-eval:{tasks / 'firstlm_synopsis_choice.yaml'}", "test")
    assert [row["answer"] for row in choices] == [row["answer"] for row in own]
    assert len(load_corpus(f"lm-eval:{tasks / 'firstlm_synopsis.yaml'}", "validation")) == 100


def test_a_task_with_test_examples_only_lends_some_of_them(tasks, tmp_path):
    text = (tasks / "firstlm_synopsis_choice.yaml").read_text()
    (tmp_path / "task.yaml").write_text(text.replace("validation_split: validation\n", ""))
    parts = {s: load_corpus(f"lm-eval:{tmp_path}/task.yaml", s) for s in ("validation", "test")}
    assert [len(part) for part in parts.values()] == [2, 3]
    assert not set(parts["validation"]["answer"]) & set(parts["test"]["answer"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_task", "lm-eval has no task 'no_such_task'"),
        ("nothing/there.yaml", "there is no file nothing/there.yaml"),
        ("mmlu", "is a group of tasks: name one of them"),
    ],
)
def test_what_is_no_task_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(f"lm-eval:{name}", "test")
