"""What the loop measures of itself: sums on the device, read once a log interval; the first step that went wrong."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from kd.errors import UserError
from kd.machine import peak_memory_mb
from kd.parallel import is_shared_out


class Meter:
    """Sums of the loss terms on the device, read once a log interval; remembers the first step that was not finite."""

    def __init__(self, names: list[str], device: torch.device, sums: dict, is_main: bool):
        self.names = [*names, "loss"]
        self._sums = torch.zeros(
            len(self.names) + 1, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64
        )
        self._bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._epoch = dict(sums.get("epoch", {}))
        self._interval_start, self._epoch_images, self._epoch_start = time.perf_counter(), 0.0, time.perf_counter()
        if "interval" in sums and is_main:
            self._sums += torch.tensor(
                [sums["interval"][name] for name in (*self.names, "images")], dtype=self._sums.dtype, device=device
            )

    def add(self, terms: dict[str, Tensor], num_images: int, step: int) -> None:
        values = torch.stack([term.detach() for term in terms.values()])
        total = values.sum()
        if num_images:
            self._sums[:-1] += torch.cat([values, total[None]]) * num_images
            self._sums[-1] += num_images
        self._bad = torch.where((self._bad < 0) & ~total.isfinite(), step + 1, self._bad)

    def check(self, accelerator, lr: float, saved_step: int | None) -> None:
        """Raise a UserError, on all processes, if any step since the start was not finite on any of them."""
        bad = [step for step in accelerator.gather(self._bad[None]).tolist() if step >= 0]
        if bad:
            raise not_finite("the loss is", min(bad), lr, saved_step)

    def state(self, accelerator) -> dict:
        """The open sums over all processes, for the checkpoint."""
        interval = accelerator.reduce(self._sums.clone(), "sum").tolist()
        return {"interval": dict(zip((*self.names, "images"), interval, strict=True)), "epoch": self._epoch}

    def flush(self, accelerator, lr: float, saved_step: int | None, norm: Tensor) -> dict[str, float | None]:
        """The terms' means over the interval's images, over all processes; starts the next interval.

        With them the norm of the last step's gradient, None where fp16 has overflowed, and the memory held at most.
        """
        self.check(accelerator, lr, saved_step)
        *sums, images = accelerator.reduce(self._sums.clone(), "sum").tolist()
        for name, value in zip((*self.names, "images"), (*sums, images), strict=True):
            self._epoch[name] = self._epoch.get(name, 0.0) + value
        now = time.perf_counter()
        row = {f"train/{name}": value / images for name, value in zip(self.names, sums, strict=True)}
        norm = (norm.full_tensor() if is_shared_out(norm) else norm).item()
        row["gradient_norm"] = norm if math.isfinite(norm) else None
        row["images_per_second"] = images / (now - self._interval_start)
        row["peak_memory_mb"] = peak_memory_mb(self._sums.device)
        self._epoch_images += images
        self._interval_start = now
        self._sums.zero_()
        return row

    def end_epoch(self) -> dict[str, float]:
        """The terms' means over the epoch's images; the speed is that since the epoch's start or the last restart."""
        row = {f"epoch/{name}": self._epoch[name] / self._epoch["images"] for name in self.names}
        now = time.perf_counter()
        row["epoch/images_per_second"] = self._epoch_images / (now - self._epoch_start)
        self._epoch, self._epoch_images = {}, 0.0
        self._epoch_start = self._interval_start = now
        return row


def not_finite(what: str, step: int, lr: float, saved_step: int | None) -> UserError:
    """The error for a loss or weights that are not finite; says which checkpoint is kept."""
    kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "there is no checkpoint yet"
    return UserError(
        f"{what} not finite at step {step}; lower --optimizer.lr (it is {lr:g}) or set --optimizer.clip_norm; {kept}"
    )
