"""Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation. Liu, Huang, Lin, Xie, Wang,
Chang, Liang. 2021. https://arxiv.org/abs/2202.03680

The correlation of every two channels of one image's feature map, the inner product of the flattened channels, should be
the teacher's. This is the version for classification, ICKD-C: one matrix (C, C) an image, after a 1x1 convolution and a
batch normalization that give the student the teacher's number of channels.
"""

from torch import Tensor, nn

from kd.losses.base import FeatureLoss, Setting
from kd.losses.parts import BatchNorm, maps, unit
from kd.outputs import Batch, Outputs


def channel_correlations(feature: Tensor) -> Tensor:
    """Inner products of the channels of maps (B, C, H, W), each row of (B, C, C) of length 1 (0 for a zero channel)."""
    channels = feature.flatten(2)
    return unit(channels @ channels.mT, dim=2)


def correlation_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of the correlations of two maps (B, C, H, W), which may differ in H and W: the sum over the C x C
    entries divided by C, the mean over images."""
    error = channel_correlations(student) - channel_correlations(teacher)
    return error.square().sum(2).mean()


class ICKD(FeatureLoss):
    """Squared error of the correlations between the channels of a feature map (ICKD-C).

    Differs from the paper: rows of the matrices are divided by their lengths, and the sum of squares by C, not C^2.
    The published numbers come from the authors' code, https://github.com/ADLab-AutoDrive/ICKD, which does both.

    It keeps matrices of C^2 numbers an image; with thousands of channels that is more than the maps themselves.

    Args:
        student_tap, teacher_tap: dotted module names of maps (C, H, W), in the paper of the last stage.
        weight: factor of this term in the objective, the authors' beta for CIFAR-100, beside a cross entropy of
            weight 1 and, in their better numbers, a KL at temperature 4 of weight 1.
    """

    def __init__(self, *taps, weight: float = 2.5, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)

    def setup(self, setting: Setting) -> None:
        student, teacher = self.shapes(setting, maps, "tap maps (CxHxW)")
        self.align = nn.Sequential(nn.Conv2d(student[0], teacher[0], 1, bias=False), BatchNorm(teacher[0]))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = self.features(student, teacher)
        return correlation_error(self.align(mine), theirs)
