"""Signals that all processes see after the same step, and which of them do not answer after an exchange failed."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

TIME_OVER = 1  # smaller than the numbers of the signals, which therefore win


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that all processes see after the same step.

    The flags are combined over gloo on the CPU, so that this waits for no GPU. A second Ctrl-C interrupts at
    once, if it comes a second or more after the first: a launcher passes on the one that the terminal sent to all. Use
    as a context manager: handlers are put back at the end.

    Args:
        timeout: seconds to wait for the other processes' flags.
        time_left: seconds until `TIME_OVER`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, timeout: float, time_left: float = math.inf):
        self.received, self._when, self._deadline = 0, 0.0, time.monotonic() + time_left
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
        """The largest signal number that any process has received, else `TIME_OVER` if one has no time left, else 0."""
        mine = self.received or TIME_OVER * (time.monotonic() >= self._deadline)
        if self._group is None:
            return mine
        flag = torch.tensor([mine], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return int(flag)


_roll_is_called = threading.Event()


def _store(timeout: float) -> dist.Store:
    """A connection of our own to the store by which the processes found each other; the launcher keeps it or, without
    one, the first process. A RuntimeError where it is gone, after so many seconds."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))
    return dist.PrefixStore(f"kd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def answering_roll_calls() -> Iterator[None]:
    """Let a thread answer for this process, whose exchange may wait for one that has noticed a loss and lives."""
    left = threading.Event()

    def answer() -> None:
        with suppress(RuntimeError):
            store = _store(60)
            while not left.wait(1):
                if store.check(["roll"]):
                    _roll_is_called.set()
                    store.set(f"alive/{dist.get_rank()}", "")
                    return

    if dist.is_initialized() and dist.get_world_size() > 1:
        threading.Thread(target=answer, daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _call_roll(timed_out: bool, patience: float) -> tuple[bool, list[int]]:
    """Whether this process is the one to tell the user, and the ranks that give no sign of life.

    In a thread: a store whose process hangs never answers. Where the failed exchange waited until its end, `timed_out`,
    a process that is silent and alive hangs.
    """
    rank, missing = dist.get_rank(), [0]
    # Without a launcher the first process keeps the store, and may not answer; the next one tells it then.
    speaks = rank == 1 and not _roll_is_called.is_set()

    def call() -> None:
        nonlocal speaks, missing
        with suppress(RuntimeError):
            store, end = _store(patience), time.monotonic() + patience
            speaks = store.add("roll", 1) == 1
            for key in ("alive", "noticed"):
                store.set(f"{key}/{rank}", "")
            if speaks:
                silent = range(dist.get_world_size())
                while (silent := [r for r in silent if not store.check([f"noticed/{r}"])]) and time.monotonic() <= end:
                    time.sleep(0.1)
                dead = [r for r in silent if not store.check([f"alive/{r}"])]
                # One that is alive and lets the others wait hangs; other errors need not reach all.
                missing = dead or (silent if timed_out else [])
                store.set("named", "")
            while not store.check(["named"]):  # the one that keeps the store must not end before
                time.sleep(0.1)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(2 * patience)
    return speaks, missing


def lost_contact(error: RuntimeError, patience: float = 5.0) -> str | None:
    """After an exchange with the other processes failed: which of them do not answer a roll call.

    Args:
        error: what was raised; anything but a failed exchange is not explained.
        patience: seconds for the others to answer.

    Returns:
        The message for the user; "" if another process is the one to give it; None if `error` is something else.
    """
    text = str(error).lower()
    if not isinstance(error, dist.DistError) and not any(word in text for word in ("gloo", "nccl")):
        return None
    detail = " ".join(str(error).split())[:200]
    if not dist.is_initialized():  # the first process may have ended with a line of its own
        why = f"no contact with the other processes ({detail}): one has ended, or the launcher's address is wrong"
        return why if os.environ.get("RANK") in ("0", "1") else ""
    if (count := dist.get_world_size()) == 1:
        return None
    speaks, missing = _call_roll("timed out" in text, patience)
    if not speaks:
        return ""
    if not missing:
        why = f"the processes lost contact ({detail})"
    else:
        who = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" * (len(missing) > 8))
        why = f"process {who} of {count} (counted from 0) does not answer: killed, hung, or its machine is down"
    return f"{why}; the same command resumes from the last checkpoint"
