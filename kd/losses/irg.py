"""Knowledge Distillation via Instance Relationship Graph. Liu et al. 2019. https://doi.org/10.1109/CVPR.2019.00726

A layer is a graph (section 3): its vertices are the images' features, its edges the squared distances between them.
From one layer to another the graph is transformed; the transformation is, for each image, the squared distance that its
feature moves. The student copies the teacher's vertices of the last layer (the logits, since features differ in
length), the edges of some layers, and the transformations between them. Edges and transformations are divided by their
largest one in the batch, as in the authors' code (https://github.com/yufanLIU/IRG), where features are pooled maps.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Setting, StagesLoss
from kd.losses.parts import bins, maps_or_vectors
from kd.outputs import Batch, Outputs
from kd.util.gathers import global_rows


def edges(features: Tensor) -> Tensor:
    """Squared distances (B, B) between features (B, C), divided by the largest."""
    return relative(torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square())


def transformation(earlier: Tensor, later: Tensor) -> Tensor:
    """The squared distance (B,) from each image's earlier feature (B, C) to its later one (B, C'), over the largest.

    The longer feature is averaged over neighbouring channels to the length of the shorter.
    """
    if earlier.shape[1] != later.shape[1]:
        length = min(earlier.shape[1], later.shape[1])
        earlier, later = (feature @ bins(feature.shape[1], length, feature) for feature in (earlier, later))
    return relative((later - earlier).square().sum(1))


def relative(values: Tensor) -> Tensor:
    """Values of 0 or more divided by their largest; zeros if all are 0."""
    largest = values.amax()
    return values / torch.where(largest > 0, largest, 1.0)


def pooled(feature: Tensor) -> Tensor:
    """A map (B, C, H, W) averaged over its places, (B, C); a vector (B, C) as it is."""
    return feature.flatten(2).mean(2) if feature.dim() > 2 else feature


class IRG(StagesLoss):
    """Logits, distances between images, and how far layers move images, in the global batch (Liu et al. 2019).

    The sum of three weighted parts, each a mean of squares: over logits, over the edges of all taps, and over the
    transformations from each tap to the next. A batch of one image has the logits' part only.

    Differs from the paper: the three weights are those of Knowledge-Distillation-Zoo, the reimplementation with
    published numbers for all three parts. The authors' code weighs edges and transformations by 0.005 in Caffe's halved
    sums, which is 0.0025 B in these means (0.16 for its batch of 64), has no part of vertices, and takes the largest
    edge for a constant in the gradient.
    Differs from the paper: taps are compared one to one; the paper also gives one layer of the teacher to several of
    the student. Layers of unequal lengths are averaged to the shorter to have a transformation between them; the
    authors' are the first and last block of one stage, of equal lengths.

    Args:
        student_taps, teacher_taps: dotted module names of maps (C, H, W) or vectors, from early to late, in pairs.
        vertex_weight: factor of the logits' part.
        edge_weight: factor of the edges' part.
        transformation_weight: factor of the transformations' part, which needs two pairs of taps or more.
    """

    sees_batch = True

    def __init__(
        self,
        *taps,
        vertex_weight: float = 0.1,
        edge_weight: float = 5.0,
        transformation_weight: float = 5.0,
        weight: float = 1.0,
        **kwargs,
    ):
        super().__init__(*taps, weight=weight, **kwargs)
        self.keep_nonnegative(vertex_weight=vertex_weight, edge_weight=edge_weight)
        self.keep_nonnegative(transformation_weight=transformation_weight)
        self.require(
            len(self.student_taps) > 1 or transformation_weight == 0,
            "one pair of taps has no transformation; name two or more, or set transformation_weight to 0",
        )

    def setup(self, setting: Setting) -> None:
        self.shapes(setting, maps_or_vectors, "tap maps (CxHxW) or vectors")

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        # Pooled before they are gathered: that is much less to send.
        mine, theirs = (
            [global_rows(pooled(feature), batch) for feature in features]
            for features in zip(*self.features(student, teacher), strict=True)
        )
        logits = (global_rows(outputs.logits, batch) for outputs in (student, teacher))
        loss = self.vertex_weight * F.mse_loss(*logits)
        for one, other in zip(mine, theirs, strict=True):
            loss = loss + self.edge_weight / len(mine) * F.mse_loss(edges(one), edges(other))
        for one, other in zip(pairwise(mine), pairwise(theirs), strict=True):
            moved = F.mse_loss(transformation(*one), transformation(*other))
            loss = loss + self.transformation_weight / (len(mine) - 1) * moved
        return loss
