"""Statistics of an evaluation where the truth is known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from firstlm.evaluation import statistics
from firstlm.evaluation.metrics import METRICS, sentence_statistics, token_f1
from firstlm.evaluation.records import Evaluation, ExampleResult, Method, MethodResult
from firstlm.evaluation.statistics import best_rows, rows
from synthetic_evaluation import TASKS, evaluation, result

FIRST, STATIC = Method("first", "first", 0.25), Method("static", "trained", 0.25)
LORA = Method("lora_only", "trained", 0.0)


def two(first: MethodResult, other: MethodResult, **options) -> tuple[dict, dict]:
    own, rival = rows(Evaluation({}, [first, other]), **options)
    return own, rival


def texts(answers: list[str], references: list[str]) -> list[ExampleResult]:
    return [
        ExampleResult(str(i), "t", 3, (0,), 1.0, 1.0, 1, answer, reference)
        for i, (answer, reference) in enumerate(zip(answers, references, strict=True))
    ]


def test_bleu_and_chrf_of_any_sample_are_those_of_sacrebleu() -> None:
    from sacrebleu.metrics import BLEU, CHRF

    generator = np.random.default_rng(0)
    words = ["Der", "Zug,", "fährt", "heute", "(nicht)", "nach", "Köln.", "the", "cat", "sat"]
    references = [" ".join(generator.choice(words, generator.integers(1, 9))) for _ in range(40)]
    answers = [
        " ".join(w for w in reference.split() if generator.random() < 0.8)
        for reference in references
    ]
    answers[:3], references[3] = ["", "x", references[2]], ""
    found = sentence_statistics(texts(answers, references))
    samples = [range(40), [0], [1], [2], [0, 1], [3], [3, 4], [0, 0, 5], *np.arange(40)[:, None]]
    samples += [generator.integers(0, 40, size) for size in (2, 3, 5, 17)]
    for sample in samples:
        chosen = [answers[i] for i in sample], [[references[i] for i in sample]]
        for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
            ours = METRICS[name].value(found[name][list(sample)].sum(0))
            assert ours == pytest.approx(metric.corpus_score(*chosen).score, abs=1e-9), name


def test_rouge_exact_match_and_f1_are_means_over_examples() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    answers, references = ["the cats sat", "", "a b", "x"], ["the cat sat down", "y", " a b", "x y"]
    found = sentence_statistics(texts(answers, references))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name, kind in (("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rouge_l", "rougeL")):
        wanted = [
            scorer.score(r, a)[kind].fmeasure for a, r in zip(answers, references, strict=True)
        ]
        assert METRICS[name].value(found[name].sum(0)) == pytest.approx(np.mean(wanted))
    assert METRICS["exact_match"].value(found["exact_match"].sum(0)) == 0.25
    assert token_f1("A b b", "b a c b") == pytest.approx(2 * 3 / 7)
    assert token_f1("", "") == 1 and token_f1("", "a") == 0 and token_f1("a", "b") == 0


def test_cross_entropy_is_of_tokens_and_of_prompts() -> None:
    examples = [replace(e, loss=6.0, tokens=2) for e in texts(["a"], ["a"])]
    examples += [replace(e, example="2", loss=4.0, tokens=8) for e in texts(["a"], ["a"])]
    (row,) = rows(Evaluation({}, [MethodResult(LORA, 1, examples)]))
    means = {name: value["mean"] for name, value in row["metrics"].items()}
    assert means["cross_entropy"] == 1 and means["cross_entropy_by_prompt"] == 1.75
    assert means["perplexity"] == pytest.approx(np.e)
    assert set(means) == set(METRICS)


def test_intervals_cover_the_truth_and_p_is_uniform_without_a_difference() -> None:
    covered, p_values, mean_covered = [], [], []
    base = result(FIRST, n=80, timed=False, tasks=TASKS[:1])
    for trial in range(150):
        generator = np.random.default_rng(trial)

        def drawn(method: Method, cost: float, generator=generator) -> MethodResult:
            losses = 2 + cost + generator.standard_normal(80)
            examples = [
                replace(e, loss=float(loss), tokens=1, answer="", reference="")
                for e, loss in zip(base.examples, losses, strict=True)
            ]
            return replace(base, method=method, examples=examples)

        own, _ = two(drawn(FIRST, 0.3), drawn(Method("base", "base", 0.0), 0.0), resamples=400)
        low, high = own["vs"]["base-base"]["cross_entropy"]["ci95"]
        covered.append(low <= 0.3 <= high)
        low, high = own["metrics"]["cross_entropy"]["ci95"]
        mean_covered.append(low <= 2.3 <= high)
        null, _ = two(drawn(FIRST, 0.0), drawn(STATIC, 0.0), resamples=400)
        p_values.append(null["vs"]["static-trained"]["cross_entropy"]["p"])
    # 95 % of 150, give or take three deviations.
    assert 0.90 <= np.mean(covered) <= 0.996 and 0.90 <= np.mean(mean_covered) <= 0.996
    for level in (0.05, 0.25, 0.5, 0.75):
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=0.11)
    assert np.mean(np.array(p_values) <= 0.05) <= 0.10


def test_what_examples_have_in_common_does_not_widen_a_difference() -> None:
    own, rival = two(result(FIRST, 0.1, n=100), result(STATIC, 0.2, n=100))
    difference = own["vs"]["static-trained"]["cross_entropy"]
    assert difference["delta"] == pytest.approx(-0.1, abs=0.02)
    assert difference["ci95"][1] < 0 and difference["p"] < 0.002 and difference["n"] == 200
    wide, narrow = own["metrics"]["cross_entropy"]["ci95"], difference["ci95"]
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 3
    share = difference["share"]
    ratio = rival["metrics"]["cross_entropy"]["mean"] / own["metrics"]["cross_entropy"]["mean"]
    assert share == pytest.approx(ratio) and share > 1
    assert own["vs"]["static-trained"]["rouge_l"]["delta"] > 0


def test_examples_are_paired_by_id_not_by_place() -> None:
    first, static = result(FIRST, 0.1), result(STATIC, 0.2)
    turned = replace(static, examples=static.examples[::-1])
    assert two(first, static)[0]["vs"] == two(first, turned)[0]["vs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[1:], r"different examples \(1 are in one of them only: debian-synopsis/0"),
        (lambda e: e[:5] + e[4:], "1 examples come twice"),
        (lambda e: [replace(e[0], reference="else"), *e[1:]], "reference of debian-synopsis/0"),
    ],
)
def test_what_cannot_be_paired_is_refused(change, message: str) -> None:
    static = result(STATIC)
    with pytest.raises(ValueError, match=message):
        two(result(FIRST), replace(static, examples=change(static.examples)))


def test_no_examples_or_a_method_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        rows(Evaluation({}, []))
    with pytest.raises(ValueError, match=r"static-trained-0\.25-seed0 is there twice"):
        two(result(STATIC), result(STATIC))


def test_equal_methods_do_not_differ() -> None:
    first = result(FIRST, 0.1)
    own, _ = two(first, replace(first, method=STATIC))
    for name in METRICS:
        difference = own["vs"]["static-trained"][name]
        assert difference["delta"] == 0 and difference["ci95"] == [0, 0] and difference["p"] == 1
    assert own["vs"]["static-trained"]["same_plans"] == 1


def test_several_seeds_get_a_row_of_all_that_knows_how_much_they_vary() -> None:
    def seeded(name: str, weights: str, costs: list[float]) -> list[MethodResult]:
        return [
            result(Method(name, weights, 0.25, seed), cost, n=40) for seed, cost in enumerate(costs)
        ]

    def all_seeds(costs: list[float]) -> dict:
        found = rows(
            Evaluation(
                {}, [*seeded("first", "first", costs), *seeded("static", "trained", [0.2] * 3)]
            )
        )
        assert [r["seed"] for r in found] == [0, 1, 2, "all"] * 2
        chosen = best_rows(found)
        assert [r["method"] for r in chosen] == ["first", "static"]
        points = [r["metrics"]["cross_entropy"]["mean"] for r in found[:3]]
        assert found[3]["metrics"]["cross_entropy"]["mean"] == pytest.approx(np.mean(points))
        return found[3]["vs"]["static-trained"]["cross_entropy"]

    alike, apart = all_seeds([0.1, 0.1, 0.1]), all_seeds([-0.2, 0.1, 0.4])
    widths = [d["ci95"][1] - d["ci95"][0] for d in (alike, apart)]
    assert alike["delta"] == pytest.approx(apart["delta"], abs=0.03)
    assert alike["ci95"][1] < 0 < apart["ci95"][1] and widths[1] > 4 * widths[0]


@pytest.mark.parametrize("name, weights", [("static", "trained"), ("random", "first")])
def test_one_seed_is_compared_with_all_seeds_or_draws_of_a_rival(name: str, weights) -> None:
    rivals = [result(Method(name, weights, 0.25, seed), cost) for seed, cost in enumerate((0, 2))]
    own, *others = rows(Evaluation({}, [result(FIRST, 1.0), *rivals]))
    assert [row["seed"] for row in others] == [0, 1, "all"]
    difference = own["vs"][f"{name}-{weights}"]["cross_entropy"]
    means = [row["metrics"]["cross_entropy"]["mean"] for row in (own, others[-1])]
    assert difference["delta"] == pytest.approx(means[0] - means[1])
    assert difference["ci95"][0] < 0 < difference["ci95"][1]


def test_seeds_that_were_timed_on_the_same_prompts_are_no_more_prompts() -> None:
    """Seeds that are equal tell no more than one of them."""
    widths = []
    for seeds in (1, 4):
        first = result(FIRST, 0.1, plans=5)
        timing = replace(first.timing, tpot_ms=[1.0 + 0.1 * p for p in range(8) for _ in range(3)])
        methods = [
            replace(first, timing=timing, method=replace(FIRST, seed=k)) for k in range(seeds)
        ]
        row = rows(Evaluation({}, methods))[-1]
        widths.append(np.diff(row["speedup_ci95"])[0])
    assert widths[1] == pytest.approx(widths[0], rel=0.1) and widths[0] > 0.05


@pytest.mark.parametrize("count", [2, 3, 8])
def test_means_of_few_values_vary_as_much_as_such_means_do(count: int) -> None:
    values = np.random.default_rng(1).normal(10, 2, count)
    means = statistics._few_resampled(count, 200_000, np.random.default_rng(0)) @ values
    assert means.mean() == pytest.approx(values.mean(), abs=0.02)
    assert means.std() == pytest.approx(values.std(ddof=1) / np.sqrt(count), rel=0.02)


def test_two_prompts_of_very_different_times_give_an_interval_of_speed_that_can_be() -> None:
    own, full = statistics._timed_means(np.array([[10.0, 60.0]]), np.array([[20.0, 90.0]]), 0)
    assert own.min() == 10 and own.max() == 60 and (full / own > 0).all()


def test_a_row_says_which_plans_ran_and_how_fast() -> None:
    found = rows(evaluation(n=20))
    first = next(r for r in found if r["method"] == "first" and r["seed"] == "all")
    assert first["skip_rate"] == pytest.approx(8 / 30) and first["layers_run"] == 22
    assert first["distinct_plans"] > 5 and len(first["keep_share"]) == 30
    assert first["n"] == 40 and first["tasks"].keys() == set(TASKS)
    assert first["tasks"]["debian-en-de"]["metrics"]["bleu"]["n"] == 20
    assert {"lora_only-trained", "base-base", "shuffled-first", "length-trained"} < set(first["vs"])
    assert first["speedup"] == pytest.approx(first["ideal_speedup"], rel=0.05)
    assert first["achieved_ratio"] == pytest.approx(first["speedup"] / first["ideal_speedup"])
    assert first["tpot_ms"]["n"] == 3 * 24
    assert (first["timing"]["prompts"], first["timing"]["seeds"]) == (8, 3)
    assert first["kv_bytes"] / first["full_kv_bytes"] == pytest.approx(22 / 30)
    shuffled = next(r for r in found if r["method"] == "shuffled")
    assert shuffled["speedup"] is None and shuffled["timing"] is None
    assert set(shuffled["vs"]) == {"lora_only-trained", "base-base"}
    json.dumps(found, allow_nan=False)
