"""One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation. Hao et al. 2023.
https://arxiv.org/abs/2310.19444

OFA's term on the last logits. Soft cross entropy in which a power gamma lifts the label's class where the teacher is
sure of it: with gamma above 1 the factor of the label's class grows, those of the others shrink.

Differs from the paper: without the exits that it puts on the student's stages. As in the authors' code the 1 of the
label's factor (1 + p)^gamma is taken away, since that part is the cross entropy with the labels, which is its own term,
and the other classes' probabilities have the power gamma too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import SoftenedLoss
from kd.outputs import Batch, Outputs


def target_enhanced(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, gamma: float, temperature: float
) -> Tensor:
    """Mean over images of the sum of -f * log(student); logits (B, K), labels (B,), a scalar.

    The factor f is (1 + p)^gamma - 1 for the label's class and p^gamma for another, p the teacher's probability.
    """
    student_log, teacher_log = (F.log_softmax(z / temperature, dim=1) for z in (student_logits, teacher_logits))
    is_label = torch.arange(student_log.shape[1], device=labels.device) == labels[:, None]
    label_factor = torch.expm1(gamma * torch.log1p(teacher_log.exp()))
    factors = torch.where(is_label, label_factor, (gamma * teacher_log).exp())
    return -(factors * student_log).sum(1).mean()


class OFA(SoftenedLoss):
    """Soft cross entropy that stresses the label's class where the teacher is sure of it (Hao et al. 2023).

    A cross entropy, so it is not 0 where student and teacher agree; with gamma 1 it is that with the teacher's
    probabilities.

    Args:
        gamma: the power, above 0. The authors take 1 on CIFAR-100 and 1.5 on ImageNet in their examples.
        temperature: T, above 0; there is no factor T^2, the published T is 1.
    """

    hard_labels = True

    def __init__(self, gamma: float = 1.0, temperature: float = 1.0, **kwargs):
        super().__init__(temperature, **kwargs)
        self.keep_positive(gamma=gamma)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return target_enhanced(*self.logits(student, teacher), batch.labels, self.gamma, self.temperature)
