"""What a run logs: its lines of metrics.jsonl, its progress bar, a line at each epoch's end."""

from __future__ import annotations

import time
from collections.abc import Callable

from tqdm import tqdm

from kd.run.config import seconds_of
from kd.track import Tracker
from kd.train.checkpoint import Progress
from kd.train.distiller import Distiller
from kd.train.meter import Meter
from kd.util.errors import say


class Recorder:
    """Logs a run's steps and epochs.

    Args:
        total: steps of the whole run.
        images_seen: from a number of steps to that of the images shown in them.
        progress: from where the run starts.
    """

    def __init__(
        self, distiller: Distiller, config, accelerator, run, total: int, images_seen: Callable, progress: Progress
    ):
        self._epochs, self._images_seen, self._max_seconds = config.epochs, images_seen, seconds_of(config.max_time)
        self.tracker = Tracker(accelerator, run, config, distiller.objective(), progress.metrics_bytes)
        self._terms, networks, lr = list(distiller.losses), list(distiller.learner.networks), config.optimizer.lr
        self.meter = Meter(self._terms, networks, accelerator, progress.sums, lr, progress.step)
        self._started = time.perf_counter() - progress.seconds
        hidden = None if accelerator.is_main_process else True
        self._bar = tqdm(total=total, initial=progress.step, unit="step", dynamic_ncols=True, disable=hidden)
        self._place = {}

    @property
    def seconds(self) -> float:
        """Training time, over all starts."""
        return time.perf_counter() - self._started

    @property
    def time_left(self) -> float:
        """Seconds until `max_time` is over."""
        return self._max_seconds - self.seconds

    def step(self, step: int, epoch: int) -> None:
        """Move to the place after `step` steps, in an epoch counted from 1."""
        self._bar.update()
        self._place = {"step": step, "epoch": epoch, "images_seen": self._images_seen(step)}

    def interval(self, lr: float, norm) -> None:
        """Log the means of the interval's terms; raises a UserError where one was not finite."""
        row = self.meter.flush(norm)
        self.tracker.log({**self._place, **row, "lr": lr})
        self._bar.set_description(f"epoch {self._place['epoch']}/{self._epochs}", refresh=False)
        terms = [f"{k.removeprefix('train/')} {v:.4g}" for k, v in row.items() if k.startswith("train/")]
        self._bar.set_postfix_str("  ".join([*terms, f"{row['images_per_second']:,.0f} images/s"]))

    def epoch(self, validation: dict[str, float]) -> None:
        """Log the means of the epoch's terms, its accuracy in training and its validation, and print all."""
        row = self.meter.end_epoch() | validation
        self.tracker.log({**self._place, **row})
        names = [name for name in self._terms if f"epoch/{name}" in row]
        terms = ", ".join(f"{name} {row[f'epoch/{name}']:.4f}" for name in names)
        accuracies = [(key.removesuffix("accuracy"), value) for key, value in row.items() if key.endswith("accuracy")]
        words = [(key.replace("epoch/", "train/").replace("/", " "), value) for key, value in accuracies]
        shown = "".join(f"  {word}{value:.2f} %" for word, value in words)
        where, speed = f"epoch {self._place['epoch']}/{self._epochs}", row["epoch/images_per_second"]
        line = f"{where}  loss {row['epoch/loss']:.4f} ({terms}){shown}  {speed:,.0f} images/s"
        say(line) if self._bar.disable else self._bar.write(line)

    def validation(self, step: int, epoch: int, found: dict[str, float]) -> None:
        """Log the validation of an epoch that was not trained to its end; nothing where there was none."""
        if found:
            self.tracker.log({"step": step, "epoch": epoch, "images_seen": self._images_seen(step), **found})

    def close(self) -> None:
        self._bar.close()
