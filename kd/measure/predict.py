"""What networks give for all images of a split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kd.data import Split
from kd.measure import metrics
from kd.util.gathers import gather_rows


@torch.inference_mode()
def predict(network: nn.Module, split: Split, batch_size: int, accelerator, title: str = "") -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,) of a split, on the CPU, in its order, each image once at any number of processes.

    Args:
        network: a `Classifier` or `Teachers`, on the accelerator's device; put in eval mode.
        accelerator: knows which of how many processes this is.
        batch_size: images at once over all processes.
        title: of a progress bar, which a terminal then shows.
    """
    network.eval()
    world, device = accelerator.num_processes, accelerator.device
    hidden = None if title and accelerator.is_main_process else True
    with tqdm(total=len(split) // world, desc=title, unit="image", disable=hidden, leave=False) as bar:
        logits = []
        for inputs in _own_batches(split, batch_size, accelerator):
            logits.append(network.logits(inputs).float())
            bar.update(len(logits[-1]))
    mine = torch.cat(logits) if logits else torch.zeros(0, len(network.classes), device=device)
    cuts = _cuts(split, world)
    counts = [cuts[i + 1] - cuts[i] for i in range(world)]
    return gather_rows(mine, counts).cpu(), torch.from_numpy(split.labels)


@torch.inference_mode()
def similarity(
    student: nn.Module, teacher: nn.Module, pairs: Sequence[tuple[str, str]], split: Split, batch_size: int, accelerator
) -> list[float | None]:
    """Linear CKA over a split of each pair (student's module, teacher's module), maps averaged over their places.

    Args:
        student, teacher: two `Classifier`s, both tapped here.

    Raises:
        UserError: there is no such module.
    """
    student.eval().tap([mine for mine, _ in pairs])
    teacher.eval().tap([theirs for _, theirs in pairs])

    def features(inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        ours, theirs = student.outputs(inputs).features, teacher.outputs(inputs).features
        return [(metrics.pooled(ours[one]).cpu(), metrics.pooled(theirs[other]).cpu()) for one, other in pairs]

    first = features(split.read(torch.arange(1).numpy(), accelerator.device)[0])
    sums = [metrics.feature_sums(one[:0], other[:0]) for one, other in first]  # of no images; each process adds its own
    for inputs in _own_batches(split, batch_size, accelerator):
        sums = [total + metrics.feature_sums(*pair) for total, pair in zip(sums, features(inputs), strict=True)]
    world = accelerator.num_processes
    if world > 1:
        sums = [gather_rows(part[None].to(accelerator.device), [1] * world).sum(0).cpu() for part in sums]
    return [metrics.linear_cka(total, one.shape[1]) for total, (one, _) in zip(sums, first, strict=True)]


def _cuts(split: Split, world: int) -> list[int]:
    """Where each process's images begin, and the end."""
    return [len(split) * i // world for i in range(world + 1)]


def _own_batches(split: Split, batch_size: int, accelerator) -> Iterator[dict[str, Tensor]]:
    """This process's columns of a split, batch by batch."""
    world, rank = accelerator.num_processes, accelerator.process_index
    start, end = _cuts(split, world)[rank : rank + 2]
    size = max(1, batch_size // world)
    wheres = (torch.arange(first, min(first + size, end)).numpy() for first in range(start, end, size))
    for inputs, _labels, _index in split.batches(wheres, accelerator.device):
        yield inputs
