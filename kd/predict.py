"""What a network says about all images of a split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd.data import Split
from kd.parallel import gather_rows


@torch.inference_mode()
def predict(network: nn.Module, split: Split, batch_size: int, accelerator) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,) of a split, on the CPU, in its order, each image once at any number of processes.

    Args:
        network: a `Classifier` or a `Teacher`, on the accelerator's device; put in eval mode.
        accelerator: says which of how many processes this is.
        batch_size: images at once over all processes.
    """
    network.eval()
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    cuts = [len(split) * i // world for i in range(world + 1)]
    size = max(1, batch_size // world)
    logits = []
    for start in range(cuts[rank], cuts[rank + 1], size):
        where = torch.arange(start, min(start + size, cuts[rank + 1])).numpy()
        logits.append(network(split.read(where, device)[0]).float())
    mine = torch.cat(logits) if logits else torch.zeros(0, len(network.classes), device=device)
    counts = [cuts[i + 1] - cuts[i] for i in range(world)]
    return gather_rows(mine, counts).cpu(), torch.from_numpy(split.labels)
