"""Cross entropy with the labels."""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Loss
from kd.outputs import Batch, Outputs


class CrossEntropy(Loss):
    """Cross entropy between the student's logits (not probabilities) and the labels.

    Args:
        label_smoothing: share of the target spread evenly over all classes
            (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7), in [0, 1).
    """

    needs_teacher = False
    reads_labels = True

    def __init__(self, label_smoothing: float = 0.0, weight: float = 1.0):
        super().__init__(weight)
        self.require(0 <= label_smoothing < 1, f"label_smoothing {label_smoothing} must be in [0, 1)")
        self.label_smoothing = label_smoothing

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return F.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
