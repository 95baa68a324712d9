"""What is said of predictions: functions of all logits (N, K) and labels (N,), so that nothing is averaged twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor, top: int = 1) -> float:
    """Percent of images whose label is among the `top` highest logits."""
    best = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(1).double().mean().item()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log p(label), in nats."""
    return F.cross_entropy(logits.double(), labels).item()


def calibration_error(logits: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Expected calibration error in percent: the mean gap of confidence and accuracy over bins of equal width.

    Guo et al. 2017, On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599, equation 3. Bins are
    (low, high], as there.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    correct = (predicted == labels).double()
    place = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    gaps = torch.zeros(num_bins, dtype=torch.double).index_add_(0, place, correct - confidence)
    return 100 * gaps.abs().sum().item() / len(labels)


def per_class_accuracy(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Percent right of each class's images; None for a class without images."""
    counts = confusion_matrix(logits, labels)
    return [
        100 * counts[k, k].item() / total if (total := counts[k].sum().item()) else None for k in range(len(counts))
    ]


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts (K, K): row the label, column the prediction."""
    num_classes = logits.shape[1]
    pairs = labels * num_classes + logits.argmax(1)
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def agreement(logits: Tensor, other: Tensor) -> float:
    """Percent of images for which two networks predict the same class."""
    return 100 * (logits.argmax(1) == other.argmax(1)).double().mean().item()
