"""Moving small things to a GPU without waiting for it, and how much memory it has left."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the CPU to a GPU through page-locked memory, the only way that waits for nothing.

    A copy from ordinary memory waits until the GPU has done all that it was given before.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Bytes that a GPU has left; 0 on any other device, whose memory is the machine's."""
    if device.type != "cuda":
        return 0
    free, _total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
