"""Which random views training images have, how many there are, and which of them an image shows at an epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from kd import keyed
from kd.data.augment import augment, shifts

VIEW = 1  # what a key is for; see kd.data


@dataclass(frozen=True)
class Views:
    """The random views of `kd.config.DataConfig`, by its names.

    Everything drawn is a function of an image's key, drawn on the CPU, and the pixels are computed in integers: a view
    is the same on every device, in any batch and at any number of processes.
    """

    flip: bool = False
    pad_crop: int = 0

    @classmethod
    def of(cls, config) -> Views:
        """The views of a `kd.config.DataConfig`."""
        return cls(config.flip, config.pad_crop)

    @property
    def plain(self) -> bool:
        """Whether each image is shown as it is stored."""
        return self == Views()

    @property
    def count(self) -> int | None:
        """How many views an image has; None where there are too many to count."""
        return (2 if self.flip else 1) * (2 * self.pad_crop + 1) ** 2

    def identity(self) -> list:
        """Changes when the views do."""
        return list(asdict(self).values())

    def expected_new(self, passes: float) -> float:
        """How many different views of an image so many passes are expected to show; `count` is not None."""
        return self.count * (1 - (1 - 1 / self.count) ** passes)

    def draw(self, seed: int, epoch: int, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The keys int64 (B,) of the images' views at an epoch, and the views' numbers below `count`, int64 (B,).

        Args:
            index: int64 (B,), the images' places, on the CPU.
        """
        keys = keyed.keys(keyed.key(seed, VIEW, epoch), index)
        flipped, down, right = shifts(keys, self.flip, self.pad_crop).T
        side = 2 * self.pad_crop + 1
        return keys, (flipped * side + down) * side + right

    def apply(self, images: Tensor, keys: Tensor) -> Tensor:
        """The views of images, uint8 (B, C, H, W), that their keys draw."""
        return augment(images, keys, self.flip, self.pad_crop)

    def words(self) -> str:
        """The views, said in words."""
        parts = ["flipped left-right"] if self.flip else []
        parts += [f"cropped after padding by {self.pad_crop}"] if self.pad_crop else []
        return ", ".join(parts) or "as stored"
