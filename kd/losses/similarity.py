"""Similarity-Preserving Knowledge Distillation. Tung, Mori. 2019. https://arxiv.org/abs/1907.09682

Two images that excite the teacher alike should excite the student alike (section 3): the similarities of a batch are
the inner products of its flattened features, a B x B matrix, each row divided by its length; the student's matrix is
drawn to the teacher's. The features may have any shapes, since only the matrices are compared.
"""

from torch import Tensor

from kd.losses.base import RelationLoss
from kd.losses.parts import unit
from kd.outputs import Batch, Outputs


def similarity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared Frobenius distance of the row-normalised similarities over B^2; features (B, ...), a scalar."""
    return (similarities(student) - similarities(teacher)).square().mean()


def similarities(features: Tensor) -> Tensor:
    """Inner products (B, B) of flattened features (B, ...), each row of length 1; a row of zeros where that is 0."""
    features = features.flatten(1)
    return unit(features @ features.T)


class SP(RelationLoss):
    """Distance of the two networks' similarities between the images of the global batch (Tung and Mori 2019).

    The paper weighs it by 3000 on CIFAR-10, and so does the usual comparison on CIFAR-100, with the last stage's maps.

    Differs from the paper: one pair of layers; it sums over several, which several SP terms do.

    Args:
        student_tap, teacher_tap: dotted module names; the features may differ in shape.
    """

    def __init__(self, *taps, weight: float = 3000.0, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return similarity_distance(*self.features(student, teacher, batch))
