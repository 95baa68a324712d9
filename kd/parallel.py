"""What several processes need of each other; beside the scripts and the loop, only this file knows of them."""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist
from torch import Tensor


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that all processes see after the same step.

    The flags are combined over gloo on the CPU, so that asking costs no wait for a GPU. A second Ctrl-C interrupts at
    once. Use as a context manager: handlers are put back at the end.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received = 0
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None
        self._before = {}

    def __enter__(self):
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, _frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self) -> int:
        """The largest signal number that any process has received; 0 if none has."""
        if self._group is None:
            return self.received
        flag = torch.tensor([self.received], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return int(flag)


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Rows of all processes, one process after another; each gave `counts[rank]` of them."""
    if len(counts) == 1:
        return rows
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
