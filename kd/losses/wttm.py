"""Knowledge Distillation Based on Transformed Teacher Matching. Zheng, Yang. 2024. https://arxiv.org/abs/2402.11148

WTTM. Only the teacher is softened: a temperature T is its probabilities' power 1 / T, renormalised, and the student at
temperature 1 matches that. Each image counts by the sum of the powers before they are renormalised: the less sure the
teacher, the more.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import SoftenedLoss
from kd.outputs import Batch, Outputs


def transformed_teacher(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Mean over images of sum(p^(1/T)) * KL(p^(1/T) / sum(p^(1/T)) || student); logits (B, K), a scalar.

    As in the paper there is no factor T^2, since the student's logits are not divided by T.
    """
    powers = F.log_softmax(teacher_logits, dim=1) / temperature
    log_sum = powers.logsumexp(1, keepdim=True)
    student_log = F.log_softmax(student_logits, dim=1)
    divergence = F.kl_div(student_log, powers - log_sum, reduction="none", log_target=True)
    return (log_sum.exp() * divergence).sum(1).mean()


class WTTM(SoftenedLoss):
    """KL from the softened teacher to the student as it is, images weighted by the teacher's doubt (Zheng 2024).

    Args:
        temperature: T, above 0, of the teacher alone; the paper's gamma is 1 / T.
        weight: factor of this term in the objective. T and weight differ by the pair of networks; the defaults are the
            authors' example, VGG-13 to VGG-8 on CIFAR-100, where CRD is trained beside it.
    """

    def __init__(self, temperature: float = 5.0, weight: float = 4.0, **kwargs):
        super().__init__(temperature, weight=weight, **kwargs)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return transformed_teacher(*self.logits(student, teacher), self.temperature)
