"""Knowledge Distillation with the Reused Teacher Classifier. Chen, Mei, Zhang, Wang, Feng, Chen. 2022.
https://arxiv.org/abs/2203.14001

The student ends in a projector to the teacher's last feature map and in the teacher's own, frozen classifier. It is
trained by the squared error of the projected map alone (section 3); no other term is needed.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import FeatureLoss, Setting
from kd.losses.parts import maps, same_size
from kd.outputs import Batch, Outputs


class SimKD(FeatureLoss):
    """Mean squared error between the student's projected map and the teacher's last map before pooling.

    Where the maps' sizes differ, the larger is averaged to the smaller. Differs from the paper: the authors' code
    averages a larger map of the student before its projector, not after.

    Args:
        student_tap, teacher_tap: dotted module names of maps (C, H, W) of equal C; the student's is its `projector`.
        weight: factor of this term in the objective, the only one in the paper.
    """

    def setup(self, setting: Setting) -> None:
        remedy = "tap maps (CxHxW) of as many channels, the student's being its projector"
        self.shapes(setting, lambda mine, theirs: maps(mine, theirs) and mine[0] == theirs[0], remedy)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return F.mse_loss(*same_size(*self.features(student, teacher)))
