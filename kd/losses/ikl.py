"""Decoupled Kullback-Leibler Divergence Loss. Cui et al. 2023. https://arxiv.org/abs/2305.13948

IKL. The gradient of KL is that of two terms: a squared error between the differences of all pairs of a network's
logits, weighted by the products of the pairs' probabilities, and a cross entropy with soft labels. In distillation the
first of them trains nothing, for its gradient goes to the teacher; IKL lets it reach the student.

Differs from the paper: each image is weighted by its own probabilities, as in the authors' CIFAR-100 configurations;
the mean probabilities of its class, which they take on ImageNet, are left out. KL stands for the cross entropy with
soft labels: they differ by a constant.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import SoftenedLoss, ramp
from kd.losses.kl import kl_divergence
from kd.outputs import Batch, Outputs


def pair_differences(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Mean over images of 1/4 * sum of w_j w_k ((t_j - t_k) - (s_j - s_k))^2; logits (B, K), a scalar.

    The sum goes over all pairs of classes; w are the teacher's probabilities at this temperature. It is twice the
    variance of t - s under w, which needs no K^2 numbers.
    """
    weights, gap = F.softmax(teacher_logits / temperature, dim=1), teacher_logits - student_logits
    centred = gap - (weights * gap).sum(1, keepdim=True)
    return 0.5 * (weights * centred.square()).sum(1).mean()


class IKL(SoftenedLoss):
    """KL, and a squared error between the differences of all pairs of logits (Cui et al. 2023).

    Args:
        alpha: weight of KL, which as in the authors' code has no factor T^2.
        beta: weight of the squared error. Both differ by the pair of networks on CIFAR-100; the defaults are those of
            ResNet-32x4 to ResNet-8x4.
        temperature: T of KL, above 0.
        pair_temperature: of the probabilities that weigh the pairs, above 0; the published 100 makes them nearly equal.
        warmup_epochs: over so many first epochs the loss rises linearly to its full weight; 0 for none.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        pair_temperature: float = 100.0,
        warmup_epochs: int = 20,
        **kwargs,
    ):
        super().__init__(temperature, **kwargs)
        self.keep_nonnegative(alpha=alpha, beta=beta, warmup_epochs=warmup_epochs)
        self.keep_positive(pair_temperature=pair_temperature)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = self.logits(student, teacher)
        divergence = kl_divergence(mine / self.temperature, theirs / self.temperature, 1.0)
        whole = self.alpha * divergence + self.beta * pair_differences(mine, theirs, self.pair_temperature)
        return ramp(batch.epoch, self.warmup_epochs) * whole
