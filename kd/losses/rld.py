"""Knowledge Distillation with Refined Logits. Sun et al. 2024. https://arxiv.org/abs/2408.07703

RLD. A teacher that is wrong contradicts the labels; RLD takes from it what cannot. Sample confidence: the student's
probability of the label is compared with the teacher's largest, of whichever class. Masked correlation: classes that
the teacher ranks no lower than the label, the label among them, are hidden from both, and the rest is compared.
"""

import torch
from torch import Tensor

from kd.losses.base import SoftenedLoss, ramp
from kd.losses.dkd import without_label
from kd.losses.kl import kl_divergence
from kd.outputs import Batch, Outputs


def one_or_rest(logits: Tensor, classes: Tensor) -> Tensor:
    """Logits (B, 2) of the choice "this class or another", from logits (B, K) and a class each (B,)."""
    rest = without_label(logits, classes).logsumexp(1)
    return torch.stack([logits.gather(1, classes[:, None])[:, 0], rest], dim=1)


def refined(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """T^2 times the sample confidence and the masked correlation, both KL, means over the batch; logits (B, K).

    Where the teacher ranks no class below the label the masked correlation is 0.
    """
    mine, theirs = student_logits / temperature, teacher_logits / temperature
    sample = kl_divergence(one_or_rest(mine, labels), one_or_rest(theirs, theirs.argmax(1)), 1.0)
    hidden = theirs >= theirs.gather(1, labels[:, None])
    lowest = torch.finfo(mine.dtype).min  # and not -inf: a row in which all is hidden would be nan, and is 0 so
    masked = kl_divergence(mine.masked_fill(hidden, lowest), theirs.masked_fill(hidden, lowest), 1.0)
    return temperature**2 * sample, temperature**2 * masked


class RLD(SoftenedLoss):
    """The teacher's confidence for the label, and its probabilities of the classes below the label (Sun et al. 2024).

    With 2 classes nothing is below the label but one class, and the sample confidence is what is left.

    Args:
        alpha: weight of the sample confidence.
        beta: weight of the masked correlation.
        temperature: T, above 0, of both parts. The defaults are the authors' command for VGG-13 to VGG-8 on CIFAR-100;
            their other configurations name no values, and their code can give the first part a T of its own.
        warmup_epochs: over so many first epochs the loss rises linearly to its full weight; 0 for none.
    """

    hard_labels = True

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, warmup_epochs: int = 20, **kwargs
    ):
        super().__init__(temperature, **kwargs)
        self.keep_nonnegative(alpha=alpha, beta=beta, warmup_epochs=warmup_epochs)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        sample, masked = refined(*self.logits(student, teacher), batch.labels, self.temperature)
        return ramp(batch.epoch, self.warmup_epochs) * (self.alpha * sample + self.beta * masked)
