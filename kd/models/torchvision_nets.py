"""Every classifier of torchvision by its name: pretrained or not, with a head of the right size."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import torch
from torch import nn

from kd.models.preprocess import View
from kd.util.errors import UserError, say


def names() -> list[str]:
    """The names of torchvision's classifiers."""
    import torchvision  # takes seconds, and the small networks do not need it

    return torchvision.models.list_models(module=torchvision.models)


def pretrained(name: str, weights: str):
    """torchvision's weights entry: `imagenet` or `DEFAULT` for its newest, or a name such as IMAGENET1K_V1.

    Raises:
        UserError: there is no such entry.
    """
    import torchvision

    known = torchvision.models.get_model_weights(name)
    try:
        return known["DEFAULT" if weights in ("imagenet", "DEFAULT") else weights]
    except KeyError:
        entries = ", ".join(["imagenet", *known.__members__])
        raise UserError(
            f"weights {weights!r} of {name} is neither a file nor one of torchvision's; known: {entries}"
        ) from None


def view(name: str) -> View:
    """How a classifier with its newest ImageNet weights prepares images."""
    shape = pretrained(name, "imagenet").transforms()
    return View(resize=shape.resize_size[0], crop=shape.crop_size[0], mean=tuple(shape.mean), std=tuple(shape.std))


def build_torchvision(name: str, num_classes: int, **arguments) -> nn.Module:
    """A classifier with random weights and `num_classes` outputs; logits only, without auxiliary heads."""
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    if name in ("googlenet", "inception_v3"):  # with auxiliary heads they return a tuple in training
        arguments = {"aux_logits": False, "init_weights": True, **arguments}
    try:
        return builder(weights=None, num_classes=num_classes, **arguments)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, NotImplementedError) as error:  # of their values too
        raise UserError(f"{name} does not take these arguments ({arguments}): {error}") from None


def download_weights(entry) -> dict[str, torch.Tensor]:
    """The state dict of a weights entry, from torch's cache or the network.

    Raises:
        UserError: it is not there and cannot be downloaded; the message names the file and its place.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(entry.url)
    if not file.exists():
        say(f"downloading {entry} to {file}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torch's own line for the same
            state = entry.get_state_dict(progress=False)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot get the weights {entry} ({reason}); download {entry.url} to {file}"
            f"{' (replace the damaged file)' if file.exists() else ''} and run the same command"
        ) from None
    return {key: tensor for key, tensor in state.items() if not key.startswith(("aux", "AuxLogits"))}


def head_name(network: nn.Module) -> str:
    """The dotted name of the last linear or convolutional layer: the one that gives the logits.

    Raises:
        UserError: there is none.
    """
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers:
        raise UserError(f"{type(network).__name__} has no linear or convolutional layer that could be its head")
    return layers[-1]


def replace_head(network: nn.Module, num_classes: int) -> None:
    """Put a new, randomly initialised layer with `num_classes` outputs in the head's place."""
    name = head_name(network)
    old = network.get_submodule(name)
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    else:
        same = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups")}
        new = nn.Conv2d(old.in_channels, num_classes, bias=old.bias is not None, **same)
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)
    if hasattr(network, "num_classes"):
        network.num_classes = num_classes
