"""Frozen means frozen: no gradients, and no batch norm statistics that move.

`requires_grad_(False)` alone leaves batch norm in training mode, where every forward pass changes its running
statistics (https://pytorch.org/docs/stable/notes/autograd.html#evaluation-mode-nn-module-eval).
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import MethodType

import torch
from torch import nn

from kd.util.files import file_sha256


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def freeze(module: nn.Module) -> nn.Module:
    """Take the gradients from a module for good and keep it in eval mode through every later `train()` of any parent;
    returns the module."""
    module.eval()
    for part in module.modules():
        part.train = MethodType(_stay_in_eval, part)
    return module.requires_grad_(False)


def freeze_all_but(network: nn.Module, head: str) -> None:
    """Freeze every part of a network but the module called `head` (a dotted name) and the containers on its path."""
    network.requires_grad_(False)
    module = network
    for part in head.split("."):
        for name, child in module.named_children():
            if name != part:
                freeze(child)
        module = module.get_submodule(part)
    module.requires_grad_(True)


def state_hash(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers by name: equal before and after for what is frozen."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)  # numpy does not know bf16
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()


def code_hash(module: nn.Module) -> str:
    """SHA-256 of the files that define a user's own classes in a network, those outside torch, torchvision and kd; of
    what these files import nothing is known."""
    digest = hashlib.sha256()
    for name in sorted({type(part).__module__ for part in module.modules()}):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and name.partition(".")[0] not in ("torch", "torchvision", "kd"):
            digest.update(f"{name} {file_sha256(Path(file))}".encode())
    return digest.hexdigest()
