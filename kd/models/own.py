"""Networks of the user's own, by import path, and whether the code that such a path names may be run."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder

from torch import Tensor, nn

from kd.util.errors import UserError, say
from kd.util.own_code import blamed

# From these a path could call anything, such as torch.hub.load, which runs a stranger's file.
NOT_OWN = {"torch", "torchvision", *sys.stdlib_module_names}


def import_builder(path: str, trust: bool) -> Callable[..., nn.Module]:
    """The class or function of the user's own that an import path names; prints the file when it is first run.

    Nothing is imported unless `trust`: the user gave the path or vouched for the file that holds it.

    Raises:
        UserError: it may not be run, cannot be imported, or is no network.
    """
    module, _, attribute = path.rpartition(".")
    _require_own(path, module)
    file = file_of(module)
    place = f"in {file}" if file else "not found here"
    if not trust:
        raise UserError(
            f"the network {path!r} is code ({place}), and code that a file names is not run; read it, and if it is "
            f"yours pass --trust_code true, or kd.load(run, trust=True)"
        )
    if module not in sys.modules:
        say(f"own code: {path} {place}")
    try:
        with blamed(f"cannot import the model {path!r}"):
            found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot import the model {path!r}: {error}") from None
    if not (inspect.isfunction(found) or (inspect.isclass(found) and issubclass(found, nn.Module))):
        raise UserError(f"the model {path!r} is neither a torch.nn.Module class nor a function that returns one")
    _require_own(path, found.__module__)  # it may be imported there from elsewhere
    return found


def accept(network: object, name: str) -> nn.Module:
    """What a builder of the user's own gave, as a network whose output is its logits.

    Raises:
        UserError: it is no module, or nothing in it can be trained.
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"the model {name!r} gives no torch.nn.Module but {type(network).__name__}")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"the model {name!r} has no parameter to train")
    network.register_forward_hook(_logits_alone)
    return network


def _logits_alone(_network, _inputs, output) -> Tensor:
    """The logits of an output; a dict, or an object as those of transformers, holds them as `logits`."""
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the network's forward gives {type(output).__name__}; let it return the logits alone, or in a dict or an "
            f"object as `logits`"
        )
    return logits


def _require_own(path: str, module: str) -> None:
    if not all(part.isidentifier() for part in path.split(".")):
        raise UserError(f"the model {path!r} is no import path; write it as my_package.MyNet")
    if (package := module.partition(".")[0]) in NOT_OWN:
        raise UserError(
            f"the model {path!r} is of {package}; name a torchvision classifier without a path, such as resnet18, or a "
            f"class or function of a module of your own"
        )


def file_of(module: str) -> str | None:
    """Where a module lies, found without running it or the packages that it is in; None if it is not found."""
    spec, folders = None, None
    for part in module.split("."):
        spec = PathFinder.find_spec(part, folders)
        if spec is None:
            return None
        folders = spec.submodule_search_locations
    return spec.origin
