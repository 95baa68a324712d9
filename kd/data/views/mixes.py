"""Mixed images: mixup (Zhang et al. 2017, https://arxiv.org/abs/1710.09412) and CutMix (Yun et al. 2019,
https://arxiv.org/abs/1905.04899).

The papers mix an image with another of its batch. Here the other one is any training image, a function of the image's
key, so that a mixed image does not depend on the batch or on the number of processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd import keyed
from kd.data.views.crop import draws, inside
from kd.util.device import to_device


def partners(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each image the position of the other one below `count`, int64 (B,), and the key of the other one's view."""
    keys = keyed.keys(keys, torch.tensor(keyed.Purpose.PARTNER))
    return keyed.integers(keys, count), keyed.keys(keys, torch.tensor(keyed.Purpose.PARTNER))


def draw_mixes(keys: Tensor, size: tuple[int, int], mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """The own share of each mixed image, float64 (B,), and the rectangle int64 (B, 4) that the other one fills.

    The share is drawn from Beta(alpha, alpha), `mixup` and `cutmix` are the alphas, 0 for none. An image under mixup
    has an empty rectangle; one under CutMix has the share that the rectangle leaves. Where both are set, each has half
    of the images.
    """
    uniform = draws(keys, keyed.Purpose.MIX, 4)
    cut = uniform[:, 0] < (0.5 if mixup and cutmix else 1.0 if cutmix else 0.0)
    share = torch.where(cut, _beta(uniform[:, 1], cutmix or 1.0), _beta(uniform[:, 1], mixup or 1.0))
    limit = torch.tensor(size)
    sides = ((1 - share).sqrt()[:, None] * limit).long()
    starts = (uniform[:, 2:] * limit).long() - sides // 2
    ends = (starts + sides).clamp(max=limit)
    starts = starts.clamp(min=0)
    rectangles = torch.cat([starts, ends - starts], dim=1) * cut[:, None]
    left = 1 - rectangles[:, 2:].prod(1) / (size[0] * size[1])
    return torch.where(cut, left.double(), share), rectangles


def _beta(uniform: Tensor, alpha: float) -> Tensor:
    """Quantiles of Beta(alpha, alpha)."""
    if alpha == 1:
        return uniform
    from scipy.special import betaincinv  # takes time, and few need it

    return torch.from_numpy(betaincinv(alpha, alpha, uniform.numpy()))


def mix(images: Tensor, others: Tensor, shares: Tensor, rectangles: Tensor) -> Tensor:
    """Images and others uint8 (B, C, H, W), mixed by shares where the rectangle is empty, else put together."""
    share = to_device((shares * 65536).round().int().view(-1, 1, 1, 1), images.device)
    blended = ((images.int() * share + others.int() * (65536 - share) + 32768) >> 16).to(torch.uint8)
    cut = to_device((rectangles[:, 2] > 0).view(-1, 1, 1, 1), images.device)
    where = inside(to_device(rectangles, images.device), images.shape[2:])
    return torch.where(cut, torch.where(where, others, images), blended)


def mixed_labels(labels: Tensor, others: Tensor, shares: Tensor, num_classes: int) -> Tensor:
    """The shares of the classes in each mixed image, float32 (B, K)."""
    one, other = (F.one_hot(part, num_classes).double() for part in (labels, others))
    shares = to_device(shares[:, None], labels.device)
    return (shares * one + (1 - shares) * other).float()
