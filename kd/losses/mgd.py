"""Masked Generative Distillation. Yang, Li, Shao, Shi, Yuan, Yuan. 2022. https://arxiv.org/abs/2205.01529

Random places of the student's feature map are set to 0, and a small block must generate the teacher's whole map from
the rest (section 3). The mask is a function of each image's key, so it does not depend on the device, on the number of
processes or on a restart.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from kd import keyed
from kd.losses.base import FeatureLoss, Setting
from kd.losses.parts import maps, same_size
from kd.outputs import Batch, Outputs


def kept(keys: Tensor, count: int, mask_ratio: float) -> Tensor:
    """Which of `count` places each image keeps, bool (B, count), by its key (B,); the others are about mask_ratio."""
    return keyed.uniform(keyed.keys(keys[:, None], torch.arange(count, device=keys.device))) >= mask_ratio


def generation_error(generated: Tensor, teacher: Tensor) -> Tensor:
    """The squared error of maps (B, C, H, W), summed over an image's map, the mean over images."""
    return (generated - teacher).square().flatten(1).sum(1).mean()


class MGD(FeatureLoss):
    """Squared error of the teacher's map generated from the student's map, of which random places are masked.

    The paper masks positions; the authors' code for classification masks whole channels, with mask_ratio 0.15, and its
    author writes that positions are what the paper's study of the ratio has and channels are a bit better
    (https://github.com/yzd-v/MGD/issues/17). Both are here; by default the paper's.

    Differs from the paper: maps of unequal height and width are averaged to the smaller; the paper's are equal.

    Args:
        student_tap, teacher_tap: dotted module names of maps (C, H, W), in the paper of the last stage.
        mask: what is masked, pixels (positions, in all channels) or channels.
        mask_ratio: chance of a place to be masked, in [0, 1).
        weight: factor of this term in the objective, the paper's alpha for ImageNet; the error is a sum over the
            teacher's map, so that what suits depends on its size (512x7x7 in the paper).
    """

    def __init__(
        self,
        *taps,
        mask: Literal["pixels", "channels"] = "pixels",
        mask_ratio: float = 0.5,
        weight: float = 7e-5,
        **kwargs,
    ):
        super().__init__(*taps, weight=weight, **kwargs)
        self.require(mask in ("pixels", "channels"), f"mask {mask!r} must be pixels or channels")
        self.require(0 <= mask_ratio < 1, f"mask_ratio {mask_ratio} must be in [0, 1)")
        self.mask, self.mask_ratio = mask, mask_ratio
        self._purpose = keyed.key(*b"MGD", *self.student_tap.encode())  # so that two taps draw two masks

    def setup(self, setting: Setting) -> None:
        student, teacher = self.shapes(setting, maps, "tap maps (CxHxW)")
        channels = teacher[0]
        self.align = nn.Identity() if student[0] == channels else nn.Conv2d(student[0], channels, 1)
        first, last = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.generate = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = same_size(*self.features(student, teacher))
        aligned = self.align(mine)
        size, channels, *positions = aligned.shape
        keys = keyed.keys(batch.keys, torch.full_like(batch.keys, self._purpose))
        shape = (size, 1, *positions) if self.mask == "pixels" else (size, channels, 1, 1)
        mask = kept(keys, shape[1] * shape[2] * shape[3], self.mask_ratio).view(shape)
        return generation_error(self.generate(aligned * mask), theirs)
