"""What several losses on features are made of."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167) that takes a batch of one value.

    One value a channel, an image alone with a 1x1 map, has no deviation. It is normalized by the running statistics,
    which it leaves as they are; PyTorch refuses it.

    Of several processes each normalizes its own images, as the networks' batch norms do, and the first's running
    statistics are kept; `sync_batch_norm` makes all of them see the global batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def average_pool(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (B, C, H, W) averaged to (B, C, *size), each side no longer than before; bin i covers the places from
    floor(i * H / h) to ceil((i + 1) * H / h), as in PyTorch's adaptive pooling, whose gradient is not deterministic on
    a GPU."""
    if tuple(feature.shape[2:]) == tuple(size):
        return feature
    down, across = (bins(before, after, feature) for before, after in zip(feature.shape[2:], size, strict=True))
    return ((feature @ across).transpose(2, 3) @ down).transpose(2, 3)


def bins(before: int, after: int, like: Tensor) -> Tensor:
    """The matrix (before, after) whose column i averages the places of bin i."""
    place, index = torch.arange(before, device=like.device)[:, None], torch.arange(after, device=like.device)
    inside = (place >= index * before // after) & (place < ((index + 1) * before + after - 1) // after)
    return inside.to(like.dtype) / inside.sum(0)


def same_size(one: Tensor, other: Tensor, pool: Literal["average", "max"] = "average") -> tuple[Tensor, Tensor]:
    """Two maps (B, C, H, W), the larger pooled to the smaller height and width of both; a vector (B, D) is a map
    (B, D, 1, 1). C may differ."""
    one, other = (feature[..., None, None] if feature.dim() == 2 else feature for feature in (one, other))
    size = tuple(map(min, one.shape[2:], other.shape[2:]))
    reduce = average_pool if pool == "average" else max_pool
    return reduce(one, size), reduce(other, size)


def max_pool(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (B, C, H, W) of each bin's largest value (B, C, *size), in the bins of `average_pool`."""
    height, width = feature.shape[2:]
    if height % size[0] or width % size[1]:
        return F.adaptive_max_pool2d(feature, size)
    # The same numbers, but on a GPU the gradient of the adaptive one is not deterministic.
    return F.max_pool2d(feature, (height // size[0], width // size[1]))


def unit(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """x divided by its Euclidean norm along `dim`; where that is 0, x stays, and so its gradient is finite."""
    square = x.square().sum(dim, keepdim=True)
    return x / torch.where(square == 0, 1.0, square).sqrt()


def alike(student: tuple, teacher: tuple) -> bool:
    """Whether two features' shapes, without the batch axis, are both maps (C, H, W) or both vectors (D,)."""
    return len(student) == len(teacher) and len(student) in (1, 3)


def maps(*shapes: tuple) -> bool:
    """Whether these shapes, without the batch axis, are all of maps (C, H, W)."""
    return all(len(shape) == 3 for shape in shapes)


def large_maps(*shapes: tuple) -> bool:
    """Whether these shapes, without the batch axis, are all of maps (C, H, W) with more than one place."""
    return maps(*shapes) and all(shape[1:] != (1, 1) for shape in shapes)


def maps_or_vectors(*shapes: tuple) -> bool:
    """Whether these shapes, without the batch axis, are all of maps (C, H, W) or vectors (D,)."""
    return all(len(shape) in (1, 3) for shape in shapes)


def connector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """A 1x1 convolution and batch norm from the student's channels to the teacher's (Heo et al. 2019, AB and OFD)."""
    convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / teacher_channels))
    return nn.Sequential(convolution, BatchNorm(teacher_channels))
