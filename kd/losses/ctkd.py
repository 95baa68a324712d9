"""Curriculum Temperature for Knowledge Distillation. Li et al. 2022. https://arxiv.org/abs/2211.16231

KL between softened probabilities whose temperature is learned, one for all images (the paper's global version), against
the student: its gradient is reversed, so that it makes the loss larger. The reversed gradient is multiplied by a
strength that rises from 0 to 1 by a cosine over the first epochs, from easy to hard.
"""

import math

import torch
from torch import Tensor, nn

from kd.losses.base import LogitLoss, Setting, ramp
from kd.losses.kl import kl_divergence
from kd.outputs import Batch, Outputs


def reverse_gradient(value: Tensor, strength: float) -> Tensor:
    """`value` itself, whose gradient is multiplied by -strength on its way back (Ganin and Lempitsky 2015)."""
    return value.detach() + strength * (value.detach() - value)


def curriculum(epoch: int, warmup_epochs: int) -> float:
    """The reversal's strength: (1 - cos(pi * r)) / 2, where r rises linearly to 1 over the first epochs."""
    return (1 - math.cos(math.pi * ramp(epoch, warmup_epochs))) / 2


class CTKD(LogitLoss):
    """KL at a temperature that is learned to make the student's task harder (Li et al. 2022).

    The temperature is T = min_temperature + temperature_range * sigmoid(raw_temperature). What is learned,
    raw_temperature, starts at 1 as in the authors' code (T 15.6 with the defaults), and the optimizer treats it as any
    weight, weight decay included, as theirs does. The loss's factor T^2 has a part in its gradient.

    Args:
        min_temperature: the lowest T, above 0.
        temperature_range: T stays below min_temperature + temperature_range.
        warmup_epochs: over so many first epochs the strength of the reversed gradient rises to 1.
        weight: factor of this term in the objective; the authors have 0.9, beside a cross entropy of weight 0.1.
    """

    def __init__(
        self,
        min_temperature: float = 1.0,
        temperature_range: float = 20.0,
        warmup_epochs: int = 10,
        weight: float = 0.9,
        **kwargs,
    ):
        super().__init__(weight=weight, **kwargs)
        self.keep_positive(min_temperature=min_temperature, temperature_range=temperature_range)
        self.keep_nonnegative(warmup_epochs=warmup_epochs)

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        self.raw_temperature = nn.Parameter(torch.ones(()))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        raw = reverse_gradient(self.raw_temperature, curriculum(batch.epoch, self.warmup_epochs))
        temperature = self.min_temperature + self.temperature_range * raw.sigmoid()
        return kl_divergence(*self.logits(student, teacher), temperature)
