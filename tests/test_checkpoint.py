"""Round trips: routers, adapters, hub, pipelines."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, PretrainedConfig, pipeline

import firstlm
from firstlm import RouterConfig, checkpoint, cli_info
from firstlm.checkpoint import router_state_dict
from firstlm.tokenizer import load_tokenizer
from tiny_gguf import write_tiny_gguf
from tiny_models import base_model, draw_routers, pad, prompts, routed_model, tiny_base_path
from tiny_tokenizer import tiny_tokenizer

LENGTHS = [13, 5, 9, 11]


def lora(**options) -> LoraConfig:
    return LoraConfig(
        target_modules="all-linear", r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )


def logits(model):
    with torch.no_grad():
        return model(**pad(prompts(LENGTHS), "right")).logits


def test_routers_round_trip_and_the_base_is_not_written(tmp_path):
    config = RouterConfig(pooling="windowed_mean", windows=2, head="mlp", bottleneck=7)
    model = routed_model("llama", router=config)
    model.set_thresholds([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    model.save_pretrained(tmp_path / "routed")
    files = {p.name for p in (tmp_path / "routed").iterdir()}
    assert files == {"router_config.json", "router.safetensors"}
    again = firstlm.from_pretrained(tmp_path / "routed", dtype=torch.float64)
    assert again.router_config == model.router_config
    for name, tensor in router_state_dict(model).items():
        assert torch.equal(router_state_dict(again)[name], tensor)
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_round_trips_with_its_routers(tmp_path):
    model = routed_model("llama")
    without = logits(model)
    model.add_adapter(lora())
    draw_routers(model)
    model.save_pretrained(tmp_path)
    with_adapter = logits(model)
    assert not torch.equal(with_adapter, without)
    again = firstlm.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(again), with_adapter)
    merged = firstlm.from_pretrained(tmp_path, dtype=torch.float64, merge_adapter=True)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), with_adapter, rtol=1e-6, atol=1e-8)
    plain = firstlm.from_pretrained(tmp_path, dtype=torch.float64, adapter=False)
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_a_merged_adapter_is_not_lost_by_saving(tmp_path):
    model = routed_model("llama")
    model.add_adapter(lora())
    model.save_pretrained(tmp_path)
    merged = firstlm.from_pretrained(tmp_path, merge_adapter=True)
    with pytest.raises(ValueError, match="load without merge_adapter"):
        merged.save_pretrained(tmp_path)
    assert (tmp_path / "adapter").is_dir()


@pytest.mark.parametrize("change", ["merge", "train", "resize"])
def test_a_base_that_has_changed_is_not_lost_by_saving(change, tmp_path):
    model = routed_model("llama")
    if change == "merge":
        model = get_peft_model(model, lora()).merge_and_unload()
    elif change == "train":
        with torch.no_grad():
            model.model.norm.weight += 1e-3
    else:
        model.resize_token_embeddings(120)
    with pytest.raises(ValueError, match="base are not as they were loaded"):
        model.save_pretrained(tmp_path / "routed")
    assert not (tmp_path / "routed").exists()


def test_a_base_that_was_cast_is_the_one_that_was_loaded(tmp_path):
    model = routed_model("llama", torch.float32)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model.to(dtype).save_pretrained(tmp_path)


def test_a_loaded_base_is_frozen_and_routers_learn():
    model = routed_model("llama")
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns and all(".router." in name for name in learns)


def test_only_the_main_process_saves(tmp_path):
    routed_model("llama").save_pretrained(tmp_path / "routed", is_main_process=False)
    assert not (tmp_path / "routed").exists()


def test_a_given_state_dict_is_what_is_saved(tmp_path):
    model = routed_model("llama")
    model.add_adapter(lora())
    twice = {name: value * 2 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=twice)
    again = firstlm.from_pretrained(tmp_path, dtype=torch.float64)
    learnt = {n: p for n, p in again.named_parameters() if "router" in n or "lora_" in n}
    assert any("lora_" in name for name in learnt)
    for name, value in learnt.items():
        assert torch.equal(value, twice[name])


def test_options_of_a_hub_reach_every_file_that_is_asked_for(monkeypatch):
    asked = []

    def note(cls, function):
        def call(source, *args, **options):
            asked.append(options)
            return function(source, *args, **options)

        monkeypatch.setattr(cls, function.__name__, call)

    note(PretrainedConfig, PretrainedConfig.get_config_dict)
    note(AutoConfig, AutoConfig.from_pretrained)
    given = {"token": "secret", "local_files_only": True}
    firstlm.from_pretrained(tiny_base_path("llama"), **given)
    assert len(asked) >= 2 and all(given.items() <= options.items() for options in asked)


def test_the_base_of_a_checkpoint_is_asked_for_in_its_revision(tmp_path, monkeypatch):
    model = routed_model("llama")
    model.router_config.base_model_name_or_path = "owner/name"
    model.router_config.base_revision = "abc123"
    model.save_pretrained(tmp_path)
    asked = []

    def refuse(base, **options):
        asked.append((base, options))
        raise OSError("no hub here")

    monkeypatch.setattr(checkpoint, "base_config_sha256", refuse)
    for options, revision in (({}, "abc123"), ({"revision": "main"}, "main")):
        with pytest.raises(OSError, match="no hub"):
            firstlm.from_pretrained(tmp_path, **options)
        assert asked.pop() == ("owner/name", {"revision": revision})


def test_saving_without_the_adapter_removes_a_stale_one(tmp_path):
    model = routed_model("llama")
    model.add_adapter(lora())
    model.save_pretrained(tmp_path)
    routed_model("llama").save_pretrained(tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_pefts_own_calls_attach_merge_and_remove_adapters(tmp_path):
    model = routed_model("llama")
    before = logits(model)
    wrapped = get_peft_model(model, lora())
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    adapted = logits(wrapped)
    tokens = wrapped.generate(**pad(prompts(LENGTHS)), max_new_tokens=4)
    assert tokens.shape[1] == max(LENGTHS) + 4
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), before)
    wrapped.save_pretrained(tmp_path / "peft")
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-6, atol=1e-8)
    fresh = PeftModel.from_pretrained(routed_model("llama"), tmp_path / "peft")
    torch.testing.assert_close(logits(fresh), adapted)
    torch.testing.assert_close(logits(fresh.unload()), before)


def test_routers_of_another_base_are_refused(tmp_path):
    routed_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="were made for"):
        firstlm.from_pretrained(tiny_base_path("qwen3"), router=tmp_path)


def test_fresh_routers_in_place_of_trained_ones_are_warned_of(tmp_path):
    routed_model("llama").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"fresh ones take.*prefill='full' \(theirs: 'route'\)"):
        firstlm.from_pretrained(tmp_path, router=RouterConfig(prefill="full", protected=[0]))


def test_another_prefill_than_the_routers_were_trained_with_is_warned_of(tmp_path):
    routed_model("llama").save_pretrained(tmp_path)
    model = firstlm.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.plan(**pad(prompts(LENGTHS)))
    model.router_config.prefill = "full"
    with pytest.warns(UserWarning, match="trained with prefill='route'; under prefill='full'"):
        model.plan(**pad(prompts(LENGTHS)))


def test_folders_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        firstlm.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a firstlm checkpoint"):
        firstlm.from_pretrained(tiny_base_path("llama"), router=tmp_path)
    routed_model("llama").save_pretrained(tmp_path)
    (tmp_path / "router.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no router\.safetensors"):
        firstlm.from_pretrained(tmp_path)


def test_a_gguf_gets_routers_and_its_checkpoint_finds_it_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "tiny.gguf", layers=4)
    model = firstlm.from_pretrained(tmp_path / "tiny.gguf", router=RouterConfig(protected=[0]))
    for layer, parameter in enumerate(model.router_parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(layer))
    model.save_pretrained(tmp_path / "routed")
    again = firstlm.from_pretrained(tmp_path / "routed")
    batch = pad(prompts(LENGTHS))
    assert torch.equal(again.plan(**batch).keep_prob, model.plan(**batch).keep_prob)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_routers_stay_float32_beside_a_bfloat16_base():
    model = firstlm.from_pretrained(tiny_base_path("llama"), dtype="bfloat16")
    assert {p.dtype for p in model.router_parameters()} == {torch.float32}
    assert model.plan(**pad(prompts(LENGTHS))).keep_prob.dtype == torch.float32


def test_layers_that_a_device_map_offloads_are_routed(tmp_path):
    base = tiny_base_path("llama")
    config = RouterConfig(protected=[0])
    places = dict.fromkeys([f"model.layers.{i}" for i in (1, 3)], "disk")
    places |= dict.fromkeys([f"model.layers.{i}" for i in (0, 2, 4, 5)], "cpu")
    places |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb"], "cpu")
    options = {"device_map": places | {"lm_head": "cpu"}, "offload_folder": str(tmp_path)}
    batch = pad(prompts(LENGTHS))
    found = draw_routers(firstlm.from_pretrained(base, config, **options))
    whole = draw_routers(firstlm.from_pretrained(base, config))
    assert torch.equal(
        found.generate(**batch, max_new_tokens=5), whole.generate(**batch, max_new_tokens=5)
    )


def test_device_map_places_routers_with_their_layers():
    model = firstlm.from_pretrained(tiny_base_path("llama"), device_map="cpu")
    assert model.generate(**pad(prompts(LENGTHS)), max_new_tokens=3).shape[1] == 16


def test_a_text_generation_pipeline_runs_the_chat_template():
    model = routed_model("llama", torch.float32)
    tokenizer = tiny_tokenizer()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "say a b c"}]
    out = pipe(chat, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    expected = tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    reply = out[0]["generated_text"][-1]
    assert reply["role"] == "assistant" and reply["content"].strip() == expected.strip()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as small files need to be uploaded and found again."""

    files: dict[str, bytes]  # of the one repository that there is, me/tiny

    @classmethod
    def commit(cls) -> str:
        return hashlib.sha1(repr(sorted(cls.files.items())).encode()).hexdigest()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/preupload/main"):
            wanted = json.loads(body)["files"]
            answer = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in wanted
                ]
            }
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"http://{self.headers['Host']}/me/tiny"
            answer = {"commitUrl": f"{url}/commit/{self.commit()}", "commitOid": self.commit()}
        else:  # repository creation and validation
            answer = {"url": f"http://{self.headers['Host']}/me/tiny", "name": "me/tiny"}
        self.reply(answer)

    def do_GET(self):
        if "me/tiny" not in self.path:
            return self.fail("RepoNotFound", "Repository not found")
        if "/resolve/" in self.path:
            name = self.path.partition("/resolve/")[2].partition("/")[2]
            if name not in self.files:
                return self.fail("EntryNotFound", "Entry not found")
            return self.send(self.files[name], "application/octet-stream")
        names = sorted(self.files)
        if "/tree/" in self.path:
            return self.reply(
                [{"type": "file", "path": n, "size": len(self.files[n]), "oid": n} for n in names]
            )
        siblings = [{"rfilename": name} for name in names]
        return self.reply(
            {"id": "me/tiny", "name": "me", "siblings": siblings, "sha": self.commit()}
        )

    do_HEAD = do_GET

    def reply(self, answer):
        self.send(json.dumps(answer).encode(), "application/json")

    def send(self, data, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", self.commit())
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, code, message):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, with an empty cache; returns the server, to be shut down early."""
    import huggingface_hub

    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    api = huggingface_hub.HfApi(endpoint=endpoint)
    for module in (huggingface_hub.hf_api, __import__("transformers.utils.hub").utils.hub):
        for name in ("create_repo", "create_commit", "create_branch", "api", "hf_api"):
            if hasattr(module, name):
                target = {"api": api, "hf_api": lambda: api}.get(name) or getattr(api, name)
                monkeypatch.setattr(module, name, target)
    yield server
    server.shutdown()
    server.server_close()


def test_push_to_hub_uploads_routers_and_adapter_only(hub):
    model = routed_model("llama")
    model.add_adapter(lora())
    model.push_to_hub("me/tiny", token="hf_test")
    assert {"router_config.json", "router.safetensors"} < set(Hub.files)
    assert "adapter/adapter_model.safetensors" in Hub.files
    assert not any(name.split("/")[-1] == "model.safetensors" for name in Hub.files)


def test_a_checkpoint_on_a_hub_loads_by_its_id_and_then_without_the_hub(hub, monkeypatch):
    model = routed_model("llama")
    model.add_adapter(lora())
    model.push_to_hub("me/tiny", token="hf_test")
    options = {"dtype": torch.float64, "revision": Hub.commit()}
    for again in (
        firstlm.from_pretrained("me/tiny", dtype=torch.float64),
        firstlm.from_pretrained("me/tiny", **options),
    ):
        torch.testing.assert_close(logits(again), logits(model))
        assert again.router_config == model.router_config
    routers = firstlm.from_pretrained(tiny_base_path("llama"), router="me/tiny")
    assert routers.router_config.thresholds == model.router_config.thresholds
    assert "adapter" not in Hub.files and cli_info.model("me/tiny")["adapter"]["rank"] == 4
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = firstlm.from_pretrained("me/tiny", dtype=torch.float64)
    torch.testing.assert_close(logits(offline), logits(model))


def test_a_checkpoint_on_a_hub_may_bring_its_tokenizer_or_take_its_bases(hub, tmp_path):
    base = tiny_base_path("llama")
    model = firstlm.from_pretrained(base)
    tiny_tokenizer().save_pretrained(tmp_path)
    model.router_config.base_model_name_or_path = str(tmp_path)
    model.push_to_hub("me/tiny", token="hf_test")
    assert load_tokenizer("me/tiny").encode("say a b") == tiny_tokenizer().encode("say a b")
    Hub.files["tokenizer_config.json"] = (tmp_path / "tokenizer_config.json").read_bytes()
    Hub.files["tokenizer.json"] = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer("me/tiny").encode("say a b") == tiny_tokenizer().encode("say a b")


def test_what_a_hub_does_not_have_is_one_clear_error(hub, monkeypatch):
    with pytest.raises(OSError, match="me/nothing is not a local folder"):
        firstlm.from_pretrained("me/nothing")
    with pytest.raises(ValueError, match="me/tiny is not a firstlm checkpoint"):
        firstlm.from_pretrained(tiny_base_path("llama"), router="me/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"couldn't connect|offline"):
        firstlm.from_pretrained("me/other")


def test_a_checkpoint_whose_base_has_gone_says_how_to_name_another(tmp_path):
    model = routed_model("llama")
    model.router_config.base_model_name_or_path = str(tmp_path / "gone")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gone, is not here.*router="):
        firstlm.from_pretrained(tmp_path)
    firstlm.from_pretrained(tiny_base_path("llama"), router=tmp_path)


def test_the_base_weights_are_those_of_transformers():
    routed, base = routed_model("llama"), base_model("llama")
    own = {n: t for n, t in routed.state_dict().items() if ".router." not in n}
    assert own.keys() == base.state_dict().keys()
    assert all(torch.equal(t, own[n]) for n, t in base.state_dict().items())
