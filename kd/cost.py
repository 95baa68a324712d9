"""What a network costs: parameters, multiply-adds, time an image."""

from __future__ import annotations

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
def latency(classifier: nn.Module, image_shape: tuple[int, int, int], runs: int = 30) -> float:
    """Milliseconds for one image, preprocessing included: the median of `runs` after a warm-up."""
    classifier.eval()
    device = next(classifier.parameters()).device
    image = torch.zeros(1, *image_shape, dtype=torch.uint8, device=device)
    times = []
    for i in range(runs + 5):
        start = time.perf_counter()
        classifier(image)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= 5:
            times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[len(times) // 2]
