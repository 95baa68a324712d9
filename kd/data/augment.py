"""Random views of training images: batched, each image with its own draw, a function of its key only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd import keyed


def augment(images: Tensor, keys: Tensor, flip: bool, pad_crop: int) -> Tensor:
    """Flip half of the images left-right; crop each at a random place from its zero-padded self.

    Args:
        images: uint8 (B, C, H, W).
        keys: int64 (B,); equal keys give equal draws.
        flip: whether to flip, with probability 1/2.
        pad_crop: zero pixels added on each side before a crop of the original size; 0 does nothing.

    Returns:
        uint8 (B, C, H, W).
    """
    if not flip and not pad_crop:
        return images
    count, _, height, width = images.shape
    draws = keyed.uniform(keyed.keys(keys[:, None], torch.arange(3, device=keys.device)))  # (B, 3)
    rows = torch.arange(height, device=images.device).expand(count, -1)
    columns = torch.arange(width, device=images.device).expand(count, -1)
    if flip:
        columns = torch.where(draws[:, :1] < 0.5, columns.flip(1), columns)
    if pad_crop:
        images = F.pad(images, (pad_crop,) * 4)
        shift = (draws[:, 1:] * (2 * pad_crop + 1)).long()
        rows, columns = rows + shift[:, :1], columns + shift[:, 1:]
    batch = torch.arange(count, device=images.device)
    # index (B, H, W) into (B, H, W, C), then channels back in front
    picked = images.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
