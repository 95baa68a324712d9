"""Tensors as safetensors takes them, and buffers that get their bytes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def savable(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named tensors on the CPU, each with memory of its own: tied weights share theirs, which safetensors refuses."""
    seen, result = set(), {}
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        result[name] = tensor
    return result


@contextmanager
def buffers_put_back(*modules: nn.Module) -> Iterator[None]:
    """Give the modules' buffers their bytes back at the end."""
    before = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
