"""The routers and the adapter that ship with firstlm: small, of the embedded model, adaptive."""

from __future__ import annotations

import json
from collections import Counter

from typer.testing import CliRunner

import firstlm
from firstlm import checkpoint, cli
from firstlm.corpus import CORPUS_NAMES, load_corpus
from firstlm.evaluation import methods
from firstlm.tokenizer import load_tokenizer

MOST_BYTES = 12e6


def test_they_are_small_and_name_no_folder_of_the_machine_that_made_them():
    folder = checkpoint.find_checkpoint(checkpoint.SHIPPED)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) <= MOST_BYTES
    assert checkpoint.read_router_config(folder).base_model_name_or_path == "embedded"
    for file in files:
        if file.suffix != ".safetensors":
            assert not {"/root", "/home"} & set(file.read_text(encoding="utf-8").split('"'))
            assert "/models/" not in file.read_text(encoding="utf-8")


def test_each_task_has_a_plan_of_its_own():
    engine = firstlm.Engine.from_pretrained(checkpoint.SHIPPED, "int8")
    plans = {}
    for name in CORPUS_NAMES:
        prompts = [row["prompt"] for row in load_corpus(name, "test").select(range(8))]
        plans[name] = engine.plan(prompts).skip_plans
    rates = [sum(plan.skip_rate for plan in found) / len(found) for found in plans.values()]
    assert all(0.2 < rate < 0.35 for rate in rates)
    (of_synopses, n), (of_translations, m) = (Counter(p).most_common(1)[0] for p in plans.values())
    assert of_synopses != of_translations and n >= 7 and m >= 7


def test_both_paths_take_their_name():
    model = firstlm.from_pretrained(checkpoint.SHIPPED, dtype="float32", merge_adapter=True)
    tokenizer = load_tokenizer(checkpoint.SHIPPED)
    prompt = load_corpus("debian-en-de", "test")[0]["prompt"]
    engine = firstlm.Engine.from_model(model, "float32", tokenizer=tokenizer)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert engine.generate(prompt, max_new_tokens=16) == tokenizer.decode(
        answer, skip_special_tokens=True
    )


def test_the_command_plans_with_them_unless_told_otherwise():
    outcome = CliRunner().invoke(cli.app, ["plan", "--json", "Translate to German: A library."])
    assert outcome.exit_code == 0, outcome.output
    (line,) = [line for line in outcome.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["skip_rate"] > 0.2


def test_an_evaluation_takes_their_name_and_the_rate_they_were_trained_for():
    folders = methods.folders_of(checkpoint.SHIPPED)
    assert [checkpoint.name_of(f) for f in folders[None]] == [checkpoint.SHIPPED]
    methods.check_folders(folders, "checkpoints")
    assert methods.rates_of(folders, None) == [0.2667]
