"""Simple distances between the student's and the teacher's logits or soft labels.

Soft-target cross entropy: Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531, section 2. Squared error of
logits: Ba, Caruana 2014, Do Deep Nets Really Need to be Deep?, https://arxiv.org/abs/1312.6184, equation 1.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import LogitLoss, SoftenedLoss
from kd.outputs import Batch, Outputs


class SoftCrossEntropy(SoftenedLoss):
    """T^2 times the cross entropy with the teacher's softened probabilities: KL plus the teacher's entropy.

    Args:
        temperature: T, above 0.
    """

    def __init__(self, temperature: float = 4.0, **kwargs):
        super().__init__(temperature, **kwargs)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = self.logits(student, teacher)
        targets = F.softmax(theirs / self.temperature, dim=1)
        return F.cross_entropy(mine / self.temperature, targets) * self.temperature**2


class SoftMAE(SoftenedLoss):
    """Mean absolute error between softened probabilities, over images and classes.

    Args:
        temperature: T, above 0.
    """

    def __init__(self, temperature: float = 1.0, **kwargs):
        super().__init__(temperature, **kwargs)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        probabilities = (F.softmax(logits / self.temperature, dim=1) for logits in self.logits(student, teacher))
        return F.l1_loss(*probabilities)


class LogitsMSE(LogitLoss):
    """Mean squared error between logits, over images and classes (Ba and Caruana: half the sum over classes)."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return F.mse_loss(*self.logits(student, teacher))
