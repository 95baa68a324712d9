"""Features: what any module inside a network gives, by the module's dotted name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kd.util.errors import unknown


class Taps:
    """The outputs of some of a network's modules during its latest forward pass.

    A tap is a forward hook that keeps a copy: a later in-place operation (`nn.ReLU(inplace=True)`, the `+=` of
    torchvision's ResNets) changes the module's own output, not the copy, so a tap has the value the module computed.
    """

    def __init__(self, network: nn.Module):
        self._network = network
        self._values: dict[str, Tensor] = {}
        self._names: set[str] = set()

    def add(self, names: Iterable[str], network_name: str) -> None:
        """Tap these modules; those tapped already stay so.

        Raises:
            UserError: there is no such module.
        """
        modules = dict(self._network.named_modules())
        for name in names:
            if name not in modules or name == "":
                raise unknown(f"tap of {network_name}", name, [known for known in modules if known])
            if name not in self._names:
                self._names.add(name)
                modules[name].register_forward_hook(self._keeper(name))

    def _keeper(self, name: str):
        def keep(_module, _inputs, output):
            if not isinstance(output, Tensor):
                raise TypeError(f"tap {name!r} gives a {type(output).__name__}, not a tensor")
            self._values[name] = output.clone()

        return keep

    def clear(self) -> None:
        """Forget what was kept."""
        self._values.clear()

    def take(self) -> dict[str, Tensor]:
        """What the latest forward pass gave, by name; forgotten here."""
        values = dict(self._values)
        self._values.clear()
        return values


@torch.no_grad()
def tap_shapes(network: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every module's output for one image (C, H, W), without the batch axis, in the order of the calls."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in network.named_modules():

        def note(_module, _inputs, output, name=name):
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])

        if name:
            handles.append(module.register_forward_hook(note))
    training = network.training
    network.eval()(torch.zeros(1, *image_shape))
    network.train(training)
    for handle in handles:
        handle.remove()
    return shapes
