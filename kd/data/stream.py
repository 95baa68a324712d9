"""What the next steps need, made while this one computes: by processes that decode images, or by a thread."""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from kd.data.decode import OtherSize
from kd.data.raw import RawSplit
from kd.util.errors import UserError

AHEAD = 2  # results that are made ahead and held, of each worker or of the thread


@dataclass
class Encoded:
    """Images that are decoded at each read; indexed like a uint8 array (N, C, H, W).

    raw, kept: where they come from, and int64 (N,), the places there of those that are used.
    size, fit: (H, W) of all images, and whether they are brought to it, see `kd.data.decode.read_image`.
    workers: processes that decode ahead, where it is known which images come; 0 for none.
    """

    raw: RawSplit
    kept: np.ndarray
    channels: int
    size: tuple[int, int]
    fit: bool
    workers: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.kept), self.channels, *self.size

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        images = np.empty((len(places), *self.shape[1:]), np.uint8)
        for image, place in zip(images, self.kept[places].tolist(), strict=True):
            try:
                pixels = self.raw.read(place, self.channels, self.size, self.fit)
            except OtherSize as error:
                raise UserError(f"{self.raw.name(place)} has become another image ({error}); start again") from None
            if isinstance(pixels, Exception):
                raise self.raw.unreadable([(place, pixels)])
            image[:] = pixels
        return images


def in_workers(function: Callable, arguments: Iterable, workers: int, pin: bool = False) -> Iterator:
    """`function(argument)` for each, in order, by so many processes that are ahead of who takes the results.

    Args:
        arguments: may have no end; they are drawn as they are needed, in this process.
        workers: 0 to call the function here instead.
        pin: whether tensors come in page-locked memory, for a GPU.
    """
    if workers == 0:
        yield from map(function, arguments)
        return
    loader = DataLoader(
        _Called(function),
        batch_size=None,
        sampler=arguments,
        num_workers=workers,
        prefetch_factor=AHEAD,
        collate_fn=_as_it_is,
        worker_init_fn=_calm,
        multiprocessing_context="fork" if sys.platform == "linux" else None,  # what is read need not be sent
        generator=torch.Generator(),  # or the loader would draw from the one that dropout uses
        pin_memory=pin,
    )
    before = active_children()
    results = iter(loader)
    started = [process for process in active_children() if process not in before]
    # after an error nobody may tell them to end, and Python would wait for them for ever
    end = Finalize(None, _end, args=(started,), exitpriority=1)
    try:
        for result in results:
            if isinstance(result, Exception):
                raise type(result)(*result.args)  # one that a local name holds would keep this frame and the workers
            yield result
    finally:
        end.cancel()


def ahead(function: Callable, arguments: Iterable) -> Iterator:
    """`function(argument)` for each, in order, by a thread that is ahead of who takes the results: for what lets other
    threads run, as copies of memory and reads of files do."""
    with ThreadPoolExecutor(1) as thread:
        waiting: deque = deque()
        for argument in arguments:
            waiting.append(thread.submit(function, argument))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass
class _Called:
    """A function as a data set; it gives an error back, since one that a worker raises comes with its traceback."""

    function: Callable

    def __getitem__(self, argument) -> Any:
        try:
            return self.function(argument)
        except (UserError, OtherSize) as error:
            return error


def _as_it_is(result):
    return result


def _end(workers: list) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's handler would call that an error
    for process in workers:
        process.kill()


def _calm(_worker: int) -> None:
    """What stops a run is the training process's to handle: it saves first, and then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
