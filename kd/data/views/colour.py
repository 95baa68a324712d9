"""Colours of uint8 images changed, batched, each image by its own factor: in integers, as PIL does it.

Factors are multiples of 1/65536, so a result differs from PIL's, which rounds a floating-point number down, by one
level at most. A grey image has no saturation and no hue and stays as it is under them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd.data.views.crop import draws
from kd.keyed import Purpose
from kd.util.device import to_device

ONE = 1 << 16


def fixed(factors: Tensor, images: Tensor) -> Tensor:
    """Factors (B,) as int32 (B, 1, 1, 1) with 16 bits behind the point, on the images' device."""
    return to_device((factors.double() * ONE).round().int().view(-1, 1, 1, 1), images.device)


def blend(images: Tensor, other: Tensor | int, factors: Tensor) -> Tensor:
    """`other` + factor * (images - other), each image with its factor (B,), cut to 0 to 255."""
    factor = fixed(factors, images)
    mixed = images.int() * factor + other * (ONE - factor)
    return (mixed >> 16).clamp(0, 255).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """Luminance int32 (B, 1, H, W) of ITU-R 601, with PIL's weights."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Towards black (below 1), or away from it."""
    return blend(images, 0, factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Towards each image's mean luminance (below 1), or away from it."""
    pixels = images.shape[2] * images.shape[3]
    mean = (2 * grey(images).long().sum((1, 2, 3)) + pixels) // (2 * pixels)
    return blend(images, mean.int().view(-1, 1, 1, 1), factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Towards grey (below 1), or away from it."""
    return images if images.shape[1] == 1 else blend(images, grey(images), factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Towards a smoothed image (below 1), or away from it; the outermost pixels stay."""
    height, width = images.shape[2:]
    if min(height, width) < 3:
        return images
    pixels = images.int()
    parts = [pixels[:, :, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1] = (2 * (sum(parts) + 4 * parts[4]) + 13).div(26, rounding_mode="floor")
    return blend(images, smooth, factors)


def hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Hues turned by shifts (B,) of -0.5 to 0.5 of the circle; saturation and value (of HSV) stay."""
    if images.shape[1] == 1:
        return images
    pixels = images.int()
    red, green, blue = pixels.unbind(1)
    high, low = pixels.amax(1), pixels.amin(1)
    range_ = high - low
    by = range_.clamp(min=1)
    angle = torch.where(
        high == red,
        ((green - blue) << 16).div(by, rounding_mode="floor"),
        torch.where(
            high == green,
            (2 << 16) + ((blue - red) << 16).div(by, rounding_mode="floor"),
            (4 << 16) + ((red - green) << 16).div(by, rounding_mode="floor"),
        ),
    )
    angle = (angle + 6 * fixed(shifts, images)[:, 0]).remainder(6 << 16)
    sector, part = angle >> 16, angle & (ONE - 1)
    rise = (range_ * part + (ONE >> 1)) >> 16
    up, down = low + rise, high - rise
    # which of (high, up, low, down) red, green and blue are in each of the six sectors
    levels = torch.stack([high, up, low, down], dim=1)
    table = to_device(torch.tensor([[0, 3, 2, 2, 1, 0], [1, 0, 0, 3, 2, 2], [2, 2, 1, 0, 0, 3]]), images.device)
    return levels.gather(1, table[:, sector.long()].transpose(0, 1)).to(torch.uint8)


OPERATIONS = (brightness, contrast, saturation, hue)


def draw_jitter(keys: Tensor, strengths: list[float]) -> tuple[Tensor, Tensor]:
    """Factors of brightness, contrast and saturation and the shift of hue, float64 (B, 4), and their order (B, 4).

    As torchvision's ColorJitter draws them: a factor uniform in 1 - strength to 1 + strength, not below 0; a shift in
    -strength to strength; an order uniform over all.
    """
    uniform = draws(keys, Purpose.JITTER, 8)
    strength = torch.tensor(strengths, dtype=torch.double)
    middle = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.double)
    low = torch.where(middle == 1, (middle - strength).clamp(min=0), -strength)
    return low + (middle + strength - low) * uniform[:, :4], uniform[:, 4:].argsort(dim=1)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Apply brightness, contrast, saturation and hue to each image by its factors and in its own order."""
    for step in range(4):
        images = by_group(images, order[:, step], OPERATIONS, factors)
    return images


def by_group(images: Tensor, which: Tensor, operations, factors: Tensor) -> Tensor:
    """Each image under the operation that `which` (B,) names, by its number, with its factor of it: (B, operations)."""
    result = images.clone()
    for number, operation in enumerate(operations):
        some = (which == number).nonzero()[:, 0]
        if len(some):
            there = to_device(some, images.device)
            result[there] = operation(images[there], factors[some, number])
    return result
