"""Knowledge Distill via Neuron Selectivity Transfer. Huang, Wang. 2017. https://arxiv.org/abs/1707.01219

A channel's map, scaled to unit length, is where the channel is active. The maps of an image's channels are samples of
a distribution; the student's distribution approaches the teacher's in maximum mean discrepancy, with the polynomial
kernel k(x, y) = (x . y)^2 (section 4).
"""

import torch
from torch import Tensor

from kd.losses.base import Setting, StagesLoss
from kd.losses.parts import large_maps, same_size, unit
from kd.outputs import Batch, Outputs


def selectivity_discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over images of mean k(s, s') + mean k(t, t') - 2 mean k(s, t) over the channels of each, a scalar, 0 or
    more; of maps (B, C, H, W), which may differ in C, H and W."""
    student, teacher = (unit(maps.flatten(2)) for maps in same_size(student, teacher))
    if student.shape[2] <= max(student.shape[1], teacher.shape[1]):
        # The sum of (x . y)^2 over channels is the inner product of the places' Gram matrices (H * W, H * W): the whole
        # is the squared distance of the Gram matrices, which are smaller than those of the channels here.
        return (_gram(student) - _gram(teacher)).square().sum((1, 2)).mean()
    return _kernel(student, student) + _kernel(teacher, teacher) - 2 * _kernel(student, teacher)


def _gram(rows: Tensor) -> Tensor:
    return torch.bmm(rows.mT, rows) / rows.shape[1]


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    return torch.bmm(one, other.mT).square().mean()


class NST(StagesLoss):
    """Maximum mean discrepancy of where the channels are active, summed over the stages (Huang and Wang 2017).

    Where height and width differ, the larger feature map is average-pooled to the smaller. `weight` multiplies the
    whole discrepancy, as in the authors' code.

    Differs from the paper: several stages, as in the usual comparison; the authors' code taps the last one only.

    Args:
        student_taps, teacher_taps: dotted module names of maps (C, H, W), in the order of the pairs.
    """

    def __init__(self, *taps, weight: float = 50.0, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)

    def setup(self, setting: Setting) -> None:
        # of one place alone every kernel is 1 and the discrepancy 0
        self.shapes(setting, large_maps, "tap maps (CxHxW) larger than 1x1")

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return sum(selectivity_discrepancy(*pair) for pair in self.features(student, teacher))
