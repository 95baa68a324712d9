"""The two things that pass through the loop: a batch of images, and what a network said about it.

Shapes in this project: B batch, K classes, C channels, H and W height and width, N images of a split.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Batch:
    """This process's part of one global batch, or a micro-batch of it.

    images: uint8 (B, C, H, W), augmented but neither resized nor normalised: each network does that for itself.
    labels: int64 (B,), index into the class names; of mixed images float32 (B, K), the classes' shares, which
        torch's cross entropy takes as well.
    index: int64 (B,), the images' places in the training set, by which everything random is keyed.
    keys: int64 (B,), a key an image for what is random inside the network (dropout); None outside training.
    epoch: the epoch, counted from 0.
    counts: how many images of the global batch each process has, which may be 0; None where there is one process.
    whole: whether that is all of the global batch, and not one of its micro-batches.
    lookup: int64 (B, 2) on the CPU, each image's place and the number of its view; None where views have no numbers, or
        these images only stand in for an empty part.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    keys: Tensor | None = None
    epoch: int = 0
    counts: list[int] | None = None
    whole: bool = True
    lookup: Tensor | None = None


@dataclass
class Outputs:
    """What a network said about a batch: logits (B, K) and features by tap name."""

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
