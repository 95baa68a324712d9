"""Distilling the Knowledge in a Neural Network. Hinton, Vinyals, Dean. 2015. https://arxiv.org/abs/1503.02531

The student matches the teacher's class probabilities, both softened by a temperature T (section 2). The gradient of the
softened term shrinks as 1 / T^2, so it is multiplied by T^2 (end of section 2).
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import SoftenedLoss
from kd.outputs import Batch, Outputs


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T, the mean over the batch; logits (B, K), a scalar.

    Differs from the paper: KL instead of the cross entropy with the soft targets. They differ by the teacher's entropy,
    a constant; the gradient is the same, and KL is 0 when both agree.
    """
    student_log = F.log_softmax(student_logits / temperature, dim=1)
    teacher_log = F.log_softmax(teacher_logits / temperature, dim=1)
    # "batchmean": the sum over classes, the mean over images; "mean" would divide by the number of classes too.
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


class KL(SoftenedLoss):
    """Kullback-Leibler divergence from the teacher's softened probabilities (Hinton et al. 2015).

    Args:
        temperature: T, above 0; higher makes the teacher's small probabilities count more.
    """

    def __init__(self, temperature: float = 4.0, **kwargs):
        super().__init__(temperature, **kwargs)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return kl_divergence(*self.logits(student, teacher), self.temperature)
