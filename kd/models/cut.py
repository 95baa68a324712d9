"""A network cut behind one of its modules, for what puts another head there."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from kd.models.cifar import CifarNet
from kd.util.errors import UserError


def up_to(network: nn.Module, tap: str) -> nn.Sequential:
    """The modules of a network that runs them one after another, up to the one called `tap`; names stay."""
    first, _, rest = tap.partition(".")
    children = OrderedDict()
    for name, child in network.named_children():
        children[name] = up_to(child, rest) if rest and name == first else child
        if name == first:
            break
    return nn.Sequential(children)


def last_map(network: nn.Module) -> str | None:
    """The module that gives the last feature map which is the network's own size; None where it is not known."""
    if isinstance(network, CifarNet):
        return [child for child, _ in network.named_children() if child.startswith(("stage", "layer"))][-1]
    if type(network).__module__.startswith("torchvision.") and hasattr(network, "layer4"):
        return "layer4"
    return None


def noise(image_shape: tuple[int, int, int]) -> Tensor:
    """Two images, uint8 (2, C, H, W), always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, *image_shape), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def map_of_noise(classifier, tap: str, image_shape: tuple[int, int, int], why: str) -> Tensor:
    """The map (2, C, H, W) that a module gives for `noise`; the classifier is tapped there and left in eval mode.

    Args:
        why: what asks for it, at the beginning of an error.

    Raises:
        UserError: there is no such module, or it gives no map.
    """
    classifier.tap([tap])
    found = classifier.eval().outputs({"image": noise(image_shape)}).features[tap]
    if found.ndim != 4:
        shape = "x".join(map(str, found.shape[1:]))
        raise UserError(
            f"{why}: tap {tap!r} of {classifier.recipe['model']} gives {shape}; name a module that gives a map, CxHxW"
        )
    return found


@torch.no_grad()
def cut(classifier, tap: str, image_shape: tuple[int, int, int], why: str) -> tuple[nn.Sequential, list[int]]:
    """The modules of a classifier up to one that gives a map, which they share, and that map's shape (C, H, W).

    Raises:
        UserError: as `map_of_noise`; or the network does more than to run its modules one after another.
    """
    expected, body = map_of_noise(classifier, tap, image_shape, why), up_to(classifier.network, tap)
    try:
        again = body(classifier.preprocess(noise(image_shape)))
        # Of the largest entry: in a deep network of random weights rounding is that of numbers far above small ones.
        same = again.shape == expected.shape and (again - expected).abs().max() <= 1e-3 * expected.abs().max()
    except (RuntimeError, ValueError, TypeError):
        same = False
    if not same:
        raise UserError(
            f"{why}: {classifier.recipe['model']} does not run its modules one after another up to {tap!r}, so it "
            f"cannot be cut there; name another module"
        )
    return body, list(expected.shape[1:])
