"""FitNets: Hints for Thin Deep Nets. Romero et al. 2014. https://arxiv.org/abs/1412.6550

A convolutional regressor on the student's feature map learns to predict the teacher's (equation 3).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.base import FeatureLoss, Setting
from kd.losses.parts import BatchNorm, maps
from kd.outputs import Batch, Outputs


class FitNet(FeatureLoss):
    """Mean squared error between a learned convolution of the student's feature map and the teacher's map.

    Differs from the paper: trained together with the other terms in one stage, as its successors do, not in a stage
    before them; the mean over all elements instead of half the sum; the regressor ends in batch norm and ReLU, as in
    the usual comparison's code, which the default weight is for.

    Args:
        student_tap, teacher_tap: dotted module names of maps (C, H, W) of equal H and W, the teacher's after a ReLU.
        kernel_size: of the regressor, an odd number.
        batch_norm: whether the regressor ends in batch norm and ReLU. A convolution alone suits features of any sign,
            and a weight near 1: at 100 and the comparison's learning rate it diverges.
    """

    def __init__(self, *taps, kernel_size: int = 1, batch_norm: bool = True, weight: float = 100.0, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)
        self.require(kernel_size % 2 == 1 and kernel_size > 0, f"kernel_size {kernel_size} must be odd and above 0")
        self.kernel_size, self.batch_norm = kernel_size, batch_norm

    def setup(self, setting: Setting) -> None:
        remedy = "tap maps (CxHxW) of equal height and width"
        student, teacher = self.shapes(setting, lambda one, other: maps(one, other) and one[1:] == other[1:], remedy)
        convolution = nn.Conv2d(student[0], teacher[0], self.kernel_size, padding=self.kernel_size // 2)
        after = [BatchNorm(teacher[0]), nn.ReLU()] if self.batch_norm else []
        self.regressor = nn.Sequential(convolution, *after)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = self.features(student, teacher)
        return F.mse_loss(self.regressor(mine), theirs)
