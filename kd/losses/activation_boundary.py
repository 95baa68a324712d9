"""Distillation of Activation Boundaries. Heo, Lee, Yun, Choi. 2018. https://arxiv.org/abs/1811.03233

The student's neurons, through a learned connector, are to be active where the teacher's are: before the ReLU they are
pushed beyond a margin on the side of zero where the teacher's are (section 3, the alternative loss).
"""

import torch
from torch import Tensor, nn

from kd.losses.base import Setting, StagesLoss
from kd.losses.parts import alike, connector, same_size
from kd.outputs import Batch, Outputs


def boundary_distance(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """The squared hinge max(0, margin - s) where the teacher is above 0 and max(0, margin + s) elsewhere, of maps
    (B, C, H, W) before the ReLU: the sum over channels and places, the mean over images."""
    hinge = margin - torch.where(teacher > 0, student, -student)
    return hinge.relu().square().flatten(1).sum(1).mean()


class AB(StagesLoss):
    """Hinge on which side of zero the neurons are, summed over the stages (Heo et al. 2018).

    The numbers of the authors' code: 0.003 times the sum over a stage's elements, halved for each stage before the
    last; the mean over images. The connector is a 1x1 convolution and batch norm, and nothing where both networks
    have as many channels. Where height and width differ, the larger map is average-pooled to the smaller.

    Differs from the paper: trained together with the other terms, not in a stage before them where nothing else is
    trained; at the authors' scale it is at first much larger than a cross entropy.

    Args:
        student_taps, teacher_taps: dotted module names of maps (C, H, W) or vectors before the ReLU, from lower to
            upper, in the order of the pairs.
        margin: how far beyond zero a neuron is pushed, above 0.
    """

    SCALE = 3 / 1000

    def __init__(self, *taps, margin: float = 1.0, weight: float = 1.0, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)
        self.keep_positive(margin=margin)

    def setup(self, setting: Setting) -> None:
        pairs = self.shapes(setting, alike, "tap two maps (CxHxW) or two vectors")
        channels = ((mine[0], theirs[0]) for mine, theirs in pairs)
        self.connectors = nn.ModuleList(
            nn.Identity() if one == other else connector(one, other) for one, other in channels
        )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        total = 0.0
        for connect, pair in zip(self.connectors, self.features(student, teacher), strict=True):
            mine, theirs = same_size(*pair)
            total = total / 2 + boundary_distance(connect(mine), theirs, self.margin)
        return self.SCALE * total
