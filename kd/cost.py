"""What a network costs: parameters, multiply-adds, time an image."""

from __future__ import annotations

import math
import time

import torch
from torch import nn
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
        `images_per_second`, all images over all time; `peak_memory_bytes`, the GPU memory of the network and of what it
        computes with this batch, None on a CPU, where memory cannot be told from that of the rest of the process.
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
    return {
        "batch_size": batch_size,
        "p50_ms": 1000 * ranked[len(times) // 2],
        "p95_ms": 1000 * ranked[math.ceil(0.95 * len(times)) - 1],
        "images_per_second": batch_size * len(times) / sum(times),
        "runs": len(times),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) - before + own if on_gpu else None,
    }
