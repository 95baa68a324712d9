"""What the loop measures of itself: terms on the device, read once a log interval; the first step that went wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.outputs import Outputs
from kd.util.errors import UserError
from kd.util.gathers import is_shared_out
from kd.util.machine import peak_memory_mb


@dataclass
class _Kept:
    """A step's terms as they lie on the device, with its images; how many were right, of those with a label."""

    terms: dict[str, Tensor]
    images: int
    step: int
    right: dict[str, Tensor]
    labelled: int


class Meter:
    """Means of the loss terms, and accuracy in training, which are read once a log interval; remembers the first step
    that was not finite.

    Args:
        names: of the terms.
        networks: whose accuracy is counted; the first one's is called `accuracy`, another's `NAME/accuracy`.
        sums: what `state` gave in the checkpoint that the run resumes from.
        lr: the learning rate, for errors.

    Attributes:
        saved_step: the step of the newest checkpoint, 0 where there is none.
    """

    def __init__(
        self, names: list[str], networks: Sequence[str], accelerator, sums: dict, lr: float, saved_step: int = 0
    ):
        self._accelerator, self._lr, self.saved_step = accelerator, lr, saved_step
        self._accuracies = {name: f"{name}/accuracy" if place else "accuracy" for place, name in enumerate(networks)}
        self.names = [*names, "loss", *self._accuracies.values()]
        self._kept: list[_Kept] = []
        self._bad, self._culprits = -1, []
        # by name the sum over images, and their number: of this process's interval, and of all processes' epoch
        self._sums = {name: [0.0, 0.0] for name in self.names} | (
            sums.get("interval", {}) if accelerator.is_main_process else {}
        )
        self._epoch = dict(sums.get("epoch", {}))
        self._epoch_images, self._epoch_start = 0.0, time.perf_counter()
        self._interval_start = self._epoch_start

    def add(
        self, terms: dict[str, Tensor], num_images: int, step: int, right: dict[str, Tensor], num_labelled: int
    ) -> None:
        """Keep a step's terms; nothing is computed or read yet, so that a step costs next to nothing.

        Args:
            right: by network how many of the `num_labelled` images it gives the class of their label.
        """
        terms = {name: term.detach() for name, term in terms.items()}
        self._kept.append(_Kept(terms, num_images, step, right, num_labelled))

    def _read(self) -> None:
        """Add what was kept to the sums, one step after another: where it is read must not change a bit of them."""
        if not self._kept:
            return
        both = [value for kept in self._kept for value in (*kept.terms.values(), *kept.right.values())]
        values = iter(torch.stack([value.float() for value in both]).tolist())
        for kept in self._kept:
            row = {name: next(values) for name in kept.terms}
            row["loss"] = sum(row.values())
            if self._bad < 0 and not math.isfinite(row["loss"]):
                self._bad = kept.step + 1
                bad = [name for name in kept.terms if not math.isfinite(row[name])]
                self._culprits = bad if len(bad) < len(kept.terms) else []
            right = {self._accuracies[name]: next(values) for name in kept.right}
            for name, value in row.items() if kept.images else ():
                self._count(name, value * kept.images, kept.images)
            for name, value in right.items() if kept.images else ():
                self._count(name, 100 * value, kept.labelled)
        self._kept.clear()

    def _count(self, name: str, value: float, images: int) -> None:
        total, count = self._sums[name]
        self._sums[name] = [total + value, count + images]

    def _summed(self) -> dict[str, list[float]]:
        """The open sums over all processes, and over how many images each is."""
        self._read()
        device = self._accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        mine = torch.tensor(list(self._sums.values()), dtype=dtype, device=device)
        return dict(zip(self._sums, self._accelerator.reduce(mine, "sum").tolist(), strict=True))

    def check(self) -> None:
        """Raise a UserError, on all processes, if any step since the start was not finite on any of them."""
        self._read()
        steps = self._accelerator.gather(torch.tensor([self._bad], device=self._accelerator.device)).tolist()
        if (first := min((step for step in steps if step >= 0), default=None)) is not None:
            where = [str(process) for process, step in enumerate(steps) if step == first]
            some = f" on process {', '.join(where)} of {len(steps)}" if len(where) < len(steps) else ""
            raise self.not_finite("the loss is", first, some, self._culprits)

    def state(self) -> dict:
        """The open sums over all processes, for the checkpoint."""
        return {"interval": self._summed(), "epoch": self._epoch}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in here, validation or a checkpoint, is no training: its time does not count for the speed."""
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self._interval_start += spent
        self._epoch_start += spent

    def flush(self, norm: Tensor) -> dict[str, float | None]:
        """The terms' means over the interval's images, over all processes, and the accuracy on those with a label, in
        percent; starts the next interval.

        With them the norm of the last step's gradient, None where fp16 has overflowed, and the memory held at most.
        """
        self.check()
        sums = self._summed()
        images = sums["loss"][1]
        for name, pair in sums.items():
            before = self._epoch.get(name, (0.0, 0.0))
            self._epoch[name] = [a + b for a, b in zip(before, pair, strict=True)]
        now = time.perf_counter()
        row = {f"train/{name}": total / count for name, (total, count) in sums.items() if count}
        norm = (norm.full_tensor() if is_shared_out(norm) else norm).item()
        row["gradient_norm"] = norm if math.isfinite(norm) else None
        row["images_per_second"] = images / (now - self._interval_start)
        row["peak_memory_mb"] = peak_memory_mb(self._accelerator.device)
        self._epoch_images += images
        self._interval_start = now
        self._sums = {name: [0.0, 0.0] for name in self.names}
        return row

    def end_epoch(self) -> dict[str, float]:
        """The terms' means and the accuracy over the epoch's images; the speed is that since the epoch's start or the
        last restart."""
        row = {f"epoch/{name}": total / count for name, (total, count) in self._epoch.items() if count}
        now = time.perf_counter()
        row["epoch/images_per_second"] = self._epoch_images / (now - self._epoch_start)
        self._epoch, self._epoch_images = {}, 0.0
        self._epoch_start = self._interval_start = now
        return row

    def not_finite(self, what: str, step: int, where: str = "", terms: Sequence[str] = ()) -> UserError:
        """The error for a loss or weights that are not finite; says which checkpoint is kept.

        Args:
            terms: those that are not finite where others are: then the weights were, and the formula is to blame.
        """
        kept = f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else "there is no checkpoint yet"
        remedy = f"lower --optimizer.lr (it is {self._lr:g}) or set --optimizer.clip_norm"
        if terms:
            remedy = f"only {', '.join(terms)} is: look for a logarithm, root or division of 0 in it"
        return UserError(f"{what} not finite at step {step}{where}; {remedy}; {kept}")


@torch.no_grad()
def count_right(outputs: Mapping[str, Outputs | None], labels: Tensor) -> dict[str, Tensor]:
    """How many images each network gives the class of their label, a scalar; an unknown label, -1, is no class.

    Networks without logits are left out, and all where images are mixed and have two labels.
    """
    right = {}
    for name, part in outputs.items() if labels.dim() == 1 else ():
        if part is not None and part.logits is not None:
            given = part.logits.argmax(1)
            right[name] = ((given if part.classes is None else part.classes[given]) == labels).sum()
    return right
