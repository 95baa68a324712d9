"""RandAugment. Cubuk, Zoph, Shlens, Le. 2019. https://arxiv.org/abs/1909.13719

As timm has it, by timm's string (https://github.com/huggingface/pytorch-image-models, timm/data/auto_augment.py): n
operations per image, each drawn uniformly out of 15 and applied to half of the images, all of strength m out of 10.

Differs from timm: what moves in from outside is black and pixels are the nearest ones, as under TrivialAugment here,
where timm fills with the mean colour and interpolates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kd import keyed
from kd.data.views import trivial
from kd.data.views.colour import brightness, contrast, saturation, sharpness
from kd.data.views.crop import draws
from kd.keyed import Purpose

STRONGEST = 10
_PART = re.compile(r"m(?:\d|10)|n[1-9]|mstd\d+(?:\.\d+)?|inc[01]", re.ASCII)


def invert(images: Tensor, _amounts: Tensor) -> Tensor:
    """The negative."""
    return 255 - images


def solarize_add(images: Tensor, amounts: Tensor) -> Tensor:
    """Values below 128 made brighter by whole levels (B,)."""
    values = torch.arange(256)
    tables = torch.where(values < 128, (values + amounts.long()[:, None]).clamp(max=255), values)
    return trivial.look_up(images, tables[:, None].to(images.device))


OPERATIONS = (
    trivial.autocontrast,
    trivial.equalize,
    invert,
    trivial.rotate,
    trivial.posterize,
    trivial.solarize,
    solarize_add,
    saturation,
    contrast,
    brightness,
    sharpness,
    trivial.shear_x,
    trivial.shear_y,
    trivial.translate_x,
    trivial.translate_y,
)


@dataclass(frozen=True)
class RandAugment:
    """The parts of timm's string, by its names.

    m: strength, 0 to 10.
    n: operations per image.
    mstd: standard deviation of the strength, which is drawn for each operation; above 100 it is uniform in 0 to m.
    inc: 1 for ranges in which every operation grows with strength; 0 for those of the first implementation, in which
        colours do nothing at about 5 and posterize and solarize are strongest at 0.
    """

    m: int = 10
    n: int = 2
    mstd: float = 0.0
    inc: int = 0

    @classmethod
    def of(cls, text: str) -> RandAugment:
        """Read a string such as `rand-m9-mstd0.5-inc1`.

        Raises:
            ValueError: it has another form.
        """
        first, *parts = text.split("-")
        unknown = [part for part in parts if not _PART.fullmatch(part)]
        values = {(name := part.rstrip("0123456789.")): part.removeprefix(name) for part in parts}
        if first != "rand" or unknown or len(values) < len(parts):
            raise ValueError(
                f"data.rand_augment {text!r}{f': {unknown[0]!r} is unknown; it' if unknown else ''} must be rand and "
                f"then, each once, m0 to m10, n1 to n9, mstd with a number, inc0 or inc1, such as rand-m9-mstd0.5-inc1"
            )
        return cls(**{name: float(value) if name == "mstd" else int(value) for name, value in values.items()})

    def draw(self, keys: Tensor, size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each of the n operations in turn: its number (B,) for each key, -1 for none, and what each operation
        would get, float64 (B, 15).

        Args:
            size: (H, W) of the images.
        """
        keys = keyed.keys(keys, torch.tensor(Purpose.RAND_AUGMENT))
        for number in range(self.n):
            own = keyed.keys(keys, torch.tensor(number))
            uniform = draws(own, Purpose.RAND_AUGMENT, 4)
            which = (uniform[:, 0] * len(OPERATIONS)).long()
            sign = torch.where(uniform[:, 2] < 0.5, -1.0, 1.0)
            strength = self.m * uniform[:, 3] if self.mstd > 100 else self.m + self.mstd * keyed.normal(own)
            share = strength.clamp(0, STRONGEST) / STRONGEST
            yield torch.where(uniform[:, 1] < 0.5, which, -1), self._amounts(share, sign, size)

    def _amounts(self, share: Tensor, sign: Tensor, size: tuple[int, int]) -> Tensor:
        """What the operations get at a share (B,) of the largest strength and a sign (B,), float64 (B, 15)."""
        bits, threshold, factor = (4 * share).floor(), (256 * share).floor(), 0.1 + 1.8 * share
        if self.inc:
            bits, threshold, factor = 4 - bits, 256 - threshold, (1 + 0.9 * share * sign).clamp(min=0.1)
        none, shear = torch.zeros_like(share), 0.3 * share * sign
        moved = [0.45 * share * sign * side for side in (size[1], size[0])]
        solarized = [threshold, (110 * share).floor()]
        return torch.stack(
            [none, none, none, 30 * share * sign, bits, *solarized, *[factor] * 4, shear, shear, *moved], dim=1
        )
