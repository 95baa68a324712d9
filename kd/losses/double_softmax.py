"""A mistake that is often published, to show what it does: softmax before a cross entropy that applies softmax itself.

The second softmax sees numbers between 0 and 1, so no probability can exceed e / (e + K - 1), 0.23 for 10 classes; the
gradients are small, and a network trained alone looks much worse than it is, which makes distillation look better.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Loss
from kd.outputs import Batch, Outputs


class DoubleSoftmax(Loss):
    """Cross entropy of probabilities taken for logits; wrong, use CrossEntropy."""

    needs_teacher = False
    reads_labels = True

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return F.cross_entropy(F.softmax(student.logits, dim=1), batch.labels)
