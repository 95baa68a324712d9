"""Random resized crops and random erasing: batched, each image with its own rectangle, in integers.

torchvision's functions take one rectangle per call and kornia's draw from a generator and compute in floating point, so
that a view would depend on the device and on the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd import keyed
from kd.keyed import Purpose
from kd.util.device import to_device

TRIES = 10


def draws(keys: Tensor, purpose: Purpose, number: int) -> Tensor:
    """Independent uniform float64 (B, number) in [0, 1), for this purpose alone."""
    keys = keyed.keys(keyed.keys(keys, torch.tensor(purpose))[:, None], torch.arange(number))
    return keyed.uniform(keys).double()


def boxes(
    uniform: Tensor, size: tuple[int, int], share: tuple[float, float], ratio: tuple[float, float], whole: bool
) -> tuple[Tensor, Tensor]:
    """Random rectangles: the first of ten tries, of an area and a shape drawn uniformly, that fits into the image.

    Args:
        uniform: float64 (B, 2 * TRIES + 2), the draws.
        size: (H, W) of the images.
        share, ratio: of the image's area, and width by height, from and to; the ratio's logarithm is drawn uniformly.
        whole: whether a side may be as long as the image's.

    Returns:
        int64 (B, 4), top, left, height and width; and bool (B,), whether a try has fitted.
    """
    height, width = size
    area = height * width * (share[0] + (share[1] - share[0]) * uniform[:, :TRIES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = torch.exp(low + (high - low) * uniform[:, TRIES : 2 * TRIES])
    sides = torch.stack([(area / shape).sqrt().round(), (area * shape).sqrt().round()], dim=2).long()
    limit = torch.tensor(size) - (0 if whole else 1)
    fits = ((sides > 0) & (sides <= limit)).all(2)
    first = fits.int().argmax(1)  # of equal values the first
    sides = sides[torch.arange(len(sides)), first]
    starts = (uniform[:, 2 * TRIES :] * (torch.tensor(size) - sides + 1)).long()
    return torch.cat([starts, sides], dim=1), fits.any(1)


def draw_crops(keys: Tensor, size: tuple[int, int], smallest: float) -> Tensor:
    """Rectangles int64 (B, 4) as torchvision's RandomResizedCrop draws them, of shapes from 3:4 to 4:3 and at least the
    share `smallest` of the image's area."""
    ratio = (3 / 4, 4 / 3)
    found, fits = boxes(draws(keys, Purpose.CROP, 2 * TRIES + 2), size, (smallest, 1.0), ratio, whole=True)
    height, width = size
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))  # the largest in the middle
    return torch.where(fits[:, None], found, torch.tensor([(height - h) // 2, (width - w) // 2, h, w]))


def resized_crop(images: Tensor, rectangles: Tensor) -> Tensor:
    """Each image's own rectangle enlarged bilinearly to the image's size; uint8 (B, C, H, W).

    Pixel centres are at halves and beyond the rectangle's edge its last pixel counts, as in `F.interpolate` and PIL; an
    enlargement needs no antialiasing. Weights are multiples of 1/2048.
    """
    top, left, height, width = to_device(rectangles, images.device).T
    rows = _between(images, 2, top, height)
    return ((_between(rows, 3, left, width) + (1 << 21)) >> 22).to(torch.uint8)


def _between(values: Tensor, dim: int, start: Tensor, length: Tensor) -> Tensor:
    """Values int32 interpolated along one axis, times 2048: `length` of them (B,) from `start` fill the axis."""
    count, size = len(values), values.shape[dim]
    pixel = torch.arange(size, device=values.device)
    place = (((2 * pixel + 1) * length[:, None] - size) << 11).div(2 * size, rounding_mode="floor").clamp(min=0)
    lower, weight = place >> 11, (place & 2047).int()
    upper = torch.minimum(lower + 1, length[:, None] - 1)
    shape = (count, 1, size, 1) if dim == 2 else (count, 1, 1, size)
    one, other = (
        values.gather(dim, (start[:, None] + at).view(shape).expand(values.shape)).int() for at in (lower, upper)
    )
    weight = weight.view(shape)
    return one * (2048 - weight) + other * weight


def draw_erased(keys: Tensor, size: tuple[int, int], probability: float) -> Tensor:
    """Rectangles int64 (B, 4) as torchvision's RandomErasing draws them, 2 to 33 % of the area; empty for the rest."""
    uniform = draws(keys, Purpose.ERASE, 2 * TRIES + 3)
    found, fits = boxes(uniform[:, 1:], size, (0.02, 0.33), (1 / 3.3, 1 / 0.3), whole=False)
    return found * (fits & (uniform[:, 0] < probability))[:, None]


def inside(rectangles: Tensor, size: tuple[int, int]) -> Tensor:
    """Which pixels are in each image's rectangle: bool (B, 1, H, W)."""
    top, left, height, width = (side[:, None] for side in rectangles.T)
    rows, columns = (torch.arange(side, device=rectangles.device) for side in size)
    rows = (rows >= top) & (rows < top + height)
    columns = (columns >= left) & (columns < left + width)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def erase(images: Tensor, rectangles: Tensor, colour: tuple[int, ...]) -> Tensor:
    """Each image with its rectangle in one colour (C numbers from 0 to 255)."""
    fill = torch.tensor(colour, dtype=torch.uint8).view(1, -1, 1, 1)
    where = inside(to_device(rectangles, images.device), images.shape[2:])
    return torch.where(where, to_device(fill, images.device), images)
