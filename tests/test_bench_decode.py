"""`firstlm bench decode`: arms that do the same work, figures of the agreed form, honest ratios."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import firstlm
from firstlm import RouterConfig, SkipPlan, bench_decode, bench_models, bench_tables, cli, figures
from firstlm.adapter import attach_adapter
from firstlm.bench_arms import HF, LLAMA_CPP, NATIVE, Arm, HfArm, LlamaCppArm, NativeArm
from firstlm.bench_decode import Contest, Entry, kept_counts, spread_plan
from firstlm.bench_models import Sizes, Timing
from firstlm.train_config import LoraPhaseConfig
from tiny_gguf import draw_routers, tiny_model_folder

ROW_KEYS = {
    "runtime",
    "precision",
    "threads",
    "batch",
    "layers",
    "kept_layers",
    "prompt_tokens",
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "ttft_ms",
    "tpot_ms",
    "read_bandwidth_gb_s",
    "bandwidth_share",
    "speedup",
    "ideal_speedup",
    "weight_bytes",
}
PROMPT = [5, 9, 14, 3, 77, 20, 31, 8]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("bench"), layers=3)


@pytest.fixture(scope="module")
def bench_model(model_folder, tmp_path_factory):
    return bench_models.load(str(model_folder), tmp_path_factory.mktemp("gguf"))


def greedy(model, prompt: list[int], new_tokens: int) -> list[int]:
    """The reference: the whole sequence is run again for every token."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(new_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def run_command(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["firstlm", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    captured = capsys.readouterr()
    assert not exit.value.code, captured.err
    return captured.out


def check_rows(found: dict) -> None:
    assert found["rows"]
    for row in found["rows"]:
        assert row.keys() >= ROW_KEYS
        for name in ("decode_tokens_per_s", "tpot_ms", "read_bandwidth_gb_s"):
            assert row[name].keys() == {"median", "p10", "p90", "n"}
        assert row["bandwidth_share"] > 0 and row["speedup"] > 0
        assert row["weight_bytes"] < row["step_bytes"]
        rate = 1e3 * row["batch"] / row["tpot_ms"]["median"]
        assert row["decode_tokens_per_s"]["median"] == pytest.approx(rate)


def test_the_command_prints_and_writes(model_folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "decode.json"
    before = torch.get_num_threads()
    options = ["-c", model_folder, "--against", "hf", "--no-native", "--quick", "--threads", 1]
    out = run_command(
        monkeypatch, capsys, "decode", *options, "--seed", 3, "--json", "--output", path,
        "--prompt-tokens", "4,8", "--work-dir", tmp_path / "work",
    )  # fmt: skip
    assert torch.get_num_threads() == before
    found = figures.read(path)
    assert json.loads(out) == found
    assert found["seed"] == 3 and found["threads"] == 1 and found["bars"] == []
    check_rows(found)
    assert {(row["precision"], row["prompt_tokens"]) for row in found["rows"]} == {
        (precision, T) for precision in ("float32", "bfloat16") for T in (4, 8)
    }
    assert not (tmp_path / "work").exists()  # no GGUF files for transformers
    markdown = bench_tables.tables(found)
    assert "**Prompt of 4**" in markdown and "| transformers bfloat16 |" in markdown
    text = bench_decode.as_text(found)
    assert "transformers float32" in text and "prompt of 8, 4 new tokens" in text


def test_the_command_runs_llama_cpp(model_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("llama_cpp")
    options = ["-c", model_folder, "--against", "llama.cpp", "--no-native", "--quick"]
    out = run_command(
        monkeypatch, capsys, "decode", *options, "--precision", "f32,int4", "--json",
        "--work-dir", tmp_path, "--threads", 1,
    )  # fmt: skip
    found = json.loads(out)
    check_rows(found)
    assert {(row["precision"], row["case"]) for row in found["rows"]} == {
        (kind, case)
        for kind in ("f32", "q4_0", "q4_1")
        for case in ("prompt of 8", "context of 16")
    }


def test_arms_produce_the_greedy_tokens(bench_model):
    expected = greedy(bench_model.hf, PROMPT, 6)
    timing = HfArm(bench_model.hf).run([PROMPT], 6)
    assert timing.tokens == [expected] and timing.steps == 5
    assert timing.ttft_s > 0 and timing.decode_s > 0


def test_llama_cpp_produces_the_greedy_tokens_and_again(bench_model):
    pytest.importorskip("llama_cpp")
    other = PROMPT[::-1]
    expected = [greedy(bench_model.hf, prompt, 6) for prompt in (PROMPT, other)]
    arm = LlamaCppArm(
        bench_model.gguf(["f32"])["f32"], "f32", bench_model.hf.config,
        threads=1, context=32, sequences=2,
    )  # fmt: skip
    assert arm.run([PROMPT, other], 6).tokens == expected
    again = arm.again(6)
    assert again.tokens == expected and again.ttft_s is None
    assert arm.run([PROMPT], 3).tokens == [expected[0][:3]]
    with pytest.raises(ValueError, match="no skip plans"):
        arm.run([PROMPT], 3, torch.ones(1, 3, dtype=torch.bool))
    arm.close()
    # f32 everywhere but for the cache: as transformers' bytes
    hf = bench_models.hf_sizes(bench_model.hf)
    assert arm.sizes.layers == hf.layers and arm.sizes.kv_token == hf.kv_token // 2
    hidden = bench_model.hf.config.hidden_size
    assert arm.sizes.head == hf.head + 4 * hidden  # the last norm


def test_the_engine_produces_the_greedy_tokens_and_counts_its_bytes(
    bench_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path))  # of packed weights
    expected = greedy(bench_model.hf, PROMPT, 6)
    arm = NativeArm(bench_model, "float32", threads=1)
    assert arm.run([PROMPT], 6).tokens == [expected]
    assert arm.again(6).tokens == [expected]
    hf = bench_models.hf_sizes(bench_model.hf)
    assert sum(arm.sizes.layers) == pytest.approx(sum(hf.layers), rel=0.05)
    assert arm.sizes.head == pytest.approx(hf.head, rel=0.1)
    assert arm.sizes.kv_token in (hf.kv_token, hf.kv_token // 2)
    keep = torch.tensor([[True, False, True], [True, True, False]])
    assert len(arm.run([PROMPT, PROMPT], 4, keep).tokens) == 2
    arm.close()


def test_weights_are_plain_and_keep_their_values(model_folder, bench_model):
    assert type(bench_model.hf).__name__ == "LlamaForCausalLM"
    assert "Routed" not in type(bench_model.hf).__mro__[1].__name__
    half = bench_models.in_dtype(bench_model.hf, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    weight = bench_model.hf.model.layers[1].mlp.up_proj.weight
    assert torch.equal(half.model.layers[1].mlp.up_proj.weight, weight.bfloat16())
    again = bench_models.load(str(model_folder), bench_model.gguf_folder.parent)
    assert again.gguf_folder == bench_model.gguf_folder
    with torch.no_grad():
        again.hf.model.norm.weight[0] += 1
    assert bench_models._digest(again.hf) != bench_models._digest(bench_model.hf)


def test_a_checkpoint_is_measured_with_its_adapter_merged(model_folder, tmp_path):
    model = firstlm.from_pretrained(model_folder, router=RouterConfig(protected=[0]))
    draw_routers(model)
    attach_adapter(model, LoraPhaseConfig(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    model.eval().save_pretrained(tmp_path / "checkpoint")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "checkpoint")
    found = bench_models.load(str(tmp_path / "checkpoint"), tmp_path)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        expected = model(ids, skip_plan=SkipPlan.full(3)).logits
        base = bench_models.load(str(model_folder), tmp_path).hf(ids).logits
        torch.testing.assert_close(found.hf(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert (base - expected).abs().max() > 0.01
    assert len(found.hf.state_dict()) == len(bench_models.plain_weights(found.hf))


def test_bytes_of_a_step_are_those_of_layers_that_any_row_keeps():
    sizes = Sizes(layers=(10, 20, 30), head=5, kv_token=2)
    keep = torch.tensor([[True, False, False], [True, False, True]])
    assert sizes.weights == 65
    assert sizes.step_weights(keep) == 45
    assert sizes.step(keep, 7) == 45 + 3 * 2 * 7


@pytest.mark.parametrize("L", [1, 2, 3, 30, 32])
def test_plans_keep_as_many_layers_as_asked(L):
    for k in range(1, L + 1):
        assert int(spread_plan(k, L).sum()) == k
    assert kept_counts(L)[0] == L and kept_counts(L)[-1] == max(1, round(L / 3))
    with pytest.raises(ValueError, match="from 1 to"):
        spread_plan(L + 1, L)


class FakeArm(Arm):
    """Takes exactly as long as it is told: seconds a step for each kept layer."""

    def __init__(self, runtime: str, precision: str, seconds: float) -> None:
        self.runtime, self.precision, self._seconds = runtime, precision, seconds
        self.sizes = Sizes(layers=(100,) * 4, head=0, kv_token=0)

    def run(self, prompts, new_tokens, keep=None):
        layers = 4 if keep is None else int(keep.any(0).sum())
        step = self._seconds * layers
        steps = new_tokens - 1
        return Timing(2 * step, step * steps, steps, [[0] * new_tokens for _ in prompts])

    def again(self, new_tokens):
        steps = new_tokens - 1
        return Timing(None, self._seconds * 4 * steps, steps, [[0] * new_tokens])


def measure(case: str, *entries: Entry) -> list[dict]:
    effort = bench_decode.Effort(repeats=3, read_bytes=2**16)
    rows, _ = bench_decode._run_contests([Contest(case, 5, list(entries))], effort, 2, False)
    return rows


def test_ratios_to_rivals_and_their_bars():
    ours, q8 = FakeArm(NATIVE, "int8", 1.0), FakeArm(LLAMA_CPP, "q8_0", 2.0)
    q4, hf = FakeArm(LLAMA_CPP, "q4_0", 9.0), FakeArm(HF, "float32", 8.0)
    prompts = [[1, 2, 3]]
    rows = measure(
        "prompt of 3",
        Entry(ours, prompts),
        Entry(q8, prompts),
        Entry(q4, prompts),
        Entry(hf, prompts, rounds=1),
    )
    assert [row["tpot_ms"]["n"] for row in rows] == [3, 3, 3, 1]
    over = {(o["runtime"], o["precision"]): o for o in rows[0]["over"]}
    assert over[LLAMA_CPP, "q8_0"]["decode_tokens_per_s"] == pytest.approx(2)
    assert over[LLAMA_CPP, "q8_0"]["prefill_tokens_per_s"] == pytest.approx(2)
    assert over[HF, "float32"]["decode_tokens_per_s"] == pytest.approx(8)
    bars = {bar["quantity"].split(": ")[1]: bar for bar in bench_decode.bars(rows)}
    assert bars["decode over llama.cpp q8_0"]["met"]
    assert bars["prefill over llama.cpp q8_0"]["met"]
    assert not bars["decode over transformers float32"]["met"]
    assert "decode over llama.cpp q4_0" not in bars  # not of equal precision
    assert bench_decode.as_text(
        {
            "model": "m", "threads": 2, "load_average": 3.0, "rows": rows,
            "read_bandwidth_gb_s": rows[0]["read_bandwidth_gb_s"],
            "bars": bench_decode.bars(rows),
        }
    ).count("MISSED") == 2  # fmt: skip


def test_speedup_is_beside_the_ideal():
    arm = FakeArm(NATIVE, "int8", 1.0)
    half = spread_plan(2, 4)[None]
    rows = measure(
        "int8, kept layers", Entry(arm, [[1, 2]], plans="full"), Entry(arm, [[1, 2]], half, "equal")
    )
    assert [row["speedup"] for row in rows] == pytest.approx([1, 2])
    assert [row["ideal_speedup"] for row in rows] == pytest.approx([1, 2])
    [bar] = bench_decode.bars(rows)
    assert bar["value"] == pytest.approx(1) and "2 of 4 layers" in bar["quantity"]


def test_a_batch_with_different_plans_is_compared_per_token():
    arm = FakeArm(NATIVE, "int8", 1.0)
    different = torch.tensor([[True, True, False, False], [True, False, True, False]])
    rows = measure(
        "int8, batches",
        Entry(arm, [[1, 2]], plans="full"),
        Entry(arm, [[1, 2]] * 2, different, "different"),
    )
    assert rows[1]["kept_layers"] == 2 and rows[1]["layers_read"] == 3
    assert rows[1]["speedup"] == rows[1]["ideal_speedup"] == pytest.approx(4 / (3 / 2))


def test_reading_the_prompt_once_leaves_prefill_out():
    [row] = measure("context of 3", Entry(FakeArm(NATIVE, "int8", 1.0), [[1, 2, 3]], again=True))
    assert row["ttft_ms"] is None and row["prefill_tokens_per_s"] is None
    assert row["tpot_ms"] == {"median": 4000, "p10": 4000, "p90": 4000, "n": 3}


def test_another_number_of_tokens_is_refused():
    arm = FakeArm(NATIVE, "int8", 1.0)
    arm.run = lambda prompts, new_tokens, keep=None: Timing(1.0, 1.0, 1, [[0] * 2])
    with pytest.raises(RuntimeError, match=r"produced \[2\] tokens"):
        measure("prompt of 1", Entry(arm, [[1]]))


def test_contests_ask_every_question():
    config = SimpleNamespace(num_hidden_layers=6)
    tokenizer = SimpleNamespace()
    model = SimpleNamespace(hf=SimpleNamespace(config=config), tokenizer=tokenizer)
    arms = [FakeArm(NATIVE, "int8", 1), FakeArm(LLAMA_CPP, "q8_0", 1), FakeArm(HF, "float32", 1)]
    effort = bench_decode.Effort(prompt_tokens=(4, 8), context=16, batches=(1, 2))

    def words(corpus, tokenizer, length, count):
        return [SimpleNamespace(tokens=[row] * length) for row in range(count)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_decode, "windows", words)
        contests = bench_decode._contests(model, arms, effort, seed=0)
    by_case = {contest.case: contest.entries for contest in contests}
    assert list(by_case) == [
        "prompt of 4", "prompt of 8", "context of 16", "int8, kept layers", "int8, batches",
    ]  # fmt: skip
    assert [entry.arm for entry in by_case["prompt of 8"]] == arms
    assert [entry.arm for entry in by_case["context of 16"]] == arms[:2]
    kept = [int(entry.keep.sum()) for entry in by_case["int8, kept layers"]]
    assert kept == [6, 5, 4, 3, 2]
    batches = [(len(e.prompts), e.plans, int(e.keep.sum())) for e in by_case["int8, batches"]]
    assert batches == [
        (1, "full", 6), (1, "equal", 4), (2, "full", 12), (2, "equal", 8), (2, "different", 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precisions": ["int3"]}, "unknown precision 'int3'"),
        ({"against": ["vllm"]}, "unknown rival 'vllm'"),
        ({"effort": bench_decode.Effort(context=10**6)}, "the model has 128 positions"),
    ],
)
def test_what_cannot_be_measured_is_refused(model_folder, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        bench_decode.run(
            str(model_folder), work_dir=tmp_path, native=False, progress=False,
            **({"against": []} | arguments),
        )  # fmt: skip


def test_a_missing_peer_is_one_line(model_folder, monkeypatch, capsys):
    from firstlm import llama_cpp_model

    llama_cpp_model.binding.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    options = ["decode", "-c", str(model_folder), "--against", "llama.cpp", "--quick"]
    monkeypatch.setattr(sys, "argv", ["firstlm", "bench", *options])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    err = capsys.readouterr().err
    assert exit.value.code == 1
    assert err.startswith("firstlm: error: ") and err.count("\n") == 1
    assert "pip install 'firstlm[bench]'" in err


def test_the_command_measures_the_engine(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path))
    options = ["-c", model_folder, "--quick", "--precision", "f32,int8", "--threads", 1, "--json"]
    found = json.loads(run_command(monkeypatch, capsys, "decode", *options))
    check_rows(found)
    cases = ["prompt of 8", "context of 16"]
    cases += [f"{p}, {what}" for what in ("kept layers", "batches") for p in ("float32", "int8")]
    assert list(dict.fromkeys(row["case"] for row in found["rows"])) == cases
    for row in found["rows"]:
        if row["plans"] == "full" and row["batch"] == 1:
            assert row["ideal_speedup"] == 1
        elif row["plans"] == "different":
            assert row["layers_read"] > row["kept_layers"]
        else:
            assert row["ideal_speedup"] > 1
    kept = [bar["quantity"] for bar in found["bars"] if "layers" in bar["quantity"]]
    assert [text.split(":")[0] for text in kept] == [
        f"{p}, {k} of 3 layers" for p in ("float32", "int8") for k in (2, 1)
    ]
    assert "| layers kept |" in bench_tables.tables(found)
