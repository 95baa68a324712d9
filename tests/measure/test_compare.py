"""Comparison of runs: statistics against scipy and loops, groups of seeds, baselines, the front."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from scipy import stats

from kd.measure import compare
from kd.util.errors import UserError

ALONE = {"model": "net", "model_args": {}, "data": {"source": "digits"}, "epochs": 2}
DISTILLED = {"student": "net", "model_args": {}, "data": {"source": "digits"}, "epochs": 2, "losses": ["KL"]}
TEACHER = {**ALONE, "model": "large"}


def row(run: str, config: dict, wrong, seed: int = 0, images: str = "a", adds: int = 10, teacher_top1=None) -> dict:
    """What evaluation says of a run on 100 images, as far as comparison needs it."""
    return {
        "run": run,
        "config": {**config, "seed": seed, "output_dir": run},
        "experiment": compare.experiment({**config, "seed": seed, "output_dir": run}, lambda _: None),
        "images": images,
        "seed": seed,
        "num_images": 100,
        "wrong": list(wrong),
        "top1": 100.0 - len(wrong),
        "teacher_top1": teacher_top1,
        "num_params": adds * 2,
        "multiply_adds": adds,
    }


@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 1), (0, 6), (5, 5), (3, 12), (40, 70), (400, 300), (0, 2000)])
def test_mcnemar_is_the_exact_binomial_test(one, other):
    expected = stats.binomtest(one, one + other, 0.5).pvalue if one + other else 1.0
    assert compare.mcnemar(one, other) == pytest.approx(expected, rel=1e-9)
    assert compare.mcnemar(other, one) == compare.mcnemar(one, other)


def test_mean_and_spread():
    assert compare.spread([3.0]) == {"mean": 3.0, "std": None}
    assert compare.spread([1.0, None]) is None
    assert compare.spread([]) is None
    values = [96.1, 96.9, 95.2]
    assert compare.spread(values) == {
        "mean": pytest.approx(statistics.fmean(values)),
        "std": pytest.approx(statistics.stdev(values)),
    }


def test_bootstrap_draws_the_same_images_for_all_runs_and_the_same_each_time():
    torch.manual_seed(0)
    correct = torch.rand(2, 50) < 0.7
    samples = compare.bootstrap(torch.stack([correct[0], correct[1], correct[0], ~correct[0]]), 300)
    assert samples.shape == (300, 4)
    assert samples[:, 0].equal(samples[:, 2])
    assert torch.allclose(samples[:, 0] + samples[:, 3], torch.full((300,), 100.0, dtype=torch.double))
    assert samples[:, 1].equal(compare.bootstrap(correct[1:], 300)[:, 0])
    assert len(samples[:, 0].unique()) > 10
    assert compare.bootstrap(torch.ones(1, 7, dtype=torch.bool), 10).eq(100).all()


def test_bootstrap_interval_agrees_with_scipy():
    torch.manual_seed(0)
    one, other = torch.rand(400) < 0.85, torch.rand(400) < 0.8
    samples = compare.bootstrap(torch.stack([one, other]))
    ends = torch.quantile(samples[:, 0] - samples[:, 1], torch.tensor([0.025, 0.975], dtype=torch.double))
    differences = 100 * (one.double() - other.double()).numpy()
    expected = stats.bootstrap((differences,), lambda x, axis: x.mean(axis), method="percentile", rng=0)
    low, high = expected.confidence_interval
    assert ends.tolist() == pytest.approx([low, high], abs=0.06 * (high - low))


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    correct = torch.arange(90)[None] % 3 > 0
    whole = compare.bootstrap(correct, 100)
    monkeypatch.setattr(compare, "_AT_ONCE", 900)
    assert compare.bootstrap(correct, 100).equal(whole)


def test_a_group_spreads_as_its_runs_do():
    """Without images drawn, the deviation of the mean of S runs is s / sqrt(S), s with S - 1 in its denominator."""
    values = torch.tensor([90.0, 94.0, 95.0], dtype=torch.double)
    means = compare.group_mean(values.expand(20_000, 3), 1)
    assert means.mean().item() == pytest.approx(93, abs=0.05)
    assert means.std().item() == pytest.approx(values.std().item() / math.sqrt(3), rel=0.03)
    other = compare.group_mean(values.expand(20_000, 3), 2)
    assert abs(torch.corrcoef(torch.stack([means, other]))[0, 1].item()) < 0.03
    assert compare.group_mean(values[:1].expand(5, 1), 1).eq(90).all()


def test_pareto_front_equals_its_definition():
    points = [(90.0, 5), (90.0, 5), (80.0, 5), (85.0, 1), (95.0, 100), (85.0, 2), (60.0, 1)]
    expected = []
    for a, c in points:
        better = [(x, y) for x, y in points if x >= a and y <= c and (x > a or y < c)]
        expected.append(not better)
    assert compare.pareto(points) == expected == [True, True, False, True, True, False, False]


def test_experiments_are_equal_up_to_seed_and_folders():
    configs = {
        "t0": {**TEACHER, "seed": 0, "output_dir": "t0"},
        "t1": {**TEACHER, "seed": 1, "output_dir": "t1"},
        "longer": {**TEACHER, "seed": 1, "output_dir": "longer", "epochs": 9},
        "loop": {**DISTILLED, "teacher": "loop"},
    }

    def name(config):
        return compare.experiment(config, configs.get)

    student = {**DISTILLED, "seed": 0, "output_dir": "a", "teacher": "t0", "report_to": "none"}
    same = {**student, "seed": 5, "output_dir": "b", "teacher": "t1", "report_to": "wandb", "init_from": None}
    same["data"] = {"source": "digits", "cache_dir": "elsewhere"}
    assert name(student) == name(same) == name({**student, "teacher": ["t1"]})
    for other in (
        {"teacher": "longer"},
        {"teacher": ["t0", "t1"]},
        {"teacher": "resnet18"},
        {"teacher": "loop"},
        {"epochs": 3},
        {"data": {"source": "mnist"}},
        {"init_from": "t0"},
    ):
        assert name({**student, **other}) != name(student), other
    assert name({**student, "init_from": "t0"}) == name({**student, "init_from": "t1"})


def test_a_distilled_run_is_compared_with_its_student_alone():
    rows = [
        row("runs/t", TEACHER, range(5), adds=99),
        row("runs/alone", ALONE, range(20)),
        row("runs/kd", {**DISTILLED, "teacher": "t"}, range(8, 18), teacher_top1=95.0),
    ]
    teacher, alone, kd = compare.compare(rows)
    assert [group["baseline"] for group in (teacher, alone, kd)] == [None, None, "runs/alone"]
    assert kd["alone"] == "runs/alone"
    assert kd["gain"] == kd["difference"] == 10
    assert kd["gap_closed"] == pytest.approx(100 * 10 / 15)
    assert kd["mcnemar"] == [
        {"run": "runs/kd", "baseline": "runs/alone", "only_run_right": 10, "only_baseline_right": 0, "p": 2 / 2**10}
    ]
    low, high = kd["interval"]
    assert 3 < low < 6 < 14 < high < 17
    assert [group["front"]["multiply_adds"] for group in (teacher, alone, kd)] == [True, False, True]
    assert kd["notes"] == []
    assert json.loads(json.dumps(kd)) == kd


def test_seeds_are_one_group_with_mean_and_deviation():
    rows = [row(f"runs/kd_s{s}", {**DISTILLED, "teacher": "t"}, range(10 + s), s, teacher_top1=99.0) for s in range(3)]
    rows += [row(f"runs/alone/{s}/run", ALONE, range(20 + 3 * s), s) for s in range(3)]
    kd, alone = compare.compare(rows)
    assert (kd["name"], alone["name"]) == ("runs/kd_s*", "runs/alone/*/run")
    assert (kd["n"], kd["seeds"]) == (3, [0, 1, 2])
    assert kd["spread"]["top1"] == {"mean": pytest.approx(89), "std": pytest.approx(1)}
    assert kd["spread"]["nll"] is None
    assert kd["difference"] == pytest.approx(12)
    assert [(test["run"][-1], test["baseline"][-5]) for test in kd["mcnemar"]] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert [test["p"] for test in kd["mcnemar"]] == [compare.mcnemar(n, 0) for n in (10, 12, 14)]
    narrow = compare.compare([rows[0], rows[3]])[0]["interval"]
    assert kd["interval"][0] < 12 < kd["interval"][1]
    assert narrow[1] - narrow[0] < 20
    assert kd == compare.compare(rows)[0]


def test_other_seeds_are_tested_pair_by_pair():
    rows = [row(f"kd{s}", DISTILLED | {"teacher": "t"}, range(s), s) for s in (3, 4)] + [row("alone", ALONE, range(9))]
    tests = compare.compare(rows)[0]["mcnemar"]
    assert [(test["run"], test["baseline"]) for test in tests] == [("kd3", "alone"), ("kd4", "alone")]


def test_a_chosen_baseline():
    rows = [row(name, config, range(n)) for name, config, n in (("t", TEACHER, 5), ("a", ALONE, 20))]
    rows.append(row("kd", {**DISTILLED, "teacher": "t"}, range(10), teacher_top1=95.0))
    teacher, alone, kd = compare.compare(rows, "./t")
    assert [group["baseline"] for group in (teacher, alone, kd)] == [None, "t", "t"]
    assert [group["difference"] for group in (teacher, alone, kd)] == [None, -15, -5]
    assert (kd["alone"], kd["gain"]) == ("a", 10)
    with pytest.raises(UserError, match=r"unknown baseline 'b'.*known: a, kd, t"):
        compare.compare(rows, "b")


def test_no_baseline_where_there_are_several_or_of_another_network():
    kd = row("kd", {**DISTILLED, "teacher": "t"}, range(10), teacher_top1=95.0)
    for others in (
        [row("a", ALONE, range(20)), row("b", {**ALONE, "epochs": 9}, range(20))],
        [row("a", {**ALONE, "model_args": {"dropout": 0.0}}, range(20))],
        [row("a", ALONE, range(20), images="b")],
        [row("a", {**DISTILLED, "teacher": "other"}, range(20))],
        [],
    ):
        group = compare.compare([kd, *others])[0]
        assert group["baseline"] is group["gain"] is group["interval"] is group["gap_closed"] is None
        several = "is one of a, b" if len(others) > 1 else "is not among the runs"
        notes = [f"kd: its student alone {several}; --baseline names what to compare with"] if others else []
        assert group["notes"] == notes


def test_what_makes_a_comparison_unfair_is_said():
    longer = row("kd", {**DISTILLED, "teacher": "t", "epochs": 20}, range(10))
    group = compare.compare([longer, row("a", ALONE, range(20))])[0]
    assert group["notes"] == ["kd (here) and a (there) differ in epochs (2 there, 20 here)"]
    other = compare.compare([longer, row("a", {**ALONE, "epochs": 20}, range(20), images="b")], "a")[0]
    assert other["notes"] == ["kd and a were measured on different images: no test and no interval"]
    assert other["difference"] == 10
    assert other["interval"] is other["mcnemar"] is None
    twice = compare.compare([row("a", ALONE, range(20)), row("b", ALONE, range(20))])[0]
    assert twice["notes"] == ["*: its runs of equal seed are not independent; their spread means nothing"]


def test_no_share_of_a_gap_that_is_not_there():
    rows = [row("kd", {**DISTILLED, "teacher": "t"}, range(10), teacher_top1=70.0), row("a", ALONE, range(20))]
    assert compare.compare(rows)[0]["gap_closed"] is None


def test_no_share_of_a_gap_where_no_gain_is_shown():
    rows = [row("kd", {**DISTILLED, "teacher": "t"}, range(10), teacher_top1=95.0), row("a", ALONE, range(1, 12))]
    (group, _) = compare.compare(rows)
    assert group["gain"] == 1
    assert group["interval"][0] <= 0 <= group["interval"][1]
    assert group["gap_closed"] is None
    assert compare.compare(rows, "kd")[0]["gap_closed"] is None


def test_names_of_groups_differ():
    rows = [row(f"r/{name}", ALONE, range(9), seed) for seed, name in enumerate("ab")]
    rows += [row(f"r/{name}", TEACHER, range(9), seed) for seed, name in enumerate("cd")]
    assert [group["name"] for group in compare.compare(rows)] == ["r/a and 1 more", "r/c and 1 more"]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Of 60 pairs of networks whose accuracies are 80 and 84 %, 95 % intervals of the difference hold 4 in most."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(60):
        correct = torch.rand(2, 300, generator=generator) < torch.tensor([[0.84], [0.80]])
        samples = compare.bootstrap(correct, 400)
        low, high = torch.quantile(samples[:, 0] - samples[:, 1], torch.tensor([0.025, 0.975], dtype=torch.double))
        covered += bool(low <= 4 <= high)
    assert covered >= 52
