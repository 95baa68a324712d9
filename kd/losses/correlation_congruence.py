"""Correlation Congruence for Knowledge Distillation. Peng et al. 2019. https://arxiv.org/abs/1904.01802

Beside each image's features the student should copy how images correlate (section 3). What is computed here is what the
first author's code computes, as the usual comparison (RepDistiller) received it from him and published its numbers
with: both networks' features are embedded in one space by a learned linear map each, and of every two neighbouring
images of the batch the absolute differences of student and teacher are multiplied with each other.
"""

import math

from torch import Tensor, nn

from kd.losses.base import RelationLoss, Setting
from kd.outputs import Batch, Outputs


def neighbour_incongruence(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over neighbours i, i + 1 of the sum over dimensions of |s_i - t_i| |s_i+1 - t_i+1|; both (B, D).

    Differs from the paper: it compares B x B matrices of a kernel between images; see above. A batch of one gives 0.
    """
    difference = (student - teacher).abs()
    return (difference[:-1] * difference[1:]).sum() / max(len(difference) - 1, 1)


class CC(RelationLoss):
    """Products of neighbouring images' embedded differences from the teacher (Peng et al. 2019, as published in code).

    The neighbours are those in the order of the global batch, which is random and the same on any number of processes.
    Both embeddings are trained by this loss together with the student, as in that code. Nothing prevents the trivial
    solution, two embeddings that are one constant, and both are drawn there: on random features the spread of the
    teacher's embedding fell to a thirtieth in 6,000 steps. `train_teacher_embedding: false` closes that way: the
    teacher's embedding stays the random projection that it is at first, and only the student's side can follow.

    Args:
        student_tap, teacher_tap: dotted module names, usually of the penultimate vectors; the features are flattened.
        dimension: length of the embeddings.
        train_teacher_embedding: whether the teacher's embedding is learned too.
    """

    def __init__(
        self, *taps, dimension: int = 128, train_teacher_embedding: bool = True, weight: float = 0.02, **kwargs
    ):
        super().__init__(*taps, weight=weight, **kwargs)
        self.require(dimension >= 1, f"dimension {dimension} must be 1 or more")
        self.dimension, self.train_teacher_embedding = dimension, train_teacher_embedding

    def setup(self, setting: Setting) -> None:
        mine, theirs = map(math.prod, self.shapes(setting))
        self.student_embedding = nn.Linear(mine, self.dimension)
        self.teacher_embedding = nn.Linear(theirs, self.dimension).requires_grad_(self.train_teacher_embedding)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = self.features(student, teacher, batch)
        mine, theirs = self.student_embedding(mine.flatten(1)), self.teacher_embedding(theirs.flatten(1))
        return neighbour_incongruence(mine, theirs)
