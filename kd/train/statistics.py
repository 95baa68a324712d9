"""Batch norm's running statistics, re-estimated on training images where training was too short for them to arrive.

A layer of momentum m keeps (1 - m)^n of its first statistics after n updates: 67 % for torchvision's MobileNetV3 (0.01)
after 40 steps. In eval mode such a network normalises with numbers that belong to none of its images. The mean over
batches under the final weights is what Izmailov et al. 2018 (section 3.2, https://arxiv.org/abs/1803.05407) do for
averaged weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from kd.data import Split
from kd.train.setup import BATCH_NORMS

ARRIVED = 0.01  # of the first statistics may be left
IMAGES, AT_ONCE = 512, 64


def learning_layers(network: nn.Module) -> list[str]:
    """Names of the batch norm layers whose statistics training moves: in train mode, with a fixed momentum."""
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, BATCH_NORMS)
        and layer.training
        and layer.track_running_stats
        and layer.momentum is not None
    ]


def left_over(network: nn.Module, names: Iterable[str], updates: int) -> float:
    """The largest part of its first statistics that one of these layers still has after so many updates, 0 to 1."""
    return max(((1 - network.get_submodule(name).momentum) ** updates for name in names), default=0.0)


def chosen(count: int) -> list[np.ndarray]:
    """Positions of the images to use, batch by batch: at most `IMAGES`, in full batches, at even distances through a
    split of `count`, which may be sorted by class; each batch is spread over the whole split."""
    size = min(AT_ONCE, count)
    batches = min(IMAGES, count) // size
    places = np.arange(batches * size) * count // (batches * size)
    return [places[first::batches] for first in range(batches)]


@torch.no_grad()
def reestimate(network: nn.Module, names: Iterable[str], train: Split, device: torch.device) -> None:
    """Set these layers' running mean and variance to the means over batches of training images without random views.

    A function of the weights and the images alone, so equal on every process and after every resume.
    """
    network.eval()
    layers = [network.get_submodule(name) for name in names]
    momenta = [layer.momentum for layer in layers]
    counts = [layer.num_batches_tracked.clone() for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
        layer.train()
    for where in chosen(len(train)):
        network.logits(train.read(where, device)[0])
    for layer, momentum, count in zip(layers, momenta, counts, strict=True):
        layer.momentum = momentum
        layer.num_batches_tracked.copy_(count)
        layer.eval()
