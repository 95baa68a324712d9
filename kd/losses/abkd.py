"""ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via alpha-beta-Divergence.
Wang et al. 2025. https://arxiv.org/abs/2505.04560

A family of divergences in which KL (alpha 1, beta 0) and reversed KL (alpha 0, beta 1) are limits. A smaller alpha
stresses classes where student and teacher are far apart, a larger beta those of which the student is sure.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import SoftenedLoss
from kd.outputs import Batch, Outputs


def alpha_beta_divergence(
    student_logits: Tensor, teacher_logits: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """T^2 times the divergence at temperature T, the mean over the batch; logits (B, K), a scalar.

    1 / (alpha beta) * sum of alpha / (alpha + beta) * p^(alpha + beta) + beta / (alpha + beta) * q^(alpha + beta)
    - p^alpha q^beta, p the teacher's probabilities and q the student's.
    """
    mine, theirs = (F.log_softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    total = alpha + beta
    # Powers are taken of logarithms: the gradient of q^beta at q = 0 is infinite where beta is below 1.
    own = (alpha * (total * theirs).exp() + beta * (total * mine).exp()) / total
    both = (alpha * theirs + beta * mine).exp()
    return temperature**2 / (alpha * beta) * (own - both).sum(1).mean()


class ABKD(SoftenedLoss):
    """alpha-beta-divergence from the teacher's softened probabilities, between KL and its reverse (Wang et al. 2025).

    Differs from the authors' code: multiplied by T^2, as KL is. Their example, ResNet-56 to ResNet-20 on CIFAR-100, has
    the defaults' alpha, beta and T with weight 32, which is 2 here (64 in their script's comment).

    Args:
        alpha, beta: the powers, above 0.
        temperature: T, above 0.
    """

    def __init__(self, alpha: float = 0.8, beta: float = 0.3, temperature: float = 4.0, weight: float = 2.0, **kwargs):
        super().__init__(temperature, weight=weight, **kwargs)
        self.keep_positive(alpha=alpha, beta=beta)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return alpha_beta_divergence(*self.logits(student, teacher), self.alpha, self.beta, self.temperature)
