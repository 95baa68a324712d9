"""TrivialAugment. Mueller, Hutter. 2021. https://arxiv.org/abs/2103.10158

One of 14 operations per image, drawn uniformly, at one of 31 strengths, drawn uniformly: the wide space of the paper
(table 6), with the ranges and signs of torchvision's TrivialAugmentWide. Computed as PIL does, in integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kd.data.views.colour import brightness, by_group, contrast, saturation, sharpness
from kd.data.views.crop import draws
from kd.keyed import Purpose
from kd.util.device import to_device

BINS = 31


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """The pixel at (a x + b y + c, d x + e y + f) of each image at (x, y), the nearest one; black outside.

    Args:
        matrices: float64 (B, 6), a to f, for pixel centres at halves; used as multiples of 1/65536.
    """
    count, channels, height, width = images.shape
    a, b, c, d, e, f = matrices.T
    steps = torch.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2], dim=1)
    a, b, c, d, e, f = to_device((steps * 65536 + 0.5).floor().long(), images.device).T[:, :, None, None]
    x, y = torch.arange(width, device=images.device), torch.arange(height, device=images.device)[:, None]
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16  # (B, H, W)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    places = torch.where(inside, row * width + column, 0).view(count, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, places).view_as(images) * inside[:, None]


def _affine(matrix: Callable[[Tensor], tuple]) -> Callable[[Tensor, Tensor], Tensor]:
    """The operation of images and amounts (B,) whose numbers a to f are a function of the amounts."""

    def operation(images: Tensor, amounts: Tensor) -> Tensor:
        numbers = (torch.as_tensor(number, dtype=torch.double).expand(len(amounts)) for number in matrix(amounts))
        return affine(images, torch.stack(list(numbers), dim=1))

    return operation


shear_x = _affine(lambda amounts: (1, amounts, 0, 0, 1, 0))  # rows to the left, by so much of their distance from above
shear_y = _affine(lambda amounts: (1, 0, 0, amounts, 1, 0))
translate_x = _affine(lambda amounts: (1, 0, -amounts.trunc(), 0, 1, 0))  # to the right by whole pixels
translate_y = _affine(lambda amounts: (1, 0, 0, 0, 1, -amounts.trunc()))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turned round the middle, counterclockwise."""
    angle = -degrees.double() * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    x, y = images.shape[3] / 2, images.shape[2] / 2
    matrix = cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y
    return affine(images, torch.stack(matrix, dim=1))


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Each value replaced by its image's and channel's table, (B, C or 1, 256)."""
    tables = tables.clamp(0, 255).to(torch.uint8).expand(-1, images.shape[1], -1)
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The upper `bits` (B,) bits of each value."""
    mask = (256 - (1 << (8 - bits.long()))).to(torch.uint8)
    return images & to_device(mask.view(-1, 1, 1, 1), images.device)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Values from the threshold (B,) on turned into their negative."""
    limit = to_device(thresholds.ceil().int().view(-1, 1, 1, 1), images.device)
    return torch.where(images < limit, images, 255 - images)


def autocontrast(images: Tensor, _amounts: Tensor) -> Tensor:
    """Each channel stretched to 0 to 255."""
    flat = images.flatten(2).long()
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    values = torch.arange(256, device=images.device)
    stretched = ((values - low) * 255).div((high - low).clamp(min=1), rounding_mode="floor")
    return look_up(images, torch.where(high > low, stretched, values))


def equalize(images: Tensor, _amounts: Tensor) -> Tensor:
    """Each channel's histogram made flat."""
    count, channels = images.shape[:2]
    flat = images.flatten(2).long()
    offset = 256 * torch.arange(count * channels, device=images.device).view(count, channels, 1)
    places = (flat + offset).flatten()
    counts = torch.zeros(count * channels * 256, dtype=torch.long, device=images.device)  # bincount waits for a GPU
    histogram = counts.scatter_add_(0, places, torch.ones_like(places)).view(count, channels, 256)
    last = histogram.gather(2, flat.amax(2, keepdim=True))
    step = (histogram.sum(2, keepdim=True) - last).div(255, rounding_mode="floor")
    before = histogram.cumsum(2) - histogram
    table = (step.div(2, rounding_mode="floor") + before).div(step.clamp(min=1), rounding_mode="floor")
    return look_up(images, torch.where(step > 0, table, torch.arange(256, device=images.device)))


_STRENGTH = torch.arange(BINS, dtype=torch.double) / (BINS - 1)
# operation, its strengths, whether the sign is drawn, what they are added to
_SPACE = (
    (lambda images, _amounts: images, 0 * _STRENGTH, False, 0),
    (shear_x, 0.99 * _STRENGTH, True, 0),
    (shear_y, 0.99 * _STRENGTH, True, 0),
    (translate_x, 32 * _STRENGTH, True, 0),
    (translate_y, 32 * _STRENGTH, True, 0),
    (rotate, 135 * _STRENGTH, True, 0),
    (brightness, 0.99 * _STRENGTH, True, 1),
    (saturation, 0.99 * _STRENGTH, True, 1),
    (contrast, 0.99 * _STRENGTH, True, 1),
    (sharpness, 0.99 * _STRENGTH, True, 1),
    (posterize, 8 - (6 * _STRENGTH).round(), False, 0),
    (solarize, 255 - 255 * _STRENGTH, False, 0),
    (autocontrast, 0 * _STRENGTH, False, 0),
    (equalize, 0 * _STRENGTH, False, 0),
)
OPERATIONS = tuple(operation for operation, *_ in _SPACE)


def draw_trivial(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The operation's number (B,) for each key, and what each operation would get, float64 (B, 14)."""
    uniform = draws(keys, Purpose.TRIVIAL, 3)
    which, bins = (uniform[:, 0] * len(_SPACE)).long(), (uniform[:, 1] * BINS).long()
    sign = torch.where(uniform[:, 2] < 0.5, -1.0, 1.0)
    columns = [base + strengths[bins] * (sign if signed else 1.0) for _operation, strengths, signed, base in _SPACE]
    return which, torch.stack(columns, dim=1)


def trivial_augment(images: Tensor, which: Tensor, amounts: Tensor) -> Tensor:
    """Each image under its operation; uint8 (B, C, H, W)."""
    return by_group(images, which, OPERATIONS, amounts)
