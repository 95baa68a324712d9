"""Distilling Knowledge via Knowledge Review. Chen, Liu, Zhao, Jia. 2021. https://arxiv.org/abs/2104.09044

The student's stages are fused from the deepest backwards: each with what was fused before it, by an attention over
positions (ABF, section 3.3). Each fused map predicts the teacher's stage at that level, compared at several scales by
spatial pyramid pooling (hierarchical context loss, HCL). The published numbers for CIFAR-100 come from
https://github.com/dvlab-research/ReviewKD, which this follows: the stages are the student's after their last ReLU and
the teacher's before it (`preact`), and the pooled last feature of both is one more stage.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.base import Setting, StagesLoss, ramp
from kd.losses.parts import BatchNorm, average_pool, maps_or_vectors
from kd.outputs import Batch, Outputs


def hierarchical_context(student: Tensor, teacher: Tensor, levels: tuple[int, ...] = (4, 2, 1)) -> Tensor:
    """The weighted mean of the squared errors of two maps (B, C, H, W) and of both pooled to each level's l x l.

    The map itself has weight 1, each level half of the one before; a level that is no smaller than the map is left out.
    """
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for level in levels:
        if level < min(student.shape[2:]):
            weight /= 2
            pooled = (average_pool(feature, (level, level)) for feature in (student, teacher))
            total, weights = total + weight * F.mse_loss(*pooled), weights + weight
    return total / weights


def resize(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (B, C, H, W) to (B, C, *size) by the nearest neighbour."""
    return feature if tuple(feature.shape[2:]) == size else F.interpolate(feature, size, mode="nearest")


class Fusion(nn.Module):
    """Attention-based fusion of one stage of the student with what was fused of the deeper ones.

    Args:
        in_channels, mid_channels, out_channels: of the student's stage, of what is fused, of the teacher's stage.
        size: height and width of the teacher's stage.
        deepest: there is nothing deeper to fuse with.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, size: tuple[int, int], deepest: bool):
        super().__init__()
        self.size = size
        self.reduce = nn.Sequential(nn.Conv2d(in_channels, mid_channels, 1, bias=False), BatchNorm(mid_channels))
        self.attend = None if deepest else nn.Conv2d(2 * mid_channels, 2, 1)
        predict = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        self.predict = nn.Sequential(predict, BatchNorm(out_channels))
        for convolution in (self.reduce[0], predict):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """The prediction of the teacher's stage, and what is fused, at the student's size."""
        fused = self.reduce(feature)
        if self.attend is not None:
            # A 1x1 convolution of both maps side by side is the sum of two, and that of the deeper map may be taken
            # before it is resized: a quarter of the work.
            here, there = self.attend.weight.split(fused.shape[1], dim=1)
            size = tuple(fused.shape[2:])
            attention = F.conv2d(fused, here, self.attend.bias) + resize(F.conv2d(deeper, there), size)
            mine, theirs = attention.sigmoid().split(1, dim=1)
            fused = mine * fused + theirs * resize(deeper, size)
        return self.predict(resize(fused, self.size)), fused


class ReviewKD(StagesLoss):
    """Squared errors, at several scales, of the teacher's stages predicted from the student's same and deeper stages.

    Differs from the paper: the authors' warm-up starts at 0 (epoch / warmup_epochs), this at 1 / warmup_epochs. A batch
    of one image at 1x1, which their code refuses, is normalized by the running statistics.

    Args:
        student_taps, teacher_taps: dotted module names of maps (C, H, W) or vectors (C,), which count as C x 1 x 1, in
            pairs from shallow to deep; published: stage1, stage2, stage3, pool and stage1.preact, stage2.preact,
            stage3.preact, pool.
        mid_channels: of what is fused; null for those of the student's deepest tap, at most 512, as published.
        levels: sides of the pooled maps that are compared beside the whole maps.
        warmup_epochs: over these first epochs the term's share rises linearly to 1.
        weight: factor of this term in the objective; 5 in five of the eight published CIFAR-100 pairs. The others:
            resnet32x4 to ShuffleV2 8, resnet110 to resnet32 1, resnet56 to resnet20 0.6.
    """

    def __init__(
        self,
        *taps,
        mid_channels: int | None = None,
        levels: tuple[int, ...] = (4, 2, 1),
        warmup_epochs: int = 20,
        weight: float = 5.0,
        **kwargs,
    ):
        super().__init__(*taps, weight=weight, **kwargs)
        self.require(mid_channels is None or mid_channels > 0, f"mid_channels {mid_channels} must be above 0, or null")
        self.require(all(level > 0 for level in levels), f"levels {levels} must all be above 0")
        self.keep_nonnegative(warmup_epochs=warmup_epochs)
        self.mid_channels, self.levels = mid_channels, tuple(levels)

    def setup(self, setting: Setting) -> None:
        pairs = self.shapes(setting, maps_or_vectors, "tap maps (CxHxW) or vectors")
        maps = [tuple(shape if len(shape) == 3 else (*shape, 1, 1) for shape in shapes) for shapes in pairs]
        for pair, (shallow, deep) in enumerate(pairwise(maps), start=1):
            if deep[0][1] > shallow[0][1] or deep[0][2] > shallow[0][2]:
                raise self.mismatch(pair, setting, "larger than the student's tap before; go from shallow to deep")
        mid_channels = self.mid_channels or min(512, maps[-1][0][0])
        self.fusions = nn.ModuleList(
            Fusion(mine[0], mid_channels, theirs[0], theirs[1:], deepest=pair == len(maps) - 1)
            for pair, (mine, theirs) in enumerate(maps)
        )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        total, fused = 0.0, None
        for fusion, pair in zip(reversed(self.fusions), reversed(self.features(student, teacher)), strict=True):
            mine, theirs = (feature if feature.ndim == 4 else feature[:, :, None, None] for feature in pair)
            predicted, fused = fusion(mine, fused)
            total = total + hierarchical_context(predicted, theirs, self.levels)
        return ramp(batch.epoch, self.warmup_epochs) * total
