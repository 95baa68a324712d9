"""Relational Knowledge Distillation. Park, Kim, Lu, Cho. 2019. https://arxiv.org/abs/1904.05068

The images of a batch should lie to each other in the student's space as they do in the teacher's. Pairs: their
distances, divided by the mean distance (section 3.2.1). Triplets: the cosine of the angle at the middle image (section
3.2.2). Both are compared by the Huber loss with threshold 1. Neither changes when a space is moved, turned or scaled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import RelationLoss
from kd.outputs import Batch, Outputs

COINCIDING = 1e-6  # images nearer than this share of the mean distance span no angle


def relative_distances(features: Tensor) -> Tensor:
    """Distances (B, B) between flattened features (B, ...), divided by the mean of those that are not 0."""
    features = features.flatten(1)
    # Summed from differences: by way of inner products, near images of a batch far from the origin lose all digits.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    count = (distances > 0).sum()
    mean = distances.sum() / count.clamp(min=1)
    return distances / torch.where(count > 0, mean, 1.0)


def cosines(distances: Tensor) -> Tensor:
    """The cosine (B, B, B) of the angle at image j between images i and k, at place (j, i, k), from distances (B, B).

    By the law of cosines, so that no difference of features is kept for a triplet. 0 where i or k coincides with j.
    """
    square = distances.square() / 2
    products = square[:, :, None] + square[:, None, :] - square
    apart = distances > COINCIDING
    inverse = torch.where(apart, 1 / torch.where(apart, distances, 1.0), 0.0)
    return products * inverse[:, :, None] * inverse[:, None, :]


class RKD(RelationLoss):
    """Distances and angles between the images of the global batch (Park et al. 2019).

    It keeps a few numbers a triplet, B^3, which suits batches of up to a few hundred.

    Differs from the paper: means over all B^2 pairs and B^3 triplets, those of an image with itself (0 in both
    networks, angles too but for i = k) among them, as in the authors' code, with which the published weights belong;
    the features are not normalised, as in the usual comparison, while the authors' code for CIFAR-100 divides them by
    their lengths.

    Args:
        student_tap, teacher_tap: dotted module names; the features may differ in shape. Meant for the penultimate
            vectors.
        distance_weight: factor of the distances' part.
        angle_weight: factor of the angles' part; 0 saves its B^3 numbers.
    """

    def __init__(self, *taps, distance_weight: float = 25.0, angle_weight: float = 50.0, weight: float = 1.0, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)
        self.keep_nonnegative(distance_weight=distance_weight, angle_weight=angle_weight)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = map(relative_distances, self.features(student, teacher, batch))
        loss = self.distance_weight * F.smooth_l1_loss(mine, theirs)
        if self.angle_weight:
            loss = loss + self.angle_weight * F.smooth_l1_loss(cosines(mine), cosines(theirs))
        return loss
