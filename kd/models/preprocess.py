"""From uint8 images to what a network takes: resize, centre crop, channels, normalise. Batched, on any device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.util.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_SIDE, MAX_NUMBER = 8192, 1e6  # pixels, and of mean and std: a file may hold any numbers


@dataclass(frozen=True)
class View:
    """What is done to an image before a network sees it; travels with the network in its `config.json`.

    Args:
        resize, crop: the shorter side in pixels after an antialiased bilinear resize, and the side of the centre crop;
            None for none.
        channels: 3 (grey is repeated) or 1 (colour becomes luminance, ITU-R 601).
        mean, std: a number per channel, on the scale 0..1.
        source_size: (H, W) of the training images before resizing: images of other sizes are brought to it first.

    Raises:
        UserError: a side is not from 1 to `MAX_SIDE`, or mean or std have not one finite number per channel.
    """

    resize: int | None = None
    crop: int | None = None
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    source_size: tuple[int, int] | None = None

    def __post_init__(self):
        for name in ("mean", "std", "source_size"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        for side in (self.resize, self.crop, *(self.source_size or ())):
            if side is not None and not (isinstance(side, int) and 1 <= side <= MAX_SIDE):
                raise UserError(f"images with a side of {side!r} pixels; it is a whole number from 1 to {MAX_SIDE}")
        if len(self.source_size or "HW") != 2:
            raise UserError(f"images of source_size {self.source_size!r}; it is height and width")
        numbers = (*self.mean, *self.std)
        if not (
            self.channels in (1, 3)
            and len(self.mean) == len(self.std) == self.channels
            and all(isinstance(number, int | float) and abs(number) < MAX_NUMBER for number in numbers)
            and min(self.std) > 0
        ):
            raise UserError(
                f"images of {self.channels!r} channels, mean {self.mean} and std {self.std}; there are 1 or 3, each "
                f"with a finite mean and a std above 0"
            )

    def to_dict(self) -> dict:
        """As plain JSON values; `View(**d)` reads it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


class Preprocess(nn.Module):
    """Applies a `View`: uint8 (B, C, H, W) to float32 (B, channels, H', W')."""

    def __init__(self, view: View):
        super().__init__()
        self.view = view
        shape = (1, view.channels, 1, 1)
        # Folded into one multiply and one add: x * scale + shift equals (x / 255 - mean) / std.
        mean, std = torch.tensor(view.mean).view(shape), torch.tensor(view.std).view(shape)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise TypeError(
                f"images are uint8 (B, C, H, W), 0 to 255, and these are {images.dtype}; floats on the scale 0 to 1 "
                f"become it with (255 * images).round().to(torch.uint8)"
            )
        if self.view.resize is not None:
            images = resize_shorter_side(images.float(), self.view.resize)
        if self.view.crop is not None:
            images = centre_crop(images, self.view.crop)
        if self.view.channels == 1 and images.shape[1] == 3:
            red, green, blue = images.split(1, dim=1)
            images = 0.299 * red + 0.587 * green + 0.114 * blue
        # A grey image broadcasts to three channels here. Not torch.addcmul: on a CPU it is not vectorised for this.
        return (images * self.scale).add_(self.shift)


def resize_shorter_side(images: Tensor, side: int) -> Tensor:
    """Antialiased bilinear resize of float images (B, C, H, W) so that the shorter of H and W is `side` pixels."""
    height, width = images.shape[-2:]
    if (short := min(height, width)) == side:
        return images
    size = [side * height // short, side * width // short]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def centre_crop(images: Tensor, side: int) -> Tensor:
    """The middle `side` x `side` pixels of (B, C, H, W); rounds as torchvision's CenterCrop does."""
    height, width = images.shape[-2:]
    if side > min(height, width):
        raise ValueError(f"crop {side} is larger than the image, {height}x{width}; set data.resize to {side} or more")
    top, left = round((height - side) / 2), round((width - side) / 2)
    return images[..., top : top + side, left : left + side]
