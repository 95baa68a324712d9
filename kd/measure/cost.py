"""What a network costs: parameters, multiply-adds, time per image."""

from __future__ import annotations

import math
import time
import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def num_params(network: nn.Module) -> int:
    """Number of parameters, trained or frozen; buffers do not count."""
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def multiply_adds(classifier: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of the convolutions and matrix products for one image (C, H, W): half of torch's FLOPs."""
    classifier.eval()
    device = next(classifier.parameters()).device
    with FlopCounterMode(display=False) as counter:
        classifier(torch.zeros(1, *image_shape, dtype=torch.uint8, device=device))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def speed(classifier: nn.Module, image_shape: tuple[int, int, int], batch_size: int, seconds: float = 1.0) -> dict:
    """How long a batch of images takes, preprocessing included, measured for about `seconds` after a warm-up.

    Returns:
        `p50_ms` and `p95_ms`, the median and the 95th percentile of `runs` (5 to 100) times of one batch;
        `images_per_second`, all images over all time; `peak_memory_bytes`, the memory of the network, the batch and
        what is computed of it: on a GPU what was allocated, elsewhere the tensors, without what an operation needs
        inside.
    """
    classifier.eval()
    device = next(classifier.parameters()).device
    on_gpu = device.type == "cuda"
    before, own = 0, sum(t.numel() * t.element_size() for t in (*classifier.parameters(), *classifier.buffers()))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    images = torch.zeros(batch_size, *image_shape, dtype=torch.uint8, device=device)
    times: list[float] = []
    for i in range(103):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        classifier(images)
        if on_gpu:
            torch.cuda.synchronize(device)
        if i >= 3:
            times.append(time.perf_counter() - start)
        if len(times) >= 5 and sum(times) > seconds:
            break
    ranked = sorted(times)
    if on_gpu:
        used = torch.cuda.max_memory_allocated(device) - before
    else:
        with _Tensors() as tensors:  # not while the time is taken: it slows each operation
            classifier(images)
        used = images.nbytes + tensors.peak
    return {
        "batch_size": batch_size,
        "p50_ms": 1000 * ranked[len(times) // 2],
        "p95_ms": 1000 * ranked[math.ceil(0.95 * len(times)) - 1],
        "images_per_second": batch_size * len(times) / sum(times),
        "runs": len(times),
        "peak_memory_bytes": own + used,
    }


class _Tensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is on: those alive, and the most at one time.

    `peak` holds neither the parameters nor the images, which were there before.
    """

    def __init__(self):
        super().__init__()
        self.peak = self._alive = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in _tensors([*args, *(kwargs or {}).values()])}
        out = func(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in _tensors(out)):
            if storage.data_ptr() not in given:
                self._alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self._alive)
        return out

    def _free(self, size: int) -> None:
        self._alive -= size


def _tensors(value) -> list[torch.Tensor]:
    """The tensors among an operation's arguments or results."""
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in _tensors(each)]
    return [value] if isinstance(value, torch.Tensor) else []
