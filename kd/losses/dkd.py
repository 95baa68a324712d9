"""Decoupled Knowledge Distillation. Zhao, Cui, Song, Qiu, Liang. 2022. https://arxiv.org/abs/2203.08679

The KL divergence between two class distributions is the sum of two: that of the choice "the label's class or another"
(TCKD), and that among the other classes, renormalised to sum 1 (NCKD), times the teacher's probability that it is
another (section 3.1). A teacher that is sure thus silences the second; the paper weighs both freely,
alpha * TCKD + beta * NCKD (section 3.3).

Differs from the paper: both are multiplied by T^2, as in the authors' code. There too the whole rises linearly over the
first 20 epochs.
"""

import torch
from torch import Tensor

from kd.losses.base import Setting, SoftenedLoss, ramp
from kd.losses.kl import kl_divergence
from kd.outputs import Batch, Outputs


def without_label(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits (B, K - 1) of the classes other than the label's, in their order."""
    classes = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, classes + (classes >= labels[:, None]))


def decoupled(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """T^2 * TCKD and T^2 * NCKD, means over the batch; logits (B, K), labels (B,), two scalars."""

    def parts(logits):
        others = without_label(logits, labels) / temperature
        target = logits.gather(1, labels[:, None]) / temperature
        # The logarithm of the other classes' sum, from the logits: 1 - p has no digits left where p is nearly 1.
        return torch.cat([target, others.logsumexp(1, keepdim=True)], dim=1), others

    (mine, my_others), (theirs, their_others) = parts(student_logits), parts(teacher_logits)
    target, others = kl_divergence(mine, theirs, 1.0), kl_divergence(my_others, their_others, 1.0)
    return temperature**2 * target, temperature**2 * others


class DKD(SoftenedLoss):
    """KL divergence split into the label's class and the others, each with its own weight (Zhao et al. 2022).

    With 2 classes nothing is left beside the label's class but one, NCKD is 0, and this is KL; it is refused.

    Args:
        alpha: weight of the part on the label's class (TCKD).
        beta: weight of the part among the other classes (NCKD); on CIFAR-100 the authors choose 2, 6 or 8 by the pair
            of networks, 8 for ResNet-32x4 to ResNet-8x4.
        temperature: T, above 0.
        warmup_epochs: over so many first epochs the loss rises linearly to its full weight; 0 for none.
    """

    hard_labels = True

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, warmup_epochs: int = 20, **kwargs
    ):
        super().__init__(temperature, **kwargs)
        self.keep_nonnegative(alpha=alpha, beta=beta, warmup_epochs=warmup_epochs)

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        self.require(
            setting.num_classes is None or setting.num_classes > 2,
            "2 classes leave one class beside the label's, whose part (NCKD) is always 0; take KL",
        )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        target, others = decoupled(*self.logits(student, teacher), batch.labels, self.temperature)
        return ramp(batch.epoch, self.warmup_epochs) * (self.alpha * target + self.beta * others)
