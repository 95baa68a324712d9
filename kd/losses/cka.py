"""Similarity of Neural Network Representations Revisited. Kornblith, Norouzi, Lee, Hinton. 2019.
https://arxiv.org/abs/1905.00414

Centered kernel alignment (CKA) with linear kernels measures how alike two features relate the images of a batch to each
other (section 3). It does not change when a feature is rotated, scaled or shifted, and the features' widths may differ,
so that nothing has to be learned. The paper measures with it; here one minus it is minimised.
"""

from torch import Tensor

from kd.losses.base import RelationLoss
from kd.losses.parts import unit
from kd.outputs import Batch, Outputs


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """|Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms, of centered features X and Y, flattened to (B, D); in [0, 1].

    |Y'X|^2 is also the inner product of the Gram matrices XX' and YY', (B, B). This form is used always: for flattened
    maps, much longer than a batch, it costs less, and for vectors either costs little.

    This is the biased estimate, as in the paper: it is the higher the fewer images there are for the length of the
    features. The unbiased one may be negative or divide by 0, which does not suit a loss.
    """
    grams = []
    for feature in (student, teacher):
        rows = feature.flatten(1)
        rows = rows - rows[:1].detach()  # first, so that a feature that all images share becomes 0 without rounding
        rows = unit(rows - rows.mean(0), dim=(0, 1))  # so that squares of squares stay far from the ends of float32
        grams.append(unit(rows @ rows.T, dim=(0, 1)))
    return (grams[0] * grams[1]).sum()


class CKA(RelationLoss):
    """One minus the linear CKA between the student's and the teacher's features of the global batch.

    A feature that is the same for all images has no CKA; it counts as 0, with a gradient of 0. One image alone gives a
    loss of 0, and so do two, whose relation is always the same: batches should be much larger.

    Args:
        student_tap, teacher_tap: dotted module names; maps are flattened, their shapes may differ.
        weight: factor of this term in the objective; no comparison publishes one.
    """

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = self.features(student, teacher, batch)
        return 1 - linear_cka(mine, theirs) if len(mine) > 1 else 0 * mine.sum()
