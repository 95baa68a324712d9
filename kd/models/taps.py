"""Features: what any module inside a network gives, by the module's dotted name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from kd.util.errors import unknown


def tap(network: nn.Module, names: Iterable[str], kept: dict[str, Tensor], title: str) -> None:
    """Let `kept` have the outputs of these modules of the latest forward pass.

    A tap is a forward hook that keeps a copy: a later in-place operation (`nn.ReLU(inplace=True)`, the `+=` of
    torchvision's ResNets) changes the module's own output, not the copy, so a tap has the value the module computed.

    Raises:
        UserError: there is no such module in the network, which is called `title`.
    """
    modules = dict(network.named_modules())
    for name in names:
        if name not in modules or name == "":
            raise unknown(f"tap of {title}", name, [known for known in modules if known])

        def keep(_module, _inputs, output, name=name):
            if not isinstance(output, Tensor):
                raise TypeError(f"tap {name!r} gives a {type(output).__name__}, not a tensor")
            kept[name] = output.clone()

        modules[name].register_forward_hook(keep)


@contextmanager
def watched(network: nn.Module, note: Callable[[str, tuple, Tensor], None]) -> Iterator[None]:
    """Call `note` with the name, inputs and output of each module inside a network that gives a tensor meanwhile."""

    def seen(name: str, _module, inputs: tuple, output) -> None:
        if isinstance(output, Tensor):
            note(name, inputs, output)

    handles = [module.register_forward_hook(partial(seen, name)) for name, module in network.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def tap_shapes(network: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every module's output for one image (C, H, W), without the batch axis, in the order of the calls."""
    shapes: dict[str, tuple[int, ...]] = {}
    training = network.training
    with watched(network, lambda name, _inputs, output: shapes.update({name: tuple(output.shape[1:])})):
        network.eval()(torch.zeros(1, *image_shape))
    network.train(training)
    return shapes
