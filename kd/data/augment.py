"""Random views of training images: batched, each image with its own draw, a function of its key only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd import keyed
from kd.device import to_device


def shifts(keys: Tensor, flip: bool, pad_crop: int) -> Tensor:
    """What flips and padded crops do to the images of these keys: int64 (B, 3), columns flipped (0 or 1), and where in
    the padded image the crop begins: down and right, 0 to 2 * pad_crop."""
    draws = keyed.uniform(keyed.keys(keys[:, None], torch.arange(3, device=keys.device)))
    flipped = (draws[:, :1] < 0.5).long() * flip
    return torch.cat([flipped, (draws[:, 1:] * (2 * pad_crop + 1)).long()], dim=1)


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
    drawn = to_device(shifts(keys, flip, pad_crop), images.device)
    rows = torch.arange(height, device=images.device).expand(count, -1)
    columns = torch.arange(width, device=images.device).expand(count, -1)
    if flip:
        columns = torch.where(drawn[:, :1] == 1, columns.flip(1), columns)
    if pad_crop:
        images = F.pad(images, (pad_crop,) * 4)
        rows, columns = rows + drawn[:, 1:2], columns + drawn[:, 2:]
    batch = torch.arange(count, device=images.device)
    # index (B, H, W) into (B, H, W, C), then channels back in front
    picked = images.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
