"""Batch norm of a frozen network folded into the convolutions before it: the same function, fewer passes over the maps.

With fixed statistics batch norm is a factor and an offset per channel, which the convolution's own weights can hold
(https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.fusion.fuse_conv_bn_eval.html).
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@torch.no_grad()
def folded(network: nn.Module) -> nn.Module:
    """A copy in eval mode that gives the same outputs to rounding; it shares the parameters and buffers that stay.

    A pair is left alone where a hook, as of a tap, sees the convolution's output before batch norm: each hooked module
    gives what it gave, to rounding. A network whose calls cannot be traced is left alone as a whole.
    """
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copied = copy.deepcopy(network, dict(shared)).eval()
    for convolution, norm in _pairs(copy.deepcopy(network, shared).eval()):
        names = ["", *(convolution[:end] for end, letter in enumerate(convolution) if letter == "."), convolution]
        within = [name for name in names if not f"{norm}.".startswith(f"{name}." if name else "")]
        if any(copied.get_submodule(name)._forward_hooks for name in within):
            continue
        fused = fuse_conv_bn_eval(copied.get_submodule(convolution), copied.get_submodule(norm))
        copied.set_submodule(convolution, fused.requires_grad_(False))
        copied.set_submodule(norm, nn.Identity())
    return copied


def _pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Dotted names of the convolutions whose output goes into a batch norm and nowhere else, with that batch norm's."""
    for module in network.modules():  # they would be given what stands for a tensor while tracing
        module._forward_hooks.clear()
    tracer = torch.fx.Tracer()
    try:
        graph = tracer.trace(network)
    except Exception:  # whatever a network of the user's own raises when it is given no tensors
        return []
    modules = dict(network.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = [node.target for node in graph.nodes if node.op == "get_attr"]
    found = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if getattr(before, "op", None) != "call_module" or len(before.users) > 1:
            continue
        convolution, norm = modules[before.target], modules[node.target]
        if (
            type(convolution) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
            and type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
            and norm.running_mean is not None
            and calls[before.target] == calls[node.target] == 1
            and not convolution._forward_pre_hooks  # as of weight normalisation
            and not norm._forward_pre_hooks
            and not any(name.startswith((f"{before.target}.", f"{node.target}.")) for name in read)
        ):
            found.append((before.target, node.target))
    return found
