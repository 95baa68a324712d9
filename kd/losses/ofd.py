"""A Comprehensive Overhaul of Feature Distillation. Heo et al. 2019. https://arxiv.org/abs/1904.01866

Features before the ReLU, the student's through a learned connector. Of the teacher's negative values only the margin
of their channel is left, their expected value (margin ReLU); where the target is not positive the student is only
pulled down to it, never up (partial L2; section 3).
"""

import torch
from torch import Tensor, nn

from kd.losses.base import Setting, StagesLoss
from kd.losses.parts import alike, connector, same_size
from kd.outputs import Batch, Outputs
from kd.util.gathers import global_rows


def partial_distance(student: Tensor, teacher: Tensor, margins: Tensor) -> Tensor:
    """The squared difference from max(teacher, margin), but 0 where the student is below it and it is not positive: the
    sum over channels and places, the mean over images. Maps (B, C, H, W) before the ReLU, margins (C,), 0 or less."""
    target = torch.maximum(teacher, margins[:, None, None])
    counts = (student > target) | (target > 0)
    return ((student - target).square() * counts).flatten(1).sum(1).mean()


class OFD(StagesLoss):
    """Partial L2 from the teacher's features after a margin ReLU, summed over the stages (Heo et al. 2019).

    The numbers of the authors' code: the sum over a stage's elements, halved for each stage before the last; the mean
    over images. Where height and width differ, the larger map is average-pooled to the smaller.

    Differs from the paper: a channel's margin is the mean of its negative values over the first epoch so far, of all
    processes, and stays after it; the authors' code computes it from the parameters of the teacher's batch norm. The
    teacher's batch norm is in evaluation mode; in their code it is in training mode.

    Args:
        student_taps, teacher_taps: dotted module names of maps (C, H, W) or vectors before the ReLU, from lower to
            upper, in the order of the pairs.
    """

    sees_batch = True  # the margins are those of a whole batch
    replicated = ("negatives",)

    def __init__(self, *taps, weight: float = 1e-3, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)

    def setup(self, setting: Setting) -> None:
        pairs = self.shapes(setting, alike, "tap two maps (CxHxW) or two vectors")
        self.connectors = nn.ModuleList(connector(mine[0], theirs[0]) for mine, theirs in pairs)
        # sum and number of the negative values seen, of the channels of all stages in a row
        self.register_buffer("negatives", torch.zeros(2, sum(theirs[0] for _, theirs in pairs)))

    @torch.no_grad()
    def margins(self, teacher: list[Tensor], batch: Batch) -> tuple[Tensor, ...]:
        """The margins (C,) of each stage's channels, after a look at the teacher's features in the first epoch."""
        if batch.epoch == 0:
            flat = [feature.reshape(*feature.shape[:2], -1) for feature in teacher]
            rows = [torch.stack([maps.clamp(max=0).sum(2), (maps < 0).sum(2)], 1) for maps in flat]
            # By way of the images' own sums, which are the same whichever process has an image.
            self.negatives += global_rows(torch.cat(rows, 2), batch).sum(0)
        total, number = self.negatives
        return (total / number.clamp(min=1)).split([feature.shape[1] for feature in teacher])

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        pairs = self.features(student, teacher)
        stages = zip(self.connectors, pairs, self.margins([theirs for _, theirs in pairs], batch), strict=True)
        total = 0.0
        for connect, pair, margins in stages:
            mine, theirs = same_size(*pair)
            total = total / 2 + partial_distance(connect(mine), theirs, margins)
        return total
