"""The training images of each step: which they are, how they are shown, and which of them are this process's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kd import keyed
from kd.data.views import Views
from kd.data.views.mixes import mixed_labels
from kd.outputs import Batch
from kd.util.device import to_device

if TYPE_CHECKING:
    from kd.data import Split

BLOCK = 64  # steps that are drawn at once: each draw is a dozen small operations, which would cost a step as much


@dataclass
class _Drawn:
    """What is drawn for images that are shown one after another; all of one length, or None."""

    where: np.ndarray  # positions in the split
    places: Tensor
    keys: Tensor
    numbers: Tensor | None
    dropout: Tensor
    others: np.ndarray | None
    other_keys: Tensor | None

    def part(self, start: int, stop: int) -> _Drawn:
        return _Drawn(*(value if value is None else value[start:stop] for value in vars(self).values()))


@dataclass
class _Part:
    """A process's micro-batch."""

    drawn: _Drawn
    where: np.ndarray  # positions in the split of the images, then of those that they are mixed with
    lookup: Tensor | None
    counts: list[int] | None
    whole: bool
    weight: float
    labelled: Tensor | None = None
    labelled_share: float = 1.0


class TrainBatches:
    """The training images of each step: a function of (seed, step) alone, cut into one part a process.

    Args:
        split: the training images.
        batch_size: of the global batch, over all processes.
        seed: of order, views and dropout.
        rank, num_processes: which part of each global batch is this process's; the first parts are the larger ones.
        views: the random views.
        accumulate: into how many micro-batches a process's part is cut.
        num_classes: K, of mixed images' labels.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        rank: int,
        num_processes: int,
        views: Views,
        accumulate: int = 1,
        num_classes: int = 0,
    ):
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.rank, self.num_processes, self.accumulate = rank, num_processes, accumulate
        self.views, self.num_classes = views, num_classes
        self.steps_per_epoch = -(-len(split) // batch_size)
        self._orders: dict[int, np.ndarray] = {}
        self._blocks: dict[tuple[int, int], list[list[_Part]]] = {}
        self._labels = split.labels if (split.labels < 0).any() else None  # only where some are unknown
        self._coming, self._read, self._parts = None, None, deque()

    def positions(self, step: int) -> np.ndarray:
        """Positions in the split of the whole global batch of a step, in order; the epoch's last may be smaller."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def images_seen(self, step: int) -> int:
        """How many images have been shown after so many steps."""
        missing = self.steps_per_epoch * self.batch_size - len(self.split)  # in each epoch's last batch
        return step * self.batch_size - step // self.steps_per_epoch * missing

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
        part, epoch = self._parts.popleft(), step // self.steps_per_epoch
        drawn = part.drawn
        if self.views.mixes:
            count = len(drawn.places)
            images = self.views.apply(inputs["image"], torch.cat([drawn.keys, drawn.other_keys]))
            inputs["image"], shares = self.views.mix(images[:count], images[count:], drawn.keys)
            labels, index = mixed_labels(labels[:count], labels[count:], shares, self.num_classes), index[:count]
        elif "image" in inputs:
            inputs["image"] = self.views.apply(inputs["image"], drawn.keys)
        for viewed in self.split.viewed:
            inputs |= viewed.table.look(part.lookup, inputs, viewed.compute)
        batch = Batch(inputs, labels, index, to_device(drawn.dropout, device), epoch, part.counts, part.whole, step)
        if part.labelled is not None:
            batch.labelled, batch.labelled_share = to_device(part.labelled, device), part.labelled_share
        return batch, part.weight

    def close(self) -> None:
        """End the prefetching."""
        self._coming = self._read = None

    def _size(self, step: int) -> int:
        """How many images the global batch of a step has."""
        return min(self.batch_size, len(self.split) - step % self.steps_per_epoch * self.batch_size)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            order = keyed.permutation(keyed.key(self.seed, keyed.Purpose.ORDER, epoch), len(self.split)).numpy()
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: order}  # images are read ahead: two epochs
        return self._orders[epoch]

    def _part(self, step: int, micro: int) -> _Part:
        epoch, batch = divmod(step, self.steps_per_epoch)
        block, number = divmod(batch, BLOCK)
        if (epoch, block) not in self._blocks:
            first = step - number
            last = min(first + BLOCK, (epoch + 1) * self.steps_per_epoch)
            self._blocks = {**dict(list(self._blocks.items())[-1:]), (epoch, block): self._draw(first, last)}
        return self._blocks[epoch, block][number][micro]

    def _draw(self, first: int, last: int) -> list[list[_Part]]:
        """The micro-batches of some successive steps of an epoch."""
        epoch, batch = divmod(first, self.steps_per_epoch)
        where = self._order(epoch)[batch * self.batch_size : (batch + last - first) * self.batch_size]
        places, others, other_keys = torch.from_numpy(self.split.places[where]), None, None
        keys, numbers = self.views.draw(self.seed, epoch, places)
        if self.views.mixes:
            others, other_keys = self.views.partners(keys, len(self.split))
            others = others.numpy()
        dropout = keyed.keys(keyed.key(self.seed, keyed.Purpose.DROPOUT, epoch), places)
        drawn = _Drawn(where, places, keys, numbers, dropout, others, other_keys)
        offsets = range(0, (last - first) * self.batch_size, self.batch_size)
        return [
            [self._cut(drawn, offset, step, micro) for micro in range(self.num_micro(step))]
            for step, offset in zip(range(first, last), offsets, strict=True)
        ]

    def _cut(self, drawn: _Drawn, offset: int, step: int, micro: int) -> _Part:
        """This process's part of what is drawn from `offset` on."""
        size, num_micro, world = self._size(step), self.num_micro(step), self.num_processes
        parts = [_share(*_share(offset, offset + size, world, rank), num_micro, micro) for rank in range(world)]
        start, stop = parts[self.rank]
        weight = (stop - start) * world / size
        own = drawn.part(start, stop) if weight else drawn.part(offset, offset + 1)
        where = own.where if own.others is None else np.concatenate([own.where, own.others])
        lookup = None
        if own.numbers is not None and weight:
            lookup = torch.stack([own.places, own.numbers], dim=1)
        counts = [stop - start for start, stop in parts] if world > 1 else None
        part = _Part(own, where, lookup, counts, num_micro == 1, weight)
        if self._labels is not None:
            known = self._labels[own.where] >= 0
            everywhere = (self._labels[drawn.where[offset : offset + size]] >= 0).mean()
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


def _share(start: int, stop: int, count: int, number: int) -> tuple[int, int]:
    """Where one of `count` parts of a range is; the first parts are the larger ones."""
    size, larger = divmod(stop - start, count)
    start += number * size + min(number, larger)
    return start, start + size + (number < larger)
