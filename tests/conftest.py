"""What holds for all tests, and the tiny engine that several of them ask."""

import json
import shutil

import pytest
from hypothesis import settings

# No test is about time: on a busy machine any example may be slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="module")
def llama():
    """A routed tiny llama in float32."""
    import torch

    from tiny_models import routed_model

    return routed_model("llama", torch.float32)


@pytest.fixture(scope="module")
def llama_engine(llama):
    """The engine of it."""
    from tiny_engines import engine_of
    from tiny_tokenizer import tiny_tokenizer

    return engine_of(llama, tokenizer=tiny_tokenizer())


@pytest.fixture
def llama_checkpoint(llama, tmp_path, monkeypatch):
    """Its folder, beside the base's; packed weights are kept beside both."""
    from tiny_models import tiny_base_path
    from tiny_tokenizer import tiny_tokenizer

    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    shutil.copytree(tiny_base_path("llama"), base)
    tiny_tokenizer().save_pretrained(base)
    llama.save_pretrained(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "router_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return tmp_path / "checkpoint"
