"""Paying More Attention to Attention. Zagoruyko, Komodakis. 2016. https://arxiv.org/abs/1612.03928

An attention map is the sum over a feature map's channels of |activation|^p, scaled to unit length; the student's maps
approach the teacher's (section 3.1, equation 2).
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Setting, StagesLoss
from kd.losses.parts import large_maps, same_size, unit
from kd.outputs import Batch, Outputs


def attention(maps: Tensor, power: float) -> Tensor:
    """Attention maps (B, H * W) of unit length, of feature maps (B, C, H, W)."""
    return unit(maps.abs().pow(power).mean(1).flatten(1))


def attention_distance(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """The mean over images and places of the squared difference of attention maps; features (B, C, H, W), a scalar."""
    student, teacher = same_size(student, teacher)
    return F.mse_loss(attention(student, power), attention(teacher, power))


class AT(StagesLoss):
    """Squared distance of the attention maps of each stage, summed over the stages (Zagoruyko and Komodakis 2016).

    Where height and width differ, the larger feature map is average-pooled to the smaller.

    Differs from the paper: the square of the norm and no factor 1/2, as in the authors' code, from which the published
    numbers are; the mean over places is the paper's own division of its weight of 1000.

    Args:
        student_taps, teacher_taps: dotted module names of maps (C, H, W), in the order of the pairs.
        power: p of |activation|^p, 1 or more; higher puts more weight on the strongest places.
    """

    def __init__(self, *taps, power: float = 2.0, weight: float = 1000.0, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)
        self.require(1 <= power < float("inf"), f"power {power} must be a finite number, 1 or more")
        self.power = power

    def setup(self, setting: Setting) -> None:
        self.shapes(setting, large_maps, "tap maps (CxHxW) larger than 1x1")  # at 1x1 the attention is always 1

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return sum(attention_distance(*pair, self.power) for pair in self.features(student, teacher))
