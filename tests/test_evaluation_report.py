"""The report says what the rows say, also where FiRST loses, and needs no other file."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from firstlm.evaluation import aims, charts, files, report, report_notes, tables
from firstlm.evaluation.conclusions import Verdict, outcome, verdicts
from firstlm.evaluation.records import Evaluation, Method, MethodResult
from firstlm.evaluation.statistics import rows
from synthetic_evaluation import TASKS, evaluation, result

FIRST = Method("first", "first", 0.25)


def judged(*methods: MethodResult) -> Verdict:
    (verdict,) = verdicts(rows(Evaluation({}, list(methods)), resamples=500))
    return verdict


def rival(name: str, cost: float, weights: str = "trained") -> MethodResult:
    return result(Method(name, weights, 0.25), cost)


def in_first_task(*methods: MethodResult) -> list[MethodResult]:
    return [
        replace(one, examples=[e for e in one.examples if e.task == TASKS[0]]) for one in methods
    ]


def answering(one: MethodResult, answer: str) -> MethodResult:
    return replace(one, examples=[replace(e, answer=answer) for e in one.examples])


AS_GOOD = (rival("static", 0.2), rival("uniform", 0.3), rival("shuffled", 0.3, "first"))
FAIR = tuple(answering(one, "nothing of it") for one in AS_GOOD)  # their answers are worse, too


def test_adaptivity_pays_if_trained_rivals_and_shuffled_plans_lose() -> None:
    first = result(FIRST, 0.1, plans=5)
    yes = judged(*in_first_task(first, *FAIR))
    assert yes.answer == "yes" and "all 2 trained rivals" in yes.headline
    assert "likewise by the answers" in yes.headline
    assert yes.headline.endswith("plans fit their prompts.")
    assert any("dealt to wrong prompts lose: -0." in line for line in yes.sentences)
    even = replace(first, method=Method("uniform", "trained", 0.25))
    partly = judged(first, FAIR[0], even, FAIR[2])
    assert partly.answer == "partly" and "better than 1 of 2 trained rivals" in partly.headline
    assert "no difference shown to every n-th layer + LoRA: +0.000 [" in partly.headline


def test_a_static_plan_that_is_not_beaten_leaves_it_open() -> None:
    """Better than layers chosen badly for all is no adaptivity."""
    first = result(FIRST, 0.1, plans=5)
    even = replace(first, method=Method("static", "trained", 0.25))
    for others in (FAIR[1:], FAIR[2:]):
        verdict = judged(first, even, *others)
        assert verdict.answer == "unknown"
        assert verdict.headline.startswith("No difference shown to static plan + LoRA: +0.000")
        assert ("Better than every n-th layer + LoRA." in verdict.headline) == (len(others) == 2)


def test_several_tasks_need_plans_that_were_shuffled_within_a_task() -> None:
    first = result(FIRST, 0.1, plans=5)
    unshuffled = judged(first, *FAIR)
    assert unshuffled.answer == "yes" and "fit their tasks at least" in unshuffled.headline
    worse = judged(first, *FAIR, rival("shuffled_in_task", 0.3, "first"))
    assert worse.answer == "yes" and worse.headline.endswith("also within a task.")
    same = replace(first, method=Method("shuffled_in_task", "first", 0.25))
    even = judged(first, *FAIR, same)
    assert even.answer == "yes" and "within a task no gain is shown: +0.000" in even.headline


def test_answers_that_are_not_better_are_not_a_yes() -> None:
    found = judged(result(FIRST, 0.1, plans=5), *AS_GOOD)
    assert found.answer == "partly"
    assert "but by ROUGE-L no difference shown to static plan + LoRA: +0." in found.headline


def test_answers_that_are_better_by_bleu_alone_are_enough() -> None:
    figures = rows(Evaluation({}, [result(FIRST, 0.1, plans=5), *AS_GOOD]), resamples=200)
    for entry in figures[0]["vs"].values():
        entry["bleu"] |= {"delta": 2.0, "ci95": [1.0, 3.0], "p": 0.001}
    (verdict,) = verdicts(figures)
    assert verdict.answer == "yes"


def test_worse_answers_are_not_a_yes() -> None:
    static, *others = AS_GOOD
    first = answering(result(FIRST, 0.1, plans=5), "nothing of it")
    found = judged(first, static, *others)
    assert found.answer == "partly" and "by ROUGE-L WORSE than static plan" in found.headline


def test_answers_are_judged_by_bleu_where_there_is_no_rouge() -> None:
    first = answering(result(FIRST, 0.1, plans=5), "nothing of it")
    figures = rows(Evaluation({}, [first, *AS_GOOD]), resamples=200)
    for row in figures:
        for entry in [row["metrics"], *row["vs"].values()]:
            del entry["rouge_l"]
    (verdict,) = verdicts(figures)
    assert "by BLEU WORSE than static plan" in verdict.headline
    assert "BLEU (0-100)" in tables.short_table(figures).head


@pytest.mark.parametrize(("layers", "word"), [(-2, "less"), (2, "more")])
def test_a_yes_is_of_equal_skip_rates(layers: int, word: str) -> None:
    first = result(FIRST, 0.1, plans=5)

    def moved(kept: tuple[int, ...]) -> tuple[int, ...]:
        return kept[:-layers] if layers > 0 else tuple(sorted({*kept, *spared(kept)}))

    def spared(kept: tuple[int, ...]) -> list[int]:
        return [layer for layer in range(30) if layer not in kept][: -layers or None]

    examples = [replace(e, kept=moved(e.kept)) for e in first.examples]
    found = judged(replace(first, examples=examples), *FAIR)
    assert found.answer == "partly"
    assert f"it skips 2.00 layers {word} than static plan + LoRA" in found.headline


def test_a_loss_is_said_plainly() -> None:
    first, shuffled = result(FIRST, 0.2, plans=5), rival("shuffled", 0.3, "first")
    lost = judged(first, rival("static", 0.1), shuffled)
    assert lost.answer == "no" and lost.headline.startswith("Beaten by static plan + LoRA: +0.1")
    assert any("WORSE than static plan: +0.1" in line for line in lost.sentences)
    wrong = judged(first, rival("static", 0.3), rival("shuffled", 0.1, "first"))
    assert wrong.answer == "no" and "Plans of other prompts are better" in wrong.headline
    one_plan = judged(result(FIRST, 0.1), rival("static", 0.2), shuffled)
    assert one_plan.answer == "no" and "One plan serves all prompts" in one_plan.headline


def test_no_difference_to_shuffled_plans_is_no_claim_either_way(tmp_path: Path) -> None:
    first = result(FIRST, 0.2, plans=5)
    same = replace(first, method=Method("shuffled", "first", 0.25))
    found = judged(first, rival("static", 0.3), same)
    assert found.answer == "unknown" and "no difference shown" in found.headline
    assert "+0.000 [+0.000, +0.000]" in found.headline
    assert not any("do as well" in line for line in [found.headline, *found.sentences])
    evaluation = Evaluation({}, [first, rival("static", 0.3), same])
    page = report.write(evaluation, rows(evaluation, resamples=50), tmp_path)["html"].read_text()
    assert "nats/token lost with plans of other prompts: no difference shown" in page


def test_what_was_not_measured_is_not_shown() -> None:
    first = result(FIRST, 0.1, plans=5, timed=False)
    static, uniform, shuffled = FAIR
    for others, missing in (
        ((), "No rival of this rate was trained"),
        ((rival("static", 0.2, "first"), rival("uniform", 0.2, "base"), shuffled), "No rival"),
        ((uniform, shuffled), "No static plan of this rate was trained"),
        ((static, uniform), "No shuffled plans were measured"),
    ):
        found = judged(first, *others)
        assert found.answer == "unknown" and found.headline.startswith(missing)
        assert "not shown" in found.headline
    assert "Decoding was not timed." in found.sentences
    untrained = judged(first, rival("uniform", 0.2, "base"), shuffled)
    assert any("No control of this rate was trained" in line for line in untrained.sentences)
    assert verdicts(rows(Evaluation({}, [rival("static", 0.1)]))) == []


def test_better_needs_the_interval_and_p() -> None:
    def of(low: float, high: float, p: float, metric: str = "rouge_l") -> str:
        return outcome({metric: {"ci95": [low, high], "p": p}}, metric)

    assert of(0.1, 0.2, 0.01) == "better" and of(-0.2, -0.1, 0.01) == "worse"
    assert of(0.1, 0.2, 0.01, "cross_entropy") == "worse"
    assert of(0.0001, 0.09, 0.051) == of(-0.1, 0.2, 0.04) == of(-0.2, 0.0, 0.01) == "even"


def test_a_budget_that_was_moved_to_long_answers_is_pointed_out() -> None:
    first = result(FIRST, 0.1, plans=5)
    examples = [
        replace(e, kept=tuple(range(30)) if e.tokens > 20 else e.kept[:-4]) for e in first.examples
    ]
    moved = judged(replace(first, examples=examples), rival("static", 0.2))
    assert any("layers spent, not layers chosen" in line for line in moved.sentences)
    assert not any("layers spent" in line for line in judged(first, rival("static", 0.2)).sentences)


def test_rivals_that_skip_another_share_are_named_where_first_lost_too() -> None:
    first, better = result(FIRST, 0.3, plans=5), rival("static", 0.1)
    more = [replace(e, kept=e.kept[:-2]) for e in better.examples]
    lost = judged(first, replace(better, examples=more))
    assert lost.answer == "no"
    assert any("layers less than static plan + LoRA" in line for line in lost.sentences)


def test_a_rival_of_one_seed_is_also_set_against_this_seed_of_first() -> None:
    firsts = [result(replace(FIRST, seed=seed), 0.1 + 0.2 * seed, plans=5) for seed in (0, 1)]
    line = "Of seed 0 alone, the only one of these rivals, with intervals over prompts only: "
    (said,) = [s for s in judged(*firsts, *AS_GOOD).sentences if s.startswith("Of seed")]
    assert said.startswith(f"{line}static plan + LoRA: -0.096 [")
    assert "every n-th layer + LoRA: -0.196 [" in said and "shuffled" not in said
    assert not any(s.startswith("Of seed") for s in judged(firsts[0], *AS_GOOD).sentences)


def half(times: float) -> Evaluation:
    """FiRST at 50 %, whose tokens take `times` the time of all layers', at an ideal of 0.605."""
    first = result(Method("first", "first", 0.5), 0.1, n=5, plans=5)
    timing = first.timing
    assert timing is not None
    slowed = replace(timing, tpot_ms=[times * ms for ms in timing.full_tpot_ms])
    return Evaluation({}, [replace(first, timing=slowed)])


@pytest.mark.parametrize(
    ("times", "change", "word"), [(0.62, 0.38, "less"), (1.0, 0.0, "less"), (1.05, 0.05, "more")]
)
def test_decoding_that_takes_longer_is_said_to(
    times: float, change: float, word: str, tmp_path: Path
) -> None:
    found = half(times)
    figures = rows(found, resamples=50)
    (verdict,) = verdicts(figures)
    said = f"a token takes {change:.1%} {word} time than with all layers"
    reached = "35% less (for 50% skipped) is " + ("reached" if times < 0.65 else "MISSED")
    assert any(said in line and reached in line for line in verdict.sentences)
    page = report.write(found, figures, tmp_path)["html"].read_text(encoding="utf-8")
    assert f"<b>{change:.0%}</b><span>{word} time per token, measured</span>" in page


def test_faster_than_the_bytes_allow_is_said(tmp_path: Path) -> None:
    found = half(0.5)
    figures = rows(found, resamples=50)
    (verdict,) = verdicts(figures)
    assert any("That is more than the bytes that it reads" in line for line in verdict.sentences)
    page = report.write(found, figures, tmp_path)["html"].read_text(encoding="utf-8")
    assert "measured; more than the bytes that it reads account for" in page


def test_aims_are_judged_by_the_whole_interval() -> None:
    found = [aims.judge(low, high, 0.95) for low, high in ((0.95, 1), (0.9, 0.949), (0.94, 0.96))]
    assert found == ["reached", "MISSED", "not decided"]
    lora = result(Method("lora_only", "trained", 0.0), 0.0)
    near = result(FIRST, 0.05, plans=5)
    (line,) = [s for s in judged(near, lora).sentences if "of LoRA-only's ROUGE-L" in s]
    assert "the aim of 98% (for 25% skipped) is " in line
    low, high = (float(end) / 100 for end in re.search(r"\[(.*)%, (.*)%\]", line).groups())
    assert line.endswith(aims.judge(low, high, 0.98) + ".")


@pytest.mark.parametrize(
    ("rate", "known"), [(0.2667, 0.25), (0.267, 0.25), (0.25, 0.25), (0.3667, 0.35), (0.3, None)]
)
def test_a_rate_has_the_aim_of_the_one_within_half_a_layer(rate: float, known: float) -> None:
    found = aims.aim_of(aims.QUALITY_AIMS, {"skip_rate_asked": rate, "num_layers": 30})
    assert found == (None if known is None else (known, aims.QUALITY_AIMS[known]))


MACHINE = {"cpu": "a CPU", "cores": 4, "threads": 3, "gpu": None}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("report")
    found = evaluation(n=12)
    figures = rows(found, resamples=200)
    # A report can be made from the file alone.
    report.write(found, json.loads(json.dumps(figures)), folder, MACHINE)
    return folder, figures


def test_the_page_is_one_file(written: tuple[Path, list[dict]]) -> None:
    folder, _ = written
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 7
    assert not re.search(r"(src|href)=['\"](?!data:)", page) and "http" not in page
    assert "<script" not in page
    pictures = [base64.b64decode(data) for data in re.findall(r"base64,([^']+)'", page)]
    assert all(Image.open(io.BytesIO(data)).width == 1320 for data in pictures)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.md"]


def test_markdown_and_page_say_the_same(written: tuple[Path, list[dict]]) -> None:
    folder, figures = written
    text = (folder / "report.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    for verdict in verdicts(figures):
        assert verdict.headline in text and verdict.headline in page
    for heading in ("All methods", "Latency", "How it was measured", "Checks that held"):
        assert f"## {heading}\n" in text
    assert "layer calls equal the plans: 1,200 answers" in text
    assert "![" not in text and text.count("](report.html)") == 1
    assert "| examples | 12 |" in text and "<td>examples</td><td>12</td>" in page


def test_what_was_tested_comes_first(written: tuple[Path, list[dict]]) -> None:
    folder, _ = written
    text = (folder / "report.md").read_text(encoding="utf-8")
    opening = text.split("\n\n")[1]
    assert opening in (folder / "report.html").read_text(encoding="utf-8")
    for said in (
        "30 layers", "training seeds 0, 1, 2", "skip 0.25 and 0.5 of", "a CPU, 4 cores, 2 threads",
        "24 held-out prompts (12 of debian-synopsis, 12 of debian-en-de)",
    ):  # fmt: skip
        assert said in opening
    one = result(replace(FIRST, checkpoint="runs/x"), plans=5, n=5, timed=False)
    settings = {"too_long": 7, "effort": {"max_length": 128}}
    found = Evaluation(settings, [one], {"optimizer steps": "first-first-0.25-seed0: 72 steps"})
    opening = report_notes.what_was_tested(found, rows(found, resamples=50), None)
    for said in ("(runs/x)", "for 72 optimizer steps", "7 examples longer than 128 tokens"):
        assert said in opening
    assert "Machine" not in opening


def test_a_report_names_the_machine_that_measured(tmp_path: Path) -> None:
    files.write_evaluation(Evaluation({}, [result(FIRST, n=5, timed=False)]), tmp_path, 0)
    machine = json.loads((tmp_path / files.RESULTS).read_text())["machine"]
    assert f"Machine: {machine['gpu'] or machine['cpu']}" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("engine", "said"), [("hf", "in the hf path;"), ("native", "in the native engine;")]
)
def test_the_engine_of_quality_is_the_one_that_was_used(engine: str, said: str) -> None:
    found = Evaluation({"engine": engine}, [result(FIRST, n=5)])
    line = report_notes.how_measured(found, rows(found, resamples=50))[0]
    assert said in line


def test_a_report_without_first_timing_or_tasks(tmp_path: Path) -> None:
    only = Evaluation({}, [result(Method("lora_only", "trained", 0.0), n=5, tasks=("one",),
                                  timed=False)])  # fmt: skip
    paths = report.write(only, rows(only, resamples=50), tmp_path)
    text = paths["markdown"].read_text(encoding="utf-8")
    assert "FiRST itself was not measured" in text and "Nothing was timed." in text
    page = paths["html"].read_text(encoding="utf-8")
    assert page.count("<img alt='quality_skip_rate'") == page.count("<img ") == 1


def test_a_summary_for_a_readme(written: tuple[Path, list[dict]], tmp_path: Path, capsys) -> None:
    from firstlm import figures

    path = tmp_path / "results.json"
    figures.write(path, {"rows": written[1]}, seed=0)
    tables.main(["--summary", str(path)])
    said, _, *lines = capsys.readouterr().out.splitlines()
    assert said == "n = 24 prompts (12 of debian-synopsis, 12 of debian-en-de)"
    assert len({line.count("|") for line in lines}) == 1
    (first,) = [line for line in lines if line.startswith("| **FiRST, 0.25**")]
    assert "22.0 of 30" in first and re.search(r"1\.\d\d \[1\.\d\d, 1\.\d\d\]", first)
    (static,) = [line for line in lines if line.startswith("| static plan, 0.25")]
    assert re.search(r"-0\.\d+ \[-0\.\d+, -0\.\d+\]", static)


def names(table: tables.Table) -> list[str]:
    return [row[0] for row in table.rows]


def test_the_first_table_is_what_the_verdict_rests_on(written: tuple[Path, list[dict]]) -> None:
    folder, figures = written
    one_rate = [row for row in figures if row["skip_rate_asked"] in (0.0, 0.25)]
    table = tables.short_table(one_rate)
    own, on_first = names(table)[1:8], names(table)[9:]
    assert own[:2] == ["LoRA-only", "FiRST, 0.25"] and "static plan, 0.25" in own
    assert names(table)[8] == "on FiRST's weights"
    assert set(on_first) == {"plans from prompt length, 0.25", "plans of other prompts, 0.25"}
    place = table.head.index("layers kept")
    assert [row[place] for row in table.rows[1:4]] == ["30.0 of 30", "22.0 of 30", "22.0 of 30"]
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.index("## In short") < text.index("## All methods")


def test_tables_say_n_and_whose_weights_once(written: tuple[Path, list[dict]]) -> None:
    figures = written[1]
    first = next(verdict.row for verdict in verdicts(figures))
    made = [tables.short_table(figures), tables.main_table(figures), tables.latency_table(figures),
            tables.all_metrics_table(figures), tables.comparison_table(first)]  # fmt: skip
    for table in [*made, tables.main_table(figures, TASKS[0])]:
        assert re.match(r"n = (\d+ prompts|8 × 3)", table.caption)
        assert table.caption in table.markdown() and "<caption>n = " in table.html()
        assert "(FiRST's weights)" not in table.markdown()
        assert names(table).count("on FiRST's weights") == 1
    assert "<th colspan='3'>a group</th>" in tables.Table("abc", [["a group"]]).html()
    assert tables.main_table(figures, TASKS[0]).caption == "n = 12 prompts of debian-synopsis"


def test_times_of_different_weights_are_shares_of_their_own_groups() -> None:
    slow, fast = result(FIRST, 0.1, n=5, plans=5), rival("static", 0.2)
    timing = slow.timing
    assert timing is not None
    doubled = {
        name: [2 * ms for ms in getattr(timing, name)] for name in ("tpot_ms", "full_tpot_ms")
    }
    slow = replace(slow, timing=replace(timing, **doubled))
    fast = replace(result(Method("static", "trained", 0.25), 0.2, n=5), timing=timing)
    figures = rows(Evaluation({}, [slow, fast]), resamples=50)
    for table in (tables.main_table(figures), tables.short_table(figures)):
        assert "TPOT, ms" not in table.head
    place = tables.main_table(figures).head.index(tables.TIME_HEAD)
    shares = {row[place] for row in tables.main_table(figures).rows if len(row) > 1}
    assert len(shares) == 1 and re.fullmatch(r"-\d\d\.\d%", shares.pop())


def test_the_ideal_is_seen_beside_a_bar_that_is_shorter(tmp_path: Path) -> None:
    def marked(times: float) -> int:
        picture = Image.open(charts.latency(rows(half(times), resamples=50), tmp_path / "a.png"))
        wanted = tuple(int(charts.VERMILLION[i : i + 2], 16) for i in (1, 3, 5))
        return int((np.asarray(picture.convert("RGB")) == wanted).all(-1).sum())

    assert marked(0.3) > 20 and marked(0.9) > 20


def test_the_pareto_front_is_what_no_other_method_beats_in_both() -> None:
    def row(name: str, speedup: float, loss: float) -> dict:
        return {"name": name, "speedup": speedup, "metrics": {"cross_entropy": {"mean": loss}}}

    figures = [
        row("full", 1.0, 2.0), row("slow and bad", 1.2, 2.9), row("fast", 1.8, 3.0),
        row("good", 1.3, 2.4), row("as fast, worse", 1.8, 3.5),
    ]  # fmt: skip
    front = charts.pareto_front(figures, "cross_entropy")
    assert [row["name"] for row in front] == ["fast", "good", "full"]
