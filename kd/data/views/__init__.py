"""Which random views training images have, how many there are, and which of them an image shows at an epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from kd import keyed
from kd.data.views.augment import augment, shifts
from kd.data.views.colour import by_group, color_jitter, draw_jitter
from kd.data.views.crop import draw_crops, draw_erased, erase, resized_crop
from kd.data.views.mixes import draw_mixes, mix
from kd.data.views.rand import OPERATIONS, RandAugment
from kd.data.views.trivial import draw_trivial, trivial_augment
from kd.keyed import Purpose


@dataclass(frozen=True)
class Views:
    """The random views of `kd.run.config.DataConfig`, by its names.

    Everything drawn is a function of an image's key, drawn on the CPU, and pixels are computed in integers: a view is
    the same on every device, in any batch and at any number of processes.
    """

    flip: bool = False
    pad_crop: int = 0
    random_resized_crop: float = 0.0
    color_jitter: tuple[float, ...] = ()
    trivial_augment: bool = False
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    rand_augment: str | None = None
    views_per_image: int = 0
    colour: tuple[float, ...] = ()  # of what is erased, 0 to 1
    split_seed: int = 0  # of the views, where an image has a number of them

    @classmethod
    def of(cls, config) -> Views:
        """The views of a `kd.run.config.DataConfig`."""
        values = {field.name: getattr(config, field.name, None) for field in fields(cls)}
        values.update(
            color_jitter=tuple(config.color_jitter),
            colour=tuple(config.mean) if config.random_erasing else (),
            split_seed=config.split_seed if config.views_per_image else 0,
        )
        return cls(**values)

    @property
    def plain(self) -> bool:
        """Whether each image is shown as it is stored."""
        return self == Views()

    @property
    def mixes(self) -> bool:
        """Whether an image is mixed with another."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def count(self) -> int | None:
        """How many views an image has; None where there are too many to count."""
        if self.views_per_image:
            return self.views_per_image
        if self != Views(self.flip, self.pad_crop):
            return None
        return (2 if self.flip else 1) * (2 * self.pad_crop + 1) ** 2

    def identity(self) -> list:
        """Changes when the views do."""
        return [value for value in asdict(self).values() if value is not None]

    def expected_new(self, passes: float) -> float:
        """How many different views of an image so many passes are expected to show; `count` is not None."""
        if self.views_per_image:
            return min(passes, self.views_per_image)
        return self.count * (1 - (1 - 1 / self.count) ** passes)

    def draw(self, seed: int, epoch: int, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The keys int64 (B,) of the images' views at an epoch, and the views' numbers below `count`, int64 (B,).

        With `views_per_image` an image shows its views one after another; which is first depends on the seed, what they
        are does not, so that runs of several seeds share tables.

        Args:
            index: int64 (B,), the images' places, on the CPU.
        """
        if self.plain:
            return index, torch.zeros_like(index)  # the only view: nothing is drawn
        if self.views_per_image:
            first = keyed.integers(keyed.keys(keyed.key(seed, Purpose.NUMBER), index), self.views_per_image)
            numbers = (first + epoch) % self.views_per_image
            base = keyed.key(self.split_seed, Purpose.NUMBER, Purpose.NUMBER)
            return keyed.keys(keyed.keys(base, numbers), index), numbers
        keys = keyed.keys(keyed.key(seed, Purpose.VIEW, epoch), index)
        if self.count is None:
            return keys, None
        flipped, down, right = shifts(keys, self.flip, self.pad_crop).T
        side = 2 * self.pad_crop + 1
        return keys, (flipped * side + down) * side + right

    def apply(self, images: Tensor, keys: Tensor) -> Tensor:
        """The views of images, uint8 (B, C, H, W), that their keys (on the CPU) draw; not mixed yet."""
        size = images.shape[2:]
        if self.random_resized_crop:
            images = resized_crop(images, draw_crops(keys, tuple(size), self.random_resized_crop))
        images = augment(images, keys, self.flip, self.pad_crop)
        if self.color_jitter:
            images = color_jitter(images, *draw_jitter(keys, self.color_jitter))
        if self.trivial_augment:
            images = trivial_augment(images, *draw_trivial(keys))
        if self.rand_augment:
            for which, amounts in RandAugment.of(self.rand_augment).draw(keys, tuple(size)):
                images = by_group(images, which, OPERATIONS, amounts)
        if self.random_erasing:
            images = erase(images, draw_erased(keys, tuple(size), self.random_erasing), self._fill(images.shape[1]))
        return images

    def mix(self, images: Tensor, others: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed views uint8 (B, C, H, W), and the images' own shares in them, float64 (B,)."""
        shares, rectangles = draw_mixes(keys, tuple(images.shape[2:]), self.mixup, self.cutmix)
        return mix(images, others, shares, rectangles), shares

    def _fill(self, channels: int) -> tuple[int, ...]:
        """The mean colour in as many channels as are stored."""
        levels = [round(255 * value) for value in self.colour]
        return tuple(levels) if len(levels) == channels else (round(sum(levels) / len(levels)),) * channels

    def words(self) -> str:
        """The views in words."""
        jitter = "/".join(f"{value:g}" for value in self.color_jitter)
        parts = (
            (self.random_resized_crop, f"random crops of {self.random_resized_crop:.0%} to 100 % of the area, resized"),
            (self.flip, "flips left-right"),
            (self.pad_crop, f"crops after padding by {self.pad_crop}"),
            (self.color_jitter, f"colour jitter {jitter}"),
            (self.trivial_augment, "TrivialAugment"),
            (self.rand_augment, f"RandAugment ({self.rand_augment})"),
            (self.random_erasing, f"a rectangle erased in {self.random_erasing:.0%} of the images"),
            (self.mixup, f"mixup (alpha {self.mixup:g})"),
            (self.cutmix, f"CutMix (alpha {self.cutmix:g})"),
        )
        words = ", ".join(text for drawn, text in parts if drawn) or "as stored"
        return f"{words}; {self.views_per_image} of them per image, in turn" if self.views_per_image else words
