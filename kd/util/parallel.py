"""What several processes need of each other; beside the scripts and the loop, only this file knows of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd.outputs import Batch
from kd.util.errors import UserError


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that all processes see after the same step.

    The flags are combined over gloo on the CPU, so that asking costs no wait for a GPU. A second Ctrl-C interrupts at
    once, if it comes a second or more after the first: a launcher passes on the one that the terminal sent to all. Use
    as a context manager: handlers are put back at the end.

    Args:
        timeout: seconds to wait for the other processes' flags.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, timeout: float):
        self.received, self._when = 0, 0.0
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if several else None
        self._before = {}

    def __enter__(self):
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ignore_repeats(self) -> None:
        """From here on only Ctrl-C ends this process: it is about to end by itself, and whoever sends a signal once may
        send it again."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
            self._before[number] = signal.SIG_IGN

    def _receive(self, number, _frame):
        now = time.monotonic()
        if self.received and number == signal.SIGINT and now - self._when > 1:
            raise KeyboardInterrupt
        self.received, self._when = number, now

    def agreed(self) -> int:
        """The largest signal number that any process has received; 0 if none has."""
        if self._group is None:
            return self.received
        flag = torch.tensor([self.received], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return int(flag)


_roll_is_called = threading.Event()


@contextmanager
def answering_roll_calls() -> Iterator[None]:
    """Let a thread answer for this process, whose exchange may wait for one that has noticed a loss and lives."""
    left = threading.Event()

    def answer() -> None:
        store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
        with suppress(RuntimeError):
            while not left.wait(1):
                if store.check(["kd/roll"]):
                    _roll_is_called.set()
                    store.set(f"kd/alive/{rank}", "")
                    return

    if dist.is_initialized() and dist.get_world_size() > 1:
        threading.Thread(target=answer, daemon=True).start()
    try:
        yield
    finally:
        left.set()


def lost_contact(error: RuntimeError, patience: float = 5.0) -> str | None:
    """After an exchange with the other processes failed: which of them do not answer a roll call.

    Args:
        error: what was raised; anything but a failed exchange is not explained.
        patience: seconds for the others to answer.

    Returns:
        The message for the user; "" if another process is the one to say it; None if `error` is something else.
    """
    said = str(error).lower()
    exchange = isinstance(error, dist.DistError) or any(word in said for word in ("gloo", "nccl"))
    if not exchange:
        return None
    detail = " ".join(str(error).split())[:200]
    if not dist.is_initialized():  # the first process may have ended with a line of its own
        why = f"no contact with the other processes ({detail}): one has ended, or the launcher's address is wrong"
        return why if os.environ.get("RANK") in ("0", "1") else ""
    if dist.get_world_size() == 1:
        return None
    rank, everyone = dist.get_rank(), range(dist.get_world_size())
    # without a launcher the first process keeps the store, and may not answer; the next one says it then
    missing, speaks = [0], rank == 1 and not _roll_is_called.is_set()

    def call_roll() -> None:
        nonlocal missing, speaks
        with suppress(RuntimeError):
            store, end = dist.distributed_c10d._get_default_store(), time.monotonic() + patience
            speaks = store.add("kd/roll", 1) == 1
            for key in ("alive", "noticed"):
                store.set(f"kd/{key}/{rank}", "")
            while speaks:
                silent = [other for other in everyone if not store.check([f"kd/noticed/{other}"])]
                if not silent or time.monotonic() > end:
                    dead = [other for other in silent if not store.check([f"kd/alive/{other}"])]
                    # one that is alive and lets the others wait hangs; other errors need not reach all
                    missing = dead or (silent if "timed out" in said else [])
                    store.set("kd/named", "")
                    return
                time.sleep(0.1)
            while not store.check(["kd/named"]):  # the one that keeps the store must not end before
                time.sleep(0.1)

    # a store whose process hangs takes the question and never answers
    caller = threading.Thread(target=call_roll, daemon=True)
    caller.start()
    caller.join(2 * patience)
    if not speaks:
        return ""
    if not missing:
        why = f"the processes lost contact ({detail})"
    else:
        who = ", ".join(str(other) for other in missing[:8]) + (f" and {len(missing) - 8} more" * (len(missing) > 8))
        why = f"process {who} of {len(everyone)} (counted from 0) does not answer: killed, hung, or its machine is down"
    return f"{why}; the same command goes on from the last checkpoint"


def share_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers: batch norm's running statistics, which each has of its own images."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Rows of all processes, one process after another; each gave `counts[rank]` of them."""
    if len(counts) == 1:
        return rows
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def global_rows(rows: Tensor, batch: Batch) -> Tensor:
    """The rows (B, ...) that all processes have for the images of one global batch, in its order.

    Gradients flow back to each process's own rows: a loss that is computed from global rows, equal on all processes,
    has the gradient that one process with the whole batch would have.

    Raises:
        UserError: the batch is a micro-batch.
    """
    if not batch.whole:
        raise UserError("a loss compares the images of a whole batch and would see a part of it; set accumulate 1")
    if batch.counts is None:
        return rows
    return _GlobalRows.apply(rows, batch.counts)


class _GlobalRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, counts):
        ctx.counts, ctx.num_rows = counts, len(rows)
        return gather_rows(rows[: counts[dist.get_rank()]].contiguous(), counts)

    @staticmethod
    def backward(ctx, gradient):
        # The true adjoint: every process's loss depends on these rows, so their gradients are summed.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        rank = dist.get_rank()
        start, count = sum(ctx.counts[:rank]), ctx.counts[rank]
        mine = gradient.new_zeros(ctx.num_rows, *gradient.shape[1:])  # a process without images has one of weight 0
        mine[:count] = gradient[start : start + count]
        return mine, None


def global_sum(value: Tensor, batch: Batch) -> Tensor:
    """The sum over the processes of a value that needs no gradient."""
    value = value.detach().clone()
    if batch.counts is not None:
        dist.all_reduce(value)
    return value


def whole(named: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Named tensors, those that FSDP2 shares out among the processes made whole on the CPU.

    All processes must ask; one that does not `keep` the result gets an empty one.
    """
    result = {}
    for name, tensor in named.items():
        if is_shared_out(tensor):
            tensor = tensor.full_tensor().cpu()  # one at a time: together they may not fit into a GPU
        if keep:
            result[name] = tensor
    return result


def share_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that all processes have whole, shared out as `like` is; itself where `like` is whole."""
    if not is_shared_out(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes time, and few need it

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def gradient_norm(module: nn.Module, accelerator) -> Tensor:
    """2-norm of all gradients together, fp16's loss scale taken out: a scalar on the device, nothing waits for it."""
    accelerator.unscale_gradients()
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def is_shared_out(tensor: Tensor) -> bool:
    """Whether FSDP2 has left only a part of this tensor on this process."""
    return hasattr(tensor, "full_tensor")


def all_finite(tensors: list[Tensor], accelerator) -> bool:
    """Whether all values are finite on all processes."""
    local = (tensor.to_local() if is_shared_out(tensor) else tensor for tensor in tensors)
    finite = torch.tensor([all(bool(tensor.isfinite().all()) for tensor in local)], device=accelerator.device)
    return bool(accelerator.gather(finite).all())


def share_loss_buffers(losses: Iterable[nn.Module]) -> None:
    """Give all processes the first one's buffers of the losses, as DistributedDataParallel does and FSDP2 does not."""
    for loss in losses:
        for name, buffer in loss.named_buffers():
            if name not in loss.replicated:
                dist.broadcast(buffer, 0)


@torch.no_grad()
def copy_whole(source: nn.Module, target: nn.Module) -> None:
    """Fill `target`, a module of the same shapes, with the weights of `source`, which FSDP2 shares out.

    Buffers, which it does not share out and does not keep equal, are the first process's.
    """
    own = target.state_dict()
    for name, tensor in source.state_dict().items():
        if is_shared_out(tensor):
            own[name].copy_(tensor.full_tensor())
        else:
            own[name].copy_(tensor)
            dist.broadcast(own[name], 0)
