"""Distances between one feature of the student and one of the teacher, nothing learned.

The forms of PyTorch's knowledge distillation tutorial
(https://pytorch.org/tutorials/beginner/knowledge_distillation_tutorial.html) and of the notebooks after it.
"""

import math
import operator
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import FeatureLoss, Setting
from kd.outputs import Batch, Outputs

DISTANCES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


class FeatureDistance(FeatureLoss):
    """Mean distance of two features of one shape, over all their elements.

    Args:
        distance: mse, l1 or smooth_l1 (torch's, beta 1).
    """

    def __init__(self, *taps, distance: Literal["mse", "l1", "smooth_l1"] = "mse", weight: float = 1.0, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)
        self.distance = distance

    def setup(self, setting: Setting) -> None:
        self.shapes(setting, operator.eq, "tap modules of equal shape, or use FitNet, which learns a regressor")

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return DISTANCES[self.distance](*self.features(student, teacher))


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over the batch of 1 - cos(student, teacher), both flattened to (B, D).

    A longer teacher's vector is average-pooled to the student's length.
    """
    student, teacher = student.flatten(1), teacher.flatten(1)
    if teacher.shape[1] != student.shape[1]:
        teacher = F.adaptive_avg_pool1d(teacher[:, None], student.shape[1])[:, 0]
    return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()


class CosineEmbedding(FeatureLoss):
    """One minus the cosine of the flattened features; the teacher's is average-pooled to the student's length."""

    def setup(self, setting: Setting) -> None:
        mine, theirs = self.shapes(setting)
        if math.prod(theirs) < math.prod(mine):
            raise self.mismatch(setting, "tap a module of the student that is no longer than the teacher's")

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return cosine_distance(*self.features(student, teacher))
