"""Multi-Label Knowledge Distillation. Yang et al. 2023. https://arxiv.org/abs/2308.06453

The paper's loss on logits (MLD), for networks trained with a binary cross entropy for each class: an image may be of
several classes, so their probabilities are sigmoids that do not sum to 1, and each class is a distribution of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Loss
from kd.outputs import Batch, Outputs


def binary_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL between the classes' sigmoids, the sum over the classes, the mean over the batch; logits (B, K), a scalar.

    Differs from the authors' code: exact far out, where theirs keeps probabilities within 1e-8 of 0 and 1.
    """
    # The logarithms of "yes" and of "no", one beside the other.
    mine, theirs = (F.logsigmoid(torch.cat([z, -z], dim=1)) for z in (student_logits, teacher_logits))
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True)


class BinaryKL(Loss):
    """Kullback-Leibler divergence between each class's sigmoids, for images of several classes (Yang et al. 2023).

    Args:
        weight: factor of this term in the objective; 10 is the published value on MS-COCO.
    """

    def __init__(self, weight: float = 10.0):
        super().__init__(weight)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return binary_kl(student.logits, teacher.logits)
