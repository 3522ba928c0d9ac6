"""Pictures show the plans they were given, like plans side by side."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from firstlm import plots
from firstlm.skip_plan import SkipPlan


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
        {"total_step": 1, "phase": "warmup", "loss": 3.0, "cross_entropy": 3.0},
        {"total_step": 2, "phase": "routers", "loss": 3.5, "cross_entropy": 3.2, "skip_rate": 0.1,
         "skip_rate_asked": 0.25},
        {"total_step": 3, "phase": "lora", "loss": 2.5, "cross_entropy": 2.5, "skip_rate": 0.24,
         "skip_rate_asked": 0.25},
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
