"""TrainConfig: one set of settings for YAML, flags and Python, checked before any work starts."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from firstlm import TrainConfig
from firstlm.train_config import config_fields


def test_yaml_dict_and_overrides_build_the_same_config(tmp_path):
    values = {"base": "some/model", "skip_rate": 0.3, "lora": {"steps": 7, "lr": 0.002}}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(values))
    overrides = ["base=some/model", "skip_rate=0.3", "lora.steps=7", "lora.lr=2e-3"]
    assert TrainConfig.from_yaml(file) == TrainConfig.from_dict(values)
    assert TrainConfig.from_dict({}, overrides) == TrainConfig.from_dict(values)
    direct = TrainConfig(base="some/model", skip_rate=0.3)
    direct.lora.steps, direct.lora.lr = 7, 0.002
    assert direct == TrainConfig.from_yaml(file)


def test_a_written_config_reads_back_as_itself(tmp_path):
    config = TrainConfig.from_dict({"data": {"train": ["a", "b"]}, "router": {"keep_bias": 1.5}})
    config.to_yaml(tmp_path / "config.yaml")
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    assert TrainConfig.from_yaml(tmp_path / "c.yaml", ["seed=2", "seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("values", "key", "near"),
    [
        ({"lora": {"step": 3}}, "lora.step", "lora.steps"),
        ({"routrs": {}}, "routrs", "routers"),
        ({"steps": 3}, "steps", "steps"),
        ({"rank": 8}, "rank", "lora.rank"),
        ({"data": {"max_lenght": 8}}, "data.max_lenght", "data.max_length"),
        ({"warmup": {"distill": {"wieght": 1.0}}}, "wieght", "warmup.distill.weight"),
    ],
)
def test_unknown_keys_name_the_near_miss(values, key, near):
    with pytest.raises(ValueError) as error:
        TrainConfig.from_dict(values)
    assert f"{key}'" in str(error.value) and f"{near}'?" in str(error.value)


def test_unknown_overrides_are_refused_too():
    with pytest.raises(ValueError, match=r"lora\.stpes.*did you mean 'lora\.steps'"):
        TrainConfig.from_dict({}, ["lora.stpes=3"])
    with pytest.raises(ValueError, match="name=value"):
        TrainConfig.from_dict({}, ["lora.steps"])
    with pytest.raises(ValueError, match="is not a section"):
        TrainConfig.from_dict({"seed": 1}, ["seed.x=3"])


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"seed": "one"}, "seed='one': expected a whole number"),
        ({"seed": True}, "seed=True"),
        ({"lora": {"steps": 1.5}}, "lora.steps=1.5: expected a whole number"),
        ({"precision": "f16"}, "expected one of f32, bf16"),
        ({"resume": "yes"}, "expected true or false"),
        ({"lora": 3}, "lora is a section of settings"),
        ({"data": {"train": 3}}, "expected text or a list of text"),
        ({"router": {"keep_bias": "importence"}}, "importance"),
    ],
)
def test_values_of_a_wrong_type_say_what_is_accepted(values, complaint):
    with pytest.raises(ValueError) as error:
        TrainConfig.from_dict(values)
    assert complaint in str(error.value)


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert TrainConfig.from_dict(yaml.safe_load("lora: {lr: 1e-3}")).lora.lr == 1e-3
    assert TrainConfig.from_dict({"lora": {"lr": 1}}).lora.lr == 1.0


def test_all_complaints_come_in_one_message():
    config = TrainConfig.from_dict(
        {
            "skip_rate": 1.2,
            "batch_size": 0,
            "phases": ["lora", "router"],
            "lora": {"lr": -1.0, "dropout": 2.0},
            "routers": {"alpha": 5.0, "alpha_range": [0.0, 1.0]},
            "control_plan": "magic",
        }
    )
    with pytest.raises(ValueError) as error:
        config.validate()
    for name in ("skip_rate=1.2", "batch_size=0", "'router'", "did you mean 'routers'", "lora.lr",
                 "lora.dropout", "alpha_range", "control_plan='magic'"):  # fmt: skip
        assert name in str(error.value), name


@pytest.mark.parametrize(
    "values",
    [
        {"phases": []},
        {"phases": ["lora", "routers"]},
        {"phases": ["lora", "lora"]},
        {"resume": True, "overwrite": True},
        {"router": {"windows": 4}},
        {"warmup": {"epochs": 0.0}},
        {"routers": {"steps": 0}},
        {"routers": {"hold": "per_layer", "skip_rate_start": 0.1}},
        {"warmup": {"drop_temperature": 0.0}},
        {"calibrate_rates": [0.3, 1.0]},
        {"plan_search_examples": 0},
        {"plan_search_trials": -1},
        {"control": "static", "control_plan": "random"},
        {"control": "static", "control_plan": "random:-1"},
        {"control": "static", "control_plan": "most_kept:"},
        {"control_plan": "greedy"},
        {"control": "length", "control_plan": [0, 1]},
        {"control": "static", "plan_search_common": "runs/static"},
        {"router": {"keep_bias": "importance"}, "plan_search_common": "runs/static"},
        {"router": {"bottleneck": 8}},
        {"data": {"messages_column": "chat", "prompt_column": "question"}},
    ],
)
def test_settings_that_cannot_work_are_refused(values):
    with pytest.raises(ValueError):
        TrainConfig.from_dict(values).validate()


@pytest.mark.parametrize(
    "values",
    [
        {"control": "static", "control_plan": "greedy", "router": {"keep_bias": "importance"}},
        {"control": "length", "plan_search_common": "x", "router": {"keep_bias": "importance"}},
        {"plan_search_common": "runs/static"},
        {"router": {"head": "mlp", "bottleneck": 8}},
        TrainConfig(control="lora_only").to_dict(),
    ],
)
def test_settings_that_go_together_are_taken(values):
    TrainConfig.from_dict(values).validate()


def test_the_default_config_is_valid_and_every_setting_has_a_help_text():
    TrainConfig().validate()
    fields = config_fields()
    assert len({f.name for f in fields}) == len(fields) > 60
    for f in fields:
        assert f.help and f.type, f.name


def test_difference_names_what_changes_the_weights_only():
    config = TrainConfig()
    other = dataclasses.replace(config, output_dir="elsewhere", progress=False, save_every=3)
    assert config.difference(other) == []
    assert config.difference(dataclasses.replace(config, seed=9)) == ["seed"]


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="mapping"):
        TrainConfig.from_yaml(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="not YAML"):
        TrainConfig.from_yaml(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_bytes("base: modèle\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"c\.yaml is not UTF-8 text"):
        TrainConfig.from_yaml(tmp_path / "c.yaml")
