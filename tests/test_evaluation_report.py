"""The report says what the rows say, also where FiRST loses, and needs no other file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from firstlm.evaluation import report, tables
from firstlm.evaluation.conclusions import Verdict, verdicts
from firstlm.evaluation.records import Evaluation, Method, MethodResult
from firstlm.evaluation.statistics import rows
from synthetic_evaluation import evaluation, result

FIRST = Method("first", "first", 0.25)


def judged(*methods: MethodResult) -> Verdict:
    (verdict,) = verdicts(rows(Evaluation({}, list(methods)), resamples=500))
    return verdict


def rival(name: str, cost: float, weights: str = "trained") -> MethodResult:
    return result(Method(name, weights, 0.25), cost)


def test_adaptivity_pays_if_rivals_and_shuffled_plans_lose() -> None:
    first, shuffled = result(FIRST, 0.1, plans=5), rival("shuffled", 0.3, "first")
    yes = judged(first, rival("static", 0.2), rival("uniform", 0.3), shuffled)
    assert yes.answer == "yes" and "all 2 rivals" in yes.headline
    assert any("dealt to the wrong prompts lose: -0." in line for line in yes.sentences)
    even = replace(first, method=Method("static", "trained", 0.25))
    partly = judged(first, even, rival("uniform", 0.3), shuffled)
    assert partly.answer == "partly" and partly.headline.endswith(
        "even with best static plan + LoRA."
    )


def test_a_loss_is_said_plainly() -> None:
    first, shuffled = result(FIRST, 0.2, plans=5), rival("shuffled", 0.3, "first")
    lost = judged(first, rival("static", 0.1), shuffled)
    assert lost.answer == "no" and lost.headline == "Beaten by best static plan + LoRA."
    assert any("WORSE than best static plan + LoRA: +0.1" in line for line in lost.sentences)
    same = replace(first, method=Method("shuffled", "first", 0.25))
    illusion = judged(first, rival("static", 0.3), same)
    assert illusion.answer == "no" and "illusion" in illusion.headline
    one_plan = judged(result(FIRST, 0.1), rival("static", 0.2), shuffled)
    assert one_plan.answer == "no" and "One plan serves all prompts" in one_plan.headline


def test_what_was_not_measured_is_not_known() -> None:
    first = result(FIRST, 0.1, plans=5, timed=False)
    alone = judged(first)
    assert alone.answer == "unknown" and "controls of this rate" in alone.headline
    unshuffled = judged(first, rival("static", 0.2))
    assert unshuffled.answer == "unknown" and "shuffled plans" in unshuffled.headline
    assert "Decoding was not timed." in unshuffled.sentences
    untrained = judged(first, rival("uniform", 0.2, "base"), rival("shuffled", 0.3, "first"))
    assert untrained.answer == "yes"
    assert any("No control of this rate was trained" in line for line in untrained.sentences)
    assert verdicts(rows(Evaluation({}, [rival("static", 0.1)]))) == []


def test_a_budget_that_was_moved_to_long_answers_is_pointed_out() -> None:
    first = result(FIRST, 0.1, plans=5)
    examples = [
        replace(e, kept=tuple(range(30)) if e.tokens > 20 else e.kept[:-4]) for e in first.examples
    ]
    moved = judged(replace(first, examples=examples), rival("static", 0.2))
    assert any("layers spent, not layers chosen" in line for line in moved.sentences)
    assert not any("layers spent" in line for line in judged(first, rival("static", 0.2)).sentences)


@pytest.mark.parametrize(
    ("times", "change", "word"), [(0.5, 0.5, "less"), (1.0, 0.0, "less"), (1.05, 0.05, "more")]
)
def test_decoding_that_takes_longer_is_said_to(
    times: float, change: float, word: str, tmp_path: Path
) -> None:
    first = result(Method("first", "first", 0.5), 0.1, n=5, plans=5)
    timing = first.timing
    assert timing is not None
    slowed = replace(timing, tpot_ms=[times * ms for ms in timing.full_tpot_ms])
    found = Evaluation({}, [replace(first, timing=slowed)])
    figures = rows(found, resamples=50)
    (verdict,) = verdicts(figures)
    said = f"a token takes {change:.1%} {word} time than with all layers"
    reached = "35% less is " + ("reached" if times < 0.65 else "MISSED")
    assert any(said in line and reached in line for line in verdict.sentences)
    page = report.write(found, figures, tmp_path)["html"].read_text(encoding="utf-8")
    assert f"<b>{change:.0%}</b><span>{word} time per token, measured</span>" in page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("report")
    found = evaluation(n=12)
    figures = rows(found, resamples=200)
    # A report can be made from the file alone.
    report.write(found, json.loads(json.dumps(figures)), folder)
    return folder, figures


def test_the_page_is_one_file(written: tuple[Path, list[dict]]) -> None:
    folder, _ = written
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 7
    assert not re.search(r"(src|href)=['\"](?!data:)", page) and "http" not in page
    assert "<script" not in page and "n = 24 prompts" not in page  # n is in pictures and tables
    pictures = sorted(path.name for path in (folder / "plots").iterdir())
    assert pictures == [
        "gains.png", "keep_share.png", "latency.png", "plans.png", "quality_skip_rate.png",
        "quality_tpot.png", "skip_rates.png",
    ]  # fmt: skip
    assert all(Image.open(folder / "plots" / name).width == 1320 for name in pictures)


def test_markdown_and_page_say_the_same(written: tuple[Path, list[dict]]) -> None:
    folder, figures = written
    text = (folder / "report.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    for verdict in verdicts(figures):
        assert verdict.headline in text and verdict.headline in page
    for heading in ("All methods", "Latency", "How it was measured", "Checks that held"):
        assert f"## {heading}\n" in text
    assert "24 held-out prompts (12 of debian-synopsis, 12 of debian-en-de)" in page
    assert "layer calls equal the plans: 1,200 answers" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (folder / re.search(r"\((.*)\)", line).group(1)).exists()


def test_a_report_without_first_timing_or_tasks(tmp_path: Path) -> None:
    only = Evaluation({}, [result(Method("lora_only", "trained", 0.0), n=5, tasks=("one",),
                                  timed=False)])  # fmt: skip
    paths = report.write(only, rows(only, resamples=50), tmp_path)
    text = paths["markdown"].read_text(encoding="utf-8")
    assert "FiRST itself was not measured" in text and "Nothing was timed." in text
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["quality_skip_rate.png"]


def test_a_summary_for_a_readme(written: tuple[Path, list[dict]], tmp_path: Path, capsys) -> None:
    from firstlm import figures

    path = tmp_path / "results.json"
    figures.write(path, {"rows": written[1]}, seed=0)
    tables.main(["--summary", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    (first,) = [line for line in lines if line.startswith("| **FiRST, 0.25**")]
    assert "26.7%" in first and "(1.27)" in first
    (static,) = [line for line in lines if line.startswith("| best static plan + LoRA, 0.25")]
    assert re.search(r"-0\.\d+ \[-0\.\d+, -0\.\d+\]", static)
