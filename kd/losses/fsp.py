"""A Gift from Knowledge Distillation. Yim, Joo, Bae, Kim. 2017. https://doi.org/10.1109/CVPR.2017.754

The flow of solution procedure between two layers is the matrix of inner products of their channels (equation 1); the
student's matrices approach the teacher's (equation 2).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Setting, StagesLoss
from kd.losses.parts import maps, same_size
from kd.outputs import Batch, Outputs


def flow(lower: Tensor, upper: Tensor) -> Tensor:
    """The flow matrices (B, C, D) between maps (B, C, H, W) and (B, D, H, W): mean products over the places.

    Where height and width differ, the larger is max-pooled to the smaller (section 4).
    """
    lower, upper = (maps.flatten(2) for maps in same_size(lower, upper, "max"))
    return torch.bmm(lower, upper.mT) / lower.shape[2]


class FSP(StagesLoss):
    """Squared distance of the flow matrices between consecutive stages, summed over them (Yim et al. 2017).

    Student and teacher need as many channels in each pair of taps; their heights and widths may differ.

    Differs from the paper: trained together with the other terms, not in a stage before them; flows between
    consecutive taps instead of between the first and the last layer of each stage; the mean over a matrix's entries
    instead of their sum, which is the scale that the default weight is for.

    Args:
        student_taps, teacher_taps: dotted module names of maps (C, H, W) from lower to upper, at least two.
    """

    def __init__(self, *taps, weight: float = 50.0, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)
        taps = self.student_taps
        self.require(len(taps) > 1, f"student_taps {taps} must be two or more; a flow is between two")

    def setup(self, setting: Setting) -> None:
        self.shapes(setting, maps, "tap maps (CxHxW)")
        remedy = "tap maps of as many channels, or use AT, NST or VID, which do not need them"
        self.shapes(setting, lambda mine, theirs: mine[0] == theirs[0], remedy)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = zip(*self.features(student, teacher), strict=True)
        flows = zip(pairwise(mine), pairwise(theirs), strict=True)
        return sum(F.mse_loss(flow(*one), flow(*other)) for one, other in flows)
