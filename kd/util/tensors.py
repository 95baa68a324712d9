"""Tensors as safetensors takes them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


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
