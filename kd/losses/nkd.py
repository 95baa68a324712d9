"""From Knowledge Distillation to Self-Knowledge Distillation. Yang et al. 2023. https://arxiv.org/abs/2303.13005

The NKD loss. The cross entropy with soft labels has a part on the label's class and one on the others. Student and
teacher give the others different sums, so the second part can never be met; NKD renormalises both to sum 1 before it
compares them. The term for the label's class is - p_teacher * log p_student, at temperature 1; that for the others,
times gamma and T^2, is the cross entropy of the renormalised probabilities at temperature T.

Both are cross entropies, so the loss is not 0 where student and teacher agree. The paper adds the cross entropy with
the labels, with weight 1.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import SoftenedLoss
from kd.losses.dkd import without_label
from kd.outputs import Batch, Outputs


def normalized(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The term of the label's class and T^2 times that of the others, means over the batch; logits (B, K), labels (B,).

    With 2 classes the one other class has probability 1 after renormalising, and its term is 0.
    """
    confidence = F.softmax(teacher_logits, dim=1).gather(1, labels[:, None])
    target = -confidence * F.log_softmax(student_logits, dim=1).gather(1, labels[:, None])
    soft_labels = F.softmax(without_label(teacher_logits, labels) / temperature, dim=1)
    others = F.cross_entropy(without_label(student_logits, labels) / temperature, soft_labels)
    return target.mean(), temperature**2 * others


class NKD(SoftenedLoss):
    """Soft cross entropy whose classes beside the label's are renormalised to sum 1 (Yang et al. 2023).

    With 2 classes the cross entropy of the label's class, weighted by the teacher's confidence in it, is what is left;
    it still depends on the teacher, so it is not refused.

    Args:
        gamma: weight of the other classes' term.
        temperature: T of the other classes' term, above 0. gamma 1.5 and T 1 are the published values for ImageNet; the
            authors' configuration of ResNet-34 to ResNet-18 on CIFAR-100 has gamma 3.5 and T 3.
    """

    hard_labels = True

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0, **kwargs):
        super().__init__(temperature, **kwargs)
        self.keep_nonnegative(gamma=gamma)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        target, others = normalized(*self.logits(student, teacher), batch.labels, self.temperature)
        return target + self.gamma * others
