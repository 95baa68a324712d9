"""What evaluate.py prints: the verdict in words."""

from __future__ import annotations

import pytest

from kd.report.tables import verdicts


def group(name: str, difference=None, interval=None, baseline="runs/alone*", n: int = 5) -> dict:
    return {"name": name, "n": n, "difference": difference, "interval": interval, "baseline": interval and baseline}


@pytest.mark.parametrize(
    ("difference", "interval", "n", "sentence"),
    [
        (2.1, [0.8, 3.4], 5, "kd* is better than alone* by 2.1 points (95 %: 0.8 to 3.4)"),
        (-2.1, [-3.4, -0.8], 5, "kd* is worse than alone* by 2.1 points (95 %: 0.8 to 3.4)"),
        (0.4, [-0.8, 1.6], 5, "no difference shown between kd* and alone* (95 %: -0.8 to 1.6)"),
        (0.4, [0.0, 0.8], 5, "no difference shown between kd* and alone* (95 %: 0.0 to 0.8)"),
        (2.1, [0.8, 3.4], 1, "kd* is better than alone* by 2.1 points (95 %: 0.8 to 3.4, of one seed)"),
    ],
)
def test_the_verdict_follows_the_interval(difference, interval, n, sentence):
    assert verdicts([group("runs/alone*"), group("runs/kd*", difference, interval, n=n)]) == [sentence]


def test_no_verdict_without_a_baseline():
    assert verdicts([group("runs/alone*"), group("runs/t")]) == []
