"""Bare networks as what the distiller takes: a learner, and teachers."""

from __future__ import annotations

from torch import nn

from kd.outputs import Batch
from kd.students import Plain


def alone(network: nn.Module) -> Plain:
    """The learner of one network, which may be any with `tap` and `outputs(inputs, keys)`."""
    learner = Plain()
    learner.setup(network, None)
    return learner


class AsTeachers(nn.Module):
    """A network as the only teacher."""

    names = ("teacher",)

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def tap(self, name, taps) -> None:
        self.network.tap(taps)

    def forward(self, batch: Batch) -> dict:
        return {"teacher": self.network.outputs(batch.inputs)}
