"""Metrics of predictions: functions of all logits (N, K) and labels (N,), so that nothing is averaged twice."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def hits(logits: Tensor, labels: Tensor, top: int = 1) -> Tensor:
    """Whether each image's label is among the `top` highest logits: bool (N,)."""
    if top == 1:
        return logits.argmax(1) == labels
    return (logits.topk(min(top, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)


def accuracy(logits: Tensor, labels: Tensor, top: int = 1) -> float:
    """Percent of images whose label is among the `top` highest logits."""
    return 100 * hits(logits, labels, top).double().mean().item()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log p(label), in nats."""
    return F.cross_entropy(logits.double(), labels).item()


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """Mean over images of the sum over classes of (p - y)^2, y the one-hot label: 0 to 2.

    Brier 1950, Verification of Forecasts Expressed in Terms of Probability. Of two classes it is twice the form that
    takes one probability.
    """
    probabilities = logits.double().softmax(1)
    return (probabilities - F.one_hot(labels, logits.shape[1])).square().sum(1).mean().item()


def reliability(logits: Tensor, labels: Tensor, num_bins: int = 15) -> list[dict]:
    """The reliability diagram: confidence and accuracy in bins of equal width of the highest probability.

    Returns:
        A bin's `low` and `high` (it is (low, high]), its `count`, and the mean `confidence` and the `accuracy` of its
        images in percent, None where it has none.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    place = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    counts, sure, right = (
        torch.zeros(num_bins, dtype=torch.double).index_add_(0, place, values).tolist()
        for values in (torch.ones_like(confidence), confidence, (predicted == labels).double())
    )
    bins = []
    for b, count in enumerate(map(int, counts)):
        means = (100 * sure[b] / count, 100 * right[b] / count) if count else (None, None)
        edges = {"low": b / num_bins, "high": (b + 1) / num_bins}
        bins.append({**edges, "count": count, "confidence": means[0], "accuracy": means[1]})
    return bins


def calibration_error(logits: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Expected calibration error in percent: the mean gap of confidence and accuracy over bins of equal width.

    Guo et al. 2017, On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599, equation 3. Bins are
    (low, high], as there.
    """
    bins = [part for part in reliability(logits, labels, num_bins) if part["count"]]
    return sum(part["count"] * abs(part["accuracy"] - part["confidence"]) for part in bins) / len(labels)


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """The temperature T that makes softmax(logits / T) the likeliest: temperature scaling, section 4.2 of Guo et al.

    To be fitted on validation images. The mean NLL is convex in 1 / T: its minimum is where its slope is 0.

    Returns:
        T, or None where the NLL has no minimum between 1/1000 and 1000: every image is right, so that the more certain
        is always the likelier, or the logits say nothing about the labels.
    """
    from scipy.optimize import brentq  # slow to import

    logits = logits.double()
    true = logits.gather(1, labels[:, None])[:, 0]

    def slope(log_inverse: float) -> float:
        return (((math.exp(log_inverse) * logits).softmax(1) * logits).sum(1) - true).mean().item()

    ends = math.log(1e-3), math.log(1e3)
    return math.exp(-brentq(slope, *ends, xtol=1e-12)) if slope(ends[0]) < 0 < slope(ends[1]) else None


def per_class_accuracy(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Percent right of each class's images; None for a class without images."""
    counts = confusion_matrix(logits, labels)
    pairs = zip(counts.diag().tolist(), counts.sum(1).tolist(), strict=True)
    return [100 * right / total if total else None for right, total in pairs]


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts (K, K): row the label, column the prediction."""
    num_classes = logits.shape[1]
    pairs = labels * num_classes + logits.argmax(1)
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def agreement(logits: Tensor, other: Tensor, top: int = 1) -> float:
    """Percent of images whose likeliest class of the `other` network (the teacher) is among this one's `top` likeliest.

    With `top` 1 both predict the same class.
    """
    return accuracy(logits, other.argmax(1), top)


def kl_divergence(teacher: Tensor, student: Tensor) -> float:
    """Mean over images of KL(teacher || student) of the probabilities at temperature 1, in nats; logits (N, K)."""
    target, learned = teacher.double().log_softmax(1), student.double().log_softmax(1)
    return F.kl_div(learned, target, log_target=True, reduction="batchmean").item()


def only_one_right(logits: Tensor, other: Tensor, labels: Tensor) -> tuple[list[int], list[int]]:
    """Positions of the images that only the first network gets right, and of those that only the other does."""
    mine, theirs = hits(logits, labels), hits(other, labels)
    return tuple(where.nonzero()[:, 0].tolist() for where in (mine & ~theirs, theirs & ~mine))


def pooled(feature: Tensor) -> Tensor:
    """Rows (B, D) of a feature: maps (B, C, H, W) and tokens (B, T, D) are averaged over their places."""
    if feature.dim() == 3:
        return feature.mean(1)
    return feature.flatten(2).mean(2) if feature.dim() > 3 else feature


def feature_sums(one: Tensor, other: Tensor) -> Tensor:
    """What `linear_cka` needs of some images' features (B, D) and (B, E): float64 (D + E + 1, D + E + 1).

    The sums of products of all columns of [one, other, 1]. Those of several batches are added, so that a split of any
    size takes this much memory.
    """
    rows = torch.cat([one.double(), other.double(), one.new_ones(len(one), 1, dtype=torch.double)], dim=1)
    return rows.T @ rows


def linear_cka(sums: Tensor, width: int) -> float | None:
    """Linear CKA of two features over all images whose `feature_sums` were added; the first is `width` (D) wide.

    |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms, of the centered features: 1 where they are equal up to rotation and scale.
    None where a feature is the same for all images. Kornblith et al. 2019, https://arxiv.org/abs/1905.00414, section 3,
    in the space of features, exact for any number of images; `kd.losses.CKA` estimates it for whole maps of one batch.
    """
    inner, total, count = sums[:-1, :-1], sums[-1, :-1], sums[-1, -1]
    centered = inner - total[:, None] * total / count
    parts = slice(0, width), slice(width, None)
    if any(centered[p, p].trace() <= 1e-12 * inner[p, p].trace() for p in parts):
        return None
    x, y = parts
    return (centered[x, y].square().sum() / (centered[x, x].norm() * centered[y, y].norm())).item()
