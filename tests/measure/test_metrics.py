"""Metrics against plain loops and scikit-learn; cost against numbers worked out by hand."""

from __future__ import annotations

import math
import time

import pytest
import torch
from sklearn import metrics as reference
from torch import nn

from kd.measure import cost, metrics


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


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / math.fsum(powers) for power in powers]


def test_brier_score_equals_a_loop(predictions):
    logits, labels = predictions
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total += math.fsum((p - (k == label)) ** 2 for k, p in enumerate(softmax(row)))
    assert metrics.brier_score(logits, labels) == pytest.approx(total / 500, rel=1e-9)
    two = logits[:, :2]
    single = reference.brier_score_loss(labels % 2, two.double().softmax(1)[:, 1])
    assert metrics.brier_score(two, labels % 2) == pytest.approx(2 * single, rel=1e-9)
    sure = 1000 * nn.functional.one_hot(torch.arange(4), 4).float()
    assert metrics.brier_score(sure, torch.arange(4)) == 0
    assert metrics.brier_score(sure, torch.arange(4).flip(0)) == 2


def test_reliability_equals_a_loop(predictions):
    logits, labels = predictions
    inside: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        probabilities = softmax(row)
        b = next(b for b in range(15) if probabilities[probabilities.index(max(probabilities))] <= (b + 1) / 15)
        inside[b].append((max(probabilities), probabilities.index(max(probabilities)) == label))
    bins = metrics.reliability(logits, labels)
    assert sum(part["count"] for part in bins) == 500
    for b, (part, found) in enumerate(zip(bins, inside, strict=True)):
        assert (part["low"], part["high"], part["count"]) == (b / 15, (b + 1) / 15, len(found))
        if found:
            assert part["confidence"] == pytest.approx(100 * math.fsum(p for p, _ in found) / len(found), rel=1e-9)
            assert part["accuracy"] == pytest.approx(100 * sum(right for _, right in found) / len(found), rel=1e-9)
        else:
            assert part["confidence"] is part["accuracy"] is None
    assert not bins[0]["count"]  # the likeliest of 6 classes has more than 1/15


@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0, 5.0, 100.0])
def test_temperature_is_where_the_likelihood_is_highest(predictions, scale):
    logits, labels = predictions
    fitted = metrics.fit_temperature(scale * logits, labels)
    assert fitted == pytest.approx(scale * metrics.fit_temperature(logits, labels), rel=1e-6)

    def nll(temperature: float) -> float:
        rows = ((scale * logits).double() / temperature).tolist()
        return -math.fsum(math.log(softmax(r)[k]) for r, k in zip(rows, labels.tolist(), strict=True)) / 500

    assert nll(fitted) < min(nll(fitted * 1.001), nll(fitted / 1.001))
    slope = (nll(fitted * 1.0001) - nll(fitted / 1.0001)) / (math.log(1.0001) * 2)
    assert abs(slope) < 1e-8


def test_temperature_of_logits_that_have_none(predictions):
    logits, labels = predictions
    assert metrics.fit_temperature(nn.functional.one_hot(labels, 6).float(), labels) is None  # all right
    assert metrics.fit_temperature(-nn.functional.one_hot(labels, 6).float(), labels) is None  # all wrong
    assert metrics.fit_temperature(torch.zeros(500, 6), labels) is None
    assert metrics.fit_temperature(torch.full((500, 6), math.nan), labels) is None
    far = 1e4 * logits
    assert metrics.fit_temperature(far, labels) is None  # above 1000


def test_agreement_among_the_five_likeliest_equals_a_loop(predictions):
    logits, _ = predictions
    other = torch.randn(500, 6)
    for top in (1, 2, 5):
        same = 0
        for row, theirs in zip(logits.tolist(), other.tolist(), strict=True):
            same += theirs.index(max(theirs)) in sorted(range(6), key=lambda k, row=row: -row[k])[:top]
        assert metrics.agreement(logits, other, top) == pytest.approx(100 * same / 500, abs=1e-12)


def test_kl_divergence_equals_a_loop(predictions):
    student, _ = predictions
    teacher = torch.randn(500, 6)
    total = 0.0
    for row, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        total += math.fsum(p * math.log(p / q) for p, q in zip(softmax(theirs), softmax(row), strict=True))
    assert metrics.kl_divergence(teacher, student) == pytest.approx(total / 500, rel=1e-9)
    assert metrics.kl_divergence(teacher, teacher + 3) == pytest.approx(0, abs=1e-12)
    assert math.isfinite(metrics.kl_divergence(1e4 * teacher, -1e4 * teacher))


def test_images_that_only_one_gets_right(predictions):
    logits, labels = predictions
    other = torch.randn(500, 6)
    mine, theirs = [], []
    for i, label in enumerate(labels.tolist()):
        right, also = logits[i].argmax().item() == label, other[i].argmax().item() == label
        mine += [i] if right and not also else []
        theirs += [i] if also and not right else []
    assert metrics.only_one_right(logits, other, labels) == (mine, theirs)


def gram_cka(x: list[list[float]], y: list[list[float]]) -> float:
    """Linear CKA from the centered Gram matrices, with loops: another way than that of `linear_cka`."""
    grams = []
    for rows in (x, y):
        n = len(rows)
        mean = [math.fsum(column) / n for column in zip(*rows, strict=True)]
        rows = [[value - m for value, m in zip(row, mean, strict=True)] for row in rows]
        grams.append([[math.fsum(a * b for a, b in zip(p, q, strict=True)) for q in rows] for p in rows])

    def inner(one, other):
        return math.fsum(a * b for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True))

    return inner(*grams) / math.sqrt(inner(grams[0], grams[0]) * inner(grams[1], grams[1]))


def test_cka_of_a_split_in_batches_equals_gram_matrices_with_loops():
    torch.manual_seed(0)
    x = torch.randn(40, 5) + 7
    y = torch.cat([x[:, :2] ** 2, torch.randn(40, 1)], dim=1)
    sums = sum(metrics.feature_sums(x[i : i + 16], y[i : i + 16]) for i in range(0, 40, 16))
    expected = gram_cka(x.double().tolist(), y.double().tolist())
    assert 0.1 < expected < 0.9
    assert metrics.linear_cka(sums, 5) == pytest.approx(expected, rel=1e-9)


def test_cka_does_not_change_with_rotation_scale_and_shift_and_is_none_of_a_constant():
    torch.manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.double)
    turned = 3 * x @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.double)).Q + 100
    assert metrics.linear_cka(metrics.feature_sums(x, turned), 4) == pytest.approx(1, rel=1e-9)
    assert metrics.linear_cka(metrics.feature_sums(x, torch.full((50, 3), 0.1)), 4) is None


def test_features_are_averaged_over_their_places():
    feature = torch.randn(2, 3, 4, 5)
    assert metrics.pooled(feature).shape == (2, 3)
    assert metrics.pooled(feature)[1, 2] == pytest.approx(feature[1, 2].mean().item(), rel=1e-5)
    assert metrics.pooled(torch.randn(2, 7, 3)).shape == (2, 3)
    assert metrics.pooled(feature[:, :, 0, 0]).equal(feature[:, :, 0, 0])


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


def test_speed_of_a_network_whose_time_is_known():
    class Sleeps(nn.Linear):
        batches = 0

        def forward(self, images):
            self.batches += 1
            time.sleep(0.05 if self.batches == 7 else 0.01)

    network = Sleeps(1, 1)
    speed = cost.speed(network, (3, 4, 4), 8, seconds=0.2)
    assert network.batches == speed["runs"] + 4  # to warm up, and the last one for its memory
    assert 5 <= speed["runs"] < 25
    assert 10 <= speed["p50_ms"] < 20
    assert speed["p95_ms"] >= speed["p50_ms"]
    assert speed["images_per_second"] <= 8 / 0.01
    assert speed["batch_size"] == 8
    assert cost.speed(Sleeps(1, 1), (3, 4, 4), 1, seconds=0)["runs"] == 5


def test_peak_memory_is_that_of_the_tensors_alive_at_one_time():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(48, 1000, bias=False), nn.Linear(1000, 10, bias=False)

        def forward(self, images):
            wide = self.wide(images.flatten(1).float())  # the view is no memory, the copy is freed
            wide.relu_()
            doubled = 2 * wide
            del wide
            return self.narrow(doubled.view(-1, 1000))

    for batch_size in (1, 8):
        weights, images, peak = 4 * (48_000 + 10_000), 48, 4 * 2 * 1000
        found = cost.speed(Grows(), (3, 4, 4), batch_size, seconds=0)["peak_memory_bytes"]
        assert found == weights + batch_size * (images + peak)
