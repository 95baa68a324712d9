"""Metrics against plain loops and scikit-learn; cost against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn import metrics as reference
from torch import nn

from kd import cost, metrics


@pytest.fixture
def predictions():
    torch.manual_seed(0)
    labels = torch.randint(0, 6, (500,))
    logits = torch.randn(500, 6) + 1.5 * nn.functional.one_hot(labels, 6)
    return logits, labels


@pytest.mark.parametrize("top", [1, 2, 5, 10])
def test_accuracy(predictions, top):
    logits, labels = predictions
    hits = sum(
        label in sorted(range(6), key=lambda k: -row[k])[:top]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    )
    assert metrics.accuracy(logits, labels, top) == pytest.approx(100 * hits / 500, abs=1e-12)


def test_negative_log_likelihood(predictions):
    logits, labels = predictions
    expected = reference.log_loss(labels, logits.double().softmax(1), labels=range(6))
    assert metrics.negative_log_likelihood(logits, labels) == pytest.approx(expected, rel=1e-9)


def test_calibration_error_equals_a_loop_over_bins(predictions):
    logits, labels = predictions
    confidence, predicted = logits.double().softmax(1).max(1)
    expected = 0.0
    for b in range(15):
        inside = [i for i in range(500) if b / 15 < confidence[i] <= (b + 1) / 15]
        if inside:
            right = sum(int(predicted[i] == labels[i]) for i in inside) / len(inside)
            sure = math.fsum(confidence[i] for i in inside) / len(inside)
            expected += len(inside) / 500 * abs(right - sure)
    assert metrics.calibration_error(logits, labels) == pytest.approx(100 * expected, rel=1e-9)


def test_calibration_error_of_the_perfect_and_the_sure_and_wrong():
    sure = 1000 * nn.functional.one_hot(torch.arange(4), 4).float()
    assert metrics.calibration_error(sure, torch.arange(4)) == 0
    assert metrics.calibration_error(sure, torch.arange(4).flip(0)) == pytest.approx(100)


def test_confusion_and_per_class(predictions):
    logits, labels = predictions
    expected = reference.confusion_matrix(labels, logits.argmax(1), labels=range(6))
    assert metrics.confusion_matrix(logits, labels).tolist() == expected.tolist()
    recall = reference.recall_score(labels, logits.argmax(1), average=None)
    assert metrics.per_class_accuracy(logits, labels) == pytest.approx((100 * recall).tolist())
    assert metrics.per_class_accuracy(logits[labels != 2], labels[labels != 2])[2] is None


def test_agreement(predictions):
    logits, labels = predictions
    assert metrics.agreement(logits, logits * 3) == 100
    assert metrics.agreement(logits, nn.functional.one_hot(labels, 6)) == pytest.approx(
        metrics.accuracy(logits, labels)
    )


def test_cost_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert cost.num_params(network) == 8 * 27 + 8 + 8 * 16 * 5 + 5

    class Takes8Bit(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network(images.float())

    assert cost.multiply_adds(Takes8Bit(), (3, 4, 4)) == 16 * 8 * 27 + 8 * 16 * 5
    assert cost.latency(Takes8Bit(), (3, 4, 4), runs=3) > 0
