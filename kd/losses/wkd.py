"""Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation. Lv, Yang, Li. 2024.
https://arxiv.org/abs/2412.08139

WKD-F. The vectors at the places of a feature map are a sample of a Gaussian with independent channels. The student's
map, after a learned projection, is compared with the teacher's by the 2-Wasserstein distance between their Gaussians,
whose square is the squared distance of the means plus that of the standard deviations. A grid splits both maps into
cells with a Gaussian each.
"""

from torch import Tensor, nn

from kd.losses.base import FeatureLoss, Setting
from kd.losses.parts import BatchNorm
from kd.outputs import Batch, Outputs

EPSILON = 1e-5  # added to variances before the root, as in the authors' code: its derivative at 0 is infinite


def gaussians(feature: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Means and standard deviations (B, C, grid, grid) of the cells of a map (B, C, H, W); grid divides H and W.

    Differs from the authors' code: the number of places is the variance's denominator, and not one less, so that a cell
    of one place has a deviation.
    """
    cells = feature.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))
    return cells.mean((3, 5)), (cells.var((3, 5), correction=0) + EPSILON).sqrt()


def wasserstein(student_map: Tensor, teacher_map: Tensor, grid: int, mean_weight: float) -> Tensor:
    """mean_weight * |difference of means|^2 + |difference of deviations|^2, the mean over images and cells."""
    (mean, spread), (their_mean, their_spread) = gaussians(student_map, grid), gaussians(teacher_map, grid)
    distance = mean_weight * (mean - their_mean).square() + (spread - their_spread).square()
    return distance.sum(1).mean()


class WKDF(FeatureLoss):
    """Wasserstein distance between Gaussians of the places of two feature maps (WKD-F, Lv et al. 2024).

    Differs from the authors' code: its weight does not fall to 0 after epoch 150 of 240; the maps may differ in height
    and width.

    Args:
        student_tap, teacher_tap: dotted module names of maps (C, H, W), the teacher's after a ReLU.
        grid: cells along each side; divides the heights and widths of both maps.
        mean_weight: weight of the means beside the standard deviations.
        weight: factor of this term in the objective. The defaults are the published ones for the last maps of
            ResNet-32x4 and ResNet-8x4 on CIFAR-100.
    """

    def __init__(self, *taps, grid: int = 1, mean_weight: float = 4.0, weight: float = 0.08, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)
        self.require(grid > 0, f"grid {grid} must be above 0")
        self.keep_nonnegative(mean_weight=mean_weight)
        self.grid = grid

    def setup(self, setting: Setting) -> None:
        shapes = student, teacher = self.shapes(setting)
        if any(len(shape) != 3 or shape[1] % self.grid or shape[2] % self.grid for shape in shapes):
            raise self.mismatch(setting, f"tap maps (CxHxW) whose heights and widths grid {self.grid} divides")
        self.projector = nn.Sequential(nn.Conv2d(student[0], teacher[0], 1), BatchNorm(teacher[0]), nn.ReLU())

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = self.features(student, teacher)
        return wasserstein(self.projector(mine), theirs, self.grid, self.mean_weight)
