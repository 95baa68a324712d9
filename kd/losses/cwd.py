"""Channel-wise Knowledge Distillation for Dense Prediction. Shu, Liu, Gao, Yan, Shen. 2020.
https://arxiv.org/abs/2011.13256

Each channel of a feature map becomes a distribution over positions by a softmax with temperature T; the loss is the
divergence of the student's from the teacher's, times T^2, the mean over channels (section 3). A 1x1 convolution
aligns the student's channels where their number differs.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.base import FeatureLoss, Setting
from kd.losses.parts import maps, same_size
from kd.outputs import Batch, Outputs


def channel_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) over the positions of each channel of maps (B, C, H, W), the mean over B and C."""
    mine, theirs = (F.log_softmax(feature.flatten(2) / temperature, dim=2) for feature in (student, teacher))
    return F.kl_div(mine.flatten(0, 1), theirs.flatten(0, 1), reduction="batchmean", log_target=True) * temperature**2


class CWD(FeatureLoss):
    """Divergence of each channel's softmax over positions from the teacher's.

    Differs from the paper: maps of unequal height and width are averaged to the smaller; the paper's are equal.

    Args:
        student_tap, teacher_tap: dotted module names of maps (C, H, W).
        temperature: T, above 0; higher makes a wider part of each map count.
        weight: factor of this term in the objective; 50 is the usual one for feature maps in the comparisons on
            segmentation (3 for maps of logits). The paper has no classification.
    """

    def __init__(self, *taps, temperature: float = 4.0, weight: float = 50.0, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)
        self.keep_positive(temperature=temperature)

    def setup(self, setting: Setting) -> None:
        student, teacher = self.shapes(setting, maps, "tap maps (CxHxW)")
        if min(student[1], teacher[1]) * min(student[2], teacher[2]) == 1:
            raise self.mismatch(setting, "a softmax over one position is always 1; tap larger maps")
        self.align = nn.Identity() if student[0] == teacher[0] else nn.Conv2d(student[0], teacher[0], 1, bias=False)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = same_size(*self.features(student, teacher))
        return channel_divergence(self.align(mine), theirs, self.temperature)
