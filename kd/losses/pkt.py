"""Learning Deep Representations with Probabilistic Knowledge Transfer. Passalis, Tefas. 2018.
https://arxiv.org/abs/1803.10837

From each image of a batch, the others are more or less probable as neighbours: the kernel (cos + 1) / 2 of the two
features, divided by its sum over the batch (section 3). The student's probabilities are drawn to the teacher's by the
Kullback-Leibler divergence. Cosines need no bandwidth, and the features may differ in length.
"""

from torch import Tensor

from kd.losses.base import RelationLoss
from kd.losses.parts import unit
from kd.outputs import Batch, Outputs

SMALLEST = 1e-7  # of the kernel, whose logarithm is taken; it is 0 for opposite features


def neighbour_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the neighbours' probabilities, over B^2; features (B, ...), a scalar.

    Differs from the paper: where the paper sums over all pairs, this is the mean over them, and an image is among its
    own neighbours. Both are the authors' code's, with which the published weights belong.
    """
    student_log, teacher_log = log_probabilities(student), log_probabilities(teacher)
    return (teacher_log.exp() * (teacher_log - student_log)).mean()


def log_probabilities(features: Tensor) -> Tensor:
    """For features (B, ...) the logarithm of each image's neighbours' probabilities, (B, B)."""
    features = unit(features.flatten(1))
    kernel = ((features @ features.T + 1) / 2).clamp(min=SMALLEST)
    return kernel.log() - kernel.sum(1, keepdim=True).log()


class PKT(RelationLoss):
    """Divergence of the neighbours' probabilities in the global batch (Passalis and Tefas 2018).

    The weight is the usual comparison's on CIFAR-100, for the penultimate vectors.

    Args:
        student_tap, teacher_tap: dotted module names; the features may differ in shape.
    """

    def __init__(self, *taps, weight: float = 3e4, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return neighbour_divergence(*self.features(student, teacher, batch))
