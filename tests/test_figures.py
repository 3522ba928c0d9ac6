"""Figures carry their spread and origin; timings compare equal work; pictures are drawn."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from firstlm import figures, plots
from firstlm.skip_plan import SkipPlan
from PIL import Image


def test_measured_gives_median_and_spread() -> None:
    got = figures.measured(range(11))
    assert got == {"median": 5.0, "p10": 1.0, "p90": 9.0, "n": 11}
    assert figures.measured([7]) == {"median": 7.0, "p10": 7.0, "p90": 7.0, "n": 1}


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_measured_refuses_nothing_and_nonfinite(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"at least one|must be finite"):
        figures.measured(values)


def test_written_figures_say_where_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figures.json"
    written = figures.write(path, {"tpot_ms": figures.measured([1, 2, 3])}, seed=7)
    read = figures.read(path)
    assert read == written == json.loads(path.read_text())
    assert read["seed"] == 7
    assert read["schema_version"] == figures.SCHEMA_VERSION
    assert {"python", "torch", "transformers", "peft"} <= read["versions"].keys()
    assert read["machine"]["cores"] == figures.available_cores() >= 1
    assert read["machine"]["cpu"]
    assert os.listdir(path.parent) == ["figures.json"]


def test_reserved_keys_and_nonfinite_figures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="versions"):
        figures.record({"versions": {}}, seed=0)
    with pytest.raises(ValueError, match=r"figures.a.b\[1\] is nan"):
        figures.write(tmp_path / "x.json", {"a": {"b": [1.0, float(np.nan)]}}, seed=0)
    assert not (tmp_path / "x.json").exists()


def test_reading_another_schema_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="schema_version is 99"):
        figures.read(path)
    path.write_text("not json")
    with pytest.raises(ValueError, match="is not JSON"):
        figures.read(path)


def some_plans(prompts: int = 24, layers: int = 7) -> list[SkipPlan]:
    rng = np.random.default_rng(0)
    masks = rng.random((prompts, layers)) < 0.6
    masks[:, 0] = True
    return [SkipPlan.from_mask(mask) for mask in masks]


def test_prompts_with_the_same_plan_stand_side_by_side_and_groups_stay_together() -> None:
    plans = some_plans() * 2
    groups = ["b", "a"] * len(some_plans())
    mask = plots.keep_matrix(plans)
    drawn = mask[plots.prompt_order(mask)]
    changes = (drawn[1:] != drawn[:-1]).any(axis=1).sum()
    assert changes == len(set(plans)) - 1
    order = plots.prompt_order(mask, groups)
    assert [groups[i] for i in order] == ["a"] * 24 + ["b"] * 24
    with pytest.raises(ValueError, match="48 prompts need as many groups, got 1"):
        plots.prompt_order(mask, ["a"])
    assert sorted(plots.prompt_order(np.ones((3, 4), dtype=bool))) == [0, 1, 2]


def test_overview_draws_the_plans_it_was_given(tmp_path: Path) -> None:
    log = [
        {"step": 1, "phase": "warmup", "loss": 3.0, "cross_entropy": 3.0},
        {"step": 2, "phase": "routers", "loss": 3.5, "cross_entropy": 3.2, "skip_rate": 0.1,
         "target_skip_rate": 0.25},
        {"step": 3, "phase": "lora", "loss": 2.5, "cross_entropy": 2.5, "skip_rate": 0.24,
         "target_skip_rate": 0.25},
    ]  # fmt: skip
    path = plots.overview(tmp_path / "new" / "overview.png", some_plans(), log, title="A title")
    picture = Image.open(path)
    assert picture.width == 1200
    colors = {color[:3] for _, color in picture.convert("RGB").getcolors(1 << 24)}
    for wanted in (plots.KEPT, plots.SKIPPED, plots.ACCENT):
        assert tuple(bytes.fromhex(wanted[1:])) in colors
    assert os.listdir(path.parent) == ["overview.png"]
    assert plots.overview(tmp_path / "plain.png", some_plans(prompts=1)).stat().st_size > 0


def test_keep_share_and_its_errors(tmp_path: Path) -> None:
    path = plots.keep_share(tmp_path / "share.png", {"a": some_plans(), "b": some_plans(3)})
    assert Image.open(path).height == 384
    with pytest.raises(ValueError, match="plans_by_label is empty"):
        plots.keep_share(tmp_path / "none.png", {})
    with pytest.raises(ValueError, match=r"plans of one model are needed, got 2 plans.*\[3, 4\]"):
        plots.keep_matrix([SkipPlan((0,), 3), SkipPlan((0,), 4)])
