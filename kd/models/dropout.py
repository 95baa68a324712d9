"""Dropout whose mask is a function of the image and the step, not of a generator's state.

So a run that was killed resumes with the masks it would have had, and two processes that share a batch draw the masks
that one process would have drawn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd import keyed


class KeyedDropout(nn.Dropout):
    """`nn.Dropout` (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html) with one key per image.

    Without keys (outside the training loop) it is the ordinary dropout.
    """

    def __init__(self, p: float, layer: int):
        super().__init__(p)
        self.layer = layer
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.keys is None or len(self.keys) != len(x):
            return F.dropout(x, self.p)
        # Four draws of 16 bits from each hash: hashing is most of what this costs.
        numel, first = x[0].numel(), self.layer << 32
        hashes = keyed.keys(self.keys[:, None], torch.arange(first, first - (-numel // 4), device=x.device))
        draws = hashes.view(torch.int16)[:, :numel].view(x.shape)
        kept = draws >= round(self.p * 2**16) - 2**15
        return x * (kept * (1 / (1 - self.p))).to(x.dtype)


def use_keyed_dropout(network: nn.Module) -> list[KeyedDropout]:
    """Replace every plain `nn.Dropout` of a network in place; returns the new modules, in order."""
    found = []
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                found.append(KeyedDropout(child.p, layer=len(found)))
                setattr(module, name, found[-1].train(child.training))
    return found
