"""The training images of each step: which they are, how they are shown, and which of them are this process's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kd import keyed
from kd.data.views import Views
from kd.data.views.mixes import mixed_labels, partners
from kd.outputs import Batch
from kd.util.device import to_device

if TYPE_CHECKING:
    from kd.data import Split

BLOCK = 64  # steps that are drawn at once: each draw is a dozen small operations, which would cost a step as much


@dataclass
class _Part:
    """A process's micro-batch before its images are read; what is named as in `Batch` is the same.

    where, views: positions in the split, and keys of the views, of the images and then of what these are mixed with.
    lookup: int64 (B, 2), places and numbers of the views, for tables; None where there are none.
    """

    where: np.ndarray
    views: Tensor
    keys: Tensor
    lookup: Tensor | None
    weight: float
    counts: list[int] | None
    whole: bool
    labelled: Tensor | None = None
    labelled_share: float = 1.0


@dataclass(eq=False)
class TrainBatches:
    """The training images of each step: a function of (seed, step) alone, cut into one part per process.

    Args:
        split: the training images.
        batch_size: of the global batch, over all processes.
        seed: of order, views and dropout.
        rank, num_processes: which part of each global batch is this process's; the first parts are the larger ones.
        views: the random views.
        accumulate: into how many micro-batches a process's part is cut.
        num_classes: K, of mixed images' labels.
    """

    split: Split
    batch_size: int
    seed: int
    rank: int
    num_processes: int
    views: Views
    accumulate: int = 1
    num_classes: int = 0

    def __post_init__(self):
        self.steps_per_epoch = -(-len(self.split) // self.batch_size)
        self._blocks: dict[int, list[list[_Part]]] = {}  # by their first step
        self._labels = self.split.labels if (self.split.labels < 0).any() else None  # only where some are unknown
        self._coming, self._read, self._parts = None, None, deque()

    def positions(self, step: int) -> np.ndarray:
        """Positions in the split of the whole global batch of a step, in order; the epoch's last may be smaller."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, len(self.split))
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def images_seen(self, step: int) -> int:
        """How many images have been shown after so many steps."""
        epochs, batches = divmod(step, self.steps_per_epoch)
        return epochs * len(self.split) + batches * self.batch_size

    def num_micro(self, step: int) -> int:
        """How many micro-batches a step has, equal on all processes; none is empty on the first one."""
        return min(self.accumulate, -(-self._size(step) // self.num_processes))

    def read(self, step: int, device: torch.device, micro: int = 0) -> tuple[Batch, float]:
        """This process's micro-batch of a step, and the weight that makes the sum over the step's micro-batches, and
        the mean over the processes, the mean over the global batch.

        A process whose part is empty (the last batch has fewer images than there are processes) gets the batch's first
        image with weight 0, since every process must take part in the step.

        The images that a loop needs next (micro-batches from the last to the first, then the next step) are
        prefetched; any others may be read too.
        """
        if (step, micro, device) != self._coming:
            self._parts = deque()
            self._read = self.split.batches(self._wheres(step, micro, self._parts), device)
        inputs, labels, index = next(self._read)
        self._coming = (*self._after(step, micro), device)
        part = self._parts.popleft()
        if "image" in inputs:
            inputs["image"] = self.views.apply(inputs["image"], part.views)
        if self.views.mixes:
            count = len(part.keys)
            inputs["image"], shares = self.views.mix(*inputs["image"].split(count), part.views[:count])
            labels, index = mixed_labels(*labels.split(count), shares, self.num_classes), index[:count]
        for look in self.split.viewed:
            inputs |= look(part.lookup, inputs)
        keys, labelled = (None if one is None else to_device(one, device) for one in (part.keys, part.labelled))
        epoch, known = step // self.steps_per_epoch, {"labelled": labelled, "labelled_share": part.labelled_share}
        return Batch(inputs, labels, index, keys, epoch, part.counts, part.whole, step, **known), part.weight

    def close(self) -> None:
        """End the prefetching."""
        self._coming = self._read = None

    def _size(self, step: int) -> int:
        """How many images the global batch of a step has."""
        return min(self.batch_size, len(self.split) - step % self.steps_per_epoch * self.batch_size)

    def _part(self, step: int, micro: int) -> _Part:
        number = step % self.steps_per_epoch % BLOCK
        if (first := step - number) not in self._blocks:  # two are kept: images are read ahead
            self._blocks = {**dict(list(self._blocks.items())[-1:]), first: self._draw(first)}
        return self._blocks[first][number][micro]

    def _draw(self, first: int) -> list[list[_Part]]:
        """The micro-batches of `BLOCK` successive steps, or those up to the end of the epoch."""
        epoch, batch = divmod(first, self.steps_per_epoch)
        steps = range(first, min(first + BLOCK, (epoch + 1) * self.steps_per_epoch))
        order = _order(self.seed, epoch, len(self.split))
        where = order[batch * self.batch_size : (batch + len(steps)) * self.batch_size]
        places = torch.from_numpy(self.split.places[where])
        views, numbers = self.views.draw(self.seed, epoch, places)
        lookup = None if numbers is None else torch.stack([places, numbers], dim=1)
        keys = keyed.keys(keyed.key(self.seed, keyed.Purpose.DROPOUT, epoch), places)
        where, views = where[None], views[None]
        if self.views.mixes:
            others, other_views = partners(views, len(self.split))
            where, views = np.concatenate([where, others.numpy()]), torch.cat([views, other_views])
        return [
            [
                self._cut(where, views, keys, lookup, number * self.batch_size, step, micro)
                for micro in range(self.num_micro(step))
            ]
            for number, step in enumerate(steps)
        ]

    def _cut(self, where, views, keys, lookup, offset: int, step: int, micro: int) -> _Part:
        """This process's part of what is drawn from `offset` on."""
        size, num_micro, world = self._size(step), self.num_micro(step), self.num_processes
        parts = [_share(*_share(offset, offset + size, world, rank), num_micro, micro) for rank in range(world)]
        start, stop = parts[self.rank]
        counts = [stop - start for start, stop in parts] if world > 1 else None
        own = slice(start, stop) if stop > start else slice(offset, offset + 1)
        lookup = None if lookup is None or start == stop else lookup[own]
        weight = (stop - start) * world / size
        part = _Part(
            where[:, own].flatten(), views[:, own].flatten(), keys[own], lookup, weight, counts, num_micro == 1
        )
        if self._labels is not None:
            known = self._labels[where[0, own]] >= 0
            everywhere = (self._labels[where[0, offset : offset + size]] >= 0).mean()
            part.labelled = torch.from_numpy(np.flatnonzero(known))
            part.labelled_share = float(known.mean() / everywhere) if everywhere else 0.0
        return part

    def _after(self, step: int, micro: int) -> tuple[int, int]:
        """Which micro-batch of which step a loop needs after this one."""
        return (step, micro - 1) if micro else (step + 1, self.num_micro(step + 1) - 1)

    def _wheres(self, step: int, micro: int, parts: deque) -> Iterator[np.ndarray]:
        """Where the images of this micro-batch and of all that come after it are; the parts are put into `parts`."""
        while True:
            parts.append(self._part(step, micro))
            yield parts[-1].where
            step, micro = self._after(step, micro)


@lru_cache(2)  # two: images are read ahead
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """In which order an epoch shows `count` images."""
    return keyed.permutation(keyed.key(seed, keyed.Purpose.ORDER, epoch), count).numpy()


def _share(start: int, stop: int, count: int, number: int) -> tuple[int, int]:
    """Where one of `count` parts of a range is; the first parts are the larger ones."""
    size, larger = divmod(stop - start, count)
    start += number * size + min(number, larger)
    return start, start + size + (number < larger)
